"""The endpoints of a client: their ids, who they belong to, and how they come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.fake_servers import BROKEN, FakeTransport, MakeRig, Rig, settle
from tests.support.fleets import directory
from vllm_unified.endpoints.endpoint import Endpoint
from vllm_unified.errors import ClientClosedError, ConfigurationError
from vllm_unified.fleet.directory import Directory
from vllm_unified.fleet.monitor import HealthCheck
from vllm_unified.settings import Secret, Settings, TLSConfig

SETTINGS = Settings(api_url="http://default", timeout=3, max_retries=0)


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def here(transport: FakeTransport) -> Directory:
    return directory(SETTINGS, transport=transport)


def create(here: Directory, url: str = "http://a", **settings: Any) -> Endpoint:
    return here.create_endpoint(url, settings)


def ids(here: Directory) -> list[str]:
    return [endpoint.id for endpoint in here.endpoints]


class TestIds:
    @pytest.mark.parametrize(
        ("url", "id"),
        [
            ("http://GPU1:8000/v1", "gpu1:8000"),
            ("https://gateway/team/vllm", "gateway/team/vllm"),
            ("unix:///run/vllm.sock", "/run/vllm.sock"),
        ],
    )
    def test_are_made_of_the_address(self, here: Directory, url: str, id: str) -> None:
        assert create(here, url).id == id

    def test_of_one_address_twice_are_numbered(self, here: Directory) -> None:
        for _ in range(3):
            create(here)

        assert ids(here) == ["a", "a#2", "a#3"]

    def test_one_that_is_free_again_is_used_again(self, here: Directory) -> None:
        async def remove() -> None:
            await here.remove_endpoint(create(here), timeout=1)

        asyncio.run(remove())

        assert create(here).id == "a"

    def test_that_is_taken_is_refused(self, here: Directory) -> None:
        create(here, id="gpu")

        with pytest.raises(ConfigurationError, match="'gpu' already"):
            create(here, "http://b", id="gpu")

        assert ids(here) == ["gpu"]

    def test_a_string_is_an_id_or_an_address(self, here: Directory) -> None:
        gpu = create(here, "http://a", id="gpu")

        assert here.route("gpu").endpoints == (gpu,)
        plain = here.route("http://a/v1").endpoints[0]
        assert plain is not gpu
        assert plain.id == "http://a"
        assert here.route("http://A").endpoints == (plain,)

    def test_a_string_that_is_neither_is_refused(self, here: Directory) -> None:
        with pytest.raises(ConfigurationError, match="gpu7"):
            here.route("gpu7")

        assert ids(here) == []


class TestEndpoints:
    async def test_one_address_with_two_keys_is_two(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        one, two = (create(rig.directory, api_key=key) for key in ("one", "two"))

        for endpoint in (one, two):
            await rig.ask(fleet=rig.directory.route(endpoint))

        assert [sent.headers["Authorization"] for sent in rig.servers[0].requests] == [
            "Bearer one",
            "Bearer two",
        ]
        assert one.breaker is not two.breaker

    def test_have_the_clients_settings_unless_they_have_their_own(self, here: Directory) -> None:
        plain, own = create(here), create(here, timeout=9)

        assert (plain.settings.timeout, own.settings.timeout) == (3, 9)
        assert here.route(own).settings.timeout == 9

    def test_of_another_client_are_refused(self, here: Directory) -> None:
        foreign = create(directory(SETTINGS, transport=FakeTransport()))

        for use in (here.route, here.member, here.get_stats, here.reset_stats):
            with pytest.raises(ConfigurationError, match="another client"):
                use(foreign)
        with pytest.raises(ConfigurationError, match="another client"):
            here.create_fleet([foreign], {})

    async def test_that_need_it_have_connections_of_their_own(self) -> None:
        made: list[Settings] = []

        def make(settings: Settings) -> FakeTransport:
            made.append(settings)
            return transports.setdefault(len(made), FakeTransport())

        transports: dict[int, FakeTransport] = {}
        here = Directory(SETTINGS, None, make)
        create(here)
        create(here, proxy="http://proxy:3128")

        await here.close()

        assert [settings.proxy for settings in made] == [None, "http://proxy:3128"]
        assert all(transport.closed for transport in transports.values())


class TestFleets:
    def test_of_a_plain_list(self, here: Directory) -> None:
        known = create(here, "http://c", id="c")

        fleet = here.create_fleet(["http://a", {"url": "http://b", "weight": 2}, known], {})

        assert [endpoint.id for endpoint in fleet.endpoints] == ["a", "b", "c"]
        assert [endpoint.weight for endpoint in fleet.endpoints] == [1, 2, 1]

    def test_by_name(self, here: Directory) -> None:
        fleet = here.create_fleet({"one": "http://a", "two": {"url": "http://a"}}, {})

        assert [endpoint.id for endpoint in fleet.endpoints] == ["one", "two"]

    def test_have_settings_in_place_of_the_clients(self, here: Directory) -> None:
        fleet = here.create_fleet(["http://a"], {"timeout": "9s", "maxRetries": 7})

        assert (fleet.settings.timeout, fleet.settings.max_retries) == (9.0, 7)

    def test_keywords_are_in_seconds_and_win_over_the_dict(self, here: Directory) -> None:
        fleet = here.create_fleet(
            ["http://a"], {"timeout": 9000, "queue_timeout": 2000}, {"queue_timeout": 3}
        )

        assert (fleet.settings.timeout, fleet.settings.queue_timeout) == (9.0, 3.0)

    @pytest.mark.parametrize(
        ("options", "keywords", "interval"),
        [
            ({"health_check": {"interval": 5000}}, {}, 5.0),
            ({}, {"health_check": {"interval": 5}}, 5.0),
            ({"health_check": {"interval": 5000}}, {"health_check": {"interval": 6}}, 6.0),
            ({"health_check": {"interval": "7s"}}, {"health_check": None}, 7.0),
        ],
    )
    def test_so_are_the_times_of_their_health_check(
        self,
        here: Directory,
        monkeypatch: pytest.MonkeyPatch,
        options: dict[str, Any],
        keywords: dict[str, Any],
        interval: float,
    ) -> None:
        made: list[HealthCheck] = []
        monkeypatch.setattr(
            "vllm_unified.fleet.directory.Monitor", lambda check, _: made.append(check)
        )

        here.create_fleet(["http://a"], options, keywords)

        assert made == [HealthCheck(interval=interval)]

    def test_a_health_check_among_keywords_has_numbers_only(self, here: Directory) -> None:
        with pytest.raises(ConfigurationError, match=r"interval must be .* seconds, not '5s'"):
            here.create_fleet(["http://a"], {}, {"health_check": {"interval": "5s"}})

    def test_a_strategy_may_be_a_keyword(self, here: Directory) -> None:
        with pytest.raises(ConfigurationError, match="best"):
            here.create_fleet(["http://a"], {"strategy": "latency"}, {"strategy": "best"})

    def test_their_settings_are_those_of_members_that_are_made_for_them(
        self, here: Directory
    ) -> None:
        known = create(here, "http://c")
        members: list[Any] = ["http://a", {"url": "http://b", "max_retries": 5}, known]

        fleet = here.create_fleet(members, {"apiKey": "k"}, {"max_retries": 7})

        assert [each.settings.max_retries for each in fleet.endpoints] == [7, 5, 0]
        keys = [each.settings.api_key for each in fleet.endpoints]
        assert keys == [Secret("k"), Secret("k"), None]

    def test_they_are_those_of_members_that_join_later(self, here: Directory) -> None:
        known = create(here, "http://c")
        fleet = here.create_fleet(["http://a"], {}, {"max_retries": 7})

        joined = [here.add_member(fleet, member) for member in ("http://b", known)]

        assert [each.settings.max_retries for each in joined] == [7, 0]
        assert fleet.endpoints[1:] == tuple(joined)

    async def test_nobody_joins_one_that_is_closed(self, here: Directory) -> None:
        fleet = here.create_fleet(["http://a"], {})
        await here.close_fleet(fleet)

        with pytest.raises(ClientClosedError, match="this fleet is closed"):
            here.add_member(fleet, "http://b")

        assert ids(here) == ["a"]

    @pytest.mark.parametrize(
        "options", [{"proxy": "http://proxy:3128"}, {"tls": TLSConfig(verify=False)}]
    )
    def test_with_a_way_of_their_own_their_members_have_it(self, options: dict[str, Any]) -> None:
        made: list[Settings] = []

        def make(settings: Settings) -> FakeTransport:
            made.append(settings)
            return FakeTransport()

        here = Directory(SETTINGS, None, make)
        known = create(here, "http://c")

        here.create_fleet(["http://a", "http://b", known], {}, options)

        (name, value) = next(iter(options.items()))
        assert [getattr(settings, name) for settings in made] == [None, value, value]

    async def test_a_removed_member_takes_its_own_way_along(self) -> None:
        closed: list[FakeTransport] = []

        class Closing(FakeTransport):
            async def close(self) -> None:
                closed.append(self)

        here = Directory(SETTINGS, None, lambda settings: Closing())
        shared, own = create(here, "http://a"), create(here, "http://b", proxy="http://proxy:3128")

        await here.remove_endpoint(shared, timeout=1)
        assert closed == []
        await here.remove_endpoint(own, timeout=1)
        assert len(closed) == 1
        await here.close()
        assert len(closed) == 2

    @pytest.mark.parametrize(
        ("members", "options", "words"),
        [
            (["http://a"], {"time_out": 5}, "a fleet has the unknown key 'time_out'"),
            (["http://a"], {"max_retries": 1, "maxRetries": 2}, "a fleet gives max_retries twice"),
            ([{"url": "http://a", "wait": 1}], {}, "an endpoint has the unknown key 'wait'"),
            ([{"url": "http://a", "api_url": "http://b"}], {}, "an endpoint has both url and api"),
        ],
    )
    def test_the_words_of_an_error_say_whose_it_is(
        self, here: Directory, members: Any, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=words):
            here.create_fleet(members, options)

    @pytest.mark.parametrize(
        ("members", "options", "named"),
        [
            ([], {}, "none"),
            ({}, {}, "none"),
            ("http://a", {}, "str"),
            (5, {}, "int"),
            (["http://a", "ftp://b"], {}, "ftp"),
            (["http://a", {"url": "http://b", "wait": 1}], {}, "wait"),
            ([{"url": "http://a", "id": "x"}, {"url": "http://b", "id": "x"}], {}, "'x' already"),
            (["http://a"], {"strategy": "best"}, "best"),
            (["http://a"], {"health_check": 5}, "health_check"),
            (["http://a"], {"health_check": {"often": 5}}, "often"),
            (["http://a"], {"health_check": {"interval": "x"}}, "interval"),
            (["http://a"], {"time_out": 5}, "time_out"),
        ],
    )
    def test_that_are_refused_leave_no_endpoints_behind(
        self, here: Directory, members: Any, options: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=named):
            here.create_fleet(members, options)

        assert ids(here) == []
        assert here.status() == []

    async def test_an_endpoints_headers_win_over_the_clients_and_those_of_a_call_over_both(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig(
            "a", settings={"headers": {"x-team": "client"}}, endpoint={"headers": {"x-team": "own"}}
        )

        await rig.ask()
        await rig.ask(settings={"headers": {"x-team": "call"}})

        teams = [sent.headers["x-team"] for sent in rig.servers[0].requests]
        assert teams == ["own", "call"]

    async def test_the_clients_headers_are_sent_through_a_fleet(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", settings={"headers": {"x-team": "client"}})

        await rig.ask()

        assert rig.servers[0].requests[0].headers["x-team"] == "client"

    async def test_one_that_lost_all_its_members_is_still_the_clients(
        self, make_rig: MakeRig
    ) -> None:
        rig = make_rig("a", health_check=True)
        await rig.ask()
        rig.fleet.remove(rig.endpoints[0])
        rig.directory.create_fleet(["http://b"], {})
        rig.fleet.add(create(rig.directory, "http://c"))

        await rig.directory.close()

        assert rig.fleet.endpoints == ()

    async def test_one_that_is_closed_leaves_its_endpoints_alone(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")

        await rig.directory.close_fleet(rig.fleet)
        await rig.directory.close_fleet(rig.fleet)

        with pytest.raises(ClientClosedError):
            await rig.ask()
        assert (await rig.ask(fleet=rig.directory.route("a"))).text == "a"


class TestTheDefault:
    async def test_is_the_fleet_in_resources(self, transport: FakeTransport) -> None:
        here = directory(
            SETTINGS,
            transport=transport,
            endpoints={"one": "http://a", "two": "http://b"},
            strategy="round_robin",
            healthCheck=False,
        )

        assert [endpoint.id for endpoint in here.route(None).endpoints] == ["one", "two"]
        await here.close()

    def test_is_the_clients_address_without(self, here: Directory) -> None:
        assert here.route(None).endpoints[0].url == "http://default"

    @pytest.mark.parametrize("resources", [{"endpoint": ["http://a"]}, {1: 2}])
    def test_an_unknown_resource_is_named(self, resources: dict[Any, Any]) -> None:
        with pytest.raises(ConfigurationError, match=str(next(iter(resources)))):
            Directory(SETTINGS, resources, lambda _: FakeTransport())


class TestRemoving:
    async def busy(self, make_rig: MakeRig) -> tuple[Rig, asyncio.Task[Any]]:
        """A fleet whose first endpoint has a request."""
        rig = make_rig("a", "b")
        rig.servers[0].hold()
        call = rig.start()
        await settle()
        return rig, call

    async def test_waits_for_what_is_in_flight(self, make_rig: MakeRig) -> None:
        rig, call = await self.busy(make_rig)

        removing = asyncio.create_task(
            rig.directory.remove_endpoint(rig.endpoints[0], timeout=None)
        )
        await settle()
        assert not removing.done()
        assert rig.directory.status()[0].state == "draining"
        rig.servers[0].finish()

        assert await removing
        assert (await call).text == "a"
        assert [status.id for status in rig.directory.status()] == ["b"]

    async def test_sends_nothing_more_there(self, make_rig: MakeRig) -> None:
        rig, _ = await self.busy(make_rig)
        removing = asyncio.create_task(rig.directory.remove_endpoint(rig.endpoints[0], timeout=1))
        await settle()

        for _ in range(3):
            await rig.ask()
        with pytest.raises(ConfigurationError, match="draining"):
            await rig.ask(fleet=rig.directory.route(rig.endpoints[0]))

        assert rig.sent() == [1, 3]
        rig.servers[0].heal()
        await removing

    async def test_does_not_wait_for_ever(self, make_rig: MakeRig) -> None:
        rig, call = await self.busy(make_rig)

        assert not await rig.directory.remove_endpoint(rig.endpoints[0], timeout=0.001)

        rig.servers[0].finish()
        assert (await call).text == "a"
        assert rig.endpoints[0].in_flight == 0

    async def test_what_is_removed_is_refused(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        await rig.directory.remove_endpoint(rig.endpoints[0], timeout=None)

        with pytest.raises(ConfigurationError, match="was removed"):
            await rig.directory.remove_endpoint(rig.endpoints[0], timeout=None)
        with pytest.raises(ConfigurationError, match="was removed"):
            rig.directory.route(rig.endpoints[0])

    async def test_at_the_same_time_twice(self, make_rig: MakeRig) -> None:
        rig, _ = await self.busy(make_rig)
        removing = [
            asyncio.create_task(rig.directory.remove_endpoint(rig.endpoints[0], timeout=None))
            for _ in range(2)
        ]
        await settle()
        rig.servers[0].finish()

        assert await asyncio.gather(*removing) == [True, True]


class TestStatus:
    async def test_how_an_endpoint_does(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", endpoint={"max_concurrent_requests": 1, "weight": 2})
        rig.servers[0].hold()
        rig.start()
        rig.start()
        await settle()
        rig.serve("m")
        rig.endpoints[0].polled(running=3, waiting=0)

        (status,) = rig.directory.status()

        assert (status.id, status.url, status.state) == ("a", "http://a", "closed")
        assert (status.in_flight, status.capacity, status.max_concurrent_requests) == (1, 1, 1)
        assert (status.waiting, status.weight, status.models) == (1, 2.0, ("m",))
        assert (status.server_running, status.server_waiting) == (3, 0)
        assert (status.error, status.stats.in_flight) == (None, 1)

    async def test_of_one_that_was_never_used(self, here: Directory) -> None:
        create(here)

        (status,) = here.status()

        assert (status.latency, status.models, status.error) == (None, None, None)
        assert (status.server_running, status.server_waiting) == (None, None)
        assert status.stats.requests == 0

    async def test_the_last_failure_until_the_next_success(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        rig.servers[0].reply(BROKEN)
        await rig.fail()
        assert "EngineCore" in (rig.directory.status()[0].error or "")

        await rig.ask()

        assert rig.directory.status()[0].error is None


class TestStatistics:
    async def test_of_an_endpoint_by_its_id_or_address(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        await rig.ask()
        await rig.ask(fleet=rig.directory.route("http://a"))
        await rig.ask(fleet=rig.directory.route("http://a"))

        counts = [
            rig.directory.stats.endpoint(id, 0).requests
            for id in ("a", rig.directory.route("http://a/v1").endpoints[0].id)
        ]
        assert counts == [1, 2]
        assert rig.directory.get_stats("http://a/v1") == rig.directory.get_stats("http://a")

    def test_asking_for_them_makes_no_endpoint(self, here: Directory) -> None:
        here.get_stats("http://never-used")
        here.reset_stats("http://never-used")

        assert here.endpoints == ()

    async def test_start_at_zero_again(self, make_rig: MakeRig) -> None:
        rig = make_rig("a", "b")
        await rig.ask()
        await rig.ask()

        rig.directory.reset_stats(rig.endpoints[0])
        assert [rig.stats(place).requests for place in (0, 1)] == [0, 1]
        rig.directory.reset_stats(None)
        assert rig.statistics().overall.requests == 0

    async def test_are_there_after_the_end(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")
        await rig.ask()

        await rig.directory.close()

        assert rig.stats().requests == 1
        assert rig.statistics().overall.requests == 1


class TestTheEnd:
    async def test_nothing_can_be_made_or_used_any_more(self, make_rig: MakeRig) -> None:
        rig = make_rig("a")

        await rig.directory.close()
        await rig.directory.close()

        for use in (
            lambda: rig.directory.route(None),
            lambda: rig.directory.route(rig.fleet),
            lambda: create(rig.directory, "http://c"),
            lambda: rig.directory.create_fleet(["http://c"], {}),
        ):
            with pytest.raises(ClientClosedError):
                use()
        assert rig.transport.closed

    async def test_keys_are_in_no_repr(self, here: Directory) -> None:
        endpoint = create(here, api_key="geheim")

        assert endpoint.settings.api_key == Secret("geheim")
        assert "geheim" not in f"{endpoint!r} {here.route(endpoint)!r} {here.status()!r}"
