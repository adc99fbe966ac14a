"""Streams that are cut and go on elsewhere, against a model of vLLM that is never cut.

The model has what makes it hard: tokens that are pieces of characters, vLLM's incremental
detokenizer, text held back for stop strings, and chunks of several tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unified.fleet.continuation import (
    DROPPED,
    OBSTACLES,
    PASSED_ON,
    REPLACED,
    Continuation,
    obstacle,
)
from vllm_unified.fleet.stops import StopMatcher
from vllm_unified.results import StreamChunk, ToolCallDelta, Usage
from vllm_unified.wire.parameters import KNOWN_PARAMETERS

DRAGON, YOU = "🐉".encode(), "你".encode()
VOCABULARY = [
    b"a",
    b"b",
    b"ab",
    b" ",
    YOU,
    DRAGON,
    YOU[:1],
    YOU[1:],
    YOU[1:] + b"a",
    b"b" + DRAGON[:1],
    DRAGON[:2],
    DRAGON[1:3],
    DRAGON[2:],
    DRAGON[3:],
    b"",
]
SPECIAL = len(VOCABULARY) - 1
"""The end of an answer: without text in a stream, with it where /detokenize is asked."""
A, B, WHOLE_DRAGON = 0, 1, 5
DRAGON_START, DRAGON_END = 10, 12
PROMPT = (A, 3, A, 3)
MAX_MODEL_LEN = 40


def text_of(ids: Sequence[int]) -> str:
    """What streams make of tokens."""
    return b"".join(VOCABULARY[id_] for id_ in ids).decode("utf-8", "replace")


def detokenize(ids: Sequence[int]) -> str:
    """What ``/detokenize`` makes of tokens: it names the special ones."""
    pieces = (b"<s>" if id_ == SPECIAL else VOCABULARY[id_] for id_ in ids)
    return b"".join(pieces).decode("utf-8", "replace")


class DecodeStream:
    """``step_decode_stream`` of the tokenizers library, which vLLM streams with."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.ids = list(prompt)
        self.prefix = ""
        self.prefix_index = 0

    def step(self, token: int) -> str:
        if not self.prefix and self.ids:
            prefix = text_of(self.ids)
            if not prefix.endswith("\ufffd"):
                self.prefix, self.prefix_index = prefix, len(self.ids)
        self.ids.append(token)
        text = text_of(self.ids)
        if len(text.encode()) <= len(self.prefix.encode()) or text.endswith("\ufffd"):
            return ""
        new = text[len(self.prefix) :]
        index = len(self.ids) - self.prefix_index
        self.ids = self.ids[self.prefix_index :]
        self.prefix, self.prefix_index = text_of(self.ids), index
        return new


def steps(body: Mapping[str, Any], answer: Sequence[int], *, limit: int) -> Iterator[StreamChunk]:
    """A vLLM that would answer PROMPT with these tokens, token by token."""
    prompt = body["prompt"]
    assert list(prompt) == [*PROMPT, *answer][: len(prompt)], "a token was lost or repeated"
    stops, keeps = body.get("stop") or [], bool(body.get("include_stop_str_in_output"))
    held = 0 if keeps or not stops else max(map(len, stops)) - 1
    stream, output, sent = DecodeStream(prompt), "", 0
    for count, token in enumerate(answer[len(prompt) - len(PROMPT) :], 1):
        finish: str | None = None
        reason: str | int | None = None
        if token == SPECIAL or token in body.get("stop_token_ids", ()):
            finish = "stop"
            reason = None if token == SPECIAL else token
        elif count == limit:
            finish = "length"
        before = len(output)
        if finish != "stop" or keeps:
            output += stream.step(token)
        stop = naive_stop(output, stops, after=before)
        if stop is not None:
            end, matched = stop
            finish, reason = "stop", matched
            output = output[: end if keeps else end - len(matched)]
        shown = output[sent : len(output) if finish else max(sent, len(output) - held)]
        sent += len(shown)
        yield StreamChunk(text=shown, token_ids=(token,), finish_reason=finish, stop_reason=reason)
        if finish:
            return


