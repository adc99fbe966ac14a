"""Structured output: facts out of a text, typed."""

import msgspec

from vllm_unified import OutputValidationError, VllmUnified


class Person(msgspec.Struct):
    name: str
    born: int


TEXT = "Ada Lovelace, born in 1815, wrote the first published program."

with VllmUnified(api_url="http://localhost:8000", timeout=120) as vllm:
    try:
        answer = vllm.chat(
            f"Who is this about, and when was that person born? {TEXT}",
            response_model=Person,
            max_tokens=60,
            temperature=0,
        )
        print(answer.parsed)
    except OutputValidationError as error:
        print(f"{error}: {error.text!r}")
