"""From many rows to those worth learning from: the whole-set decisions, in constant memory.

Rows pass `prepare.py` chunk by chunk (filters, contamination); then come duplicates, the split, the
mixture of sources, the selection, and a shuffle. Kept records wait on disk meanwhile; in memory is
what decides of each row: about 300 bytes. The order is fixed, and every drop is counted and kept
aside with its reason.

Legend: N rows that passed `prepare.py`.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import write_json
from tutelage.data import near
from tutelage.data.balance import balanced
from tutelage.data.difficulty import difficulty_bands, prefer
from tutelage.data.prepare import (
    CONTAMINATION,
    UNREADABLE,
    Dropped,
    Job,
    RawRow,
    prepared,
)
from tutelage.data.waiting import Waiting, write
from tutelage.data.zipselect import zip_select
from tutelage.recipe.curation import Funnel, Select
from tutelage.records import prompt_messages

DUPLICATES, MIX, HOLDOUT, SELECT, LIMIT = "duplicates", "mix", "holdout", "select", "limit"
CONVERSATIONS_FILE, FUNNEL_FILE, QUARANTINE = "conversations.parquet", "funnel.json", "quarantine"
DIFFICULTY_BANDS = 5
SHOWN_CHARACTERS = 500
"""Of the row that stays, beside the duplicate that goes."""


@dataclass
class _Counts:
    """The funnel: who dropped how many, and how many were left."""

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, count: int, example: str = "") -> None:
        self.dropped[name] = self.dropped.get(name, 0) + count
        if example:
            self.example.setdefault(name, example)

    def steps(self) -> list[dict[str, Any]]:
        left, found = self.read, []
        for name, count in self.dropped.items():
            left -= count
            found.append({"name": name, "dropped": count, "left": left})
        return found

    def check_left(self, left: int) -> None:
        """Raises DataError naming who took the last row."""
        if left:
            return
        name, count = next((n, c) for n, c in reversed(self.dropped.items()) if c)
        raise DataError(
            f"no row is left of {self.read:,} read: {name} dropped the last {count:,}"
            + (f" (first: {self.example[name]})" if name in self.example else "")
            + "; add rows, or loosen it"
        )


def run_funnel(
    rows: Iterable[RawRow], job: Job, config: Funnel, work: WorkDir, *, origin: str,
    on_bad: Callable[[int, int, Dropped], None],
) -> dict[str, int]:  # fmt: skip
    """Narrow rows down and write the result, the counts and what was dropped; returns counts.

    `on_bad(bad, read, first)` may stop the step when too many rows are unreadable.
    Raises DataError when there was no row (`origin` says where), or none is left, naming what
    dropped the last.
    """
    folder = work.scratch("funnel")
    shutil.rmtree(folder)  # what an earlier attempt left
    folder.mkdir()
    waiting, counts = Waiting(folder), _Counts()
    with _Quarantine(work.path / QUARANTINE) as quarantine:
        for name in (UNREADABLE, *(table.name for table in config.filters)):
            counts.add(name, 0)
        if job.evaluation:
            counts.add(CONTAMINATION, 0)
        bad = _collect(rows, job, work, waiting, counts, quarantine)
        if not counts.read:
            raise DataError(f"no rows at all in {origin}")
        if bad:
            on_bad(counts.dropped[UNREADABLE], counts.read, bad)
        total = sum(waiting.counts)
        counts.check_left(total)
        kept_N = _decided(waiting, config, counts, quarantine, np.ones(total, bool))
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(np.flatnonzero(kept_N))
    if config.limit:
        counts.add(LIMIT, len(order) - len(order[: config.limit]))
        order = order[: config.limit]
    counts.check_left(len(order))
    write(work.path / CONVERSATIONS_FILE, waiting, order)
    write_json(work.path / FUNNEL_FILE, {"read": counts.read, "steps": counts.steps()})
    dropped = {f"dropped_{name}": count for name, count in counts.dropped.items()}
    return {"rows": len(order), "read": counts.read, **dropped}


def _collect(
    rows: Iterable[RawRow], job: Job, work: WorkDir, waiting: Waiting, counts: _Counts,
    quarantine: "_Quarantine",
) -> Dropped | None:  # fmt: skip
    """Prepare every chunk; returns the first row that could not be read, if there is one."""
    bad: Dropped | None = None
    with work.reporter.bar(0, "rows", unit="rows") as bar:
        for chunk in prepared(rows, job, workers=work.workers):
            counts.read += chunk.read
            waiting.add(chunk)
            for dropped in chunk.dropped:
                counts.add(dropped.name, 1, f"{dropped.place}: {dropped.reason}")
                quarantine.add(dropped)
                if dropped.name == UNREADABLE:
                    bad = bad or dropped
            bar.total += chunk.read
            bar.advance(chunk.read)
    return bad


def _decided(
    waiting: Waiting,
    config: Funnel,
    counts: _Counts,
    quarantine: "_Quarantine",
    kept_N: np.ndarray,
) -> np.ndarray:
    """Duplicates, split, mixture, selection: True for the rows that stay."""
    if config.duplicates:
        kept_N &= _without_duplicates(waiting, config, counts, quarantine)
        counts.check_left(int(kept_N.sum()))
    if config.part != "all":
        held_out_N = np.concatenate(waiting.held_out) < config.holdout_share
        kept_N = _taken(kept_N, held_out_N == (config.part == "holdout"), HOLDOUT, counts)
    weights = [source.weight for source in getattr(config, "sources", ())]
    if any(weights):
        mixed_N = _mixed(np.concatenate(waiting.sources), kept_N, weights, config.limit)
        kept_N = _taken(kept_N, mixed_N, MIX, counts)
    if config.select:
        chosen_N = _selected(waiting, kept_N, config.select, config.seed)
        kept_N = _taken(kept_N, chosen_N, SELECT, counts)
    return kept_N


def _taken(kept_N: np.ndarray, wanted_N: np.ndarray, name: str, counts: _Counts) -> np.ndarray:
    left_N = kept_N & wanted_N
    counts.add(name, int(kept_N.sum() - left_N.sum()))
    counts.check_left(int(left_N.sum()))
    return left_N


def _without_duplicates(
    waiting: Waiting, config: Funnel, counts: _Counts, quarantine: "_Quarantine"
) -> np.ndarray:
    rule = config.duplicates
    assert rule is not None
    found = near.find(
        near.join(waiting.sketches), threshold=rule.near or 1.0, same_numbers=rule.same_numbers
    )
    of_N = found.of_N if rule.near else np.where(found.similarity_N == 1, found.of_N, -1)
    places = [place for part in waiting.places for place in part]
    wanted = np.unique(of_N[of_N >= 0])
    survivors: dict[int, tuple[str, str]] = {}
    for rows, table in waiting.tables():
        inside = wanted[(wanted >= rows.start) & (wanted < rows.stop)]
        records = table.select(["id", "messages"]).take(pa.array(inside - rows.start)).to_pylist()
        for row, record in zip(inside.tolist(), records, strict=True):
            said = "\n".join(m["content"] for m in prompt_messages(record))
            survivors[row] = (record["id"], said[:SHOWN_CHARACTERS])
    counts.add(DUPLICATES, 0)
    for rows, table in waiting.tables():
        inside = np.flatnonzero(of_N[rows] >= 0)
        for offset, record in zip(
            inside.tolist(), table.take(pa.array(inside)).to_pylist(), strict=True
        ):
            row = rows.start + offset
            similarity = float(found.similarity_N[row])
            of, of_text = survivors[int(of_N[row])]
            dropped = Dropped(
                DUPLICATES, places[row], record["id"], f"{similarity:.2f} the same as {of}", record,
                {"of": of, "of_text": of_text, "similarity": round(similarity, 4)},
            )  # fmt: skip
            counts.add(DUPLICATES, 1, f"{dropped.place}: {dropped.reason}")
            quarantine.add(dropped)
    return of_N < 0


def _mixed(
    sources_N: np.ndarray, kept_N: np.ndarray, weights: Sequence[float], limit: int
) -> np.ndarray:
    """The first rows of each weighted source, as many as its share of the whole allows."""
    sizes = [int((kept_N & (sources_N == number)).sum()) for number in range(len(weights))]
    weighted = [(size, weight) for size, weight in zip(sizes, weights, strict=True) if weight]
    scale = min(size / weight for size, weight in weighted)
    if limit:
        scale = min(scale, limit / sum(weight for _, weight in weighted))
    wanted_N = np.ones(len(kept_N), bool)
    for number, weight in enumerate(weights):
        if weight:
            own_N = np.flatnonzero(kept_N & (sources_N == number))
            wanted_N[own_N[round(scale * weight) :]] = False
    return wanted_N


def _selected(waiting: Waiting, kept_N: np.ndarray, select: Select, seed: int) -> np.ndarray:
    rows = np.flatnonzero(kept_N)
    count = min(select.count, len(rows))  # a smaller set is taken whole
    if select.by == "zip":
        texts = (
            "\n".join(message["content"] for message in messages)
            for messages in waiting.column("messages")
        )
        kept_texts = [text for text, kept in zip(texts, kept_N, strict=True) if kept]
        chosen = rows[zip_select(kept_texts, count=count)]
    else:
        known = [np.nan if value is None else value for value in waiting.column("difficulty")]
        difficulty = np.array(known, np.float64)[rows]
        if select.by == "difficulty":
            if np.isnan(difficulty).all():
                raise DataError("select by difficulty: no row has one; add a difficulty step")
            chosen = rows[
                prefer(difficulty, count=count, centre=select.centre, width=select.width, seed=seed)
            ]
        else:
            keys = list(zip(*_groups(waiting, rows, difficulty, select), strict=True))
            chosen = rows[balanced(keys, count=count, seed=seed)]
    wanted_N = np.zeros(len(kept_N), bool)
    wanted_N[chosen] = True
    return wanted_N


def _groups(
    waiting: Waiting, rows: np.ndarray, difficulty: np.ndarray, select: Select
) -> Iterator[list[str]]:
    for name in select.over:
        if name == "difficulty":
            yield difficulty_bands(difficulty, count=DIFFICULTY_BANDS)
        else:
            values = waiting.column(name)
            yield [str(values[row] or "") for row in rows]


class _Quarantine:
    """One file for each reason to drop a row; made when the first one is dropped."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        self._folder = folder
        self._streams: dict[str, TextIO] = {}

    def add(self, dropped: Dropped) -> None:
        if dropped.name not in self._streams:
            self._folder.mkdir(exist_ok=True)
            path = self._folder / f"{dropped.name}.jsonl"
            self._streams[dropped.name] = path.open("w", encoding="utf-8", newline="\n")
        self._streams[dropped.name].write(dropped.line())

    def __enter__(self) -> "_Quarantine":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()
