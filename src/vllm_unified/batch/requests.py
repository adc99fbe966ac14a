"""What each prompt of a batch becomes: a request, and the settings of its call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_unified.arguments import call_arguments
from vllm_unified.batch.packing import most_in_a_pack
from vllm_unified.results import ResultMetadata
from vllm_unified.settings import Settings
from vllm_unified.templates import CallTemplate
from vllm_unified.wire.requests import (
    GenerationInput,
    RequestTemplate,
    WireRequest,
    embedding_request,
    generation_fields,
    generation_request,
)
from vllm_unified.wire.responses import answer_decoder
from vllm_unified.wire.structure import OutputStructure, output_structure

BATCH_TIMEOUT = 300.0
"""Seconds for each prompt, where the client has its default: a batch fills its servers, and every
answer takes longer then than when it is alone."""
_DEFAULT_TIMEOUT = Settings().timeout
_NOT_JOINED = (
    *("request_id", "use_beam_search", "echo", "prompt_logprobs", "suffix"),
    *("kv_transfer_params", "ec_transfer_params", "extra_body", "return_token_ids"),
)
"""Parameters whose meaning, or whose answer, is another for several prompts."""
_MODELS = frozenset({"model", "lora_adapter", "loraAdapter"})
_MOST_STRUCTURES = 64
"""Types that are remembered; rows of a generator may each have a schema of its own."""


class PromptRequest(msgspec.Struct, frozen=True):
    """A prompt, ready to be sent."""

    request: WireRequest
    settings: Settings
    decode: Callable[[bytes, ResultMetadata], Any]
    """What makes a result of its answer."""
    own_model: bool = False
    """Whether the prompt itself names its model."""
    template: RequestTemplate | None = None
    """What joins it with others into one request; ``None`` where it has to be alone."""
    is_text: bool = False
    """Or token ids: they are not mixed in one request."""


class RequestMaker:
    """Makes the requests of a batch: parameters for all, and those of a prompt, which win."""

    def __init__(
        self, settings: Settings, shared: Mapping[str, Any], *, embeddings: bool = False
    ) -> None:
        """``embeddings``: a dict with ``input`` asks for some.

        Raises:
            BadRequestError, ConfigurationError: a shared parameter is wrong.
        """
        if settings.timeout == _DEFAULT_TIMEOUT:
            settings = msgspec.structs.replace(settings, timeout=BATCH_TIMEOUT)
        self._settings = settings
        self._embeddings = embeddings
        self._shared = {name: value for name, value in shared.items() if value is not None}
        self._structures: dict[int, tuple[Any, OutputStructure]] = {}
        # What is wrong for all is said before anything is sent.
        self._chats = self._template("messages", [{"role": "user", "content": "a"}])
        self._prompts: CallTemplate | None = None
        if "response_model" not in self._shared:
            self._prompts = self._template("prompt", "a")

        self.most_in_a_pack = self._most_in_a_pack()
        """How many of its requests may be joined."""

    def make(self, prompt: GenerationInput) -> PromptRequest:
        """The request of one prompt.

        Raises:
            VllmError: it cannot be sent.
        """
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
        ):
            template, joins = self._prompts, self._prompts
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            template, joins = self._chats, None
        else:
            template = joins = None
        if template is not None:
            return PromptRequest(
                template.requests.request(prompt),
                template.settings,
                template.decode,
                template=None if joins is None else joins.requests,
                is_text=isinstance(prompt, str),
            )
        own = generation_fields(prompt)
        own_model = any(own.get(name) is not None for name in _MODELS)
        settings, fields, structure = self._call(own, own_model=own_model)
        if self._embeddings and "input" in fields:
            data, model = fields.pop("input"), fields.pop("model", None)
            request = embedding_request(data, model, fields)
        else:
            request = generation_request(fields, structure=structure)
        return PromptRequest(request, settings, answer_decoder(request), own_model)

    def _most_in_a_pack(self) -> int:
        shared = self._shared
        if self._prompts is None or self._prompts.settings.hedge_after is not None:
            return 1
        if any(shared.get(name) for name in _NOT_JOINED):
            return 1
        tokens, logprobs = shared.get("max_tokens", 16), shared.get("logprobs", 0)
        if not isinstance(tokens, int) or not isinstance(logprobs, int) or logprobs < 0:
            return 1
        return most_in_a_pack(
            tokens=tokens,
            samples=shared.get("n", 1),
            logprobs=logprobs,
            limit=self._settings.max_response_bytes,
        )

    def _template(self, name: str, value: Any) -> CallTemplate | None:
        settings, fields, structure = self._call({name: value}, own_model=False)
        return CallTemplate.of(settings, fields, structure)

    def _call(
        self, own: Mapping[str, Any], *, own_model: bool
    ) -> tuple[Settings, dict[str, Any], OutputStructure | None]:
        shared = self._shared
        if own_model:
            shared = {name: value for name, value in shared.items() if name not in _MODELS}
        settings, fields = call_arguments(self._settings, shared, None, own, {})
        response_model = fields.pop("response_model", None)
        structure = None if response_model is None else self._structure(response_model)
        return settings, fields, structure

    def _structure(self, response_model: Any) -> OutputStructure:
        """Made once for each type: that takes longer than a request."""
        known = self._structures.get(id(response_model))
        if known is None:
            known = (response_model, output_structure(response_model))
            if len(self._structures) < _MOST_STRUCTURES:
                self._structures[id(response_model)] = known
        return known[1]
