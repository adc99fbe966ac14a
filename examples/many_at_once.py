"""Many requests at once, and what each of them took."""

import asyncio

from vllm_unified import AsyncVllmUnified


async def main() -> None:
    async with AsyncVllmUnified(api_url="http://localhost:8000", timeout=120) as vllm:
        topics = ["dragons", "unicorns", "griffins", "phoenixes"]
        results = await asyncio.gather(
            *(vllm.generate(f"A haiku about {topic}:", max_tokens=30) for topic in topics)
        )
    for topic, result in zip(topics, results, strict=True):
        tokens, seconds = result.usage.completion_tokens, result.metadata.duration
        print(f"{topic}: {tokens} tokens in {seconds:.2f} s")
        print(result.text.strip())


asyncio.run(main())
