"""A small Docker engine: its API on a Unix socket, and simulators for containers."""

from __future__ import annotations

import contextlib
import json
import re
import socketserver
import struct
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from vllm_unified.simulator.background import BackgroundSimulator, Fleet

IMAGE = "vllm-test:1"
STARTED = "2026-11-22T20:00:{:02}.123456789Z"


class FakeContainer:
    """A container, whose process is a simulator."""

    def __init__(self, id: str, name: str, order: dict[str, Any]) -> None:
        self.id = id
        self.name = name
        self.order = order
        """As it was sent to ``/containers/create``."""
        self.status = "created"
        self.exit_code = 0
        self.starts = 0
        self.process: BackgroundSimulator | None = None

    @property
    def port(self) -> int:
        """The host's."""
        [bindings] = self.order["HostConfig"]["PortBindings"].values()
        return int(bindings[0]["HostPort"])

    @property
    def environment(self) -> dict[str, str]:
        """Of its process."""
        return dict(item.split("=", 1) for item in self.order["Env"])

    def attributes(self) -> dict[str, Any]:
        """As ``docker inspect`` shows them."""
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "Config": {
                "Image": self.order["Image"],
                "Labels": self.order["Labels"],
                "Tty": False,
            },
            "State": {
                "Status": self.status,
                "ExitCode": self.exit_code,
                "OOMKilled": False,
                "Error": "",
                "StartedAt": STARTED.format(self.starts - 1)
                if self.starts
                else "0001-01-01T00:00:00Z",
            },
        }


class FakeDocker:
    """Listens on a socket; its attributes choose how it behaves."""

    def __init__(self, socket: Path) -> None:
        self.url = f"unix://{socket}"
        self.images = {IMAGE}
        self.pullable: set[str] = set()
        self.runtimes: dict[str, Any] = {"runc": {}}
        self.containers: dict[str, FakeContainer] = {}
        self.calls: list[str] = []
        """Method and path of each request, without the version."""
        self.fail_starts = 0
        """How many containers to come end at once, with an engine's words."""
        self.silent = False
        """Whether containers run and never listen."""
        self.taken_ports = 0
        """How many starts to come find their port taken."""
        self.log = "INFO 11-22 15:30:41 [model.py:733] Resolved architecture: Fake\n"
        self.held = threading.Event()
        """Starts wait for it."""
        self.held.set()
        self._made = 0
        self._fleet = Fleet()
        self._lock = threading.RLock()
        self._server = _Server(str(socket), _Handler)
        self._server.docker = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """End everything."""
        self.held.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._fleet.close()

    @property
    def only(self) -> FakeContainer:
        """The one container."""
        [container] = self.containers.values()
        return container

    def kill(self, container: FakeContainer, code: int = 137) -> None:
        """End a container's process from outside."""
        with self._lock:
            if container.process is not None:
                container.process.stop()
                container.process = None
            container.status, container.exit_code = "exited", code

    def remove(self, container: FakeContainer) -> None:
        """End a container from outside, and remove it."""
        with self._lock:
            self.kill(container)
            self.containers.pop(container.id, None)

    def find(self, key: str) -> FakeContainer | None:
        """By id or name."""
        with self._lock:
            known = list(self.containers.values())
        return next((each for each in known if key in (each.id, each.name)), None)

    def create(self, name: str, order: dict[str, Any]) -> tuple[int, Any]:
        """``POST /containers/create``"""
        if order["Image"] not in self.images:
            return 404, {"message": f"No such image: {order['Image']}"}
        with self._lock:
            if (holder := self.find(name)) is not None:
                said = f'The container name "/{name}" is already in use by container {holder.id}.'
                return 409, {"message": f"Conflict. {said}"}
            self._made += 1
            id = f"{self._made:064x}"
            self.containers[id] = FakeContainer(id, name, order)
        return 201, {"Id": id, "Warnings": []}

    def start(self, container: FakeContainer) -> tuple[int, Any]:
        """``POST /containers/ID/start``"""
        self.held.wait(10)
        if container.status == "running":
            return 304, None
        if self.taken_ports:
            self.taken_ports -= 1
            said = f"Bind for 127.0.0.1:{container.port} failed: port is already allocated"
            return 500, {"message": f"driver failed programming external connectivity: {said}"}
        container.starts += 1
        if self.fail_starts:
            self.fail_starts -= 1
            self.log = "ERROR 11-22 15:30:41 [core.py:1] ValueError: no such weights\n"
            container.status, container.exit_code = "exited", 1
            return 204, None
        if not self.silent:
            container.process = self._process(container)
        container.status = "running"
        return 204, None

    def _process(self, container: FakeContainer) -> BackgroundSimulator:
        args = container.order["Cmd"]
        key = container.environment.get("VLLM_API_KEY")
        return self._fleet.add(
            model=args[args.index("--served-model-name") + 1],
            port=container.port,
            api_keys=(key,) if key else (),
        )