def naive_stop(text: str, stops: Sequence[str], *, after: int = 0) -> tuple[int, str] | None:
    """The first end of a stop string behind ``after``, and the string."""
    for end in range(after + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end, stop
    return None


def merged(chunks: Sequence[StreamChunk]) -> StreamChunk:
    return StreamChunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(id_ for chunk in chunks for id_ in chunk.token_ids or ()),
        finish_reason=chunks[-1].finish_reason,
        stop_reason=chunks[-1].stop_reason,
    )


def in_chunks(whole: Sequence[StreamChunk], sizes: Sequence[int]) -> list[StreamChunk]:
    """Merged as vLLM merges what waits: by sizes, over and over."""
    chunks, rest, turn = [], list(whole), 0
    while rest:
        size = sizes[turn % len(sizes)]
        chunks.append(merged(rest[:size]))
        rest, turn = rest[size:], turn + 1
    return chunks


def budget(body: Mapping[str, Any], prompt: Sequence[int], *, is_chat: bool) -> int:
    default = MAX_MODEL_LEN if is_chat else 16
    return min(body.get("max_tokens") or default, MAX_MODEL_LEN - len(prompt))


def uninterrupted(body: dict[str, Any], answer: Sequence[int], *, is_chat: bool) -> StreamChunk:
    limit = budget(body, PROMPT, is_chat=is_chat)
    return merged(list(steps({**body, "prompt": PROMPT}, answer, limit=limit)))


def interrupted(
    body: dict[str, Any],
    answer: Sequence[int],
    *,
    is_chat: bool,
    sizes: Sequence[int],
    cuts: Sequence[int],
) -> tuple[StreamChunk, Continuation]:
    """What a caller gets of one server after the other, each dying after so many chunks."""
    continuation, shown = Continuation(body, is_chat=is_chat), list[StreamChunk]()
    request, remaining = {**body, "prompt": PROMPT}, list(cuts)
    limit = budget(body, PROMPT, is_chat=is_chat)
    while True:
        chunks = in_chunks(list(steps(request, answer, limit=limit)), sizes)
        continuation.begin(request["prompt"])
        for chunk in chunks[: remaining.pop(0) if remaining else None]:
            shown += filter(None, [continuation.feed(chunk)])
            if continuation.is_finished:
                return merged(shown), continuation
        if not continuation.has_begun:
            assert shown == []
            continuation = Continuation(body, is_chat=is_chat)
            continue
        settle(continuation)
        assert continuation.obstacle(max_model_len=MAX_MODEL_LEN) is None
        request = continuation.request(max_model_len=MAX_MODEL_LEN)
        limit = budget(request, request["prompt"], is_chat=False)


def settle(continuation: Continuation) -> int:
    """Answer all questions; how many there were."""
    asked = 0
    while (ids := continuation.question()) is not None:
        continuation.answer(detokenize(ids))
        asked += 1
    return asked


tokens = st.integers(0, SPECIAL - 1)
answers = st.lists(tokens, max_size=30).map(lambda ids: [*ids, SPECIAL])
chunk_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)
cut_places = st.lists(st.integers(0, 12), max_size=5)
stop_strings = st.lists(st.text("ab 你🐉", min_size=1, max_size=5), min_size=1, max_size=3)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 36),
        "stop_token_ids": st.lists(tokens, max_size=2),
    },
)


