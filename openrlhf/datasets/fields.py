"""The fields of a row: text, or a list of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf.errors import DataError

ANY_VALUE = ("--label_key", "--steps_key")
"""Flags of keys whose values are checked where they are read; all others hold text or messages."""
PAIRS = "--chosen_key"
"""Only data with this flag has margins; elsewhere a column of that name is any column."""


def check_keys(keys: Any, required: Mapping[str, str], where: str) -> None:
    """Raise :class:`DataError` when a required key is not among ``keys``; names what is there and the flag to set.

    ``required`` is key that every row must have -> flag that chooses the key.
    """
    for key, flag in required.items():
        if key not in keys:
            there = ", ".join(map(str, keys)) or "nothing"
            raise DataError(f"{where}: no key {key!r}; found: {there}; set {flag} to the key that holds it")


def check_row(row: Mapping[str, Any], required: Mapping[str, str], where: str) -> None:
    """Raise :class:`DataError` when a row lacks a required key, or a value is neither text nor messages nor null."""
    check_keys(row, required, where)
    for key, flag in required.items():
        if flag not in ANY_VALUE and not isinstance(row[key], str):
            as_messages(row[key], "user", f"{where}: {key!r} ({flag})")
    margin = row.get("margin") if PAIRS in required.values() else None
    if isinstance(margin, bool) or not isinstance(margin, (int, float, type(None))):
        raise DataError(f"{where}: 'margin' is a number; found {type(margin).__name__}")


def as_text(value: Any, where: str) -> str:
    """Return ``value`` when it is a string, ``""`` for None; anything else is a :class:`DataError`."""
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = "; a list of messages needs --apply_chat_template" if isinstance(value, list) else ""
        raise DataError(f"{where}: expected text, found {type(value).__name__}{hint}")
    return value


def as_messages(value: Any, role: str, where: str) -> list[dict]:
    """Return a list of messages; a plain string becomes one message of ``role``, None becomes none."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        hint = "; write it in quotes" if isinstance(value, (int, float)) else ""
        raise DataError(f"{where}: expected text or a list of messages, found {type(value).__name__}{hint}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise DataError(f"{where}: a message has the keys role and content; found: {found}")
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise DataError(f"{where}: the content of a message is text; found {type(message['content']).__name__}")
        if not isinstance(message["role"], str):
            raise DataError(f"{where}: the role of a message is text; found {type(message['role']).__name__}")
        messages.append({key: part for key, part in message.items() if part is not None or key == "content"})
    return messages


def is_blank(value: Any) -> bool:
    """Whether a prompt or response field holds nothing but white space; for messages the last one is looked at."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return not value[-1].get("tool_calls") and is_blank(value[-1].get("content"))
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def assistant_turns(messages: list[dict]) -> list[int]:
    """Return the positions of the assistant messages that say something."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and not is_blank([message])]