@contextlib.contextmanager
def fake_docker() -> Iterator[FakeDocker]:
    """One for as long as the block runs. A socket's path may be 108 bytes long at most."""
    with tempfile.TemporaryDirectory() as folder:
        engine = FakeDocker(Path(folder) / "d.sock")
        try:
            yield engine
        finally:
            engine.close()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    docker: FakeDocker


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5
    server: _Server

    def address_string(self) -> str:
        return "a client"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path = re.sub(r"^/v[\d.]+", "", unquote(parts.path))
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        docker = self.server.docker
        docker.calls.append(f"{self.command} {path}")
        status, answer = _answer(
            docker, self.command, path, query, json.loads(sent) if sent else None
        )
        body = answer if isinstance(answer, bytes) else b"" if answer is None else _json(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        if isinstance(answer, list):  # as it comes
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            pieces = [_json(each) + b"\n" for each in answer]
            chunks = [f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces]
            self.wfile.write(b"".join([*chunks, b"0\r\n\r\n"]))
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body:
                self.wfile.write(body)


def _json(answer: object) -> bytes:
    return json.dumps(answer).encode()


def _answer(
    docker: FakeDocker, method: str, path: str, query: dict[str, str], sent: Any
) -> tuple[int, Any]:
    match method, path.strip("/").split("/"):
        case "GET", ["version"]:
            return 200, {
                "ApiVersion": "1.45",
                "Version": "27.0.0",
                "Components": [{"Name": "Engine"}],
            }
        case "GET", ["info"]:
            return 200, {"Runtimes": docker.runtimes, "MemTotal": 2**34, "DockerRootDir": "/nope"}
        case "GET", ["images", *name, "json"]:
            known = "/".join(name) in docker.images
            return (200, {"Id": "sha256:1"}) if known else (404, {"message": "No such image"})
        case "POST", ["images", "create"]:
            return _pull(docker, f"{query['fromImage']}:{query['tag']}")
        case "GET", ["containers", "json"]:
            wanted = json.loads(query["filters"])["label"]
            return 200, _json([each.attributes() for each in _labelled(docker, wanted)])
        case "POST", ["containers", "create"]:
            return docker.create(query["name"], sent)
        case _, ["containers", key, *rest]:
            container = docker.find(key)
            if container is None:
                return 404, {"message": f"No such container: {key}"}
            return _of_container(docker, container, method, rest)
    return 404, {"message": f"page not found: {method} {path}"}


def _of_container(
    docker: FakeDocker, container: FakeContainer, method: str, rest: list[str]
) -> tuple[int, Any]:
    match method, rest:
        case "GET", ["json"]:
            return 200, container.attributes()
        case "GET", ["logs"]:
            text = docker.log.encode()
            return 200, struct.pack(">BxxxI", 1, len(text)) + text
        case "POST", ["start"]:
            return docker.start(container)
        case "POST", ["stop"]:
            docker.kill(container, code=0)
            return 204, None
        case "DELETE", []:
            docker.remove(container)
            return 204, None
    return 404, {"message": "page not found"}


def _labelled(docker: FakeDocker, wanted: list[str]) -> list[FakeContainer]:
    return [
        each
        for each in docker.containers.values()
        if set(wanted) <= {f"{name}={value}" for name, value in each.order["Labels"].items()}
    ]


def _pull(docker: FakeDocker, image: str) -> tuple[int, Any]:
    news: list[dict[str, Any]] = [{"status": "Pulling from somewhere"}]
    if image in docker.pullable:
        docker.images.add(image)
        news += [
            {
                "status": "Downloading",
                "id": "abc",
                "progressDetail": {"current": part, "total": 200},
            }
            for part in (50, 51, 200)
        ]
    else:
        news.append({"error": "pull access denied for nope"})
    return 200, news
