"""Tools: which choices are allowed, and the call that the imaginary model makes. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from vllm_unified.simulator.config import SimulatorConfig
from vllm_unified.simulator.errors import ApiError, invalid
from vllm_unified.simulator.structured import instance

_USAGE = 'Correct usage: `{"type": "function", "function": {"name": "my_function"}}`'


def check_tools(body: dict[str, Any]) -> None:
    """The rules of ``ChatCompletionRequest.check_tool_usage``; sets the default choice.

    Raises:
        ApiError: no tools where some are needed, or a choice that names none of them.
    """
    if body.get("tools") == []:
        raise invalid(
            "`tools` must not be an empty array. "
            "Either provide at least one tool or omit the field entirely.",
            "tools",
        )
    if "tool_choice" not in body and body.get("tools"):
        body["tool_choice"] = "auto"
    choice = body.get("tool_choice")
    if choice is None or choice == "none":
        return
    if not body.get("tools"):
        raise invalid("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, dict):
        _check_named(choice, body["tools"])
    elif choice not in ("auto", "required"):
        raise invalid(
            f"Invalid value for `tool_choice`: {choice}! "
            'Only named tools, "none", "auto" or "required" are supported.',
            "tool_choice",
        )


def _check_named(choice: dict[str, Any], tools: list[Any]) -> None:
    function = choice.get("function")
    if not isinstance(function, dict):
        message = f"Invalid value for `function`: `{function}` in `tool_choice`! {_USAGE}"
        raise invalid(message, "tool_choice.function")
    if "name" not in function:
        message = f"Expected field `name` in `function` in `tool_choice`! {_USAGE}"
        raise invalid(message, "tool_choice.function.name")
    if function["name"] not in (tool["function"]["name"] for tool in tools):
        message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise invalid(message, "tool_choice")


def check_parser(body: Mapping[str, Any], config: SimulatorConfig) -> None:
    """A choice other than ``none`` needs the server's parser.

    Raises:
        ApiError: when the server was started without.
    """
    choice = body.get("tool_choice")
    if not body.get("tools") or choice in (None, "none"):
        return
    if choice == "auto":
        if not (config.enable_auto_tool_choice and config.tool_call_parser):
            raise ApiError(
                '"auto" tool choice requires '
                "--enable-auto-tool-choice and --tool-call-parser to be set"
            )
    elif not config.tool_call_parser:
        named = isinstance(choice, dict)
        described = f'function "{choice["function"]["name"]}"' if named else f'"{choice}"'
        raise ApiError(f"tool_choice={described} requires --tool-call-parser to be set")


def forced_call(body: Mapping[str, Any]) -> dict[str, str] | None:
    """Name and arguments of the call that a required or named choice forces."""
    choice = body.get("tool_choice")
    if choice == "required":
        function = body["tools"][0]["function"]
    elif isinstance(choice, dict):
        name = choice["function"]["name"]
        function = next(t["function"] for t in body["tools"] if t["function"]["name"] == name)
    else:
        return None
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    arguments = json.dumps(instance(schema, schema), ensure_ascii=False)
    return {"name": function["name"], "arguments": arguments}


def call_id() -> str:
    """An id as vLLM's ``make_tool_call_id``."""
    return f"chatcmpl-tool-{secrets.token_hex(8)}"
