"""Where settings come from, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.clients import KINDS, Kind, make_client
from vllm_unified import AsyncVllmUnified, ConfigurationError, Settings, TLSConfig, VllmUnified
from vllm_unified.settings import Secret, resolve_settings, server_address

SECRET = "sk-geheim-0123456789"


def resolve(
    metadata: Any = None, environment: dict[str, str] | None = None, **keywords: Any
) -> Settings:
    return resolve_settings(metadata, keywords, environment or {})


ENVIRONMENT = {
    "VLLM_API_URL": "http://environment:1",
    "VLLM_MODEL": "environment",
    "VLLM_API_KEY": "environment",
    "VLLM_TIMEOUT": "1000",
}
METADATA = {
    "api_url": "http://metadata:1",
    "model": "metadata",
    "api_key": "metadata",
    "timeout": 2000,
}
KEYWORDS = {
    "api_url": "http://keyword:1",
    "model": "keyword",
    "api_key": "keyword",
    "timeout": 3,
}


class TestPriorities:
    @pytest.mark.parametrize(
        ("keywords", "metadata", "environment", "found", "timeout"),
        [
            (KEYWORDS, METADATA, ENVIRONMENT, "keyword", 3),
            ({}, METADATA, ENVIRONMENT, "metadata", 2),
            ({}, None, ENVIRONMENT, "environment", 1),
            (dict.fromkeys(KEYWORDS), METADATA, ENVIRONMENT, "metadata", 2),
            ({}, dict.fromkeys(METADATA), ENVIRONMENT, "environment", 1),
        ],
        ids=["keywords", "metadata", "environment", "None keywords", "None metadata"],
    )
    def test_the_first_that_says_something_wins(
        self,
        keywords: dict[str, Any],
        metadata: dict[str, Any] | None,
        environment: dict[str, str],
        found: str,
        timeout: float,
    ) -> None:
        settings = resolve_settings(metadata, keywords, environment)

        assert settings.api_url == f"http://{found}:1"
        assert settings.model == found
        assert settings.api_key == Secret(found)
        assert settings.timeout == timeout

    @pytest.mark.parametrize(
        "environment", [{}, dict.fromkeys(ENVIRONMENT, ""), {"VLLM_MODEL": " "}]
    )
    def test_defaults(self, environment: dict[str, str]) -> None:
        assert resolve(environment=environment) == Settings()
        assert Settings().api_url == "http://localhost:8000"
        assert Settings().timeout == 30
        assert (Settings().model, Settings().api_key) == (None, None)

    @pytest.mark.parametrize("kind", KINDS)
    async def test_the_environment_is_read_when_a_client_is_made(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_API_URL", "http://one:1")
        async with make_client(kind) as first:
            monkeypatch.setenv("VLLM_API_URL", "http://two:2")
            async with make_client(kind) as second:
                assert first.settings.api_url == "http://one:1"
                assert second.settings.api_url == "http://two:2"

    def test_the_environment_is_not_read_at_import(self) -> None:
        code = (
            "import os; os.environ['VLLM_API_URL'] = 'nonsense'\n"
            "import vllm_unified\n"
            "os.environ['VLLM_API_URL'] = 'http://late:1'\n"
            "print(vllm_unified.AsyncVllmUnified().settings.api_url)"
        )

        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

        assert done.stdout.strip() == "http://late:1", done.stderr


class TestSpelling:
    @pytest.mark.parametrize(
        ("key", "value", "name", "found"),
        [
            ("api_url", "http://a:1", "api_url", "http://a:1"),
            ("apiUrl", "http://a:1", "api_url", "http://a:1"),
            ("vllm_api_url", "http://a:1", "api_url", "http://a:1"),
            ("vllmApiUrl", "http://a:1", "api_url", "http://a:1"),
            ("vllmApiKey", "k", "api_key", Secret("k")),
            ("VLLM_API_KEY", "k", "api_key", Secret("k")),
            ("model", "m", "model", "m"),
            ("vllmModel", "m", "model", "m"),
            ("timeout", 1500, "timeout", 1.5),
            ("firstTokenTimeout", 10, "first_token_timeout", 0.01),
            ("idleTimeout", 10.5, "idle_timeout", 0.0105),
            ("connectTimeout", 1000, "connect_timeout", 1.0),
            ("maxRetries", 0, "max_retries", 0),
            ("max_concurrent_requests", 5, "max_concurrent_requests", 5),
            ("maxConcurrentRequests", 5, "max_concurrent_requests", 5),
            ("queueSize", 0, "queue_size", 0),
            ("maxResponseBytes", 5, "max_response_bytes", 5),
            ("headers", {"a": "b"}, "headers", {"a": "b"}),
            ("proxy", "", "proxy", ""),
            ("tls", {"verify": False}, "tls", TLSConfig(verify=False)),
        ],
    )
    def test_metadata_takes_both_and_the_prefix(
        self, key: str, value: Any, name: str, found: Any
    ) -> None:
        assert getattr(resolve({key: value}), name) == found

    def test_the_same_twice_is_no_conflict(self) -> None:
        assert resolve({"api_key": "k", "vllmApiKey": "k"}).api_key == Secret("k")

    def test_two_different_values_are(self) -> None:
        with pytest.raises(ConfigurationError, match="'max_retries' and as 'maxRetries'"):
            resolve({"max_retries": 1, "maxRetries": 2})

    def test_two_different_keys_are_not_shown(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            resolve({"api_key": SECRET, "vllmApiKey": SECRET + "x"})

        assert SECRET not in str(caught.value)

    @pytest.mark.parametrize(
        "key", ["apikey", "url", "max_retry", "vllm", "", 5, None, "vllm_vllm_model"]
    )
    def test_an_unknown_key_is_named(self, key: Any) -> None:
        with pytest.raises(ConfigurationError, match=f"unknown key {key!r}") as caught:
            resolve({key: 1})

        assert "max_retries" in str(caught.value)

    @pytest.mark.parametrize("metadata", [[("model", "m")], "model", 5])
    def test_metadata_is_a_mapping(self, metadata: Any) -> None:
        with pytest.raises(ConfigurationError, match="metadata must be a mapping"):
            resolve(metadata)


class TestValues:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("api_url", 5),
            ("api_url", b"http://a"),
            ("model", 5),
            ("api_key", 5),
            ("api_key", "two\nlines"),
            ("api_key", "“typographic”"),
            ("timeout", "30"),
            ("timeout", 0),
            ("timeout", -1),
            ("timeout", True),
            ("timeout", float("nan")),
            ("timeout", float("inf")),
            ("timeout", 10**400),
            ("max_retries", -1),
            ("max_retries", 1.0),
            ("max_retries", True),
            ("max_retries", "2"),
            ("max_concurrent_requests", 0),
            ("queue_size", -1),
            ("max_response_bytes", 0),
            ("headers", [("a", "b")]),
            ("headers", {"a": 1}),
            ("headers", {1: "a"}),
            ("headers", {"": "a"}),
            ("headers", {"a b": "c"}),
            ("headers", {"a:": "c"}),
            ("headers", {"ü": "c"}),
            ("headers", {"a": "b\r\nc: d"}),
            ("headers", {"a": "\0"}),
            ("headers", {"a": "\ud83d"}),
            ("proxy", 5),
            ("proxy", "socks5://a:1"),
            ("proxy", "http://"),
            ("proxy", "http://a:nonsense"),
            ("tls", "ca.pem"),
            ("tls", {"ca": "x"}),
            ("tls", {"verify": "no"}),
        ],
    )
    @pytest.mark.parametrize("source", ["keyword", "metadata"])
    def test_a_wrong_value_names_its_key(self, name: str, value: Any, source: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            resolve({name: value}) if source == "metadata" else resolve(**{name: value})

        assert caught.value.message.startswith(name)

    @pytest.mark.parametrize("text", ["soon", "-1", "0", "nan", "inf", "1e999"])
    def test_a_wrong_time_in_the_environment_names_its_variable(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="VLLM_TIMEOUT"):
            resolve(environment={"VLLM_TIMEOUT": text})

    def test_a_wrong_time_is_said_in_its_own_unit(self) -> None:
        with pytest.raises(ConfigurationError, match="milliseconds, not -30"):
            resolve({"timeout": -30})
        with pytest.raises(ConfigurationError, match="of seconds, not -30"):
            resolve(timeout=-30)

    @pytest.mark.parametrize("key", [f" {SECRET}\n", SECRET])
    def test_a_key_that_was_read_from_a_file_loses_its_line_end(self, key: str) -> None:
        assert resolve(api_key=key).api_key == Secret(SECRET)

    @pytest.mark.parametrize("proxy", ["proxy:3128", "http://proxy:3128", " http://proxy:3128 "])
    def test_a_proxy_may_leave_its_scheme_out(self, proxy: str) -> None:
        assert resolve(proxy=proxy).proxy == "http://proxy:3128"


class TestOneCall:
    def test_it_replaces_some_and_adds_headers(self) -> None:
        settings = Settings(headers={"a": "1", "b": "1"}, timeout=5)

        own = settings.for_call({"timeout": 7, "headers": {"b": "2"}, "max_retries": None})

        assert own.timeout == 7
        assert own.headers == {"a": "1", "b": "2"}
        assert own.max_retries == settings.max_retries
        assert settings.timeout == 5

    def test_nothing_replaced_is_the_same(self) -> None:
        settings = Settings()

        assert settings.for_call({}) is settings

    @pytest.mark.parametrize("wrong", [{"timeout": "5"}, {"max_retries": -1}, {"headers": 5}])
    def test_wrong_values_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            Settings().for_call(wrong)


class TestAddresses:
    @pytest.mark.parametrize(
        ("given", "address"),
        [
            ("http://a:8000", "http://a:8000"),
            ("http://a:8000/", "http://a:8000"),
            ("HTTP://A.Example:8000", "http://a.example:8000"),
            (" https://a ", "https://a"),
            ("http://a/v1", "http://a"),
            ("http://a/v1/", "http://a"),
            ("http://a/v1/completions", "http://a"),
            ("http://a/v1/chat/completions", "http://a"),
            ("http://a/v1/chat", "http://a"),
            ("http://a/team/V1", "http://a/team/V1"),
            ("http://a/team/v1", "http://a/team"),
            ("http://a/av1", "http://a/av1"),
            ("http://[::1]:8000", "http://[::1]:8000"),
            ("http://10.0.0.1", "http://10.0.0.1"),
            ("unix:///run/vllm.sock", "unix:///run/vllm.sock"),
            ("unix:/run/Vllm.sock", "unix:///run/Vllm.sock"),
        ],
    )
    def test_every_spelling_is_one(self, given: str, address: str) -> None:
        assert server_address(given) == address
        assert server_address(address) == address

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "localhost:8000",
            "a",
            "//a",
            "ftp://a",
            "http://",
            "http:///v1",
            "http://a:x",
            "http://a:99999",
            "http://a:0",
            "http://[::1",
            "unix://",
            "unix:///",
            "unix://a/b",
            "http://a b",
            "http://a/b c",
            "http://a/ü",
            "file:///etc/passwd",
        ],
    )
    def test_what_is_no_address_is_named(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="api_url"):
            resolve(api_url=url)

    @pytest.mark.parametrize(
        "url",
        [
            f"http://me:{SECRET}@a:8000",
            f"http://{SECRET}@a",
            f"http://:{SECRET}@a",
            f"http://me:{SECRET}@a:nonsense",
            f"http://me:{SECRET}#?@a:nonsense",
            f"ftp://me:{SECRET}@a",
            f"me:{SECRET}@a",
            f"http://a?api_key={SECRET}",
            f"http://a#{SECRET}",
            f"ftp://a?api_key={SECRET}",
            f"http://a:x?api_key={SECRET}",
        ],
    )
    def test_credentials_are_refused_and_not_shown(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            resolve(api_url=url)

        assert SECRET not in f"{caught.value}{caught.value!r}{caught.value.__cause__!r}"

    @given(st.text(max_size=30) | st.text(max_size=20).map("http://{}".format))
    def test_any_text_is_an_address_or_a_configuration_error(self, text: str) -> None:
        try:
            address = server_address(text)
        except ConfigurationError:
            return
        assert server_address(address) == address
        assert address.startswith(("http://", "https://", "unix:///"))


class TestSecrets:
    @pytest.mark.parametrize("form", [repr, str, "{}".format])
    def test_nothing_shows_a_secret(self, form: Any) -> None:
        settings = resolve(
            api_key=SECRET, headers={"x-key": SECRET}, proxy=f"http://me:{SECRET}@proxy"
        )
        client = AsyncVllmUnified(api_key=SECRET, headers={"x-key": SECRET})

        for thing in (settings, settings.api_key, client, client.settings):
            assert SECRET not in form(thing)

    def test_a_client_that_cannot_be_made_does_not_show_it(self) -> None:
        for kind in (AsyncVllmUnified, VllmUnified):
            with pytest.raises(ConfigurationError) as caught:
                kind(api_key=f"{SECRET}\n{SECRET}")
            assert SECRET not in str(caught.value)

    def test_a_secret_is_not_encoded_by_accident(self) -> None:
        with pytest.raises(TypeError):
            msgspec.json.encode(resolve(api_key=SECRET))

    def test_secrets_can_be_compared(self) -> None:
        assert Secret("a") == Secret("a") != Secret("b")
        assert Secret("a") != "a"
        assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
