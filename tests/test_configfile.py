"""Files that describe a client: what they become, and what is said of those that are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import KINDS, Kind
from vllm_unified import (
    AsyncVllmUnified,
    ConfigurationError,
    EndpointStatus,
    VllmUnified,
)
from vllm_unified.configfile import read_config
from vllm_unified.endpoints.config import EndpointConfig
from vllm_unified.settings import Secret, Settings
from vllm_unified.simulator import Fleet

EXAMPLE = Path(__file__).parent.parent / "examples" / "fleet.toml"
KEY = "sk-geheim-0123456789"
GPU1 = '[endpoints.gpu1]\nurl = "http://gpu1:8000"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "fleet.toml"
        file.write_text(text)
        return file

    return write


def complaint(file: Path, **environment: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_config(file, environment)
    text = str(caught.value)
    assert KEY not in text
    return text


# What a file becomes


@pytest.mark.parametrize("text", ["", GPU1], ids=["no endpoints", "endpoints"])
def test_the_file_becomes_what_the_constructor_takes(write: Write, text: str) -> None:
    config = read_config(write(text), {})
    AsyncVllmUnified(config.resources, config.metadata)


def test_settings_are_metadata(write: Write) -> None:
    config = read_config(write('[settings]\nmodel = "m"\ntimeout = "60s"\nmaxRetries = 4\n'), {})
    assert config.metadata == {"model": "m", "timeout": "60s", "max_retries": 4}


def test_endpoints_and_their_options_are_resources(write: Write) -> None:
    text = f'strategy = "session"\nhealth_check = {{ interval = "2s" }}\n{GPU1}weight = 2\n'
    assert read_config(write(text), {}).resources == {
        "strategy": "session",
        "health_check": {"interval": "2s"},
        "endpoints": {"gpu1": {"url": "http://gpu1:8000", "weight": 2}},
    }


def test_an_endpoint_may_be_an_address_only(write: Write) -> None:
    config = read_config(write('[endpoints]\ngpu1 = "http://gpu1:8000"\n'), {})
    assert config.resources["endpoints"] == {"gpu1": {"url": "http://gpu1:8000"}}


def test_without_endpoints_it_is_a_client_for_the_address_in_its_settings(write: Write) -> None:
    config = read_config(write('[settings]\napi_url = "http://gpu1:8000/v1"\n'), {})
    assert config.resources["endpoints"] == {"http://gpu1:8000": "http://gpu1:8000"}


def test_without_any_address_the_environment_has_it(write: Write) -> None:
    config = read_config(write(""), {"VLLM_API_URL": "http://gpu9:8000"})
    assert list(config.resources["endpoints"]) == ["http://gpu9:8000"]


def test_a_byte_order_mark_is_no_part_of_the_text(write: Write) -> None:
    assert list(read_config(write("\ufeff" + GPU1), {}).resources["endpoints"]) == ["gpu1"]


def test_paths_are_relative_to_the_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(f'[settings.tls]\nca_file = "ca.pem"\ncert_file = "/c.pem"\n{GPU1}')
    monkeypatch.chdir(tmp_path.parent)
    config = read_config(file.relative_to(tmp_path.parent), {})
    assert config.metadata["tls"] == {"ca_file": str(tmp_path / "ca.pem"), "cert_file": "/c.pem"}


def test_paths_of_an_endpoint_are_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    config = read_config(write(f'{GPU1}tls = {{ ca_file = "ca.pem" }}\n'), {})
    assert config.resources["endpoints"]["gpu1"]["tls"] == {"ca_file": str(tmp_path / "ca.pem")}


def test_the_example_is_right() -> None:
    config = read_config(EXAMPLE, {"HOSTED_VLLM_KEY": KEY})
    assert list(config.resources["endpoints"]) == ["gpu1", "gpu2", "hosted"]


def test_every_field_of_an_endpoint_can_be_given(write: Write) -> None:
    """One that is added to the code must not be forgotten here."""
    known = complaint(write(f"{GPU1}nope = 1\n")).partition("Known: ")[2]
    fields = {*EndpointConfig.__struct_fields__, *Settings.__struct_fields__, "url"}
    wanted = fields - {"id", "settings", "own_transport", "api_url"}
    assert {*re.findall(r"\w+", known)} == wanted | {"api_key_env"}


# Keys


@pytest.mark.parametrize("table", ["settings", "endpoints.gpu1"])
def test_a_key_of_an_environment_variable(write: Write, table: str) -> None:
    text = f'[{table}]\napi_key_env = "GPU1_KEY"\n'
    text += "" if table == "settings" else 'url = "http://gpu1:8000"\n'
    config = read_config(write(text), {"GPU1_KEY": f" {KEY}\n"})
    found = config.metadata if table == "settings" else config.resources["endpoints"]["gpu1"]
    assert found["api_key"] == Secret(KEY)
    assert "api_key_env" not in found
    assert not config.holds_key


@pytest.mark.parametrize("text", [f'[settings]\napi_key = "{KEY}"\n', f'{GPU1}api_key = "{KEY}"\n'])
def test_a_key_in_the_file_is_told(write: Write, text: str) -> None:
    assert read_config(write(text), {}).holds_key


def test_no_repr_shows_a_key(write: Write) -> None:
    text = f'[settings]\nheaders = {{ "X-Key" = "{KEY}" }}\n{GPU1}api_key = "{KEY}"\n'
    config = read_config(write(text), {})
    assert KEY not in repr(config)
    assert KEY not in repr(config.resources)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_that_is_missing_is_named(write: Write, value: str | None) -> None:
    environment = {} if value is None else {"GPU1_KEY": value}
    text = complaint(write(f'{GPU1}api_key_env = "GPU1_KEY"\n'), **environment)
    assert "fleet.toml, [endpoints.gpu1]: api_key_env" in text
    assert "GPU1_KEY is not set" in text


# What is wrong, and where


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strategie = 1", "fleet.toml: unknown key 'strategie'\nKnown: strategy, health_check, "),
        ("[setings]", "fleet.toml: unknown table 'setings'\nKnown: "),
        ("[settings]\ntimeuot = 1", "[settings]: unknown key 'timeuot'\nKnown: api_url, model, "),
        ("[settings.tls]\nca = 'x'", "[settings.tls]: unknown key 'ca'\nKnown: ca_file, "),
        (f"{GPU1}nope = 1", "[endpoints.gpu1]: unknown key 'nope'\nKnown: url, model, "),
        (f"{GPU1}id = 'x'", "[endpoints.gpu1]: unknown key 'id'"),
        (f"{GPU1}[endpoints.gpu1.breaker]", "[endpoints.gpu1]: unknown table 'breaker'"),
        (f"{GPU1}circuit_breaker = {{ x = 1 }}", "[endpoints.gpu1]: circuit_breaker"),
        ("[endpoints.'gpu1:8000']\nnope = 1", '[endpoints."gpu1:8000"]: unknown key'),
        ("[endpoints.gpu1]\nweight = 2", "[endpoints.gpu1]: url is missing"),
        ("endpoints = ['http://gpu1:8000']", "endpoints must be tables, such as [endpoints.gpu1]"),
        ("[endpoints]\ngpu1 = 3", "[endpoints.gpu1]: this must be a table, not int"),
        ("settings = 3", "[settings]: this must be a table, not int"),
        ("[settings]\ntimeout = 'soon'", "[settings]: timeout must be"),
        ("[settings]\nmax_retries = 1\nmaxRetries = 2", "[settings]: max_retries is given twice"),
        ("[settings]\napi_url = 'gpu1'", "[settings]: api_url is not the URL of a server"),
        (f"{GPU1}max_concurrent_requests = 0", "[endpoints.gpu1]: max_concurrent_requests must be"),
        (f"{GPU1}weight = -1", "[endpoints.gpu1]: weight must be"),
        ("[endpoints]\ngpu1 = 'gpu1:8000'", "[endpoints.gpu1]: url is not the URL"),
        (f"[settings]\napi_key = '{KEY}'\napi_key_env = 'K'", "[settings]: api_key and api_key_e"),
        ("[settings]\napi_key_env = 3", "[settings]: api_key_env must be the name of an env"),
        (f"[settings]\napi_key = '{KEY}\u2019'", "[settings]: api_key has characters"),
        (f"strategy = 'best'\n{GPU1}", "fleet.toml: there is no routing strategy 'best'"),
        ("health_check = 3", "fleet.toml: health_check must be"),
        ("health_check = { often = 1 }", "fleet.toml: health_check has the unknown key 'often'"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(write: Write, text: str, words: str) -> None:
    assert words in complaint(write(text))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"{GPU1}api_key = {KEY}", "line 3, column 11"),
        (f"{GPU1}{GPU1}", "line 3, column 16"),
        (f"{GPU1}weight = [1,", "line 3, column 13"),
        ("weight = 1" * 1000, "line 1, column 11"),
    ],
    ids=["value", "twice", "end", "long line"],
)
def test_what_is_not_toml_is_told_with_line_and_column(write: Write, text: str, place: str) -> None:
    told = complaint(write(text))
    assert "fleet.toml is not TOML: " in told
    assert place in told


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_bytes(b"# one\n# tw\xf6\n")
    assert complaint(file).endswith("fleet.toml is not UTF-8 (in line 2)")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "none.toml"
    assert complaint(file) == f"cannot read {file}: No such file or directory"


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"cannot read {tmp_path}: Is a directory"


# from_config


@pytest.fixture(params=KINDS)
def load(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``from_config`` of both clients: the settings and the endpoints of what it made."""
    kind: Kind = request.param
    cls: Any = AsyncVllmUnified if kind == "async" else VllmUnified

    def load(file: Path, **keywords: Any) -> tuple[Settings, list[EndpointStatus]]:
        client = cls.from_config(file, **keywords)
        try:
            return client.settings, client.list_endpoints()
        finally:
            if kind == "blocking":
                client.close()

    return load


