"""Work in shards: each one whole on disk before the next, so that a crash costs at most one.

A stage says how to begin (`Begin`: load an engine, open files) and how to make one shard; an
executor says where. `Local` makes them here, one after the other; a fleet (`engines/fleet.py`)
begins on many machines and hands shards out. The ledger is kept here in both cases.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tutelage.core.artifact import WorkDir


@dataclass(frozen=True)
class Shard:
    """A range of items, and the name of the part it makes."""

    index: int
    items: range
    kind: str = "part"

    @property
    def name(self) -> str:
        """`part-00003`: the stem of its file and its key in the ledger."""
        return f"{self.kind}-{self.index:05d}"


OnTokens = Callable[[int], None]
MakeShard = Callable[[Shard, OnTokens], Mapping[str, int]]
"""Writes the shard's files atomically, reports tokens as they come, and returns how many of each
kind it cost."""
OnDone = Callable[[Shard, float, Mapping[str, int]], None]
"""Hears of a finished shard: its working seconds, and its tokens of each kind."""
Say = Callable[[str], None]
Begin = Callable[[], AbstractContextManager[MakeShard]]
"""Has what every shard needs, and lets go of it at the end. For a fleet it must be picklable: a
module's function, or a partial of one."""


class Executor(Protocol):
    """Where shards are made."""

    def run(
        self,
        todo: Sequence[Shard],
        begin: Begin,
        *,
        on_tokens: OnTokens,
        on_done: OnDone,
        say: Say,
    ) -> None:
        """Make all of `todo`; `on_done(shard, seconds, tokens)` once each one's files are there.

        `on_tokens` hears of tokens as they come, from all shards that are being made together.
        """
        ...


@dataclass(frozen=True)
class Local:
    """In this process, in order."""

    def run(
        self,
        todo: Sequence[Shard],
        begin: Begin,
        *,
        on_tokens: OnTokens,
        on_done: OnDone,
        say: Say,
    ) -> None:
        """See `Executor.run`."""
        with begin() as make:
            for shard in todo:
                started = time.monotonic()
                tokens = make(shard, on_tokens)
                on_done(shard, time.monotonic() - started, tokens)


def shards(count: int, rows: int) -> list[Shard]:
    """Cut `count` items into shards of `rows`; the last may be smaller."""
    starts = range(0, count, rows)
    return [
        Shard(index, range(start, min(start + rows, count))) for index, start in enumerate(starts)
    ]


def run_shards(
    work: WorkDir, parts: Sequence[Shard], begin: Begin, *, label: str, tokens_each: int,
    here: bool = False,
) -> None:  # fmt: skip
    """Make every shard of `parts` that is not finished yet, where the work folder's executor says.

    `tokens_each` is the most an item can take: the bar runs over tokens, and jumps where answers
    end early. With `here` they are made in this process, whoever the executor is.
    """
    todo = [shard for shard in parts if not work.done(shard.name)]
    if not todo:  # nothing to load a model for
        return
    count = sum(len(shard.items) for shard in parts)
    finished = count - sum(len(shard.items) for shard in todo)  # is not in the rate
    expected = {shard.name: len(shard.items) * tokens_each for shard in todo}
    with work.reporter.bar(
        count * tokens_each, label, unit="tokens", done=finished * tokens_each
    ) as bar:
        running = 0  # tokens of shards that are not done yet

        def on_tokens(number: int) -> None:
            nonlocal running
            running += number
            bar.advance(number)

        def on_done(shard: Shard, seconds: float, tokens: Mapping[str, int]) -> None:
            nonlocal finished, running
            work.commit(shard.name, seconds=seconds, tokens=tokens)
            finished += len(shard.items)
            # What the others have so far is not told apart: the bar may lag, and never runs ahead.
            running = max(0, running - expected[shard.name])
            bar.advance(finished * tokens_each + running - bar.done)

        executor = Local() if here or work.executor is None else work.executor
        executor.run(todo, begin, on_tokens=on_tokens, on_done=on_done, say=work.reporter.say)