@settings(max_examples=200)
@given(answers, bodies, st.booleans(), chunk_sizes, cut_places)
def test_a_stream_that_is_cut_anywhere_gives_the_text_and_tokens_of_one_that_is_not(
    answer: list[int],
    body: dict[str, Any],
    is_chat: bool,
    sizes: list[int],
    cuts: list[int],
) -> None:
    joined, continuation = interrupted(body, answer, is_chat=is_chat, sizes=sizes, cuts=cuts)

    whole = uninterrupted(body, answer, is_chat=is_chat)
    assert joined == whole
    count = len(whole.token_ids or ())
    assert continuation.usage == Usage(
        prompt_tokens=len(PROMPT), completion_tokens=count, total_tokens=len(PROMPT) + count
    )


@settings(max_examples=200)
@given(answers, bodies, st.booleans(), chunk_sizes, cut_places, stop_strings, st.booleans())
def test_a_stop_string_ends_the_text_wherever_the_cuts_are(
    answer: list[int],
    body: dict[str, Any],
    is_chat: bool,
    sizes: list[int],
    cuts: list[int],
    stops: list[str],
    keeps: bool,
) -> None:
    body |= {"stop": stops, "include_stop_str_in_output": keeps}

    joined, _ = interrupted(body, answer, is_chat=is_chat, sizes=sizes, cuts=cuts)

    whole = uninterrupted(body, answer, is_chat=is_chat)
    assert joined.text == whole.text
    assert (joined.finish_reason, joined.stop_reason) == (whole.finish_reason, whole.stop_reason)
    whole_ids = whole.token_ids or ()
    assert (joined.token_ids or ())[: len(whole_ids)] == whole_ids


@given(st.text("ab", max_size=30), stop_strings, st.booleans(), st.lists(st.integers(0, 30)))
def test_pieces_of_a_text_stop_where_the_whole_does(
    text: str, stops: list[str], keeps: bool, places: list[int]
) -> None:
    matcher = StopMatcher(stops, keeps_match=keeps, before="")
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    shown, stop = "", None
    for start, end in itertools.pairwise(edges):
        new, stop = matcher.feed(text[start:end])
        shown += new
        if stop is not None:
            break
    else:
        shown += matcher.finish()

    expected = naive_stop(text, stops)
    if expected is None:
        assert (shown, stop) == (text, None)
    else:
        end, first = expected
        assert (shown, stop) == (text[: end if keeps else end - len(first)], first)


@pytest.mark.parametrize(
    ("stops", "first", "text"),
    [
        (["abcd", "bc"], "bc", "xa"),
        (["bc", "abc"], "bc", "xa"),
        (["abc", "bc"], "abc", "x"),
        (["d", "c"], "c", "xab"),
    ],
)
def test_the_stop_string_that_is_complete_first_wins_and_then_the_first_in_the_list(
    stops: list[str], first: str, text: str
) -> None:
    assert StopMatcher(stops, keeps_match=False, before="").feed("xabcd") == (text, first)


def fed(
    *chunks: tuple[str, Sequence[int]], is_chat: bool = False, **body: Any
) -> tuple[Continuation, list[StreamChunk | None]]:
    """A continuation that has seen these texts and tokens, and what it showed."""
    continuation = Continuation(body, is_chat=is_chat)
    continuation.begin(PROMPT)
    return continuation, [
        continuation.feed(StreamChunk(text=text, token_ids=tuple(ids))) for text, ids in chunks
    ]


def requested(continuation: Continuation, max_model_len: int | None = None) -> dict[str, Any]:
    settle(continuation)
    return continuation.request(max_model_len=max_model_len)


def ids_of(chunk: StreamChunk | None) -> tuple[int, ...] | None:
    return None if chunk is None else chunk.token_ids


def test_tokens_of_an_incomplete_character_are_held_back_and_given_up() -> None:
    continuation, shown = fed(("a", [A]), ("", [DRAGON_START]))

    assert [ids_of(chunk) for chunk in shown] == [(A,), None]
    assert requested(continuation)["prompt"] == [*PROMPT, A]


def test_held_back_tokens_are_shown_with_the_text_they_belong_to() -> None:
    _, shown = fed(("", [DRAGON_START]), ("🐉", [DRAGON_END]))

    assert [ids_of(chunk) for chunk in shown] == [None, (DRAGON_START, DRAGON_END)]


