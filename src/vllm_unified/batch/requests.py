"""What each prompt of a batch becomes: a request, and the settings of its call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_unified.arguments import call_arguments
from vllm_unified.errors import BadRequestError
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import (
    GenerationInput,
    WireRequest,
    chat_request,
    generation_fields,
    generation_request,
)
from vllm_unified.wire.structure import OutputStructure, output_structure

BATCH_TIMEOUT = 300.0
"""Seconds for each prompt, where the client has its default: a batch fills its servers, and every
answer takes longer then than when it is alone."""
_DEFAULT_TIMEOUT = Settings().timeout
_MODELS = frozenset({"model", "lora_adapter", "loraAdapter"})
_ANY_MESSAGES = [{"role": "user", "content": "a"}]


class PromptRequest(msgspec.Struct, frozen=True):
    """A prompt, ready to be sent."""

    request: WireRequest
    settings: Settings
    own_model: bool
    """Whether the prompt itself names its model."""


class RequestMaker:
    """Makes the requests of a batch: parameters for all, and those of a prompt, which win."""

    def __init__(self, settings: Settings, shared: Mapping[str, Any]) -> None:
        """
        Raises:
            BadRequestError, ConfigurationError: a shared parameter is wrong.
        """
        if settings.timeout == _DEFAULT_TIMEOUT:
            settings = msgspec.structs.replace(settings, timeout=BATCH_TIMEOUT)
        self._settings = settings
        self._shared = {name: value for name, value in shared.items() if value is not None}
        self._structures: dict[Any, OutputStructure] = {}
        # What is wrong for all is said before anything is sent.
        self.make(_ANY_MESSAGES if "response_model" in self._shared else "a")

    def make(self, prompt: GenerationInput) -> PromptRequest:
        """The request of one prompt.

        Raises:
            VllmError: it cannot be sent.
        """
        own = generation_fields(prompt)
        own_model = any(own.get(name) is not None for name in _MODELS)
        shared = self._shared
        if own_model:
            shared = {name: value for name, value in shared.items() if name not in _MODELS}
        settings, fields = call_arguments(self._settings, shared, None, own, {})
        response_model = fields.pop("response_model", None)
        if response_model is None:
            return PromptRequest(generation_request(fields), settings, own_model)
        if "messages" not in fields:
            raise BadRequestError(
                "response_model is for messages, and this is a prompt",
                hint='Give [{"role": "user", "content": ...}], or structured_outputs={...}.',
            )
        structure = self._structure(response_model)
        request = chat_request(fields.pop("messages"), fields, structure=structure)
        return PromptRequest(request, settings, own_model)

    def _structure(self, response_model: Any) -> OutputStructure:
        if isinstance(response_model, Mapping):
            return output_structure(response_model)
        if response_model not in self._structures:
            self._structures[response_model] = output_structure(response_model)
        return self._structures[response_model]
