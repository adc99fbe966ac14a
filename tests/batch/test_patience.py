"""Whether a failed prompt is tried again, and when a batch is given up."""

from __future__ import annotations

import pytest

from vllm_unified.batch.patience import (
    FIRST_PATIENCE,
    LONGEST_PAUSE,
    OF_A_REFUSAL,
    PATIENCE,
    PROOF,
    Patience,
    blame_of,
)
from vllm_unified.errors import (
    AuthenticationError,
    BadRequestError,
    CircuitOpenError,
    ConnectError,
    ConnectionLostError,
    ContextLengthError,
    EngineDeadError,
    GenerationAbortedError,
    ModelNotFoundError,
    NotFoundError,
    OutputValidationError,
    OverloadedError,
    ProtocolError,
    QueueFullError,
    RequestTimeoutError,
    ServerError,
    UnsupportedError,
    VllmError,
)

BUSY = OverloadedError("The engine is currently busy and cannot accept new requests.")


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (BadRequestError("a"), "prompt"),
        (ContextLengthError("a"), "prompt"),
        (OutputValidationError("a"), "prompt"),
        (UnsupportedError("a"), "prompt"),
        (ProtocolError("a"), "prompt"),
        (ConnectError("a"), "server"),
        (BUSY, "server"),
        (EngineDeadError("a"), "server"),
        (RequestTimeoutError("a"), "server"),
        (AuthenticationError("a"), "setup"),
        (NotFoundError("a"), "setup"),
        (ModelNotFoundError("a"), "setup"),
    ],
)
def test_whose_fault_it_is(error: VllmError, blamed: str) -> None:
    assert blame_of(error, own_model=False) == blamed


def test_a_model_of_its_own_that_nobody_has_is_the_prompts_fault() -> None:
    assert blame_of(ModelNotFoundError("a"), own_model=True) == "prompt"


class TestGivingUp:
    def test_nothing_is_over_while_nothing_fails(self) -> None:
        assert not Patience().is_over(now=1e9)

    def test_before_the_first_success_it_is_short(self) -> None:
        patience = Patience()
        patience.failed("server", now=100)

        assert not patience.is_over(now=100 + FIRST_PATIENCE - 0.1)
        assert patience.is_over(now=100 + FIRST_PATIENCE)

    def test_after_one_it_is_long(self) -> None:
        patience = Patience()
        patience.succeeded(now=50)
        patience.failed("server", now=100)

        assert not patience.is_over(now=100 + PATIENCE - 0.1)
        assert patience.is_over(now=100 + PATIENCE)

    def test_a_number_holds_from_the_beginning(self) -> None:
        patience = Patience(600)
        patience.failed("server", now=0)

        assert not patience.is_over(now=599)
        assert patience.is_over(now=600)

    def test_a_success_ends_the_trouble(self) -> None:
        patience = Patience(10)
        patience.failed("server", now=0)

        assert patience.succeeded(now=8) == 8

        patience.failed("server", now=9)
        assert not patience.is_over(now=18)
        assert patience.is_over(now=19)

    def test_what_is_wrong_from_the_beginning_is_over_at_once(self) -> None:
        patience = Patience(600)
        patience.failed("setup", now=0)

        assert patience.is_over(now=0)

    def test_what_was_right_once_may_be_so_again(self) -> None:
        patience = Patience(600)
        patience.succeeded(now=0)
        patience.failed("setup", now=1)

        assert not patience.is_over(now=1)


class TestStrikes:
    def test_a_server_that_is_gone_says_nothing_of_the_prompt(self) -> None:
        patience = Patience()
        for error in (ConnectError("a"), ConnectionLostError("a"), EngineDeadError("a"), BUSY):
            assert patience.strikes(error, began=0) == 0

    def test_others_that_succeed_meanwhile_do(self) -> None:
        patience = Patience()
        patience.succeeded(now=5)

        assert patience.strikes(ConnectionLostError("a"), began=4) == 1
        assert patience.strikes(ConnectionLostError("a"), began=6) == 0

    def test_so_does_a_look_at_the_servers_that_found_them_well(self) -> None:
        patience = Patience()
        patience.failed("server", now=100)
        patience.proved(now=200)

        assert patience.trouble is None
        assert patience.strikes(ConnectionLostError("a"), began=199) == 0
        assert patience.strikes(ConnectionLostError("a"), began=201) == 1
        assert patience.strikes(ConnectionLostError("a"), began=201 + PROOF) == 0

    def test_so_does_the_servers_own_answer(self) -> None:
        error = ServerError("it broke", status_code=500)

        assert Patience().strikes(error, began=0) == 1

    @pytest.mark.parametrize("status", [502, 503, 504])
    def test_but_not_that_of_a_gateway(self, status: int) -> None:
        assert Patience().strikes(ServerError("nobody there", status_code=status), began=0) == 0

    def test_nor_an_abort_by_a_server_that_ends(self) -> None:
        assert Patience().strikes(GenerationAbortedError("a"), began=0) == 0

    @pytest.mark.parametrize("error", [BUSY, QueueFullError("a"), CircuitOpenError("a")])
    def test_a_refusal_counts_little(self, error: VllmError) -> None:
        patience = Patience()
        patience.succeeded(now=5)

        assert patience.strikes(error, began=4) == OF_A_REFUSAL


class TestPauses:
    def test_they_grow_and_are_bounded(self) -> None:
        pauses = [
            Patience().pause(tries, ConnectError("a"), lambda: 1.0) for tries in (1, 2, 3, 50)
        ]

        assert pauses == [0.5, 1.0, 2.0, LONGEST_PAUSE]

    def test_a_server_that_asks_for_time_gets_some(self) -> None:
        error = ServerError("later", retry_after=2.0)
        assert Patience().pause(1, error, lambda: 0.0) == 2.0
        error.retry_after = 3600
        assert Patience().pause(1, error, lambda: 0.0) == LONGEST_PAUSE