def test_of_a_chunk_of_several_tokens_only_the_first_is_certain_at_once() -> None:
    continuation, shown = fed(("ab", [A, B, DRAGON_START]), ("🐉", [DRAGON_END, DRAGON_START]))

    assert [ids_of(chunk) for chunk in shown] == [(A,), (B, DRAGON_START, DRAGON_END)]
    assert requested(continuation)["prompt"] == [*PROMPT, A, B, DRAGON_START, DRAGON_END]


def test_a_chunk_that_shows_all_it_has_comes_through_as_it_is() -> None:
    continuation = Continuation({}, is_chat=False)
    chunk = StreamChunk(text="a", token_ids=(A,), data=b"{}")

    assert continuation.feed(chunk) is chunk


def test_a_completion_of_single_tokens_asks_nothing() -> None:
    continuation, _ = fed(("a", [A]), ("b", [B]))

    assert settle(continuation) == 0
    assert continuation.obstacle(max_model_len=None) is None


def test_a_chat_asks_once_because_a_parser_may_stand_before_its_text() -> None:
    continuation, _ = fed(("a", [A]), ("b", [B]), is_chat=True, max_tokens=9)

    assert continuation.question() == [A, B]
    assert settle(continuation) == 1
    assert continuation.obstacle(max_model_len=None) is None


def test_after_its_first_cut_a_chat_is_a_completion_and_asks_nothing() -> None:
    continuation, _ = fed(("a", [A]), is_chat=True, max_tokens=9)
    requested(continuation)
    continuation.feed(StreamChunk(text="b", token_ids=(B,)))

    assert continuation.question() is None


def test_after_its_first_cut_no_text_is_held_back_by_a_server() -> None:
    continuation, _ = fed(("a", [A, B, B]), stop=["xyz"])
    requested(continuation)
    continuation.feed(StreamChunk(text="ab", token_ids=(A, B)))

    assert requested(continuation)["prompt"] == [*PROMPT, A, B, B, A, B]


def test_text_held_back_over_the_cut_comes_with_the_finish_reason() -> None:
    continuation, _ = fed(("a", [A, B, B]), stop=["xyz"])
    requested(continuation)

    last = continuation.feed(StreamChunk(text="", token_ids=(SPECIAL,), finish_reason="stop"))

    assert last is not None
    assert (last.text, last.token_ids) == ("bb", (B, B, SPECIAL))


def test_a_stop_string_across_the_cut_ends_the_answer_before_the_server_does() -> None:
    continuation, _ = fed(("a", [A, A, B, B]), stop=["bbab"])
    requested(continuation)

    last = continuation.feed(StreamChunk(text="a", token_ids=(A,)))
    assert last is not None
    assert not continuation.is_finished
    last = continuation.feed(StreamChunk(text="b ", token_ids=(B,)))

    assert last == StreamChunk(text="", token_ids=(B,), finish_reason="stop", stop_reason="bbab")
    assert continuation.is_finished


def test_an_incomplete_character_does_not_pass_for_one_that_was_left_out() -> None:
    """Both texts are of the length that was expected; only one ends where the stream did."""
    continuation, _ = fed(("   ", [3, 3, 3, 3, 3, DRAGON_START]), stop=["abc"])
    continuation.answer("    \ufffd")
    continuation.answer("    ")

    assert continuation.request(max_model_len=None)["prompt"] == [*PROMPT, 3, 3, 3, 3, 3]


def test_a_chunk_asks_once_for_each_token_that_it_may_end_with() -> None:
    continuation, _ = fed(("a", [A, DRAGON_START, 11]))

    assert settle(continuation) == 3
    assert requested(continuation)["prompt"] == [*PROMPT, A]


