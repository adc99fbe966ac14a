"""A stand-in for vLLM's API server: its arguments, its port, its answers, and its ways to fail.

``FAKE_MODE`` chooses: ``ok``, ``fail`` (exit 1 with an engine's words), ``hang`` (never listens),
``port`` (the first start finds its port in use), ``core`` (a child that ignores SIGTERM),
``stray`` (a child that also leaves the session), ``once`` (only the first start succeeds).
``FAKE_COUNT`` is a file that gets a line per start, ``FAKE_DELAY`` the seconds before it listens.

While it runs it can be told: ``POST /fake/exit`` ``{"code": 0}``, ``/fake/hang`` (generates
nothing any more), ``/fake/busy`` ``{"running": 1}`` (what its metrics say).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"

running = 0
hanging = threading.Event()
adapters: dict[str, str] = {}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        global running
        key = os.environ.get("VLLM_API_KEY")
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length))
        if self.path == "/fake/exit":
            print("(APIServer pid=1) ERROR 11-22 15:30:41 [x.py:1] EngineDeadError: the core died")
            sys.stdout.flush()
            os._exit(asked["code"])
        elif self.path == "/fake/hang":
            hanging.set()
            self.answer(200, {})
        elif self.path == "/fake/busy":
            running = asked["running"]
            self.answer(200, {})
        elif key and self.headers.get("Authorization") != f"Bearer {key}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/v1/load_lora_adapter":
            self.load(asked["lora_name"], asked["lora_path"])
        else:
            if hanging.is_set():
                time.sleep(300)
            self.answer(200, {"model": asked["model"], "choices": [{"text": " 2"}]})

    def load(self, name: str, path: str) -> None:
        if Path(path).is_dir():
            adapters[name] = path
            self.answer(200, f"Success: LoRA adapter '{name}' added successfully.")
        else:
            self.answer(404, {"error": {"message": f"No adapter found for {path}"}})

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, f'vllm:num_requests_running{{engine="0"}} {running}.0\n')
        elif self.path == "/v1/models":
            cards: list[dict[str, Any]] = [{"id": "fake", "root": "/m", "parent": None}]
            for name, path in adapters.items():
                cards.append({"id": name, "root": path, "parent": "fake"})
            self.answer(200, {"data": cards})
        else:
            self.answer(200, {"argv": sys.argv, "env": dict(os.environ)})

    def answer(self, status: int, body: object) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def starts() -> int:
    """How often it was started, this time included."""
    count = Path(os.environ["FAKE_COUNT"])
    with count.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(count.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    known, _ = parser.parse_known_args()
    mode = os.environ.get("FAKE_MODE", "ok")
    number = starts()
    print("(APIServer pid=1) INFO 11-22 15:30:41 [model.py:733] Resolved architecture: Fake")
    sys.stdout.flush()
    if mode == "fail" or (mode == "once" and number > 1):
        print("(EngineCore pid=2) ERROR 11-22 15:30:41 [core.py:1] ValueError: no such weights")
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    if mode == "port" and number == 1:
        sys.exit("OSError: [Errno 98] Address already in use")
    if mode in {"core", "stray"}:
        core = subprocess.Popen(
            [sys.executable, "-c", CORE], start_new_session=mode == "stray", close_fds=True
        )
        with Path(os.environ["FAKE_COUNT"]).open("a") as file:
            file.write(f"{core.pid}\n")
    if mode == "hang":
        time.sleep(300)
    time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
    server = ThreadingHTTPServer((known.host, known.port), Handler)
    server.daemon_threads = True

    def stop(number: int, frame: object) -> None:
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
