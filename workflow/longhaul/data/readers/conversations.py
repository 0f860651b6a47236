"""Validates one chat row: allowed roles and message keys, ShareGPT or OpenAI form, tool calls, tools.

Different spellings of one thing become one form: the texts of a list of parts are joined, the arguments of a tool call
become an object, ShareGPT's roles get their usual names.
"""

from __future__ import annotations

import json
from typing import Any

from longhaul.data.readers.rows_and_file_ranges import BadData
from longhaul.data.readers.text_values import validate_texts, validated_text

Message = dict[str, Any]
Tool = dict[str, Any]
"""A chat template may read any key of both; validated_messages checks the types of those that longhaul reads."""
KeyPath = tuple[str, ...]
"""("name",) is a message's key; ("tool_calls", "function", "strict") is a key of the functions in its calls."""
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of the key with the assistant's reasoning. transformers passes any of them to a template as the first one."""
_KNOWN_KEYS = frozenset({"role", "content"})
_KNOWN_KEYS_OF_ANSWERS = _KNOWN_KEYS | {"weight", "tool_calls", *REASONING_KEYS}
"""Keys of messages whose meaning longhaul knows. The others are for the chat template."""

# ShareGPT's names for these roles.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def keys_for_template(message: Message) -> set[KeyPath]:
    """Return a message's keys that only the chat template may read, those of its tool calls and their functions included."""
    known = _KNOWN_KEYS_OF_ANSWERS if message["role"] == "assistant" else _KNOWN_KEYS
    found: set[KeyPath] = {(key,) for key in message.keys() - known}
    for call in message.get("tool_calls", ()):
        found |= {("tool_calls", key) for key in call.keys() - {"type", "function"}}
        found |= {("tool_calls", "function", key) for key in call["function"].keys() - {"name", "arguments"}}
    return found


def without_key(value: Any, path: KeyPath) -> Any:
    """Return a message without a key; for a key of tool calls, without that of all calls."""
    if isinstance(value, list):
        return [without_key(item, path) for item in value]
    first, *rest = path
    if not rest or first not in value:
        return {key: item for key, item in value.items() if key != first}
    return {**value, first: without_key(value[first], tuple(rest))}


def unread_part_keys(messages: object) -> set[str]:
    """Return the keys of text parts in a list of messages, apart from type and text. Joining the texts loses them."""
    found = set[str]()
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content", message.get("value"))
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                found |= {key for key, value in part.items() if value is not None} - {"type", "text"}
    return found


def key_text(name: str) -> str:
    """Return "tool_call_id of role tool" for "tool.tool_call_id"; another text as it is."""
    role, dot, key = name.partition(".")
    return f"{key} of role {role}" if dot and role in ROLES else name


