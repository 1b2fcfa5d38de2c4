"""A worker of the fleet: one engine, and the shards it is handed. It knows nothing of Ray."""

import os
import pickle
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tutelage import __version__
from tutelage.core.errors import EngineError
from tutelage.core.fault import Fault
from tutelage.core.shards import MakeShard, Shard


@dataclass(frozen=True)
class Facts:
    """Where a worker is and what it runs."""

    node: str
    pid: int
    version: str
    python: str


@dataclass(frozen=True)
class Made:
    """A shard whose files are there."""

    shard: str
    seconds: float
    tokens: Mapping[str, int]
    heard: int
    """Tokens that were reported on the way."""


def facts() -> Facts:
    """Of this process."""
    return Facts(
        socket.gethostname(), os.getpid(), __version__,
        ".".join(platform.python_version_tuple()[:2]),
    )  # fmt: skip


class Worker:
    """An actor; Ray lets two of its methods run at a time, so that `heard` answers during `make`.

    Faults are returned, not raised: an exception would come back wrapped in Ray's own.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)  # now: torch reads its threads when it is imported
        self._stack = ExitStack()
        self._make: MakeShard | None = None
        self._shard, self._heard = "", 0

    def facts(self) -> Facts:
        """Of this worker."""
        return facts()

    def open(self, begin: bytes, paths: Sequence[str]) -> Fault | None:
        """Begin, once `paths` have been found to be here as they are at the driver's."""
        try:
            _check_shared(paths)
            # Our own bytes: the driver's process of this run made them.
            context = pickle.loads(begin)()  # noqa: S301
            self._make = self._stack.enter_context(context)
        except Exception as error:  # the driver raises it again
            return Fault.of(error)
        return None

    def make(self, shard: Shard) -> Made | Fault:
        """Make one shard."""
        assert self._make is not None
        self._shard, self._heard = shard.name, 0
        started = time.monotonic()
        try:
            tokens = self._make(shard, self._on_tokens)
        except Exception as error:  # the driver raises it again
            return Fault.of(error)
        return Made(shard.name, time.monotonic() - started, dict(tokens), self._heard)

    def heard(self) -> tuple[str, int]:
        """The shard in the making and its tokens so far."""
        return self._shard, self._heard

    def close(self) -> None:
        """Let go of the engine and of what else was begun."""
        self._make = None
        self._stack.close()

    def _on_tokens(self, number: int) -> None:
        self._heard += number


def _check_shared(paths: Sequence[str]) -> None:
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise EngineError(
            f"the node {socket.gethostname()} does not see {missing[0]}; every node of the cluster "
            "must see the store and the models under the path they have here: share the folder"
        )