def test_a_space_that_detokenize_leaves_out_at_the_beginning_is_no_difference() -> None:
    continuation, _ = fed((" a", [3]), is_chat=True, max_tokens=9)
    continuation.answer("a")

    assert continuation.obstacle(max_model_len=None) is None


@pytest.mark.parametrize("text", ["b", "a ", "", "aa", "\ufffd", "  a"])
def test_a_server_that_altered_its_text_is_not_continued(text: str) -> None:
    continuation, _ = fed((" a", [A]), is_chat=True, max_tokens=9)
    continuation.answer(text)

    assert continuation.obstacle(max_model_len=None) == "its tokens are not the text that came"


def test_text_held_back_has_to_be_all_there() -> None:
    continuation, _ = fed((" ", [A]), stop=["four"])
    continuation.answer("a")

    assert continuation.obstacle(max_model_len=None) == "its tokens are not the text that came"


def test_what_is_not_settled_is_not_continued() -> None:
    continuation, _ = fed(("ab", [A, B]))

    with pytest.raises(ValueError, match="not settled"):
        continuation.request(max_model_len=None)


def test_a_request_may_be_asked_for_again() -> None:
    continuation, _ = fed(("a", [A]), ("", [DRAGON_START]), max_tokens=9, seed=1)
    first = requested(continuation)
    continuation.feed(StreamChunk(text="", token_ids=(DRAGON_START,)))

    assert requested(continuation) == first


@pytest.mark.parametrize(
    ("is_chat", "body", "max_tokens"),
    [
        (False, {"max_tokens": 3}, 1),
        (False, {"max_tokens": 10}, 8),
        (False, {}, 14),
        (True, {"max_tokens": 10}, 8),
        (True, {"max_completion_tokens": 20, "max_tokens": 10}, 18),
        (True, {}, 100 - len(PROMPT) - 2),
    ],
)
def test_the_rest_has_the_rest_of_the_budget(
    is_chat: bool, body: dict[str, Any], max_tokens: int
) -> None:
    chunks = [("a", [A]), ("b", [B]), ("", [DRAGON_START])]
    continuation, _ = fed(*chunks, is_chat=is_chat, **body)

    assert requested(continuation, max_model_len=100)["max_tokens"] == max_tokens


def test_a_chat_without_a_budget_needs_the_length_of_the_context() -> None:
    continuation, _ = fed(("a", [A]), is_chat=True)
    settle(continuation)

    assert "max_model_len is not known" in (continuation.obstacle(max_model_len=None) or "")
    assert continuation.obstacle(max_model_len=100) is None


@pytest.mark.parametrize(("min_tokens", "rest"), [(5, 3), (3, 1), (2, None), (1, None)])
def test_min_tokens_is_reduced_by_what_there_is(min_tokens: int, rest: int | None) -> None:
    continuation, _ = fed(("a", [A]), ("b", [B]), min_tokens=min_tokens)

    assert requested(continuation).get("min_tokens") == rest


@pytest.mark.parametrize(
    ("seed", "moved"), [(7, 9), (-1, -1), (2**63 - 1, -(2**63) + 1), (-(2**63), -(2**63) + 2)]
)
def test_a_seed_moves_on_and_stays_one(seed: int, moved: int) -> None:
    continuation, _ = fed(("a", [A]), ("b", [B]), seed=seed)

    assert requested(continuation)["seed"] == moved


