"""``vllm-unified models --info``"""

from __future__ import annotations

from tests.cli.conftest import Cli
from vllm_unified import ModelInfo
from vllm_unified.simulator import Fleet


def test_what_is_known_has_its_source(cli: Cli, vllm_fleet: Fleet) -> None:
    done = cli("models", "--info", "--url", vllm_fleet.add(model="dragon").url)
    assert (done.code, done.err) == (0, "")
    title, *lines = done.out.splitlines()
    assert title.split() == ["value", "source"]
    found = {line[: title.index("value")].strip(): line.split()[-2:] for line in lines}
    assert found["id"] == ["dragon", "/v1/models"]
    assert found["max model len"] == ["4096", "/v1/models"]
    assert found["dtype"] == ["bfloat16", "/server_info"]
    assert found["quantization"] == ["none", "/server_info"]
    assert found["lora enabled"] == ["no", "/server_info"]


def test_what_is_not_known_is_named(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add(model="dragon", dev_mode=False).url
    done = cli("models", "--info", "--url", url)
    [unknown] = [line for line in done.out.splitlines() if line.startswith("not known")]
    assert "dtype, quantization," in unknown
    assert "max model len" not in unknown


def test_info_as_json(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add(model="dragon").url
    found = cli("models", "--info", "--json", "--url", url).json
    assert tuple(found) == ModelInfo.__struct_fields__
    assert (found["dtype"], found["sources"]["dtype"]) == ("bfloat16", "/server_info")


def test_info_of_an_unknown_model(cli: Cli, vllm_fleet: Fleet) -> None:
    url = vllm_fleet.add(model="dragon").url
    done = cli("models", "--info", "--model", "nope", "--url", url)
    assert (done.code, done.out) == (1, "")
    assert "'nope'; it serves dragon" in done.err


def test_info_where_nobody_is(cli: Cli, nobody: str) -> None:
    done = cli("models", "--info", "--url", nobody)
    assert done.code == 3
    assert f"No vLLM server answers at {nobody}" in done.err
