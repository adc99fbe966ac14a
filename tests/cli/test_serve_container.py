"""``serve --container``, with a small Docker engine."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.cli.conftest import Cli
from tests.support.fake_docker import IMAGE, FakeDocker, fake_docker
from vllm_unified.cli.serve_container import gpus_of
from vllm_unified.errors import ConfigurationError


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    with fake_docker() as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.url)
        yield engine


def test_detached_it_runs_on(cli: Cli, docker: FakeDocker) -> None:
    arguments = ("org/model", "--container", IMAGE, "--gpus", "none", "--detach", "--json")
    done = cli("serve", *arguments)
    container = docker.only
    assert done.code == 0
    assert done.json == {
        "url": f"http://127.0.0.1:{container.port}",
        "model": "org/model",
        "container": container.name,
    }
    assert f"docker rm -f {container.name}" in done.err
    assert (container.status, container.order["HostConfig"].get("DeviceRequests")) == (
        "running",
        None,
    )


def test_in_the_foreground_ctrl_c_removes_it(
    cli: Cli, docker: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(message: str, **options: object) -> None:
        if "docker logs" in message:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("vllm_unified.cli.serve_container.err.print", interrupted)
    assert cli("serve", "org/model", "--container", IMAGE).code == 130
    assert docker.containers == {}


def test_a_missing_image_that_cannot_be_pulled_is_told(cli: Cli, docker: FakeDocker) -> None:
    done = cli("serve", "org/model", "--container", "org/none:1")
    assert done.code == 1
    assert "the image org/none:1 cannot be pulled: pull access denied" in done.err


def test_gpus_are_said_as_docker_has_it() -> None:
    assert gpus_of("all") == "all"
    assert gpus_of("none") is None
    assert gpus_of("2") == 2
    assert gpus_of("device=0,GPU-3f") == ("0", "GPU-3f")
    with pytest.raises(ConfigurationError, match="--gpus some"):
        gpus_of("some")
