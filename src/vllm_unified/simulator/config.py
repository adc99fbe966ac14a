"""What a simulator is: its model, its limits, its clock."""

from __future__ import annotations

from typing import Literal

import msgspec

VERSION = "0.32.0"
"""The vLLM whose wire this is."""

Task = Literal["generate", "embed"]


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the imaginary hardware takes. All zero, the default: as fast as possible."""

    time_to_first_token: float = 0.0
    """Mean seconds from being scheduled to the first token, for an empty prompt."""
    per_prompt_token: float = 0.0
    """Seconds for each prompt token that was not in the prefix cache."""
    inter_token_latency: float = 0.0
    """Mean seconds between two tokens of one sequence that runs alone."""
    jitter: float = 0.0
    """Standard deviation of both, as a share of the mean (0.2 is 20 %)."""
    load_factor: float = 0.0
    """How much slower a full batch is: 1.0 doubles the time per token when the batch is full."""

    @property
    def instant(self) -> bool:
        """Whether nothing ever waits."""
        return not (self.time_to_first_token or self.per_prompt_token or self.inter_token_latency)


class SimulatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One simulated server. The defaults are those of ``vllm serve`` where it has one."""

    model: str = "sim"
    """What ``--model`` would be; it seeds the texts, so equal models give equal answers."""
    served_model_names: tuple[str, ...] = ()
    """Names that clients may use; the first stands in answers. Default: ``model``."""
    tasks: tuple[Task, ...] = ("generate",)
    """Endpoint families that exist; the others answer 404, as with a real model."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free port, which then stays the same over a restart."""
    uds: str | None = None
    """Path of a Unix socket to listen on instead of host and port."""
    api_keys: tuple[str, ...] = ()
    """Bearer tokens; with none, everything is open."""

    max_model_len: int = 4096
    """Context length, in tokens."""
    max_num_seqs: int = 256
    """Batch size: sequences that run at the same time."""
    max_num_queued_reqs: int | None = None
    """``--max-num-queued-reqs``: more unfinished sequences than this are refused with a 503."""
    max_num_queued_tokens: int | None = None
    """``--max-num-queued-tokens``: refuse while this many prompt tokens are in prefill."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    num_blocks: int = 4096
    """Blocks of the KV cache."""
    enable_prefix_caching: bool = True
    max_logprobs: int = 20

    eos_probability: float = 0.01
    """Chance, at every token, that the answer is over."""
    embedding_size: int = 64
    """Length of an embedding."""
    timing: Timing = Timing()

    enable_lora: bool = False
    max_loras: int = 1
    allow_runtime_lora: bool = True
    """``VLLM_ALLOW_RUNTIME_LORA_UPDATING``: whether the load and unload routes exist."""
    lora_paths: tuple[str, ...] | None = None
    """Paths at which an adapter "exists"; ``None``: every path that does not contain
    ``missing`` or ``nonexistent``."""
    tool_call_parser: bool = False
    """``--tool-call-parser``: required and named tool choice work."""
    enable_auto_tool_choice: bool = False
    dev_mode: bool = True
    """``VLLM_SERVER_DEV_MODE``: /sleep, /pause, /server_info and their like exist."""
    enable_prompt_tokens_details: bool = False
    enable_per_request_metrics: bool = False
    enable_force_include_usage: bool = False
    enable_request_id_headers: bool = False
    enable_server_load_tracking: bool = False
    disable_log_stats: bool = False
    keep_alive: float = 5.0
    """Seconds an idle connection is kept (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``)."""
    keep_alive_on_engine_death: bool = False
    engine_death_grace: float = 5.0
    """Seconds from the death of the engine until the server exits; the real watchdog's period."""
    control: bool = True
    """Whether ``/simulator/faults`` exists."""
    fixed_answer: bool = False
    """Answer every completion with the same bytes, for benchmarks; see ``fixed``."""
    seed: int = 0
    """Seed of jitter and of faults with a probability."""

    def __post_init__(self) -> None:
        """Refuse what could never serve a request.

        Raises:
            ValueError: if a limit is not positive, or the KV cache is smaller than one context.
        """
        for name in ("max_model_len", "max_num_seqs", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"the KV cache holds {self.num_blocks * self.block_size} tokens, "
                f"fewer than max_model_len={self.max_model_len}; raise num_blocks"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names the base model is served under, the one used in answers first."""
        return self.served_model_names or (self.model,)
