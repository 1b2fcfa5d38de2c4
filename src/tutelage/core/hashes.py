"""sha256 of files, remembered by path, size and time of change, so that a plan stays fast."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from tutelage.core.files import sha256_file, write_json


def remembered_sha256(paths: Iterable[Path], memo: Path) -> dict[Path, str]:
    """sha256 of each file; one that has not changed since `memo` was written is not read again.

    The memo only saves time: without it, or where it cannot be written, everything is read.
    """
    keys = {path: _key(path) for path in paths}
    known = _load(memo)
    fresh = {key: sha256_file(path) for path, key in keys.items() if key not in known}
    if fresh:
        with contextlib.suppress(OSError):  # a read-only store, a full disk: hash again next time
            # Read again: another process may have added entries while this one was hashing.
            write_json(memo, {**_load(memo), **fresh})
    return {path: {**known, **fresh}[key] for path, key in keys.items()}


def _key(path: Path) -> str:
    state = path.stat()
    return f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"


def _load(memo: Path) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):  # none yet, or a damaged one
        return {}
    return known if isinstance(known, dict) else {}