def validated_messages(value: object, where: object) -> list[Message]:
    """Return a row's conversation as a list of messages; BadData, with the location `where`, for what cannot be one."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _malformed(f"{where}: a conversation is a list of messages, found {found}", "use [{role, content}, …]")
    return [_validated_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]


def validated_tools(value: object, where: object, name: str) -> list[Tool] | None:
    """Return the functions that the assistant may call, from a list or its JSON text; None for null or an empty list."""
    tools = _parsed(value, where, name) if isinstance(value, str) and value.strip() else value or None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _malformed(f"{where}: {name} is not a list of JSON schemas", "use [{type: function, function: {…}}, …]")
    validate_texts(tools, where, name)
    return tools


def _validated_message(value: object, where: str) -> Message:
    """Return {role, content} from this form or from ShareGPT's {from, value}.

    Other keys that are not null stay, because the chat template may use them.
    """
    if not isinstance(value, dict):
        raise _malformed(f"{where}: expected {{role, content}}, found {type(value).__name__}", "fix the conversation")
    role_key, content_key = ("from", "value") if "from" in value and "role" not in value else ("role", "content")
    if role_key not in value:
        raise _missing_key(value, role_key, where)
    role = _validated_role(value[role_key], where)
    extra = {key: item for key, item in value.items() if key not in (role_key, content_key) and item is not None}
    if role == "assistant":
        extra = _validated_assistant_keys(extra, where)
    elif extra.pop("tool_calls", None):
        raise _malformed(f"{where}: tool_calls of role {role}", "only the assistant calls tools: fix the conversation")
    validate_texts(extra, where, "a key of the message")
    needs_content = role != "assistant" or not any(key in extra for key in ("tool_calls", *REASONING_KEYS))
    if needs_content and content_key not in value:
        raise _missing_key(value, content_key, where)
    content = value.get(content_key)
    text = "" if content is None and not needs_content else _joined_text(content, where, content_key)
    return {"role": role, "content": text, **extra}


def _missing_key(message: dict[str, object], key: str, where: str) -> BadData:
    found = ", ".join(map(repr, message)) or "nothing"
    return _malformed(f"{where}: no {key!r}; found {found}", "use {role, content}")


def _validated_role(value: object, where: str) -> str:
    role = _SHAREGPT_ROLES.get(value, value) if isinstance(value, str) else value
    if role not in ROLES:
        raise _malformed(f"{where}: role {value!r} is not one of {', '.join(ROLES)}", "fix the conversation")
    return role


def _joined_text(value: object, where: str, name: str) -> str:
    """Return a text, or the joined texts of a list of parts."""
    if not isinstance(value, list):
        return validated_text(value, where, name)
    return "".join(_text_of_part(part, where, name) for part in value)


def _text_of_part(part: object, where: str, name: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        return validated_text(part.get("text"), where, f"the text of a part of {name}")
    if isinstance(part, str):
        return validated_text(part, where, name)
    found = f"type {part['type']!r}" if isinstance(part, dict) else type(part).__name__
    raise _malformed(f"{where}: {name} has a part of {found}; only text can be trained on", "remove this row")


def _validated_assistant_keys(extra: dict[str, object], where: str) -> dict[str, object]:
    """Return the keys of an assistant's message other than role and content. Empty tool calls and reasoning are left out."""
    kept = {key: value for key, value in extra.items() if key not in ("tool_calls", *REASONING_KEYS) or value}
    for key in REASONING_KEYS:
        if key in kept:
            validated_text(kept[key], where, key)
    found = [key for key in REASONING_KEYS if key in kept]
    if len({kept[key] for key in found}) > 1:
        message = f"{where}: {' and '.join(found)} differ; a template reads one of them"
        raise _malformed(message, "keep the one with the reasoning")
    if "weight" in kept and kept["weight"] not in (0, 1):
        raise _malformed(f"{where}: weight is {kept['weight']!r}; it is 0 or 1", "use 0 for turns outside of the loss")
    if "tool_calls" in kept:
        kept["tool_calls"] = _validated_tool_calls(kept["tool_calls"], where)
    return kept


def _validated_tool_calls(value: object, where: str) -> list[dict[str, object]]:
    calls = _parsed(value, where, "tool_calls") if isinstance(value, str) else value
    if not isinstance(calls, list):
        raise _malformed(f"{where}: tool_calls is {type(calls).__name__}, not a list", "use [{type, function}, …]")
    return [_validated_tool_call(call, f"{where}, tool call {number}") for number, call in enumerate(calls, start=1)]


def _validated_tool_call(call: Any, where: str) -> dict[str, object]:
    """Return {"type": "function", "function": {"name", "arguments": {…}}, …} from this form or from {name, arguments}."""
    if isinstance(call, dict) and "function" not in call:
        call = {"function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _malformed(f"{where}: no name of a function", "use {type: function, function: {name, arguments}}")
    if "arguments" not in function:
        _refuse_other_keys({**call, **function}, where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", where, "arguments")
    if not isinstance(arguments, dict):
        raise _malformed(f"{where}: arguments is {type(arguments).__name__}, not an object", "use {name: value, …}")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _refuse_other_keys(call: dict[str, object], where: str) -> None:
    """Raise BadData if a call without arguments has a key that may be another name of them (parameters, input)."""
    known = ("function", "name", "description", "id", "type", "index")
    if others := [key for key, value in call.items() if key not in known and value is not None]:
        found = ", ".join(map(repr, others))
        message = f"{where}: no 'arguments' in the function, but {found}, which would be lost"
        raise _malformed(message, "use {type: function, function: {name, arguments}}: rename the key, or remove it")


def _parsed(text: str, where: object, name: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also for an integer of more than 4300 digits
        raise _malformed(f"{where}: {name} is not valid JSON: {text[:60]!r}", "fix or remove this row") from None


def _malformed(message: str, hint: str) -> BadData:
    return BadData.with_reason("malformed conversation", message, hint)
