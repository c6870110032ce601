"""Turns of a conversation, from the two ways they are written, in the one form that chat templates read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.data.problems import RowError, kind
from finetune_trainer.data.values import checked_text, filled, listed, text_of

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SPEAKERS = ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
CALLERS = ("function_call", "tool_call")
"""Speakers of ShareGPT whose words are not words: the value is a call of a tool, or several, as JSON."""
MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True)
class Conversation:
    """Turns as OpenAI writes them, the tools on offer, and from which turn on the assistant's words are learned."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    learned_from: int = 0


def turns_in(row: dict[str, Any], field: str, key: str) -> bool:
    """Whether a field holds a list of objects with this key."""
    turns = listed(row.get(field))
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and key in turns[0]


def openai_messages(row: dict[str, Any], field: str) -> list[Message]:
    """Turns with `role` and `content`."""
    return [_openai_message(turn, f"{field}[{i}]") for i, turn in enumerate(_turns(row, field))]


def sharegpt_messages(row: dict[str, Any], field: str) -> list[Message]:
    """Turns with `from` and `value`; calls of tools belong to the assistant's turn before them, where there is one."""
    messages: list[Message] = []
    for i, turn in enumerate(_turns(row, field)):
        message = _sharegpt_message(turn, f"{field}[{i}]")
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            calls = messages[-1].get("tool_calls", []) + message["tool_calls"]
            messages[-1] = messages[-1] | {"tool_calls": calls}
        else:
            messages.append(message)
    return messages


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's `tools`, a list of JSON schemas in OpenAI's form or bare, perhaps written as JSON text."""
    tools = listed(row.get("tools"))
    if not filled(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"tools is {kind(tools)}; it must be a list of objects, or JSON text of one")
    return [_function(_without_nulls(tool), f"tools[{i}]") for i, tool in enumerate(tools)]


def check_order(messages: list[Message], field: str, learned_from: int = 0) -> None:
    """Refuse conversations without the assistant, and turns in an order that no chat has."""
    before = ""
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in MAY_FOLLOW[before]:
            expected = " or ".join(MAY_FOLLOW[before])
            place = f"after {before}" if before else "at the beginning"
            raise RowError(f"{field}: turn {i + 1} is from {role} {place}, where {expected} is expected")
        before = role
    if not any(message["role"] == "assistant" for message in messages[learned_from:]):
        raise RowError(f"{field}: there is no assistant turn, so there is nothing to learn")


def _turns(row: dict[str, Any], field: str) -> list[Any]:
    if field not in row:
        raise RowError(f"{field} is missing; the fields here are {', '.join(map(str, row)) or 'none'}")
    turns = listed(row[field])
    if not isinstance(turns, list):
        raise RowError(f"{field} is {kind(turns)}; it must be a list of turns")
    if not turns:
        raise RowError(f"{field} is empty: a conversation has at least a question and an answer")
    return turns


def _openai_message(turn: Any, path: str) -> Message:
    message = _object(turn, path)
    role = _role(message, "role", path, ROLES)
    calls = _tool_calls(message.get("tool_calls") or _legacy(message), path)
    message = {key: value for key, value in message.items() if key not in ("content", "tool_calls", "function_call")}
    content = _content(turn, path, may_miss=bool(calls))
    _must_speak(role, content, bool(calls) or filled(message.get("reasoning_content")), path)
    return message | {"role": role, "content": content} | ({"tool_calls": calls} if calls else {})


def _sharegpt_message(turn: Any, path: str) -> Message:
    message = _object(turn, path)
    role = _role(message, "from", path, SPEAKERS)
    if _plain(message["from"]) in CALLERS:
        return {"role": role, "content": "", "tool_calls": _calls_in(message, f"{path}.value")}
    content = text_of(message, "value", f"{path}.value")
    _must_speak(role, content, False, path)
    return {"role": role, "content": content}


def _object(turn: Any, path: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{path} is {kind(turn)}; it must be an object")
    return _without_nulls(turn)


def _role(message: Message, field: str, path: str, known: dict[str, str]) -> str:
    name = text_of(message, field, f"{path}.{field}")
    role = known.get(_plain(name))
    if role is None:
        raise RowError(f"{path}.{field} is {name!r}; known are {', '.join(known)}")
    return role


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def _content(turn: Message, path: str, may_miss: bool) -> str:
    """A turn's text, which OpenAI also writes as a list of parts."""
    content = turn.get("content")
    if content is None and may_miss:
        return ""
    if not isinstance(content, list):
        return text_of(turn, "content", f"{path}.content")
    return "".join(_part(part, f"{path}.content[{i}]") for i, part in enumerate(content))


def _part(part: Any, path: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        return text_of(part, "text", f"{path}.text")
    found = f"of type {part.get('type')!r}" if isinstance(part, dict) else kind(part)
    raise RowError(f"{path} is {found}; only parts of type 'text' can be learned")


def _tool_calls(calls: Any, path: str) -> list[Any]:
    calls = listed(calls)
    if not filled(calls):
        return []
    if not isinstance(calls, list):
        raise RowError(f"{path}.tool_calls is {kind(calls)}; it must be a list")
    return [_tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _legacy(message: Message) -> list[Any]:
    """The call of a turn as OpenAI wrote it before there were tool_calls."""
    return [message["function_call"]] if "function_call" in message else []


def _calls_in(message: Message, path: str) -> list[Any]:
    value = listed(message.get("value"))
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f'{path} is no call of a tool; it must be JSON such as {{"name": "...", "arguments": {{...}}}}')
    return [_tool_call(call, f"{path}[{i}]") for i, call in enumerate(value)]


def _tool_call(call: Any, path: str) -> dict[str, Any]:
    """With the arguments as an object: OpenAI writes them as JSON text, most chat templates want them parsed."""
    call = _function(_object(call, path), path)
    arguments = _arguments(call["function"].get("arguments", {}), f"{path}.arguments")
    return call | {"function": call["function"] | {"arguments": arguments}}


def _function(item: dict[str, Any], path: str) -> dict[str, Any]:
    """A tool or a call in OpenAI's form, which has what it is about in `function`."""
    function = _object(item["function"], f"{path}.function") if "function" in item else item
    checked_text(function.get("name"), f"{path}.name")
    return {"type": "function"} | (item if "function" in item else {}) | {"function": function}


def _arguments(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError as error:
            raise RowError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RowError(f"{path} is {kind(value)}; it must be an object, or JSON text of one")
    return value


def _must_speak(role: str, content: str, acts: bool, path: str) -> None:
    if role == "assistant" and not content.strip() and not acts:
        raise RowError(f"{path}: the assistant's turn is empty, so it would learn to say nothing")


def _without_nulls(value: Any) -> Any:
    """Parquet gives every key of a struct to every row; chat templates take a null for a value."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
