"""/simulator/...: faults put in force and cleared while the server runs. Not vLLM's."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from vllm_unified.simulator.errors import ApiError
from vllm_unified.simulator.faults import Fault, FaultPlan
from vllm_unified.simulator.http import Exchange, Request
from vllm_unified.simulator.service import encode_json


class Controlled(Protocol):
    """What the routes of this module work on: the simulator."""

    faults: FaultPlan

    def heal(self) -> None:
        """Clear all faults."""


async def handle(simulator: Controlled, request: Request, exchange: Exchange) -> None:
    """GET, POST or DELETE /simulator/faults."""
    if request.path != "/simulator/faults":
        raise ApiError("only /simulator/faults exists here", status=404, type="NotFoundError")
    if request.method == "POST":
        simulator.faults.add(_fault(request.body))
    elif request.method == "DELETE":
        simulator.heal()
    elif request.method != "GET":
        raise ApiError("use GET, POST or DELETE", status=405, type="MethodNotAllowedError")
    active: dict[str, Any] = {"faults": simulator.faults.active}
    await exchange.respond(200, encode_json(active), [("content-type", "application/json")])


def _fault(body: bytes) -> Fault:
    try:
        return msgspec.json.decode(body, type=Fault)
    except msgspec.DecodeError as error:
        raise ApiError(f"not a fault: {error}") from None
