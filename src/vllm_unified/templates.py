"""Calls that are alike but for their prompt, or messages: what they share is made once. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import msgspec

from vllm_unified.arguments import call_arguments
from vllm_unified.results import ResultMetadata
from vllm_unified.settings import Settings
from vllm_unified.wire.requests import RequestTemplate, WireRequest
from vllm_unified.wire.responses import generation_decoder
from vllm_unified.wire.structure import OutputStructure, output_structure

_MOST = 64
"""Templates that are remembered; then it begins anew."""
_PLAIN = frozenset({str, int, float, bool, type(None)})


class CallTemplate(msgspec.Struct, frozen=True):
    """What calls have in common: all but one field of their requests."""

    requests: RequestTemplate
    settings: Settings
    decode: Callable[[bytes, ResultMetadata], Any]

    @classmethod
    def of(
        cls, settings: Settings, fields: Mapping[str, Any], structure: OutputStructure | None
    ) -> CallTemplate | None:
        """As :meth:`RequestTemplate.of`."""
        requests = RequestTemplate.of(fields, structure=structure)
        if requests is None:
            return None
        return cls(requests, settings, generation_decoder(requests.like))


class Templates:
    """The templates of the calls of one client.

    Most programs call with the same few parameters again and again. Checking and encoding them is
    most of what a request costs, so whoever comes a second time gets a template.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[Hashable, CallTemplate | None] = {}
        """``None``: there was one such call."""

    def call(
        self,
        where: Hashable,
        settings: Settings,
        name: Literal["prompt", "messages"],
        value: Any,
        params: Mapping[str, Any],
        *,
        model: str | None = None,
        response_model: Any = None,
    ) -> tuple[WireRequest, Settings, Callable[[bytes, ResultMetadata], Any]] | None:
        """Request and settings of a call, and what decodes its answer; ``None`` where it is none of
        those that are alike.

        Args:
            where: What ``settings`` are of, and always the same.
            name: The field that ``value`` is: one prompt, or messages.
            params: All else that the call was given.

        Raises:
            BadRequestError, ConfigurationError: as without a template.
        """
        # 1, 1.0 and True are equal, and not the same in JSON.
        types = [*map(type, params.values())]
        key = (where, name, model, response_model, *params.items(), *types)
        try:
            template = self._known.get(key)
        except TypeError:  # a list, or a dict
            return None
        if template is None:
            # What can change is not remembered.
            if not _PLAIN.issuperset(types) or "prompt" in params:
                return None
            if response_model is not None and not isinstance(response_model, type):
                return None
            if key not in self._known:
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = None
                return None
            template = _template(settings, name, value, params, model, response_model)
            if template is None:
                return None
            self._known[key] = template
        return template.requests.request(value), template.settings, template.decode


def _template(
    settings: Settings,
    name: str,
    value: Any,
    params: Mapping[str, Any],
    model: str | None,
    response_model: Any,
) -> CallTemplate | None:
    settings, fields = call_arguments(settings, {}, model, None, params)
    structure = None if response_model is None else output_structure(response_model)
    return CallTemplate.of(settings, {**fields, name: value}, structure)
