"""Whether there is another attempt, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unified.endpoints.retry import RetryPolicy, pause_before_retry
from vllm_unified.errors import (
    BadRequestError,
    ConnectError,
    OverloadedError,
    ProtocolError,
    RequestTimeoutError,
    StreamStalledError,
    TLSError,
    VllmError,
)

POLICY = RetryPolicy(max_retries=3)


def pause(
    error: VllmError | None = None,
    *,
    failed: int = 1,
    remaining: float = 1000,
    random: float = 0.5,
    policy: RetryPolicy = POLICY,
) -> float | None:
    return pause_before_retry(
        policy,
        error or OverloadedError("busy"),
        failed_attempts=failed,
        remaining=remaining,
        random=lambda: random,
    )


@pytest.mark.parametrize(("failed", "longest"), [(1, 0.5), (2, 1.0), (3, 2.0)])
@pytest.mark.parametrize("random", [0.0, 0.25, 0.999])
def test_pauses_double_and_the_jitter_is_over_all_of_them(
    failed: int, longest: float, random: float
) -> None:
    assert pause(failed=failed, random=random) == pytest.approx(random * longest)


def test_the_jitter_comes_after_the_clamp() -> None:
    """Otherwise all callers at the cap would wait the same."""
    policy = RetryPolicy(max_retries=100)

    at_the_cap = [pause(failed=50, random=random, policy=policy) for random in (0.1, 0.5, 0.9)]

    assert at_the_cap == pytest.approx([0.8, 4.0, 7.2])


def test_many_attempts_do_not_overflow() -> None:
    assert pause(failed=5000, policy=RetryPolicy(max_retries=10_000)) == pytest.approx(4.0)


def test_after_the_last_retry_there_is_no_other() -> None:
    assert pause(failed=3) is not None
    assert pause(failed=4) is None
    assert pause(failed=1, policy=RetryPolicy(max_retries=0)) is None


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OverloadedError("busy"), True),
        (ConnectError("refused"), True),
        (BadRequestError("wrong"), False),
        (ProtocolError("HTML"), False),
        (TLSError("certificate"), False),
        (RequestTimeoutError("late"), False),
        (StreamStalledError("silent"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: VllmError, again: bool) -> None:
    assert (pause(error) is not None) is again


@pytest.mark.parametrize("random", [0.0, 0.999])
def test_what_the_server_asks_for_is_honoured_and_spread(random: float) -> None:
    waited = pause(OverloadedError("busy", retry_after=7), random=random)

    assert waited is not None
    assert 7 <= waited <= 7.5


def test_what_the_server_asks_for_is_bounded() -> None:
    assert pause(OverloadedError("busy", retry_after=60)) is not None
    assert pause(OverloadedError("busy", retry_after=61)) is None


def test_retry_after_nothing_is_at_once() -> None:
    assert pause(OverloadedError("busy", retry_after=0), random=0) == 0


@pytest.mark.parametrize("retry_after", [None, 7.0])
@pytest.mark.parametrize("remaining", [-1.0, 0.0, 0.2])
def test_no_pause_outlasts_the_deadline(retry_after: float | None, remaining: float) -> None:
    assert pause(OverloadedError("busy", retry_after=retry_after), remaining=remaining) is None


@given(
    st.integers(1, 10_000),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.001, 1e6),
    st.none() | st.floats(0, 1e6),
)
def test_a_pause_is_always_within_the_deadline_and_the_bounds(
    failed: int, random: float, remaining: float, retry_after: float | None
) -> None:
    waited = pause(
        OverloadedError("busy", retry_after=retry_after),
        failed=failed,
        remaining=remaining,
        random=random,
        policy=RetryPolicy(max_retries=10_000),
    )

    assert waited is None or 0 <= waited < remaining
    assert waited is None or waited >= (retry_after or 0)
    assert waited is None or waited <= 60.5
