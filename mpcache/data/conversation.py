"""Chats as datasets hold them: lists of messages with a role and a content."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpcache.errors import UsageError

# roles as ShareGPT names them; other names stay
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """The messages of one chat, in order. An empty or null row has no message."""

    messages: tuple[Mapping[str, Any], ...]
    "each has `role` and `content`, and the other fields of the dataset that are not null"
    where: str = field(default="a conversation", compare=False)
    "position of the row, for errors"


def conversation_of(messages: Any, where: object) -> Conversation:
    """The conversation of a row's value. Raises UsageError, which names the row by `where`."""
    if messages is None:
        return Conversation(())
    if not isinstance(messages, list):
        raise UsageError(
            f"{where} must hold a list of messages, got {type(messages).__name__}; correct the "
            "row in the data"
        )
    return Conversation(
        tuple(_message(message, f"message {i} in {where}") for i, message in enumerate(messages, 1))
    )


def _message(message: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise UsageError(
            f"{where} must be an object with role and content, got {type(message).__name__}; "
            "correct the message in the data"
        )
    role, content = ("from", "value") if "from" in message else ("role", "content")
    if not isinstance(message.get(role), str) or not message[role]:
        raise UsageError(
            f"{where} must have a text in the field {role}, got {message.get(role)!r:.40}; "
            "correct the message in the data"
        )
    # tables fill missing fields with null: a dataset must mean the same as JSON and as a table
    others = {k: v for k, v in message.items() if k not in (role, content) and v is not None}
    name = message[role]
    text = _text(message.get(content), content, where, is_optional="tool_calls" in others)
    return {"role": _ROLES.get(name, name), "content": text, **others}


def _text(content: Any, field: str, where: str, *, is_optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and is_optional:
        return ""  # an assistant that only calls tools
    if isinstance(content, list) and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    raise UsageError(
        f"{where} must have a text in the field {field}, got {_type_name(content)}; remove the "
        "message from the data, or write a text into the field"
    )


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
    )


def _type_name(content: Any) -> str:
    if isinstance(content, list):
        kinds = [p.get("type") if isinstance(p, dict) else type(p).__name__ for p in content]
        return f"parts of type {', '.join(dict.fromkeys(map(str, kinds)))}"
    return "none" if content is None else type(content).__name__
