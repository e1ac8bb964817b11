"""Messages as chat templates want them, whatever a data set has made of them.

Arrow gives every struct the keys of all others, filled with None, and cannot hold what differs in shape from row to
row, so data sets store tool schemas and arguments as JSON text. A template asks whether a key is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def without_nulls(value: Any) -> Any:
    """The value without the keys whose value is None, at every depth; None in a list stays."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def parsed(value: Any, column: str) -> Any:
    """What JSON text in a column says; anything else as it is. Raises ValueError that names the column."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{column!r} is a string and no valid JSON ({error}): {value[:60]!r}") from None


def plain_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message without nulls, a content of text parts joined to a string, its tool calls and their arguments parsed.

    Raises ValueError for a content part that is no text, and for tool calls that are no list.
    """
    plain = without_nulls(turn)
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(_text(part) for part in plain["content"])
    calls = parsed(plain.pop("tool_calls", None), "tool_calls")
    if calls is None:
        return plain
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' is {type(calls).__name__}: use a list of calls, or its JSON")
    plain["tool_calls"] = calls
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            function["arguments"] = parsed(arguments, "arguments")
    return plain


def _text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = f"dict({', '.join(map(str, part))})" if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"a message's content holds {kind} where a part {{'type': 'text', 'text': ...}} should be")


def template_options(example: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A row's `tools`, None for none, and its `chat_template_kwargs`. Raises ValueError for what these cannot be."""
    tools = without_nulls(parsed(example.get("tools"), "tools"))
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' is {type(tools).__name__}: use a list of schemas, or its JSON")
    options = without_nulls(parsed(example.get("chat_template_kwargs"), "chat_template_kwargs")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"'chat_template_kwargs' is {type(options).__name__}: use a dict, or its JSON")
    return tools or None, options
