"""What is done to each row alone, chunk by chunk, so that any number of processes may share it.

Owns one chunk's way from raw rows to kept records, dropped ones with their reasons, and what the
whole-set decisions (`funnel.py`) need of each kept row. A chunk's result depends on the chunk and
the job alone: chunks are cut at fixed places, so the number of workers changes nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.core.errors import DataError
from tutelage.data.contamination import Index
from tutelage.data.filters import NamedFilter, apply_filters, build_filters
from tutelage.data.near import Sketches, sketch
from tutelage.data.rows import conversation
from tutelage.data.sources import UnreadableRow
from tutelage.recipe.curation import DataSource
from tutelage.recipe.filters import AnyFilter
from tutelage.records import CONVERSATIONS, prompt_messages

CHUNK_ROWS = 2048
FEW_CHUNKS = 4
"""Up to so many a second process would take longer to start than to help."""
UNREADABLE, CONTAMINATION = "unreadable", "contamination"


@dataclass(frozen=True)
class RawRow:
    """A row as a source gave it."""

    place: str
    row: Mapping[str, Any] | str
    """The reason, where it could not even be read."""
    source: int = -1
    """Which source's columns say what it means; -1 for a record of an earlier step."""


@dataclass(frozen=True)
class Job:
    """All a process needs to know to prepare a chunk."""

    sources: tuple[DataSource, ...] = ()
    names: tuple[str, ...] = ()
    filters: tuple[AnyFilter, ...] = ()
    tokenizer: Path | None = None
    """A `tokenizer.json`, by which `length` counts."""
    evaluation: tuple[str, ...] = ()
    """Texts of which a row must hold nothing."""
    compare: str = ""
    """What duplicates are told by: prompt, conversation, or "" for not at all."""


@dataclass(frozen=True)
class Dropped:
    """A row that was taken out, with the line that is kept of it."""

    name: str
    """By what: also the name of its quarantine file."""
    place: str
    id: str
    reason: str
    row: Mapping[str, Any] | None
    more: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """One line of JSON."""
        fields = {"place": self.place, "id": self.id, "reason": self.reason, **self.more}
        return json.dumps({**fields, "row": self.row}, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Prepared:
    """One chunk."""

    read: int
    kept: pa.RecordBatch
    """Records of CONVERSATIONS."""
    places: list[str]
    sources_N: np.ndarray
    """int16"""
    held_out_N: np.ndarray
    """float64 in [0, 1): by the prompt's text; below the hold-out's share it is held out."""
    sketches: Sketches | None
    dropped: list[Dropped]


def prepared(rows: Iterable[RawRow], job: Job, *, workers: int) -> Iterator[Prepared]:
    """Every chunk, in order. More than a few are shared among `workers` processes."""
    chunks = _chunks(rows)
    first = list(islice(chunks, FEW_CHUNKS))
    if workers < 2 or len(first) < FEW_CHUNKS:
        preparer = Preparer(job)
        yield from map(preparer, chain(first, chunks))
        return
    # Not forked: a process that has used torch's threads may hang when it is.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(job,)
    ) as pool:
        waiting: list[Future[Prepared]] = []
        for chunk in chain(first, chunks):
            waiting.append(pool.submit(_prepare, chunk))
            if len(waiting) > 2 * workers:  # no more rows are read than the workers keep up with
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _chunks(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk


class Preparer:
    """Prepares chunks by one job; what is costly to build is built once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        counter = _token_counter(job.tokenizer) if job.tokenizer else None
        self.filters: Sequence[NamedFilter] = build_filters(job.filters, count_tokens=counter)
        self.index = Index.build(job.evaluation) if job.evaluation else None

    def __call__(self, chunk: Sequence[RawRow]) -> Prepared:
        """One chunk's rows."""
        dropped: list[Dropped] = []
        kept: list[tuple[RawRow, Mapping[str, Any]]] = []
        for raw in chunk:
            record = self._record(raw)
            if isinstance(record, Dropped):
                dropped.append(record)
            elif found := apply_filters(self.filters, record):
                name, reason = found
                dropped.append(Dropped(name, raw.place, record["id"], reason, record))
            else:
                kept.append((raw, record))
        if self.index:
            kept, contaminated = self._decontaminated(kept, self.index)
            dropped += contaminated
        records = [record for _, record in kept]
        prompts = [_said(prompt_messages(record), ("user",)) for record in records]
        compared = prompts
        if self.job.compare == "conversation":
            compared = [_everything(record) for record in records]
        return Prepared(
            read=len(chunk),
            kept=pa.RecordBatch.from_pylist(records, schema=CONVERSATIONS),
            places=[raw.place for raw, _ in kept],
            sources_N=np.array([raw.source for raw, _ in kept], np.int16),
            held_out_N=np.array([_position(record) for record in records], np.float64),
            sketches=sketch(compared) if self.job.compare else None,
            dropped=dropped,
        )

    def _record(self, raw: RawRow) -> Mapping[str, Any] | Dropped:
        if isinstance(raw.row, str):
            return Dropped(UNREADABLE, raw.place, "", raw.row, None)
        if raw.source < 0:
            return raw.row
        source, name = self.job.sources[raw.source], self.job.names[raw.source]
        try:
            return conversation(raw.row, source, place=raw.place, name=name)
        except DataError as error:
            return Dropped(UNREADABLE, raw.place, "", str(error), None)

    def _decontaminated(
        self, kept: Sequence[tuple[RawRow, Mapping[str, Any]]], index: Index
    ) -> tuple[list[tuple[RawRow, Mapping[str, Any]]], list[Dropped]]:
        clean, dropped = [], []
        matches = index.find_all([_everything(record) for _, record in kept])
        for (raw, record), match in zip(kept, matches, strict=True):
            if match is None:
                clean.append((raw, record))
                continue
            reason = f"shares {match.share:.0%} of the evaluation item: {match.text[:80]}"
            more = {
                "item": self.job.evaluation[match.item],
                "shared": match.text,
                "share": round(match.share, 4),
            }
            dropped.append(Dropped(CONTAMINATION, raw.place, record["id"], reason, record, more))
        return clean, dropped


def raw_row(place: str, row: Mapping[str, Any] | UnreadableRow, source: int) -> RawRow:
    """What a source's reader yields, ready to be sent to another process."""
    return RawRow(place, str(row) if isinstance(row, UnreadableRow) else row, source)


def _said(messages: Sequence[Mapping[str, Any]], roles: Sequence[str]) -> str:
    return "\n".join(m["content"].strip() for m in messages if m["role"] in roles)


def _everything(record: Mapping[str, Any]) -> str:
    return "\n".join(
        part
        for message in record["messages"]
        for part in (message["thinking"], message["content"])
        if part
    )


def _position(record: Mapping[str, Any]) -> float:
    """Uniform in [0, 1) by the users' text alone: stable when other rows come or go."""
    digest = hashlib.sha256(_said(record["messages"], ("user",)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _token_counter(path: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


_PREPARER: list[Preparer] = []
"""Of a worker process; it has one for its whole life."""


def _start(job: Job) -> None:
    _PREPARER[:] = [Preparer(job)]


def _prepare(chunk: Sequence[RawRow]) -> Prepared:
    return _PREPARER[0](chunk)