def test_a_client_has_the_settings_and_the_endpoints_of_its_file(
    write: Write, load: Callable[..., Any]
) -> None:
    settings, endpoints = load(write(f'[settings]\nmodel = "m"\n{GPU1}weight = 2\n'))
    assert settings.model == "m"
    assert [(each.id, each.url, each.weight) for each in endpoints] == [
        ("gpu1", "http://gpu1:8000", 2.0)
    ]


def test_keywords_win_over_the_file_and_the_file_over_the_environment(
    write: Write, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("VLLM_MODEL", "e"), ("VLLM_TIMEOUT", "1"), ("VLLM_API_KEY", "e")):
        monkeypatch.setenv(variable, value)
    settings, _ = load(write('[settings]\nmodel = "f"\ntimeout = "60s"\n'), timeout=7)
    assert (settings.timeout, settings.model, settings.api_key) == (7.0, "f", Secret("e"))


def test_an_address_given_as_keyword_is_the_only_server(
    write: Write, load: Callable[..., Any]
) -> None:
    settings, endpoints = load(write(GPU1), api_url="http://gpu9:8000")
    assert settings.api_url == "http://gpu9:8000"
    assert endpoints == []


def test_a_file_that_is_wrong_makes_no_client(write: Write, load: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"\[settings\]: unknown key 'x'"):
        load(write("[settings]\nx = 1"))


async def test_a_request_goes_to_a_server_of_the_file_with_its_key(
    write: Write, vllm_fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = vllm_fleet.add(api_keys=(KEY,))
    monkeypatch.setenv("GPU1_KEY", KEY)
    file = write(f'[endpoints.gpu1]\nurl = "{server.url}"\napi_key_env = "GPU1_KEY"\n')
    async with AsyncVllmUnified.from_config(file) as vllm:
        answer = await vllm.generate("Hello", max_tokens=1)
    assert answer.metadata.endpoint == server.url
    assert answer.usage.completion_tokens == 1
