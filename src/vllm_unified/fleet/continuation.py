"""A stream that goes on at another server where the first one broke off. Pure.

With ``return_token_ids`` a stream names its prompt's tokens and its own. The two together are a
prompt for ``/v1/completions`` of any server of the same model, and what that generates is the rest.
It must not end inside a character, or vLLM streams the whole prompt back as text, so the last
tokens may have to be given up and generated again; until it is certain that they will not be, they
are not shown.

What is exact: every token is sampled from the distribution that an uninterrupted stream would have
sampled it from; none is lost and none is shown twice; text, stop strings and budgets are those of
one answer. What is not the same: random numbers. With a temperature the rest is an equally valid
sample, not the one that the seed would have given.

What cannot be seen here are the defaults of a server (``generation_config``). They hold on the next
server as well if it is started alike. A default ``max_tokens`` is the exception: it would have
ended the answer of a request without one, and does not end the rest of it.

Every claim about vLLM is from version 0.32: ``v1/engine/detokenizer.py``,
``v1/engine/output_processor.py``, ``v1/core/sched/utils.py`` and the ``protocol.py`` of both
endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from vllm_unified.fleet.stops import StopMatcher
from vllm_unified.results import StreamChunk, Usage
from vllm_unified.wire.chunks import says_something

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_COMPLETIONS_MAX_TOKENS = 16  # of a completion that does not say; vLLM's default
_SEEDS = 2**63  # a seed is a signed number of 64 bits

PASSED_ON = frozenset(
    """
    model user temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty
    watermarking logit_bias allowed_token_ids stop_token_ids ignore_eos include_stop_str_in_output
    skip_special_tokens spaces_between_special_tokens stream_options stream_interval
    priority cache_salt session_id
    """.split()
)
"""Fields that the rest is asked for with. ``repetition_penalty`` is among them because it counts
the tokens of prompt and answer alike."""

REPLACED = frozenset(
    """
    prompt messages max_tokens max_completion_tokens min_tokens seed stop stream return_token_ids
    """.split()
)
"""Fields that the rest has values of its own for. ``stop`` is left out, and watched for here:
the next server would neither know the text before its own, nor deliver it without delay."""

DROPPED = frozenset(
    """
    add_generation_prompt continue_final_message chat_template chat_template_kwargs documents
    reasoning_effort add_special_tokens truncate_prompt_tokens truncation_side
    media_io_kwargs mm_processor_kwargs
    tool_choice parallel_tool_calls tools include_reasoning return_prompt_text
    length_penalty return_tokens_as_token_ids routed_experts_prompt_start return_token_offsets
    mm_payload return_mm_kwargs
    request_id metadata store service_tier input
    """.split()
)
"""Fields that have done their work, and by line: those that made the prompt what it is (its tokens
are known, and truncated already); those of media, which are an obstacle themselves; those of a
chat's form; those that change nothing in a stream without log probabilities or beam search; and
those that vLLM ignores, or that name the first request."""

OBSTACLES: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "n": ("n is {}", (1,)),
    "best_of": ("best_of is {}", (1,)),
    "use_beam_search": ("beam search is asked for", (False,)),
    "echo": ("echo is asked for", (False,)),
    "suffix": ("a suffix is given", ("",)),
    "prompt_embeds": ("the prompt is embeddings, not tokens", ()),
    "logprobs": ("logprobs are asked for", ()),
    "top_logprobs": ("top_logprobs are asked for", (0,)),
    "prompt_logprobs": ("prompt_logprobs are asked for", ()),
    "logprob_token_ids": ("logprob_token_ids are given", ([],)),
    "presence_penalty": ("presence_penalty counts the tokens of one answer only", (0,)),
    "frequency_penalty": ("frequency_penalty counts the tokens of one answer only", (0,)),
    "bad_words": ("bad_words are looked for in the tokens of one answer only", ([],)),
    "repetition_detection": ("repetition_detection sees one answer only", ()),
    "thinking_token_budget": ("thinking_token_budget counts in one answer only", (-1,)),
    "response_format": ("response_format is {}", ({"type": "text"},)),
    **dict.fromkeys(
        "structured_outputs guided_json guided_regex guided_choice guided_grammar "
        "guided_decoding_backend guided_whitespace_pattern".split(),
        ("structured outputs begin with the answer", ({},)),
    ),
    "kv_transfer_params": ("kv_transfer_params are for one request only", ({},)),
    "ec_transfer_params": ("ec_transfer_params are for one request only", ({},)),
    "vllm_xargs": ("vllm_xargs are for extensions, whose state is unknown", ({},)),
}
"""Fields with which a stream cannot be continued: why, and the values with which it can."""

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})


def obstacle(body: Mapping[str, Any], *, is_chat: bool) -> str | None:
    """Why a stream of this request could not be continued exactly; ``None`` if it could.

    A field that nobody here knows is an obstacle: what vLLM ignores today it may know tomorrow, and
    a gateway or a plugin today.

    Args:
        body: What the caller asks for, before ``return_token_ids`` is added for our own sake.
    """
    for name, value in body.items():
        reason = None if value is None else _field_obstacle(name, value, is_chat=is_chat)
        if reason is not None:
            return reason
    return _tools_obstacle(body) or _spacing_obstacle(body) or _stop_obstacle(body)


def _field_obstacle(name: str, value: Any, *, is_chat: bool) -> str | None:
    if name in OBSTACLES:
        reason, harmless = OBSTACLES[name]
        # In a completion, logprobs is a number, and 0 asks for the token's own.
        if value in harmless or (name == "logprobs" and is_chat and not value):
            return None
        return reason.format(value)
    if name == "prompt":
        return _prompt_obstacle(value)
    if name == "messages":
        return _messages_obstacle(value)
    if name == "stream_options":
        return _stream_options_obstacle(value)
    if name not in PASSED_ON | REPLACED | DROPPED:
        return f"what {name} does is not known"
    return None


def _prompt_obstacle(prompt: Any) -> str | None:
    if isinstance(prompt, str) or len(prompt) == 1 or isinstance(prompt[0], int):
        return None
    return f"there are {len(prompt)} prompts"


def _messages_obstacle(messages: Sequence[Mapping[str, Any]]) -> str | None:
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            kind = "text" if isinstance(part, str) else part.get("type", "part without a type")
            if kind not in _TEXT_PARTS:
                return f"a message has {kind}"
    return None


def _stream_options_obstacle(options: Mapping[str, Any]) -> str | None:
    if options.get("continuous_usage_stats"):
        return "continuous_usage_stats count one answer only"
    return None


def _tools_obstacle(body: Mapping[str, Any]) -> str | None:
    # tool_choice null is "auto" where there are tools.
    return "tools are in use" if body.get("tools") and body.get("tool_choice") != "none" else None


def _spacing_obstacle(body: Mapping[str, Any]) -> str | None:
    joins = body.get("spaces_between_special_tokens") is False
    if joins and body.get("skip_special_tokens") is False:
        return "spaces_between_special_tokens depends on the token before"
    return None


def _stop_obstacle(body: Mapping[str, Any]) -> str | None:
    if not _stop_strings(body):
        return None
    if body.get("min_tokens"):
        return "min_tokens decides from which token on stop strings count"
    if body.get("return_token_ids"):
        return "the token that completes a stop string is not known"
    return None


def _stop_strings(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


class Continuation:
    """What one stream has brought, over all servers, and the request for the rest of it.

    ::

        continuation = Continuation(body, is_chat=True)
        continuation.begin(prompt_token_ids)
        shown = continuation.feed(chunk)                    # for every chunk

        # The server is gone; `continuation.has_begun`, or the request itself is sent again.
        while (token_ids := continuation.question()) is not None:
            continuation.answer(text_of(token_ids))         # /detokenize of any server
        if continuation.obstacle(max_model_len=limit) is None:
            last = continuation.ending(max_model_len=limit)
            body = continuation.request(max_model_len=limit)  # unless there is a last chunk

    Then the chunks of ``/v1/completions`` are fed, also those for a chat, as often as need be.
    """

    def __init__(self, body: Mapping[str, Any], *, is_chat: bool) -> None:
        """``body`` is what the caller asked for, as in :func:`obstacle`."""
        self._body = body
        self._is_chat = is_chat
        self._stops = _stop_strings(body)
        self._keeps_match = bool(body.get("include_stop_str_in_output"))
        self._matcher: StopMatcher | None = None
        self._trouble = obstacle(body, is_chat=is_chat)
        self._is_finished = False
        self._prompt: list[int] | None = None
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._shown = 0
        # The text so far is that of the first _low to _high tokens; which, only /detokenize knows.
        self._low = self._high = 0
        # Characters that the server holds back for stop strings, and whether it may alter its text:
        # in a chat, a parser for reasoning or tools stands between tokens and text.
        self._lag = 0 if self._keeps_match or not self._stops else max(map(len, self._stops)) - 1
        self._is_raw = not is_chat and not self._lag
        self._is_settled = False

    @property
    def has_begun(self) -> bool:
        """Whether text has come. Until then the request itself is sent again: nothing was shown."""
        return self._low > 0

    @property
    def is_finished(self) -> bool:
        """Whether the answer has its finish reason."""
        return self._is_finished

    @property
    def trouble(self) -> str | None:
        """Why the stream can go on nowhere; ``None`` if it may yet."""
        return self._trouble

    @property
    def tokens(self) -> int:
        """How many tokens were generated, over all servers, without those that were given up."""
        return len(self._token_ids)

    @property
    def usage(self) -> Usage:
        """Tokens of the original prompt and of the whole answer."""
        prompt = len(self._prompt or ())
        return Usage(
            prompt_tokens=prompt, completion_tokens=self.tokens, total_tokens=prompt + self.tokens
        )

    def begin(self, prompt_token_ids: Sequence[int]) -> None:
        """Take the prompt's tokens; those of later servers are ignored."""
        if self._prompt is None:
            self._prompt = list(prompt_token_ids)

    def feed(self, chunk: StreamChunk) -> StreamChunk | None:
        """What of this chunk may be shown now, and of those before; ``None`` for nothing.

        A chunk with text shows the token ids before it and its first one: these are certain to
        remain. A finish reason shows all. Where the stream cannot be continued, nothing is held
        back. The chunk is the same object where nothing changes.

        A stop string that lies behind the first cut ends the answer here, while the server goes on:
        if :attr:`is_finished`, hang up. What it said in the meantime counts for nothing.
        """
        if self._is_finished:
            return None
        if self._trouble is None:
            self._trouble = _trouble_of(chunk)
        start = len(self._token_ids)
        if chunk.token_ids:
            self._token_ids += chunk.token_ids
        if chunk.text:
            self._texts.append(chunk.text)
            self._low, self._high = start + 1, len(self._token_ids)
            self._is_settled = self._is_raw and self._low == self._high
        if self._matcher is not None:
            chunk = self._watched(chunk, self._matcher)
        self._is_finished = self._is_finished or chunk.finish_reason is not None
        return self._with_shown_ids(chunk, start)

    def _watched(self, chunk: StreamChunk, matcher: StopMatcher) -> StreamChunk:
        text, stop = matcher.feed(chunk.text)
        if stop is not None:
            return msgspec.structs.replace(chunk, text=text, finish_reason="stop", stop_reason=stop)
        if chunk.finish_reason is not None:
            text += matcher.finish()
        return chunk if text == chunk.text else msgspec.structs.replace(chunk, text=text)

    def _with_shown_ids(self, chunk: StreamChunk, start: int) -> StreamChunk | None:
        holds_none = self._is_finished or self._trouble is not None
        end = len(self._token_ids) if holds_none else self._low
        if self._shown != start or end != len(self._token_ids):
            ids = tuple(self._token_ids[self._shown : end])
            chunk = msgspec.structs.replace(chunk, token_ids=ids)
        self._shown = end
        return chunk if says_something(chunk) else None

    def question(self) -> Sequence[int] | None:
        """Tokens whose text has to be known before the stream can go on; ``None`` for none.

        Their text is what ``/detokenize`` makes of them. Once for a chat or for stop strings; for a
        chunk of several tokens, up to once for each of them, and mostly once.
        """
        if self._trouble is not None or not self.has_begun or self._is_settled:
            return None
        return self._token_ids[: self._high]

    def answer(self, text: str) -> None:
        """Take the text of the tokens of :meth:`question`."""
        # An undecided character at the end, or more text than came: the boundary is before.
        if not text.endswith(_REPLACEMENT) and self._was_delivered(text):
            self._texts.append(text[len(text) - self._lag :])
            self._lag = 0
            self._low = self._high
            self._is_settled = True
        elif self._high > self._low:
            self._high -= 1
        else:
            self._trouble = "its tokens are not the text that came"

    def _was_delivered(self, text: str) -> bool:
        if len(text) < self._lag:
            return False
        delivered, visible = "".join(self._texts), text[: len(text) - self._lag]
        # Decoders of the SentencePiece family leave out a space at the very beginning.
        return delivered in (visible, " " + visible)

    def obstacle(self, *, max_model_len: int | None) -> str | None:
        """Why the stream cannot be continued now; ``None`` if it can.

        Args:
            max_model_len: The next server's. Only a chat without ``max_tokens`` needs it: its
                answer ends where the context does.
        """
        if self._trouble is not None:
            return self._trouble
        if self._is_finished:
            return "it is complete"
        if self._prompt is None:
            return "the server did not say the tokens of its prompt"
        if not self.has_begun:
            return "no text has come: the request itself can be sent again"
        if not self._is_settled:
            return "where its text ends among its tokens is not settled"
        if self._limit() is None and max_model_len is None:
            return "there is no max_tokens, and the next server's max_model_len is not known"
        return None

    def ending(self, *, max_model_len: int | None) -> StreamChunk | None:
        """The last chunk, if no token remains to be asked for; finished with "length".

        A server that dies between its last token and the finish reason leaves such a stream. A stop
        token does not come without its finish reason: vLLM decides on both in one step.

        Raises:
            ValueError: there is an :meth:`obstacle`.
        """
        if self._remaining(max_model_len) > 0:
            return None
        self._cut()
        text = "" if self._matcher is None else self._matcher.finish()
        return self._with_finish(StreamChunk(text=text, finish_reason="length"))

    def _with_finish(self, chunk: StreamChunk) -> StreamChunk | None:
        self._is_finished = True
        return self._with_shown_ids(chunk, len(self._token_ids))

    def request(self, *, max_model_len: int | None) -> dict[str, Any]:
        """The body for ``/v1/completions`` of the next server; may be asked for again.

        The seed is moved on by the number of tokens: the same one would draw the random numbers of
        the first tokens once more.

        Args:
            max_model_len: As for :meth:`obstacle`.

        Raises:
            ValueError: there is an :meth:`obstacle`, or nothing remains to be asked for.
        """
        remaining = self._remaining(max_model_len)
        if remaining <= 0:
            raise ValueError("the answer has all its tokens")
        self._cut()
        assert self._prompt is not None
        body = {name: self._body[name] for name in self._body if name in PASSED_ON}
        body |= {
            "prompt": self._prompt + self._token_ids,
            "max_tokens": remaining,
            "stream": True,
            "return_token_ids": True,
        }
        if (min_tokens := (self._body.get("min_tokens") or 0) - self.tokens) > 0:
            body["min_tokens"] = min_tokens
        if (seed := self._body.get("seed")) is not None:
            body["seed"] = _moved_seed(seed, self.tokens)
        return body

    def _cut(self) -> None:
        """From here on the chunks are those of the next server."""
        del self._token_ids[self._low :]
        self._is_raw = True
        if self._stops:
            self._matcher = StopMatcher(
                self._stops, keeps_match=self._keeps_match, before="".join(self._texts)
            )

    def _remaining(self, max_model_len: int | None) -> int:
        reason = self.obstacle(max_model_len=max_model_len)
        if reason is not None:
            raise ValueError(f"the stream cannot be continued: {reason}")
        limit = self._limit()
        if limit is None:
            assert max_model_len is not None
            assert self._prompt is not None
            limit = max_model_len - len(self._prompt)
        return limit - self._low

    def _limit(self) -> int | None:
        """Tokens that the caller allows for the answer; ``None`` for what the context has."""
        limit: int | None = self._body.get("max_tokens")
        if not self._is_chat:
            return _COMPLETIONS_MAX_TOKENS if limit is None else limit
        newer: int | None = self._body.get("max_completion_tokens")
        return limit if newer is None else newer


def _trouble_of(chunk: StreamChunk) -> str | None:
    """What in this chunk makes its stream impossible to continue."""
    if chunk.reasoning:
        return "it has reasoning, which only the first server can tell from the answer"
    if chunk.tool_calls:
        return "it has tool calls"
    if chunk.index:
        return "it has several choices"
    if chunk.text and not chunk.token_ids:
        return "its text came without token ids"
    return None


def _moved_seed(seed: int, by: int) -> int:
    # -1 is vLLM's "no seed".
    return seed if seed == -1 else (seed + by + _SEEDS) % (2 * _SEEDS) - _SEEDS
