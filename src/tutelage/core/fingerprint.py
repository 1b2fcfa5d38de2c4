"""Canonical JSON and its sha256: the identity of everything a step makes.

Two processes, machines or Python versions must agree on an identity, so whatever has no single
text form (sets, paths, clocks, NaN, objects) raises instead of being guessed at.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """The one text form of `value`: sorted keys, no spaces, shortest round-trip floats.

    Raises TypeError or ValueError, naming the place, on anything that has no single text form.
    """
    return json.dumps(
        _checked(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


def fingerprint(value: Any) -> str:
    """sha256 (64 hex digits) of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields that differ, as `path: old -> new`; what changed, rather than two hashes."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}):
            place = f"{path}.{key}" if path else str(key)
            if key in old and key in new:
                lines += differences(old[key], new[key], place)
            else:
                left = _short(old[key]) if key in old else "absent"
                lines.append(f"{place}: {left} -> {_short(new[key]) if key in new else 'absent'}")
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for index, (left, right) in enumerate(zip(old, new, strict=True))
            for line in differences(left, right, f"{path}[{index}]")
        ]
    # Not `==`: to it 1, 1.0 and True are one, and they are three identities.
    return (
        []
        if canonical_json(old) == canonical_json(new)
        else [f"{path}: {_short(old)} -> {_short(new)}"]
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _checked(value: Any, place: str) -> Any:
    # bool and int before float: `True` is an int, and 1 and 1.0 are kept apart on purpose.
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}: not a finite number, so it has no identity")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}: keys of an identity are strings")
        return {key: _checked(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_checked(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}: it has no single text form")
