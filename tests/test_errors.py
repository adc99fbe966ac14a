"""Every way in which a server can fail a request, on both clients.

Each error has its own class and the built-in bases that Python users expect, says what to do,
carries what is known, and shows no key; nothing foreign comes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import vllm_unified.errors as errors_module
from tests.support import answers
from tests.support.answers import chunked, sse, text_event
from tests.support.clients import KINDS, Kind, make_client
from tests.support.scripted import CLOSE, RESET, STALL, ScriptedServer, Step
from vllm_unified import (
    AsyncVllmUnified,
    Attempt,
    AuthenticationError,
    BadRequestError,
    BatchError,
    BatchSummary,
    ConnectError,
    ConnectionLostError,
    ContextLengthError,
    EngineDeadError,
    GenerationAbortedError,
    JobStoppedError,
    ModelNotFoundError,
    NameResolutionError,
    NotFoundError,
    OutputValidationError,
    OverloadedError,
    PartialOutput,
    ProtocolError,
    RateLimitError,
    RequestTimeoutError,
    ResponseTooLargeError,
    ServerError,
    ServerStartError,
    StreamStalledError,
    StreamTruncatedError,
    TLSError,
    UnsupportedError,
    VllmError,
)

pytestmark = pytest.mark.usefixtures("no_pauses")

KEY = "sk-geheim-0123456789"
ONCE = text_event("Once ")


@dataclass(frozen=True)
class Case:
    """A reply, and the error that it is."""

    reply: tuple[Step, ...]
    kind: type[VllmError]
    said: str = ""
    status: int | None = None
    attempts: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    foreign_cause: bool = False


HTML = answers.response("<html><title>nginx</title></html>", content_type="text/html")

WHOLE = {
    "unknown model": Case(
        (
            answers.error(
                "404 Not Found", answers.UNKNOWN_MODEL, kind="NotFoundError", param="model"
            ),
        ),
        ModelNotFoundError,
        "does not exist",
        404,
    ),
    "no such path": Case(
        (answers.response({"detail": "Not Found"}, status="404 Not Found"),),
        NotFoundError,
        "POST /v1/completions",
        404,
    ),
    "no key": Case(
        (answers.response({"error": "Unauthorized"}, status="401 Unauthorized"),),
        AuthenticationError,
        "Unauthorized",
        401,
    ),
    "the key is quoted": Case(
        (answers.error("401 Unauthorized", f"Incorrect API key provided: {KEY}"),),
        AuthenticationError,
        "Incorrect API key",
        401,
    ),
    "bad parameter": Case(
        (answers.error("400 Bad Request", "temperature must be non-negative, got -1.0."),),
        BadRequestError,
        "temperature must be non-negative",
        400,
    ),
    "too long": Case(
        (answers.error("400 Bad Request", answers.CONTEXT_LENGTH),),
        ContextLengthError,
        "maximum context length is 2048",
        400,
    ),
    "busy": Case((answers.BUSY_ANSWER,), OverloadedError, "currently busy", 503, attempts=3),
    "too many": Case(
        (answers.error("429 Too Many Requests", "Rate limit exceeded"),),
        RateLimitError,
        "Rate limit",
        429,
        3,
    ),
    "engine dead": Case(
        (answers.error("500 Internal Server Error", answers.ENGINE_DEAD),),
        EngineDeadError,
        "EngineCore",
        500,
        attempts=3,
    ),
    "unsupported": Case(
        (answers.error("501 Not Implemented", "The model does not support this"),),
        UnsupportedError,
        "does not support",
        501,
    ),
    "bad gateway": Case(
        (
            answers.response(
                "<html><title>502 Bad Gateway</title></html>",
                status="502 Bad Gateway",
                content_type="text/html",
            ),
        ),
        ServerError,
        "502 Bad Gateway",
        502,
        attempts=3,
    ),
    "a status whose words are cut": Case(
        (b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 500\r\n\r\n{", CLOSE),
        AuthenticationError,
        "",
        401,
    ),
    "a status whose words are too many": Case(
        (answers.response("x" * 1_100_000, status="401 Unauthorized"),),
        AuthenticationError,
        "",
        401,
    ),
    "closed before the answer": Case(
        (CLOSE,), ConnectionLostError, "without an answer", attempts=3, foreign_cause=True
    ),
    "reset before the answer": Case(
        (RESET,), ConnectionLostError, "", attempts=3, foreign_cause=True
    ),
    "closed in the head": Case(
        (b"HTTP/1.1 200 OK\r\ncontent-", CLOSE),
        ConnectionLostError,
        "",
        attempts=3,
        foreign_cause=True,
    ),
    "closed in the body": Case(
        (answers.completion("Hello")[:-20], CLOSE),
        ConnectionLostError,
        "before the answer was",
        attempts=3,
        foreign_cause=True,
    ),
    "reset in the body": Case(
        (answers.completion("Hello")[:-20], RESET),
        ConnectionLostError,
        "",
        attempts=3,
        foreign_cause=True,
    ),
    "malformed JSON": Case(
        (answers.response('{"choices": [{"te'),), ProtocolError, "begins '{", foreign_cause=True
    ),
    "JSON of another shape": Case((answers.response({"text": "hi"}),), ProtocolError, "no choices"),
    "an HTML page": Case((HTML,), ProtocolError, "<html>", foreign_cause=True),
    "not HTTP": Case(
        (b"220 mail.example ESMTP Postfix\r\n", CLOSE),
        ProtocolError,
        "not HTTP",
        foreign_cause=True,
    ),
    "an echo": Case(
        (b"HTTP/1.1 200 OK\r\nAuthorization Bearer " + KEY.encode() + b"\r\n\r\n", CLOSE),
        ProtocolError,
        "not HTTP",
        foreign_cause=True,
    ),
    "an echo in JSON": Case(
        (answers.response({"headers": {"authorization": f"Bearer {KEY}"}}),), ProtocolError
    ),
    "nothing": Case((answers.response(b""),), ProtocolError, "", foreign_cause=True),
    "compressed, and not": Case(
        (answers.response("{}", headers={"content-encoding": "gzip"}),),
        ProtocolError,
        "compressed",
        foreign_cause=True,
    ),
    "too large": Case(
        (answers.response("x" * 5000)[:-100], STALL),
        ResponseTooLargeError,
        "4000",
        settings={"max_response_bytes": 4000},
    ),
    "an error inside a 200": Case(
        (answers.response({"error": answers.error_body(answers.BUSY, code=503)}),),
        OverloadedError,
        "busy",
        503,
        attempts=3,
    ),
    "aborted": Case(
        (answers.completion("", finish_reason="abort"),), GenerationAbortedError, "", attempts=3
    ),
    "no head in time": Case((STALL,), RequestTimeoutError, "0.1 s", settings={"timeout": 0.1}),
    "no body in time": Case(
        (answers.completion("Hello")[:-20], STALL),
        RequestTimeoutError,
        "0.1 s",
        settings={"timeout": 0.1},
    ),
    "a redirect": Case(
        (answers.response(status="302 Found", headers={"location": "https://login.example"}),),
        ProtocolError,
        "https://login.example",
        302,
    ),
}

STREAMED = {
    "error frame before text": Case(
        (sse(answers.error_event()) + chunked(answers.DONE) + answers.END,),
        EngineDeadError,
        "EngineCore",
        500,
        attempts=3,
    ),
    "error frame after text": Case(
        (sse(ONCE, answers.error_event()) + chunked(answers.DONE) + answers.END,),
        EngineDeadError,
        "EngineCore",
        500,
    ),
    "busy, in-band": Case(
        (sse(answers.error_event(answers.BUSY, kind="Service Unavailable", code=503)),),
        OverloadedError,
        "busy",
        503,
        attempts=3,
    ),
    "cut after text": Case((sse(ONCE), CLOSE), StreamTruncatedError, "cut", foreign_cause=True),
    "reset after text": Case((sse(ONCE), RESET), StreamTruncatedError, "cut", foreign_cause=True),
    "cut before text": Case(
        (answers.STREAM_HEAD, CLOSE), StreamTruncatedError, "cut", attempts=3, foreign_cause=True
    ),
    "[DONE] without a finish reason": Case(
        (sse(ONCE, answers.DONE) + answers.END,), StreamTruncatedError, "without a finish reason"
    ),
    "closed cleanly without an end": Case(
        (sse(ONCE) + answers.END,), StreamTruncatedError, "without a finish reason"
    ),
    "aborted": Case(
        (sse(ONCE, text_event("", finish_reason="abort")),), GenerationAbortedError, "aborted"
    ),
    "malformed JSON": Case(
        (sse(ONCE, b"data: {\n\n"),), ProtocolError, "cannot be read", foreign_cause=True
    ),
    "malformed chunks": Case(
        (answers.STREAM_HEAD + b"zzz\r\n", STALL), ProtocolError, "", foreign_cause=True
    ),
    "stalled": Case(
        (sse(ONCE), STALL), StreamStalledError, "0.1 s", settings={"idle_timeout": 0.1}
    ),
    "no token in time": Case(
        (answers.STREAM_HEAD, STALL),
        RequestTimeoutError,
        "no token",
        settings={"first_token_timeout": 0.1},
    ),
    "a page in place of a stream": Case((HTML,), ProtocolError, "<html>", foreign_cause=True),
    "an answer in place of a stream": Case(
        (answers.completion("Hello"),), ProtocolError, "does not stream"
    ),
    "busy": Case((answers.BUSY_ANSWER,), OverloadedError, "currently busy", 503, attempts=3),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    value: Kind = request.param
    return value


async def generate(vllm: AsyncVllmUnified) -> None:
    await vllm.generate("a", model="m", request_id="req-1")


async def stream(vllm: AsyncVllmUnified) -> None:
    async with vllm.stream("a", model="m", request_id="req-1") as chunks:
        async for _ in chunks:
            pass


async def error_of(
    kind: Kind, call: Callable[[AsyncVllmUnified], Any], url: str, **settings: Any
) -> VllmError:
    """What the call raises; a foreign exception fails the test."""
    settings = {"timeout": 5, "max_retries": 2, **settings}
    async with make_client(kind, api_url=url, api_key=KEY, **settings) as vllm:
        with pytest.raises(VllmError) as caught:
            await call(vllm)
    return caught.value


def check(error: VllmError, case: Case, url: str) -> None:
    assert type(error) is case.kind
    assert case.said in error.message
    assert error.message.strip()
    assert error.hint or error.is_transient_error or case.status in (400, 404, 501)
    assert str(error).startswith(error.message)
    assert error.status_code == case.status
    assert (error.endpoint, error.model, error.request_id) == (url, "m", "req-1")
    assert [attempt.endpoint for attempt in error.attempts] == [url] * case.attempts
    assert error.attempts[-1].error is not None
    assert (error.__cause__ is not None) is case.foreign_cause
    assert not isinstance(error.__cause__, VllmError)


def shown(error: BaseException) -> str:
    """All that a program may print or log of an error."""
    parts = ["".join(traceback.format_exception(error))]
    cause: BaseException | None = error
    while cause is not None:
        parts += [str(cause), repr(cause), repr(cause.args), repr(vars(cause))]
        cause = cause.__cause__ or cause.__context__
    # A traceback quotes the lines of the test, which name the key, but never spell it.
    return "\n".join(parts)


@pytest.mark.parametrize("name", WHOLE)
async def test_a_call_that_fails(
    kind: Kind, name: str, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    case = WHOLE[name]
    server.always(*case.reply)

    error = await error_of(kind, generate, server.url, **case.settings)

    check(error, case, server.url)
    assert error.partial is None
    assert len(server.requests) == case.attempts
    assert KEY not in shown(error)
    assert KEY not in caplog.text


@pytest.mark.parametrize("name", STREAMED)
async def test_a_stream_that_fails(
    kind: Kind, name: str, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    case = STREAMED[name]
    server.always(*case.reply)

    error = await error_of(kind, stream, server.url, **case.settings)

    check(error, case, server.url)
    assert error.partial is not None
    assert error.partial.text == ("Once " if ONCE in b"".join(_bytes(case.reply)) else "")
    assert len(server.requests) == case.attempts
    assert KEY not in shown(error)
    assert KEY not in caplog.text


def _bytes(steps: tuple[Step, ...]) -> Iterator[bytes]:
    return (step for step in steps if isinstance(step, bytes))


@pytest.mark.parametrize("call", [generate, stream])
async def test_nobody_listens(kind: Kind, call: Callable[..., Any]) -> None:
    with ScriptedServer() as closed:
        url = closed.url

    error = await error_of(kind, call, url)

    assert type(error) is ConnectError
    assert "vllm-unified serve" in str(error)
    assert "after 3 attempts" in str(error)


@pytest.mark.parametrize("call", [generate, stream])
async def test_a_name_that_is_none(kind: Kind, call: Callable[..., Any]) -> None:
    # Longer than a name may be, so that no name server is asked.
    name = ".".join(["nope"] * 60)

    error = await error_of(kind, call, f"http://{name}")

    assert type(error) is NameResolutionError
    assert name in error.message


@pytest.mark.parametrize("call", [generate, stream])
async def test_tls_with_a_server_that_has_none(
    kind: Kind, call: Callable[..., Any], server: ScriptedServer
) -> None:
    error = await error_of(kind, call, server.url.replace("http:", "https:"))

    assert type(error) is TLSError
    assert not error.is_transient_error
    assert len(error.attempts) == 1


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (RequestTimeoutError, (TimeoutError, OSError)),
        (StreamStalledError, (TimeoutError,)),
        (ConnectError, (ConnectionError,)),
        (errors_module.ConnectTimeoutError, (ConnectionError, TimeoutError)),
        (ConnectionLostError, (ConnectionError,)),
        (StreamTruncatedError, (ConnectionError,)),
        (BadRequestError, (ValueError,)),
        (errors_module.ConfigurationError, (ValueError,)),
        (OutputValidationError, (ValueError,)),
        (NotFoundError, (LookupError,)),
        (errors_module.ClientClosedError, (RuntimeError,)),
    ],
)
def test_built_in_bases(kind: type[VllmError], bases: tuple[type[Exception], ...]) -> None:
    assert issubclass(kind, (VllmError, *bases))
    for base in bases:
        assert issubclass(kind, base)


def classes(base: type[VllmError] = VllmError) -> list[type[VllmError]]:
    own = [kind for kind in base.__subclasses__() if kind.__module__.startswith("vllm_unified")]
    return [base] + [below for kind in own for below in classes(kind)]


ALL = sorted(set(classes()) - {BatchError, JobStoppedError}, key=lambda kind: kind.__name__)


def test_a_stopped_job_survives_another_process() -> None:
    numbers = dict.fromkeys(("rows", "failed", "unasked", "cut", "resumed"), 3)
    tokens = dict.fromkeys(("prompt_tokens", "completion_tokens"), 5)
    summary = BatchSummary(output="out", seconds=1.5, ledger="out.ledger", **numbers, **tokens)
    error = JobStoppedError("stopped", summary=summary, hint="go on", like=OverloadedError("busy"))

    copy = pickle.loads(pickle.dumps(error))

    assert (copy.summary, str(copy)) == (summary, str(error))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_survives_another_process(kind: type[VllmError]) -> None:
    attempt = Attempt(endpoint="http://a", started_at=1.0, duration=2.0, error="x")
    error = kind("what is wrong", hint="do that")
    error.status_code, error.retry_after, error.attempts = 503, 1.5, (attempt,)
    error.partial = PartialOutput(ending="stalled", text="Once ")
    if isinstance(error, OutputValidationError):
        error.text = "{"
    if isinstance(error, ServerStartError):
        error.log = "out of memory"

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


def test_a_batchs_error_survives_another_process() -> None:
    error = BatchError("1 of 2 failed", results=["a", None], errors={1: OverloadedError("busy")})

    copy = pickle.loads(pickle.dumps(error))

    assert (copy.results, str(copy)) == (["a", None], str(error))
    assert type(copy.errors[1]) is OverloadedError
    assert copy.is_transient_error


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {}
    above: list[str] = []
    assert errors_module.__doc__ is not None
    for line in errors_module.__doc__.splitlines():
        found = re.fullmatch(r"( {4}[ │├└─]*)(\w+Error)( \(([\w, ]+)\))?.*", line)
        if found is not None:
            depth = (len(found[1]) - 3) // 5
            above[depth:] = [found[2]]
            builtin = found[4].split(", ") if found[4] else []
            drawn[found[2]] = {*above[depth - 1 : depth], *builtin} if depth else {"Exception"}

    real = {
        kind.__name__: {base.__name__ for base in kind.__bases__}
        for kind in ALL
        if kind.__module__ == errors_module.__name__
    }

    assert drawn == real


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_says_what_it_is_for(kind: type[VllmError]) -> None:
    assert kind.__doc__
    assert kind is VllmError or kind.__doc__ != VllmError.__doc__


def test_str_says_what_where_and_what_to_do() -> None:
    attempt = Attempt(endpoint="http://a", started_at=1.0, duration=2.0, error="x")

    error = OverloadedError(
        "busy", endpoint="http://a", status_code=503, attempts=(attempt, attempt), hint="wait"
    )

    assert str(error) == "busy (at http://a, HTTP 503, after 2 attempts)\nwait"
    assert str(VllmError("just so")) == "just so"


fragments = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 500 Oh\r\n",
            b"HTTP/1.0 200\r\n",
            b"HTTP/9.9 200 x",
            b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n",
            b"HTTP/1.1 100\r\n",
            b"content-length: 5\r\n",
            b"content-length: -1\r\n",
            b"content-length: 5\r\n" * 2,
            b"transfer-encoding: chunked\r\n",
            b"transfer-encoding: gzip\r\n",
            b"content-encoding: gzip\r\n",
            b"content-encoding: deflate\r\n",
            b"content-type: text/event-stream\r\n",
            b"content-type: \xff\r\n",
            b"location: \xff\r\n",
            b"set-cookie: \xff=\xff\r\n",
            b"retry-after: \xff\r\n",
            b"connection: close\r\n",
            b"\r\n",
            b"\r\n\r\n",
            b"5\r\n",
            b"0\r\n\r\n",
            b"ffffffffffffffffff\r\n",
            b"-1\r\n",
            b"data: ",
            b"data: {}\n\n",
            b"data: [DONE]\n\n",
            b'{"choices": [',
            b'{"error": "\xff"}',
            b'{"error": {"code": 1e400}}',
            b'{"choices":[{"text":"a","index":1e99}]}',
            b"\0" * 9,
            ONCE,
            answers.completion("x"),
            answers.STREAM_HEAD,
            answers.BUSY_ANSWER,
        ]
    ),
)


@given(st.lists(fragments, max_size=8).map(b"".join))
@hypothesis_settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_comes_nothing_foreign_comes_out(server: ScriptedServer, answer: bytes) -> None:
    """A ``VllmError`` or a result, from a call and from a stream."""

    async def call() -> None:
        server.always(answer, CLOSE)
        async with AsyncVllmUnified(api_url=server.url, timeout=30, max_retries=0) as vllm:
            for attempt in (vllm.generate("a"), vllm.stream("a").collect()):
                with contextlib.suppress(VllmError):
                    await attempt

    asyncio.run(call())
