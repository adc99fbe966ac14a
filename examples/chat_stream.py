"""A conversation of two turns; each answer is printed as it comes."""

import asyncio

from vllm_unified import AsyncVllmUnified, VllmError


async def main() -> None:
    messages = [{"role": "system", "content": "Answer in one short sentence."}]
    async with AsyncVllmUnified(api_url="http://localhost:8000") as vllm:
        for question in ("What is the capital of France?", "And what is it famous for?"):
            messages.append({"role": "user", "content": question})
            print(f"> {question}")
            async with vllm.stream_chat(messages, max_tokens=60, temperature=0) as stream:
                async for text in stream.texts():
                    print(text, end="", flush=True)
            print()
            messages.append(stream.result.message)


try:
    asyncio.run(main())
except VllmError as error:
    raise SystemExit(str(error)) from None
