"""The health check: who is found dead or well, what is asked, and that it ends."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from tests.support import answers
from tests.support.fake_servers import (
    BROKEN,
    BUSY,
    Answer,
    Clock,
    FakeServer,
    MakeRig,
    Rig,
    error,
    settle,
)
from tests.support.fleets import directory
from tests.support.waiting import eventually
from vllm_unified.errors import ConfigurationError, ConnectError, RequestTimeoutError
from vllm_unified.fleet.monitor import HealthCheck, health_check, server_load
from vllm_unified.settings import Settings
from vllm_unified.simulator.background import Fleet as Simulators

OFTEN = {
    "interval": 2,
    "recovery_interval": 2,
    "load_interval": 2,
    "models_interval": 2,
    "timeout": "3s",
}
"""In milliseconds."""
GAUGES = b"vllm:num_requests_running 3.0\nvllm:num_requests_waiting 2.0\n"


def proofs(server: FakeServer) -> int:
    """How often it was asked to prove that it generates."""
    return sum(sent.json["prompt"] == "1" for sent in server.requests)


def tasks() -> list[str]:
    """Tasks of health checks that have not ended."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return sorted(name for name in names if name.startswith("health of"))


async def watched(make_rig: MakeRig, *names: str, **check: Any) -> Rig:
    """A fleet whose servers are looked at all the time."""
    rig = make_rig(*names, health_check={**OFTEN, **check})
    rig.listen("endpoint_unhealthy", "endpoint_recovered", "circuit_open", "circuit_closed")
    await rig.ask()
    return rig


def names(rig: Rig) -> list[str]:
    """Names of the events that were told."""
    return [event.name for event in rig.told]