def test_a_chat_goes_on_as_a_completion_with_its_sampling() -> None:
    continuation, _ = fed(
        ("a", [A]),
        is_chat=True,
        model="m",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        max_tokens=9,
        temperature=0.5,
        repetition_penalty=1.1,
        stop="x",
        n=1,
        truncate_prompt_tokens=2,
        add_special_tokens=True,
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": False},
        logprobs=False,
        cache_salt="s",
        stream_options={"include_usage": True},
    )

    assert requested(continuation) == {
        "model": "m",
        "prompt": [*PROMPT, A],
        "max_tokens": 8,
        "temperature": 0.5,
        "repetition_penalty": 1.1,
        "cache_salt": "s",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


def test_an_answer_whose_budget_is_spent_is_complete() -> None:
    continuation, _ = fed(("a", [A]), ("b", [B]), max_tokens=2)

    with pytest.raises(ValueError, match="all its tokens"):
        continuation.request(max_model_len=None)
    last = continuation.ending(max_model_len=None)

    assert last == StreamChunk(text="", finish_reason="length")
    assert continuation.is_finished


def test_the_end_brings_the_text_and_the_tokens_that_were_held_back() -> None:
    ids = [A, B, DRAGON_START, DRAGON_END, A, B]
    continuation, shown = fed(("a", ids), stop=["five!"], max_tokens=6)
    assert [ids_of(chunk) for chunk in shown] == [(A,)]
    settle(continuation)

    last = continuation.ending(max_model_len=None)

    assert last == StreamChunk(text="b🐉ab", token_ids=tuple(ids[1:]), finish_reason="length")


def test_an_answer_with_tokens_left_has_no_end() -> None:
    continuation, _ = fed(("a", [A]), max_tokens=2)

    assert continuation.ending(max_model_len=None) is None
    assert not continuation.is_finished


def test_before_any_text_the_request_itself_is_sent_again() -> None:
    continuation, shown = fed(("", [DRAGON_START]))

    assert shown == [None]
    assert not continuation.has_begun
    assert "sent again" in (continuation.obstacle(max_model_len=9) or "")


def test_a_complete_answer_is_not_continued() -> None:
    continuation, _ = fed(("a", [A]))
    continuation.feed(StreamChunk(text="", token_ids=(SPECIAL,), finish_reason="stop"))

    assert continuation.obstacle(max_model_len=9) == "it is complete"


def test_without_the_tokens_of_the_prompt_a_stream_is_not_continued() -> None:
    continuation = Continuation({}, is_chat=False)
    continuation.feed(StreamChunk(text="a", token_ids=(A,)))

    assert "tokens of its prompt" in (continuation.obstacle(max_model_len=9) or "")


def test_the_prompt_is_the_first_server_s() -> None:
    continuation, _ = fed(("a", [A]))
    continuation.begin([*PROMPT, A])

    assert requested(continuation)["prompt"] == [*PROMPT, A]


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (StreamChunk(text="", reasoning="Hm", token_ids=(B,)), "reasoning"),
        (StreamChunk(text="", tool_calls=(ToolCallDelta(index=0),), token_ids=(B,)), "tool calls"),
        (StreamChunk(text="b", index=1, token_ids=(B,)), "choices"),
        (StreamChunk(text="b"), "token ids"),
    ],
)
def test_a_stream_that_cannot_go_on_says_why_and_holds_nothing_back(
    chunk: StreamChunk, reason: str
) -> None:
    continuation, _ = fed(("a", [A]), ("", [DRAGON_START]), is_chat=True)

    shown = continuation.feed(chunk)

    assert reason in (continuation.obstacle(max_model_len=9) or "")
    assert continuation.question() is None
    assert ids_of(shown) == (DRAGON_START, *(chunk.token_ids or ()))


def test_special_tokens_inside_a_chunk_cannot_be_told_from_its_text() -> None:
    continuation, _ = fed(("ab", [A, SPECIAL, B]))
    settle(continuation)

    assert continuation.obstacle(max_model_len=9) == "its tokens are not the text that came"


