"""A library's function that gets its answers from whatever the user has registered.

Here a vLLM server, with a function to fall back on while nobody is there.
"""

import asyncio

from vllm_unified import AsyncVllmUnified
from vllm_unified.hardware import HardwareAbstractionLayer


async def summarize(hal: HardwareAbstractionLayer, text: str) -> str:
    """What a library does; it knows nothing of servers."""
    question = f"Summarize in one sentence: {text}"
    result = await hal.run_inference("chat", {"input": question, "max_tokens": 40})
    print(f"[{result.backend}, {len(result.attempts)} attempt(s)]")
    return result.text


async def first_sentence(request: dict[str, object]) -> str:
    """The backend of last resort."""
    text = str(request["input"]).partition(": ")[2]
    return text.partition(".")[0] + "."


async def main() -> None:
    text = "Dragons are large. They breathe fire. They like gold."
    async with (
        AsyncVllmUnified(api_url="http://localhost:8000") as vllm,
        AsyncVllmUnified(api_url="http://127.0.0.1:9", max_retries=0) as nobody,
        HardwareAbstractionLayer() as hal,
    ):
        hal.register_backend("chat", first_sentence)
        hal.register_backend("chat", nobody, priority=5, name="nobody")
        print(await summarize(hal, text))

        hal.register_backend("chat", vllm, priority=10)
        print(await summarize(hal, text))
        print(await hal.select("chat", "Hello"))


if __name__ == "__main__":
    asyncio.run(main())
