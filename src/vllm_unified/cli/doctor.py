"""``vllm-unified doctor``"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlsplit

import msgspec
import typer

from vllm_unified.cli.generate import AsJson
from vllm_unified.cli.target import Url, connect, default_url, local_servers
from vllm_unified.cli.terminal import out, print_json
from vllm_unified.hardware.detect import Hardware, detect
from vllm_unified.servers import BUNDLED_NAME, find_engine
from vllm_unified.servers.bundled import is_complete
from vllm_unified.servers.cache import cache_root, models_dir

_GIB = 2**30
# Measured: the CPU engine takes 3.5 GB on disk, and serves the bundled model in 3.6 GB.
_DISK_NEEDED = 8 * _GIB
_MEMORY_NEEDED = 4 * _GIB
_TOLD_FLAGS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimddp", "bf16", "sve2"}
_FOREIGN_GPU = (
    "vllm-unified installs vLLM for CPUs and NVIDIA GPUs only. For a vLLM of your own for this "
    "one, set VLLM_UNIFIED_ENGINE_PYTHON."
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "problem"]
    """A problem keeps something from working; a note is worth knowing."""
    text: str
    advice: str | None = None
    details: Hardware | None = None
    """With the system: all that is known of the machine."""


def doctor(url: Url = None, json: AsJson = False) -> None:
    """Look at hardware, engine, model, ports and server; say what to do about each problem.

    Exit code 1 if there is a problem.
    """
    findings = list(examine(url))
    if json:
        print_json(findings)
    else:
        _show(findings)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def examine(url: str | None) -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    hardware = detect()
    yield Finding(
        name="system",
        state="ok",
        text=f"{platform.platform()}, Python {platform.python_version()}",
        details=hardware,
    )
    yield from _hardware(hardware)
    if platform.system() == "Linux":
        yield from _installation(hardware)
    else:
        yield Finding(
            name="engine",
            state="note",
            text="servers run on Linux; on this system the client talks to servers elsewhere",
        )
    yield from _proxy(url)
    yield from _server(url)


def _hardware(hardware: Hardware) -> Iterator[Finding]:
    flags = ", ".join(sorted(hardware.cpu_flags & _TOLD_FLAGS))
    nodes = len(hardware.numa_nodes)
    yield Finding(
        name="processor",
        state="ok",
        text=f"{hardware.cpus} usable, {hardware.cpu_model}"
        + (f" ({flags})" if flags else "")
        + (f", {nodes} NUMA nodes" if nodes > 1 else ""),
    )
    gib = f"{hardware.memory_available / _GIB:.1f} of {hardware.memory_total / _GIB:.1f} GiB free"
    tight = 0 < hardware.memory_available < _MEMORY_NEEDED
    yield Finding(
        name="memory",
        state="note" if tight else "ok",
        text=gib + ("" if hardware.memory_limit is None else ", the limit of this container"),
        advice="A local server with the bundled model takes 3.6 GB." if tight else None,
    )
    if not hardware.gpus:
        yield Finding(name="gpu", state="ok", text="none: local servers use the CPU")
    for gpu in hardware.gpus:
        free = f"{gpu.memory_free / _GIB:.1f} of {gpu.memory_total / _GIB:.1f} GiB free"
        busy = "" if gpu.utilization is None else f", {gpu.utilization:.0%} busy"
        foreign = gpu.vendor != "nvidia"
        yield Finding(
            name="gpu",
            state="note" if foreign else "ok",
            text=f"{gpu.name}, {free}{busy}, driver {gpu.driver or 'not known'}",
            advice=_FOREIGN_GPU if foreign else None,
        )


def _installation(hardware: Hardware) -> Iterator[Finding]:
    engine = find_engine()
    if engine is not None:
        text = f"vLLM {engine.version} for {engine.kind}, {engine.path}"
        slow = bool(hardware.nvidia_gpus) and engine.kind == "cpu"
        yield Finding(
            name="engine",
            state="note" if slow else "ok",
            text=text,
            advice="`vllm-unified engine install cuda` makes use of the GPU." if slow else None,
        )
    else:
        yield Finding(
            name="engine",
            state="note",
            text="no vLLM on this machine (a client of servers elsewhere needs none)",
            advice="`vllm-unified engine install`, or let `serve` and `demo` install it.",
        )
    path = models_dir() / BUNDLED_NAME
    made = is_complete(path)
    yield Finding(
        name="model",
        state="ok" if made else "note",
        text=f"{BUNDLED_NAME}: {path if made else 'is made when a server first needs it'}",
    )
    root = cache_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    full = engine is None and free < _DISK_NEEDED
    yield Finding(
        name="disk",
        state="problem" if full else "ok",
        text=f"{free / _GIB:.0f} GiB free for {root}",
        advice="An engine needs about 8 GiB while it is installed; VLLM_UNIFIED_CACHE moves it."
        if full
        else None,
    )
    for server in local_servers():
        yield Finding(
            name="local server",
            state="ok",
            text=f"{server.model} at {server.url}, pid {server.pid}",
        )


def _proxy(url: str | None) -> Iterator[Finding]:
    parts = urlsplit(url or default_url())
    proxy = urllib.request.getproxies().get(parts.scheme)
    host = parts.hostname or ""
    if proxy and not urllib.request.proxy_bypass(host):
        shown = proxy.rpartition("@")[2]
        yield Finding(
            name="proxy",
            state="note",
            text=f"requests to {host} go through the proxy {shown}, as the environment says",
            advice=f"If that is not meant: NO_PROXY={host}",
        )


def _server(url: str | None) -> Iterator[Finding]:
    where = url or default_url()
    with connect(where, None, 10.0) as vllm:
        health = vllm.health(probe=True, timeout=10.0)
        if health:
            served = ", ".join(card.id for card in vllm.list_models())
            took = f"{health.duration * 1000:.0f} ms"
            yield Finding(
                name="server",
                state="ok",
                text=f"{where} serves {served}; it generated a token in {took}",
            )
            return
    first, _, hint = str(health.error).partition("\n")
    yield Finding(
        name="server",
        state="problem" if url or os.environ.get("VLLM_API_URL") else "note",
        text=f"{first}{_who_listens(where)}",
        advice=hint or None,
    )


def _who_listens(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=2).close()
    except OSError:
        return f"; nothing listens on port {port}"
    return f"; something listens on port {port}"


def _show(findings: list[Finding]) -> None:
    marks = {"ok": "[green]ok[/green]     ", "note": "[yellow]note[/yellow]   "}
    for finding in findings:
        mark = marks.get(finding.state, "[bold red]problem[/bold red]")
        out.print(f"{mark} {finding.name + ':':13} ", end="")
        out.print(finding.text, markup=False)
        for line in (finding.advice or "").splitlines():
            out.print(f"{'':21} {line}", style="dim", markup=False)