def test_a_request_that_is_an_obstacle_holds_nothing_back() -> None:
    continuation, shown = fed(("", [DRAGON_START]), n=2)

    assert [ids_of(chunk) for chunk in shown] == [(DRAGON_START,)]
    assert continuation.obstacle(max_model_len=9) == "n is 2"


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"n": 2}, "n is 2"),
        ({"best_of": 3}, "best_of is 3"),
        ({"prompt": ["a", "b"]}, "there are 2 prompts"),
        ({"prompt": [[1], [2], [3]]}, "there are 3 prompts"),
        ({"use_beam_search": True}, "beam search"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt_embeds": "AAAA"}, "embeddings"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured outputs"),
        ({"guided_json": {}, "guided_regex": "a"}, "structured outputs"),
        ({"guided_regex": "a"}, "structured outputs"),
        ({"guided_choice": ["a"]}, "structured outputs"),
        ({"guided_grammar": "a"}, "structured outputs"),
        ({"guided_decoding_backend": "x"}, "structured outputs"),
        ({"guided_whitespace_pattern": "x"}, "structured outputs"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
        ({"ec_transfer_params": {"x": 1}}, "ec_transfer_params"),
        ({"vllm_xargs": {"x": 1}}, "vllm_xargs"),
        ({"stream_options": {"continuous_usage_stats": True}}, "continuous_usage_stats"),
        (
            {"skip_special_tokens": False, "spaces_between_special_tokens": False},
            "spaces_between_special_tokens",
        ),
        ({"stop": "x", "min_tokens": 2}, "min_tokens"),
        ({"stop": ["x"], "return_token_ids": True}, "completes a stop string"),
        ({"new_in_vllm": 1}, "new_in_vllm"),
    ],
)
def test_obstacles_of_completions(body: dict[str, Any], reason: str) -> None:
    assert reason in (obstacle(body, is_chat=False) or "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"tools": [{}]}, "tools are in use"),
        ({"tools": [{}], "tool_choice": None}, "tools are in use"),
        ({"tools": [{}], "tool_choice": "auto"}, "tools are in use"),
        ({"messages": IMAGE}, "image_url"),
        ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, "without a type"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_obstacles_of_chats(body: dict[str, Any], reason: str) -> None:
    assert reason in (obstacle(body, is_chat=True) or "")


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        {},
        dict.fromkeys(KNOWN_PARAMETERS),
        {"n": 1, "best_of": 1, "echo": False, "use_beam_search": False, "suffix": ""},
        {"prompt": "text"},
        {"prompt": [1, 2, 3]},
        {"prompt": ["one"]},
        {"prompt": [[1, 2]]},
        {"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.2},
        {"tools": [{}], "tool_choice": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"thinking_token_budget": -1},
        {"top_logprobs": 0},
        {"bad_words": [], "logprob_token_ids": []},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": ["Hi", {"type": "text", "text": "you"}]}]},
        {"min_tokens": 3, "return_token_ids": True},
        {"min_p": 0.1, "top_k": 3, "seed": 5, "temperature": 1, "logit_bias": {"1": 2}},
        {"stop": ["x"], "include_stop_str_in_output": True},
        {"skip_special_tokens": False},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_what_is_no_obstacle(body: dict[str, Any], is_chat: bool) -> None:
    assert obstacle(body, is_chat=is_chat) is None


def test_a_chat_without_logprobs_may_say_so() -> None:
    assert obstacle({"logprobs": False}, is_chat=True) is None


def test_every_field_of_both_protocols_is_decided() -> None:
    of_the_protocols_only = {"return_token_offsets", "mm_payload", "return_mm_kwargs"}
    decided = PASSED_ON | REPLACED | DROPPED | OBSTACLES.keys()

    assert decided == KNOWN_PARAMETERS | of_the_protocols_only


def test_every_field_is_decided_once() -> None:
    """A penalty of 0 is no obstacle, and sent so that it overrides the server's default."""
    penalties = {"presence_penalty", "frequency_penalty"}

    assert PASSED_ON & OBSTACLES.keys() == penalties
    assert PASSED_ON.isdisjoint(REPLACED | DROPPED)
    assert (REPLACED | DROPPED).isdisjoint(OBSTACLES)
    assert REPLACED.isdisjoint(DROPPED)
