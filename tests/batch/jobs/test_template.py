"""Prompts out of columns."""

from __future__ import annotations

import pytest

from vllm_unified.batch.jobs.question import Asking, ask_for
from vllm_unified.batch.jobs.template import Template
from vllm_unified.errors import BadRequestError, ConfigurationError


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {question}\nA:", "Q: Why?\nA:"),
        ("{a b}{question}", "xWhy?"),
        ("{{question}} {n}", "{question} 3"),
        ("{list}", '["é",null]'),
        ("none", "none"),
    ],
)
def test_columns_stand_in_the_text(template: str, text: str) -> None:
    fields = {"question": "Why?", "n": 3, "list": ["é", None], "a b": "x"}
    assert Template(template).fill(fields) == text


@pytest.mark.parametrize("template", ["{", "}", "{}", "a {b", "{a{b}}"])
def test_a_brace_that_means_nothing_is_refused(template: str) -> None:
    with pytest.raises(ConfigurationError, match="character"):
        Template(template)


def test_it_knows_its_columns() -> None:
    assert Template("{b} {a} {{c}} {b}").columns == ("b", "a")


def test_a_column_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match="'qestion'") as raised:
        ask_for(Asking(prompt="{qestion} {id}"), ["id", "question"], openai=False)
    assert "id, question" in str(raised.value)


@pytest.mark.parametrize("fields", [{"id": 1}, {"id": 1, "question": None}])
def test_a_row_without_it_fails_alone(fields: dict[str, object]) -> None:
    ask = ask_for(Asking(prompt="{question}"), ["id", "question"], openai=False)
    with pytest.raises(BadRequestError, match="'question'"):
        ask(fields)


USER = {"role": "user", "content": "Hi"}
ROW = {
    "prompt": "Hi",
    "who": "Bob",
    "talk": [USER],
    "text": '[{"role": "user", "content": "Hi"}]',
    "own": {"max_tokens": 3, "temperature": 0.5},
}


@pytest.mark.parametrize(
    ("asking", "item"),
    [
        (Asking(), {"prompt": "Hi"}),
        (Asking(prompt="{prompt}!"), {"prompt": "Hi!"}),
        (Asking(chat=True), {"messages": [USER]}),
        (
            Asking(system="You are {who}."),
            {"messages": [{"role": "system", "content": "You are Bob."}, USER]},
        ),
        (Asking(messages="talk"), {"messages": [USER]}),
        (Asking(messages="text"), {"messages": [USER]}),
        (Asking(messages="prompt"), {"messages": [USER]}),
        (
            Asking(messages="talk", system="S"),
            {"messages": [{"role": "system", "content": "S"}, USER]},
        ),
        (
            Asking(params_column="own"),
            {"prompt": "Hi", "max_tokens": 3, "temperature": 0.5},
        ),
    ],
)
def test_what_a_row_asks(asking: Asking, item: dict[str, object]) -> None:
    assert ask_for(asking, list(ROW), openai=False)(ROW) == item


def test_a_column_of_messages_is_asked_by_itself() -> None:
    assert ask_for(Asking(), ["messages", "prompt"], openai=False)({"messages": "Hi"}) == {
        "messages": [USER]
    }


@pytest.mark.parametrize(
    ("asking", "columns"),
    [
        (Asking(), ["question"]),
        (Asking(prompt="a", messages="talk"), ["talk"]),
        (Asking(messages="nope"), ["talk"]),
        (Asking(params_column="nope"), ["prompt"]),
        (Asking(system="{nope}"), ["prompt"]),
    ],
)
def test_what_cannot_be_asked_is_told_before_anything_is_sent(
    asking: Asking, columns: list[str]
) -> None:
    with pytest.raises(ConfigurationError):
        ask_for(asking, columns, openai=False)


@pytest.mark.parametrize("own", [{"prompt": "other"}, {"model": "other"}, [1], "{"])
def test_own_parameters_are_no_way_around_the_question(own: object) -> None:
    ask = ask_for(Asking(params_column="own"), list(ROW), openai=False)
    with pytest.raises(BadRequestError, match="'own'"):
        ask({**ROW, "own": own})


def test_a_row_with_a_system_message_of_its_own() -> None:
    ask = ask_for(Asking(messages="talk", system="S"), ["talk"], openai=False)
    with pytest.raises(BadRequestError, match="system message of its own"):
        ask({"talk": [{"role": "system", "content": "T"}, USER]})
