"""Begins for a fleet's workers, which import this module: a cheap one, and injected faults.

They stand in for a stage's: each shard writes one small file and tells of its tokens.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tutelage.core import files
from tutelage.core.artifact import Site
from tutelage.core.errors import DataError
from tutelage.core.shards import MakeShard, OnTokens, Shard


@contextlib.contextmanager
def writing(site: Site, seconds: float = 0.0, fault: str = "") -> Iterator[MakeShard]:
    """A line an item. `fault`: `KIND:SHARD` injects a fault at that shard."""
    kind, _, at = fault.partition(":")
    if kind == "begin":
        raise DataError("rows.jsonl:7: not a conversation; mend it")
    if kind == "die-at-begin":
        os.kill(os.getpid(), signal.SIGKILL)

    def make(shard: Shard, on_tokens: OnTokens) -> Mapping[str, int]:
        with (site.path / "made.log").open("a") as log:
            print(shard.name, os.getpid(), os.environ["OMP_NUM_THREADS"], file=log)
        for _ in shard.items:
            on_tokens(2)
            time.sleep(seconds)
        if shard.name == at:
            _strike(kind, site, shard)
        path = site.path / f"{shard.name}.txt"
        files.write_text(path, "".join(f"{item}\n" for item in shard.items))
        return {"student_decoded": 2 * len(shard.items)}

    yield make


def _strike(kind: str, site: Site, shard: Shard) -> None:
    if kind == "data":
        raise DataError("rows.jsonl:7: not a conversation; mend it")
    if kind == "bug":
        raise ZeroDivisionError("a bug of ours")
    if kind == "full":
        raise OSError(28, "No space left on device", str(site.path / "x"))
    if kind == "die" or (kind == "die-once" and not (site.path / "struck").exists()):
        (site.path / "struck").touch()
        (site.path / f".{shard.name}.abc.tmp").touch()  # as an unfinished file is left
        os.kill(os.getpid(), signal.SIGKILL)


def made(folder: Path) -> list[str]:
    """Shards in the order they were begun, again where they were begun again."""
    return [line.split()[0] for line in (folder / "made.log").read_text().splitlines()]
