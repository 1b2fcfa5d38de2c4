"""The executor `ray`: shards made by a fleet of workers, each with an engine of its own.

`RayFleet.run` starts a driver (`fleet_driver.py`) in a process of its own and hears from it over a
pipe; the driver hires workers (`fleet_worker.py`) on the cluster. The ledger, the bar and the
user's terminal stay here.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tutelage.core.artifact import Artifact, Site
from tutelage.core.errors import EngineError
from tutelage.core.shards import Begin, OnDone, OnTokens, Say, Shard
from tutelage.engines.fleet_driver import KEPT, Order, drive
from tutelage.recipe.tables import Fleet

START_SECONDS = 120.0
"""For a Ray of ours to start: on a busy machine it takes 15."""
JOIN_SECONDS = 30.0
"""For a cluster to be joined, which takes 2."""
STOP_SECONDS = 3.0
PASSED_ON = "TUTELAGE_"
"""Variables of this beginning are set for the workers too."""


@dataclass(frozen=True)
class RayFleet:
    """See `core.shards.Executor`. `threads` of the CPU for a worker; 0: as many as its CPUs."""

    fleet: Fleet
    threads: int = 0

    def run(
        self,
        todo: Sequence[Shard],
        begin: Begin,
        *,
        on_tokens: OnTokens,
        on_done: OnDone,
        say: Say,
    ) -> None:
        """See `Executor.run`. Raises EngineError when the cluster is not there, is lost, or loses
        too many workers; what a worker raises, as it is."""
        if importlib.util.find_spec("ray") is None:
            raise EngineError(
                "executor = \"ray\" needs ray, which is not installed: pip install 'tutelage[ray]'"
            )
        shards = {shard.name: shard for shard in todo}
        with _mark(begin) as paths, tempfile.TemporaryDirectory(prefix="tutelage-") as folder:
            order = Order(self.fleet, todo, pickle.dumps(begin), paths, self._environment())
            with _driver(order, Path(folder) / "log") as heard:
                for kind, content in heard:
                    if kind == "tokens":
                        on_tokens(content)
                    elif kind == "done":
                        on_done(shards[content.shard], content.seconds, content.tokens)
                    elif kind == "say":
                        say(content)

    def _environment(self) -> dict[str, str]:
        threads = self.threads or max(1, int(self.fleet.cpus))
        named = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
        named |= {k: os.environ[k] for k in ("HF_HUB_OFFLINE",) if k in os.environ}
        return {**named, "OMP_NUM_THREADS": str(threads)}


@contextlib.contextmanager
def _mark(begin: Begin) -> Iterator[list[str]]:
    """The paths that a worker must see: those `begin` names, and a file that was not there before.

    A node may have a folder of the same name that is not this one.
    """
    named = [*getattr(begin, "args", ())]
    sites = [each for each in named if isinstance(each, Site)]
    inputs = [a for each in named if isinstance(each, Mapping) for a in each.values()]
    paths = [str(each.path) for each in inputs if isinstance(each, Artifact)]
    marks = [site.scratch("fleet") / uuid.uuid4().hex for site in sites]
    for mark in marks:
        mark.touch()
    try:
        yield [*map(str, marks), *paths]
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
        for site in sites:  # what a lost worker left of an unfinished file
            for stale in site.path.rglob("*.tmp"):
                stale.unlink(missing_ok=True)


@contextlib.contextmanager
def _driver(order: Order, log: Path) -> Iterator[Iterator[tuple[str, Any]]]:
    """A driver at work; yields what it says, and ends it."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(
        target=drive, args=(order, writer, str(log), os.getpid()), daemon=True
    )
    process.start()
    writer.close()  # the driver's copy is the only one, so that its death is the pipe's end
    try:
        yield _heard(reader, process, order.fleet, log)
    finally:
        process.terminate()
        process.join(STOP_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        reader.close()
        process.close()


def _heard(
    reader: Connection, process: BaseProcess, fleet: Fleet, log: Path
) -> Iterator[tuple[str, Any]]:
    local = fleet.address == "local"
    if not reader.poll(patience := START_SECONDS if local else JOIN_SECONDS):
        what = (
            "Ray did not start on this machine in"
            if local
            else (f"no Ray cluster answers (address = {fleet.address!r}; is its head running?) for")
        )
        raise EngineError(f"{what} {patience:.0f} s{_last_words(log)}")
    while True:
        try:
            kind, content = reader.recv()
        except (EOFError, OSError):  # the process is gone, perhaps in the middle of a message
            process.join(STOP_SECONDS)
            raise EngineError(
                f"the Ray cluster is gone (address = {fleet.address!r}; the driver ended with "
                f"{process.exitcode}{_last_words(log)}); start it again: {KEPT}"
            ) from None
        if kind == "failed":
            raise content.error()
        if kind == "ended":
            return
        yield kind, content


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:200]}" if lines else ""
