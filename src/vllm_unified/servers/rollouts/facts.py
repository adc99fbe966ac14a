"""What a decision about a server's change is made from, gathered from server and machine."""

from __future__ import annotations

import os
import shutil

from vllm_unified.hardware.detect import Hardware, detect
from vllm_unified.models.quantization import QuantizationConfig
from vllm_unified.models.weights import model_folder, weights_bytes
from vllm_unified.servers.cache import checkpoints_dir
from vllm_unified.servers.engines import Engine
from vllm_unified.servers.rollouts.checkpoints import find_checkpoint
from vllm_unified.servers.rollouts.preflight import Facts
from vllm_unified.servers.rollouts.successor import Successor
from vllm_unified.servers.spec import ServerSpec

# vLLM's default for --gpu-memory-utilization.
_GPU_SHARE = 0.92
_PLAIN_BITS = 16


def gather_facts(
    spec: ServerSpec,
    engine: Engine,
    new: Successor,
    config: QuantizationConfig,
    server_bytes: int,
) -> Facts:
    """Look at the old server's spec, at what is to take its place, and at this machine.

    Args:
        server_bytes: Memory that the old server has.
    """
    machine = detect()
    must_make = config.enabled and new.checkpoint is None and new.spec.quantization is None
    made = find_checkpoint(new.recipe) if new.recipe else None
    source_bytes = _bytes_of(new.source) or 0
    gpu_free, gpu_needed = _gpu(machine, spec)
    return Facts(
        platform=engine.kind,
        cores=machine.cores or machine.cpus,
        amx=any(flag.startswith("amx") for flag in machine.cpu_flags),
        lora=spec.enable_lora,
        port=spec.port,
        extra_args=spec.extra_args,
        checkpoint=new.checkpoint,
        is_there=new.checkpoint is None or _may_be_there(new.checkpoint),
        stored=new.stored,
        must_make=must_make and made is None,
        source=new.source if not must_make or new.source_folder else None,
        source_bytes=source_bytes,
        new_bytes=_new_bytes(new, config, source_bytes),
        group_size=new.group_size,
        server_bytes=server_bytes,
        weights_bytes=_bytes_of(spec.model) or 0,
        memory_available=machine.memory_available,
        gpu_free=gpu_free,
        gpu_needed=gpu_needed,
        disk_free=shutil.disk_usage(checkpoints_dir()).free,
    )


def _may_be_there(checkpoint: str) -> bool:
    """Whether it is a folder with a configuration, or a repository's id, which vLLM would fetch."""
    folder = model_folder(checkpoint, os.environ)
    if folder is not None:
        return (folder / "config.json").is_file()
    looks_like_path = checkpoint.startswith(("/", ".", "~"))
    return not looks_like_path and checkpoint.count("/") == 1


def _bytes_of(model: str | None) -> int | None:
    folder = model_folder(model, os.environ) if model else None
    return weights_bytes(folder) if folder else None


def _new_bytes(new: Successor, config: QuantizationConfig, source_bytes: int) -> int:
    if new.checkpoint:
        return _bytes_of(new.checkpoint) or source_bytes
    bits = config.bits if config.enabled and config.bits else _PLAIN_BITS
    return source_bytes * bits // _PLAIN_BITS


def _gpu(machine: Hardware, spec: ServerSpec) -> tuple[int, int]:
    """Free bytes of the fullest GPU, and what vLLM would take there: a share, whatever it runs."""
    share = spec.gpu_memory_utilization or _GPU_SHARE
    fullest = min(machine.nvidia_gpus, key=lambda gpu: gpu.memory_free, default=None)
    if fullest is None:
        return 0, 0
    return fullest.memory_free, int(share * fullest.memory_total)
