"""Callables that generate with one model at one server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from vllm_unified.wire.requests import GenerationInput

R = TypeVar("R")


class EndpointHandler(Generic[R]):
    """``handler(data, **params)`` is ``make_request`` with server, model and parameters fixed.

    Parameters of the call win over the handler's own; so do those of a ``data`` that is a dict.
    """

    def __init__(
        self,
        make_request: Callable[..., R],
        endpoint_url: Any,
        model: str | None,
        params: Mapping[str, Any],
    ) -> None:
        self._make_request = make_request
        self._endpoint_url = endpoint_url
        self._model = model
        self._params = dict(params)

    def __call__(self, data: GenerationInput, **params: Any) -> R:
        own = data if isinstance(data, Mapping) else {}
        shared = {"model": self._model, **self._params}
        options = {name: value for name, value in shared.items() if name not in own}
        return self._make_request(self._endpoint_url, data, None, {**options, **params})

    def __repr__(self) -> str:
        named = ", ".join(self._params) or "no parameters"  # values may be long, or secret
        return f"<{type(self).__name__} {self._model or 'default model'}, {named}>"
