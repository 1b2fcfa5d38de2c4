"""One owner a path at a time, over processes; the lock of a dead owner is free at once.

The operating system holds the lock (through `filelock`), so a killed owner leaves nothing to
clean up. The owner's name stands in a file beside it only to tell a waiting person who it is.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.2


@contextlib.contextmanager
def file_lock(
    path: Path, *, wait: bool = True, on_wait: Callable[[str], None] = lambda owner: None
) -> Iterator[bool]:
    """Hold the lock at `path`; yields whether it is held.

    With `wait`, blocks until it is free, calling `on_wait(owner)` once if somebody else has it;
    without, yields False at once in that case.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            yield False
            return
        on_wait(owner_of(path))
        lock.acquire(poll_interval=POLL_SECONDS)
    owner = path.with_suffix(path.suffix + ".owner")
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield True
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def owner_of(path: Path) -> str:
    """Who holds the lock at `path`, for a message: `process 123 on host`."""
    try:
        owner = json.loads(path.with_suffix(path.suffix + ".owner").read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):  # the owner may be just starting or just done
        return "another process"
