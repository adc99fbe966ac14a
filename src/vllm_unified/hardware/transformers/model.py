"""The model itself: all that knows torch and transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_unified.errors import UnsupportedError
from vllm_unified.hardware.transformers.job import Job
from vllm_unified.hardware.transformers.sampling import Sampling


class Model:
    """A causal language model with its tokenizer. One thread generates; any may encode."""

    def __init__(
        self, source: str, *, device: str | None, dtype: str | None, threads: int | None
    ) -> None:
        """Load it; this takes seconds or minutes.

        Args:
            source: A folder, or a repository's id.
            device: torch's name; ``None``: the fastest that torch has here.
            dtype: torch's name; ``None``: the checkpoint's, but ``float32`` on a CPU.
            threads: Of torch, on a CPU; ``None``: torch's own choice.

        Raises:
            OSError, ValueError, RuntimeError: in transformers' words.
        """
        self._torch: Any = importlib.import_module("torch")
        self._transformers: Any = importlib.import_module("transformers")
        local = Path(source).is_dir()
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(
            source, local_files_only=local
        )
        self.device = device or _fastest(self._torch)
        if threads is not None:
            self._torch.set_num_threads(threads)
        # Measured on a CPU with AVX-512 BF16: float32 is twice as fast as bfloat16 here.
        usual = "float32" if self.device == "cpu" else "auto"
        with _no_progress_bars(self._transformers):
            self._model = self._transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or usual, local_files_only=local
            )
        self._model.to(self.device).eval()
        config = self._model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else []
        self.ends = frozenset([ends] if isinstance(ends, int) else ends)
        if self._tokenizer.eos_token_id is not None:
            self.ends |= {int(self._tokenizer.eos_token_id)}
        self.defaults: dict[str, Any] = config.to_diff_dict()
        self.context = int(getattr(self._model.config, "max_position_embeddings", 0) or 0) or None
        pad = self._tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else next(iter(self.ends), 0))

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return list(map(int, self._tokenizer(text)["input_ids"]))

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """The tokens of a conversation, under the model's template.

        Raises:
            UnsupportedError: it has none.
        """
        if not self._tokenizer.chat_template:
            raise UnsupportedError("this model has no chat template")
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
        return list(map(int, self._tokenizer(text, add_special_tokens=False)["input_ids"]))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def generate(self, jobs: Sequence[Job]) -> None:
        """Generate the answers of jobs that go together; each is told token by token."""
        torch = self._torch
        longest = max(len(job.prompt) for job in jobs)
        padded = [[self._pad] * (longest - len(job.prompt)) + list(job.prompt) for job in jobs]
        mask = [[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in jobs]
        sampling = jobs[0].sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.tensor(padded, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                generation_config=self._config(sampling, max(job.limit for job in jobs)),
                stopping_criteria=self._transformers.StoppingCriteriaList([self._watch(jobs)]),
                logits_processor=self._transformers.LogitsProcessorList([self._hold(jobs)]),
            )

    def _config(self, sampling: Sampling, limit: int) -> Any:
        known: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            known = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
            if sampling.min_p > 0:
                known["min_p"] = sampling.min_p
        # The end of an answer is each job's own matter, so that no end is known here.
        return self._transformers.GenerationConfig(
            **known,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=limit,
            pad_token_id=self._pad,
            eos_token_id=None,
            use_cache=True,
        )

    def _watch(self, jobs: Sequence[Job]) -> Any:
        """Called after each token, with all tokens so far; says whose answers are complete."""
        torch = self._torch

        def watch(input_ids: Any, scores: Any, **more: Any) -> Any:
            last = input_ids[:, -1].tolist()
            done = [job.feed(int(token)) for job, token in zip(jobs, last, strict=True)]
            return torch.tensor(done, device=input_ids.device, dtype=torch.bool)

        return watch

    def _hold(self, jobs: Sequence[Job]) -> Any:
        """Called before each token; keeps answers from ending before their time."""
        ends = sorted(self.ends)

        def hold(input_ids: Any, scores: Any) -> Any:
            for row, job in enumerate(jobs):
                if job.holds_end and not job.sampling.ignore_eos:
                    scores[row, ends] = float("-inf")
            return scores

        return hold


@contextmanager
def _no_progress_bars(transformers: Any) -> Iterator[None]:
    """A library writes nothing to its program's terminal."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _fastest(torch: Any) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"
