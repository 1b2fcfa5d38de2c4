"""What a source's row means: one conversation, or the reason why it is none."""

import json
from collections.abc import Mapping
from typing import Any

from tutelage.core.errors import DataError
from tutelage.recipe.curation import Columns, DataSource
from tutelage.text.markers import split_thinking

ROLES = ("system", "user", "assistant")
ALIASES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "prompter": "user",
}  # fmt: skip
USUAL = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "prompt": ("prompt", "instruction", "question", "problem", "input"),
    "response": ("response", "completion", "output", "chosen"),
    "thinking": ("thinking", "reasoning", "reasoning_content"),
    "answer": ("answer", "gold"),
    "language": ("language", "lang"),
    "id": ("id",),
}
"""Names by which a column is recognised when the recipe does not map it, best first."""


def conversation(
    row: Mapping[str, Any], source: DataSource, *, place: str, name: str
) -> dict[str, Any]:
    """The row as a record of `records.CONVERSATIONS`.

    The mode is `reasoning` when the last assistant message has a chain. A row without an assistant
    message at its end is a prompt. Raises DataError with the reason (without the place).
    """
    columns = source.columns
    messages = _messages(row, columns)
    last = messages[-1]
    reasoning = last["role"] == "assistant" and bool(last["thinking"])
    used = {_column(row, columns, field) for field in USUAL}
    rest = {key: value for key, value in row.items() if key not in used and key != "task"}
    return {
        "id": str(_value(row, columns, "id") or place),
        "source": name,
        "language": _text(row, columns, "language") or source.language or None,
        "mode": "reasoning" if reasoning else "fast",
        "messages": messages,
        "complete": True,
        "answer": _text(row, columns, "answer"),
        "task": row["task"] if isinstance(row.get("task"), str) else None,
        "difficulty": None,
        "meta": json.dumps(rest, ensure_ascii=False, default=str, sort_keys=True) if rest else None,
    }


def _messages(row: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    listed = _value(row, columns, "messages")
    if isinstance(listed, list):
        messages = [_message(item) for item in listed]
    else:
        prompt = _text(row, columns, "prompt")
        if not prompt or not prompt.strip():
            raise DataError("has neither messages nor a prompt")
        messages = []
        if system := _text(row, columns, "system"):
            messages.append({"role": "system", "content": system, "thinking": None})
        messages.append({"role": "user", "content": prompt, "thinking": None})
        if response := _text(row, columns, "response"):
            messages.append(_assistant(response, _text(row, columns, "thinking")))
    if not any(message["role"] == "user" for message in messages):
        raise DataError("has no user message")
    if messages[-1]["role"] == "system":
        raise DataError("ends with a system message")
    return messages


def _message(item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise DataError("has a message that is not an object")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    role = ALIASES.get(str(role), role)
    if role not in ROLES:
        raise DataError(f"has a message with the role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError("has a message whose content is not text")
    if role == "assistant":
        chain = item.get("thinking") or item.get("reasoning_content")
        return _assistant(content, chain if isinstance(chain, str) else None)
    return {"role": role, "content": content, "thinking": None}


def _assistant(content: str, thinking: str | None) -> dict[str, Any]:
    if thinking is None:
        thinking, content = split_thinking(content)
    if not content.strip():
        raise DataError("has an empty answer")
    return {"role": "assistant", "content": content, "thinking": thinking or None}


def _column(row: Mapping[str, Any], columns: Columns, field: str) -> str | None:
    """The column that holds `field`: the mapped one, or the first usual name the row has."""
    if mapped := getattr(columns, field):
        if mapped not in row:
            raise DataError(f"has no column {mapped!r} (mapped to {field})")
        return mapped
    taken = {value for value in columns.model_dump().values() if value}
    return next((name for name in USUAL[field] if name in row and name not in taken), None)


def _value(row: Mapping[str, Any], columns: Columns, field: str) -> Any:
    column = _column(row, columns, field)
    return None if column is None else row[column]


def _text(row: Mapping[str, Any], columns: Columns, field: str) -> str | None:
    value = _value(row, columns, field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"has a {field} that is not text")
