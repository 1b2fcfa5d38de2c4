"""Work in shards: each one whole on disk before the next, so that a crash costs at most one."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tutelage.core.artifact import WorkDir


@dataclass(frozen=True)
class Shard:
    """A range of items, and the name of the part it makes."""

    index: int
    items: range

    @property
    def name(self) -> str:
        """`part-00003`: the stem of its file and its key in the ledger."""
        return f"part-{self.index:05d}"


MakeShard = Callable[[Shard, Callable[[int], None]], Mapping[str, int]]


def shards(count: int, rows: int) -> Iterator[Shard]:
    """Cut `count` items into shards of `rows`; the last may be smaller."""
    for index, start in enumerate(range(0, count, rows)):
        yield Shard(index, range(start, min(start + rows, count)))


def run_shards(
    work: WorkDir, count: int, rows: int, make: MakeShard, *, label: str, tokens_each: int
) -> None:
    """Make every shard that is not finished yet.

    `make(shard, on_tokens)` writes the shard's files atomically, reports tokens as they come, and
    returns how many of each kind it cost. `tokens_each` is the most an item can take: the bar runs
    over tokens, and jumps where answers end early.
    """
    todo = [shard for shard in shards(count, rows) if not work.done(shard.name)]
    # Shards are made in order, so what is done comes first; counted as such, it is not in the rate.
    done = (count - sum(len(shard.items) for shard in todo)) * tokens_each
    with work.reporter.bar(count * tokens_each, label, unit="tokens", done=done) as bar:
        for shard in todo:
            started = time.monotonic()
            tokens = make(shard, bar.advance)
            work.commit(shard.name, seconds=time.monotonic() - started, tokens=tokens)
            bar.advance(shard.items.stop * tokens_each - bar.done)