class TestDeath:
    async def test_an_engine_that_hangs_is_shut_out_although_health_says_200(
        self, make_rig: MakeRig
    ) -> None:
        rig = await watched(make_rig, "a", "b", timeout=10)
        rig.servers[0].hold()

        await eventually(lambda: rig.endpoints[0].state == "open")

        assert rig.servers[0].looks.count("/health") > 0
        assert isinstance(rig.endpoints[0].error, RequestTimeoutError)
        assert (await rig.ask()).metadata.endpoint == "http://b"

    @pytest.mark.parametrize("trouble", [BROKEN, ConnectError])
    async def test_a_server_that_fails_is_shut_out(self, make_rig: MakeRig, trouble: Any) -> None:
        rig = await watched(make_rig, "a", "b")

        rig.servers[0].always(trouble)

        await eventually(lambda: rig.endpoints[0].state == "open")
        assert rig.endpoints[1].state == "closed"

    async def test_it_is_told_once(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        rig.servers[0].always(BROKEN)
        await eventually(lambda: rig.endpoints[0].state == "open")
        so_far = proofs(rig.servers[0])

        await eventually(lambda: proofs(rig.servers[0]) > so_far + 3)

        assert names(rig) == ["circuit_open", "endpoint_unhealthy"]
        assert rig.told[1].endpoint == "a"
        assert rig.told[1].error.endpoint == "http://a"

    async def test_it_recovers(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        rig.servers[0].always(BROKEN)
        await eventually(lambda: rig.endpoints[0].state == "open")

        rig.servers[0].heal()
        await eventually(lambda: rig.endpoints[0].state == "closed")

        assert names(rig)[-2:] == ["circuit_closed", "endpoint_recovered"]
        assert rig.endpoints[0].error is None

    async def test_it_comes_back_slowly(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        before = rig.endpoints[0].capacity
        rig.servers[0].always(BROKEN)
        await eventually(lambda: rig.endpoints[0].state == "open")

        rig.servers[0].heal()
        await eventually(lambda: rig.endpoints[0].state == "closed")

        assert rig.endpoints[0].capacity < before

    @pytest.mark.parametrize("busy", [BUSY, error(429, "slow down")])
    async def test_overload_is_no_death(self, make_rig: MakeRig, busy: Answer) -> None:
        rig = await watched(make_rig, "a")
        so_far = proofs(rig.servers[0])

        rig.servers[0].always(busy)
        await eventually(lambda: proofs(rig.servers[0]) > so_far + 3)

        assert rig.endpoints[0].state == "closed"
        assert rig.told == []

    async def test_a_server_that_answers_others_while_a_proof_waits_is_not_dead(
        self, make_rig: MakeRig
    ) -> None:
        rig = await watched(make_rig, "a", timeout=300)
        server = rig.servers[0]
        server.hold()
        await eventually(lambda: server.held == 1)
        server.release()

        await rig.ask()
        await eventually(lambda: server.held == 0)
        await settle()

        assert (rig.endpoints[0].state, rig.told) == ("closed", [])

    @pytest.mark.parametrize("status", [401, 403])
    async def test_a_server_that_refuses_the_key_is_of_no_use(
        self, make_rig: MakeRig, status: int
    ) -> None:
        rig = await watched(make_rig, "a")

        rig.servers[0].always(error(status, "no"))

        await eventually(lambda: rig.endpoints[0].state == "open")

    @pytest.mark.parametrize("status", [400, 404])
    async def test_a_server_that_does_not_take_the_question_is_not_dead(
        self, make_rig: MakeRig, status: int
    ) -> None:
        rig = await watched(make_rig, "a")
        so_far = proofs(rig.servers[0])

        rig.servers[0].always(error(status, "this model makes embeddings"))
        await eventually(lambda: proofs(rig.servers[0]) > so_far + 3)

        assert (rig.endpoints[0].state, rig.told) == ("closed", [])

    async def test_one_that_dies_at_the_wire(
        self, vllm_fleet: Simulators, make_rig: MakeRig
    ) -> None:
        server = vllm_fleet.add()
        here = directory(Settings(timeout=3))
        fleet = here.create_fleet([server.url], {"health_check": {**OFTEN, "timeout": 100}})
        (endpoint,) = fleet.endpoints
        rig = make_rig("unused")

        await rig.ask(fleet=fleet)
        server.hang()
        await eventually(lambda: endpoint.state == "open")
        server.heal()
        await eventually(lambda: endpoint.state == "closed")

        await here.close()


class TestWhatIsAsked:
    async def test_nothing_before_the_first_call(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", health_check=OFTEN)
        await settle()

        assert (rig.servers[0].requests, rig.servers[0].looks, tasks()) == ([], [], [])

    async def test_no_proof_where_traffic_succeeds(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", health_check={**OFTEN, "interval": "10m"})
        await rig.ask()
        await eventually(lambda: rig.servers[0].looks.count("/metrics") > 3)

        assert proofs(rig.servers[0]) == 0

    async def test_a_proof_where_there_is_no_traffic(self, make_rig: MakeRig, clock: Clock) -> None:
        rig = make_rig("a", health_check={**OFTEN, "interval": "10m"})
        await rig.ask()
        await eventually(lambda: rig.servers[0].looks.count("/metrics") > 1)

        clock.advance(601)

        await eventually(lambda: proofs(rig.servers[0]) == 1)

    async def test_models_are_learned_and_learned_again(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        await eventually(lambda: rig.endpoints[0].models == {answers.MODEL: None})

        rig.servers[0].fixed["/v1/models"] = Answer(body=b'{"data": [{"id": "x"}, {"id": "y"}]}')

        await eventually(lambda: rig.endpoints[0].models == {"x": None, "y": None})

    async def test_models_that_cannot_be_read_change_nothing(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        await eventually(lambda: rig.endpoints[0].models is not None)

        rig.servers[0].fixed["/v1/models"] = Answer(body=b"<html>")
        looks = rig.servers[0].looks
        so_far = looks.count("/v1/models")
        await eventually(lambda: looks.count("/v1/models") > so_far + 2)

        assert rig.endpoints[0].models == {answers.MODEL: None}

    async def test_a_proof_names_a_model_that_the_server_has(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", health_check=OFTEN)
        rig.servers[0].fixed["/v1/models"] = Answer(body=b'{"data": [{"id": "x"}]}')
        await rig.ask()

        await eventually(
            lambda: (
                rig.servers[0].requests[-1].json == {"prompt": "1", "max_tokens": 1, "model": "x"}
            )
        )

    async def test_gauges(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        assert math.isnan(rig.endpoints[0].server_running)

        rig.servers[0].fixed["/metrics"] = Answer(body=GAUGES)

        await eventually(lambda: rig.endpoints[0].server_running == 3)
        assert rig.endpoints[0].server_waiting == 2

    @pytest.mark.parametrize("reply", [Answer(404), Answer(body=b"# nothing"), ConnectError])
    async def test_stale_gauges_are_not_trusted(self, make_rig: MakeRig, reply: Any) -> None:
        rig = await watched(make_rig, "a")
        rig.servers[0].fixed["/metrics"] = Answer(body=GAUGES)
        await eventually(lambda: rig.endpoints[0].server_running == 3)

        rig.servers[0].fixed["/metrics"] = reply

        await eventually(lambda: math.isnan(rig.endpoints[0].server_running))
        assert math.isnan(rig.endpoints[0].server_waiting)

    async def test_the_gauges_of_the_dead_are_not_trusted(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        rig.servers[0].fixed["/metrics"] = Answer(body=GAUGES)
        await eventually(lambda: rig.endpoints[0].server_running == 3)

        rig.servers[0].always(BROKEN)

        await eventually(lambda: math.isnan(rig.endpoints[0].server_running))

    async def test_nothing_of_it_is_in_the_statistics(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a")
        await eventually(lambda: proofs(rig.servers[0]) > 3)

        assert (rig.stats().requests, rig.stats().attempts) == (1, 1)


class TestTheEnd:
    async def test_with_the_fleet_no_task_is_left(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a", "b")
        assert tasks() == ["health of a", "health of b"]

        await rig.fleet.close()

        assert tasks() == []

    async def test_with_the_client_no_task_is_left(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a", "b")
        rig.servers[0].hold()
        await eventually(lambda: rig.servers[0].held == 1)

        await rig.directory.close()

        assert tasks() == []

    async def test_members_that_come_and_go_are_followed(self, make_rig: MakeRig) -> None:
        rig = await watched(make_rig, "a", "b")

        rig.fleet.remove(rig.endpoints[0])
        rig.fleet.add(rig.directory.create_endpoint("http://c", {}))
        await settle()

        assert tasks() == ["health of b", "health of c"]
        await eventually(lambda: proofs(rig.transport.server("c")) > 0)

    async def test_of_a_fleet_that_lost_all_its_members_no_task_is_left_either(
        self, make_rig: MakeRig
    ) -> None:
        rig = await watched(make_rig, "a")
        rig.fleet.remove(rig.endpoints[0])
        rig.directory.create_fleet(["http://b"], {})
        rig.fleet.add(rig.directory.create_endpoint("http://c", {}))
        await eventually(lambda: proofs(rig.transport.server("c")) > 0)

        await rig.directory.close()

        assert tasks() == []


class TestServerLoad:
    def test_the_two_gauges(self) -> None:
        assert server_load(GAUGES) == (3.0, 2.0)

    def test_of_several_engines_they_are_added_up(self) -> None:
        exposition = b"".join(
            b'vllm:num_requests_%s{engine="%d",model_name="m"} %d.0\n' % (name, engine, value)
            for name, values in ((b"running", (1, 2)), (b"waiting", (10, 20)))
            for engine, value in enumerate(values)
        )

        assert server_load(exposition) == (3.0, 30.0)

    def test_among_much_else(self) -> None:
        exposition = (
            b"# HELP vllm:num_requests_running Number of requests.\n"
            b"# TYPE vllm:num_requests_running gauge\n"
            b'vllm:num_requests_running{engine="0"} 1e2\n'
            b'vllm:num_requests_running_max{engine="0"} 7\n'
            b'vllm:num_requests_waiting_by_reason{reason="capacity"} 9\n'
            b'vllm:num_requests_waiting{engine="0"} 0\n'
            b"other:vllm:num_requests_waiting 5\n"
        )

        assert server_load(exposition) == (100.0, 0.0)

    @pytest.mark.parametrize(
        "exposition",
        [
            b"",
            b"<html>",
            b"vllm:num_requests_running 3\n",
            b"vllm:num_requests_waiting 3\n",
            b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 1\n",
            b"vllm:num_requests_running -\nvllm:num_requests_waiting 1\n",
        ],
    )
    def test_absent_gauges_are_not_zero(self, exposition: bytes) -> None:
        assert server_load(exposition) is None


class TestSettings:
    @pytest.mark.parametrize("given", [None, False])
    def test_none(self, given: object) -> None:
        assert health_check(given) is None

    def test_the_defaults(self) -> None:
        assert health_check(True) == HealthCheck()

    def test_milliseconds_and_units_in_both_spellings(self) -> None:
        check = health_check({"interval": 500, "recoveryInterval": "2s", "load_interval": "1m"})

        assert check == HealthCheck(interval=0.5, recovery_interval=2.0, load_interval=60.0)

    @pytest.mark.parametrize("given", [5, "yes", {"often": 5}, {1: 2}, {"interval": 0}])
    def test_anything_else_is_refused(self, given: object) -> None:
        with pytest.raises(ConfigurationError, match="health_check"):
            health_check(given)
