"""Shards, who makes them, and the one bar over all of them."""

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from tutelage.core.artifact import Site, WorkDir
from tutelage.core.progress import Bar, Reporter
from tutelage.core.shards import Begin, MakeShard, OnTokens, Shard, run_shards, shards


class Watched(Reporter):
    """A reporter whose bar can be read afterwards."""

    @contextlib.contextmanager
    def bar(self, total: int, label: str, *, unit: str, done: int = 0) -> Iterator[Bar]:
        self.seen.append(Bar(total, label, unit, done))
        yield self.seen[-1]

    @property
    def seen(self) -> list[Bar]:
        return self.__dict__.setdefault("_seen", [])


def opened(folder: Path) -> WorkDir:
    return WorkDir.open(folder, reporter=Watched(quiet=True), device="cpu")


@contextlib.contextmanager
def begin(log: list[str], tokens: int = 2) -> Iterator[MakeShard]:
    log.append("begin")

    def make(shard: Shard, on_tokens: OnTokens) -> Mapping[str, int]:
        log.append(shard.name)
        for _ in shard.items:
            on_tokens(tokens)
        return {"student_decoded": tokens * len(shard.items)}

    yield make
    log.append("end")


def test_what_is_needed_is_had_once_and_let_go_of(tmp_path: Path) -> None:
    log: list[str] = []
    work = opened(tmp_path)
    run_shards(work, shards(7, 3), partial(begin, log), label="x", tokens_each=4)
    assert log == ["begin", "part-00000", "part-00001", "part-00002", "end"]
    assert work.tokens()["student_decoded"] == 14


def test_nothing_is_begun_where_every_shard_is_done(tmp_path: Path) -> None:
    log: list[str] = []
    run_shards(opened(tmp_path), shards(7, 3), partial(begin, log), label="x", tokens_each=4)
    again: list[str] = []
    run_shards(opened(tmp_path), shards(7, 3), partial(begin, again), label="x", tokens_each=4)
    assert again == []


def test_the_bar_jumps_over_what_answers_left_of_their_room(tmp_path: Path) -> None:
    work = opened(tmp_path)
    run_shards(work, shards(7, 3), partial(begin, []), label="x", tokens_each=4)
    (bar,) = work.reporter.seen  # type: ignore[attr-defined]
    assert (bar.done, bar.total) == (28, 28)


def test_parts_of_two_kinds_do_not_take_each_other_for_done(tmp_path: Path) -> None:
    log: list[str] = []
    work = opened(tmp_path)
    first = [Shard(0, range(1), "calibration")]
    run_shards(work, first, partial(begin, log), label="x", tokens_each=1)
    run_shards(work, shards(1, 1), partial(begin, log), label="x", tokens_each=1)
    assert [name for name in log if "-" in name] == ["calibration-00000", "part-00000"]


class Backwards:
    """An executor that makes the last shard first, several begun before one is done."""

    def run(
        self, todo: Sequence[Shard], begin: Begin, *, on_tokens: OnTokens,
        on_done: Callable[[Shard, float, Mapping[str, int]], None], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        with begin() as make:
            made = [(shard, make(shard, on_tokens)) for shard in reversed(todo)]
        for shard, tokens in made:
            on_done(shard, 0.0, tokens)


def test_another_executor_makes_the_same_in_any_order(tmp_path: Path) -> None:
    log: list[str] = []
    work = opened(tmp_path)
    work.executor = Backwards()
    run_shards(work, shards(7, 3), partial(begin, log, tokens=4), label="x", tokens_each=4)
    assert log[1:-1] == ["part-00002", "part-00001", "part-00000"]
    assert all(work.done(shard.name) for shard in shards(7, 3))
    (bar,) = work.reporter.seen  # type: ignore[attr-defined]
    assert bar.done == bar.total == 28


def test_what_cannot_leave_this_process_is_made_here_whoever_the_executor_is(
    tmp_path: Path,
) -> None:
    work = opened(tmp_path)
    work.executor = Backwards()
    log: list[str] = []
    run_shards(work, shards(4, 2), partial(begin, log), label="x", tokens_each=4, here=True)
    assert log[1:-1] == ["part-00000", "part-00001"]


def test_a_shard_that_fails_is_not_done_and_those_before_it_are(tmp_path: Path) -> None:
    @contextlib.contextmanager
    def failing() -> Iterator[MakeShard]:
        def make(shard: Shard, on_tokens: OnTokens) -> Mapping[str, int]:
            if shard.index == 1:
                raise OSError(28, "No space left on device")
            return {}

        yield make

    work = opened(tmp_path)
    with pytest.raises(OSError, match="No space"):
        run_shards(work, shards(6, 2), failing, label="x", tokens_each=4)
    assert [work.done(shard.name) for shard in shards(6, 2)] == [True, False, False]


def test_a_site_can_be_sent_to_another_machine_and_holds_no_terminal(tmp_path: Path) -> None:
    work = WorkDir.open(
        tmp_path, reporter=Reporter(), device="cpu", workers=3, sandbox="none",
        memory=tmp_path / "m", engines={},
    )  # fmt: skip
    sent = pickle.loads(pickle.dumps(work.site()))  # noqa: S301 - our own bytes
    assert sent == Site(tmp_path, "cpu", 3, "none", tmp_path / "m", {})
    assert not isinstance(sent, WorkDir)
    assert sent.scratch("a") == work.scratch("a")
