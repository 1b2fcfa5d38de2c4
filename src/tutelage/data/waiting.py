"""Rows that wait on disk until it is decided which of them stay, and their way into one file.

Records wait as Arrow files, a part for each chunk; in memory is what decides. `write` puts the rows
that stay in any order without holding more than a bucket of them. Knows no rule of the funnel.

Legend: N rows that wait.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.files import atomic_path
from tutelage.data.near import Sketches
from tutelage.data.prepare import Prepared
from tutelage.records import CONVERSATIONS, ROW_GROUP_ROWS

BUCKET_ROWS = 1 << 16
"""Rows of the result that are in memory while they are put in order."""


@dataclass
class Waiting:
    """The rows that passed `prepare.py`: records on disk, and what decides in memory."""

    folder: Path
    counts: list[int] = field(default_factory=list)
    sketches: list[Sketches] = field(default_factory=list)
    places: list[list[str]] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)
    ids: list[np.ndarray] = field(default_factory=list)
    """uint64 hashes"""

    def add(self, chunk: Prepared) -> None:
        """Take a chunk's kept rows in."""
        path = self.part(len(self.counts))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, CONVERSATIONS) as writer:
            writer.write_batch(chunk.kept)
        self.counts.append(len(chunk.kept))
        if chunk.sketches is not None:
            self.sketches.append(chunk.sketches)
        self.places.append(chunk.places)
        self.sources.append(chunk.sources_N)
        self.held_out.append(chunk.held_out_N)
        ids = chunk.kept.column("id").to_pylist()
        self.ids.append(np.array([_hash(name) for name in ids], np.uint64))

    def part(self, index: int) -> Path:
        """The file of one chunk's rows."""
        return self.folder / f"{index:06d}.arrow"

    def tables(self) -> Iterator[tuple[slice, pa.Table]]:
        """Every part, with which of the N rows it holds."""
        start = 0
        for index, count in enumerate(self.counts):
            with pa.memory_map(str(self.part(index))) as source:
                yield slice(start, start + count), pa.ipc.open_file(source).read_all()
            start += count

    def column(self, name: str) -> list[Any]:
        """One column of all rows."""
        return [value for _, table in self.tables() for value in table[name].to_pylist()]


def write(path: Path, waiting: Waiting, order: np.ndarray) -> None:
    """The rows in `order` as one Parquet file, a bucket of them in memory at a time."""
    position_N = np.full(sum(waiting.counts), -1, np.int64)
    position_N[order] = np.arange(len(order))
    renamed = _renamed(waiting, order)
    buckets = -(-len(order) // BUCKET_ROWS)
    sinks = [
        pa.ipc.new_file(str(waiting.folder / f"bucket-{b:05d}"), CONVERSATIONS)
        for b in range(buckets)
    ]
    positions: list[list[np.ndarray]] = [[] for _ in range(buckets)]
    for rows, table in waiting.tables():
        places = position_N[rows]
        table = _with_names(table, rows.start, renamed)
        for bucket in map(int, np.unique(places[places >= 0] // BUCKET_ROWS)):
            inside = np.flatnonzero(places // BUCKET_ROWS == bucket)
            inside = inside[places[inside] >= 0]
            sinks[bucket].write_table(table.take(pa.array(inside)))
            positions[bucket].append(places[inside])
    for sink in sinks:
        sink.close()
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, CONVERSATIONS, compression="zstd") as writer,
    ):
        for bucket in range(buckets):
            with pa.memory_map(str(waiting.folder / f"bucket-{bucket:05d}")) as source:
                table = pa.ipc.open_file(source).read_all()
                ordered = table.take(pa.array(np.argsort(np.concatenate(positions[bucket]))))
                writer.write_table(ordered, row_group_size=ROW_GROUP_ROWS)
        writer.close()  # the footer must be on the file before its fsync


def _renamed(waiting: Waiting, order: np.ndarray) -> dict[int, str]:
    """New names for kept rows whose id an earlier kept row has, by row: `id#2`, `id#3`, ..."""
    hashes_N = np.concatenate([np.zeros(0, np.uint64), *waiting.ids])
    rows = np.sort(order)
    unique, counts = np.unique(hashes_N[rows], return_counts=True)
    shared = rows[np.isin(hashes_N[rows], unique[counts > 1])]
    if not len(shared):
        return {}
    taken = set(unique.tolist())
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    for part, table in waiting.tables():
        inside = shared[(shared >= part.start) & (shared < part.stop)]
        ids = table["id"].take(pa.array(inside - part.start)).to_pylist()
        for row, name in zip(inside.tolist(), ids, strict=True):
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > 1:
                fresh = f"{name}#{seen[name]}"
                while _hash(fresh) in taken:  # some other row is called so by itself
                    fresh += "#"
                taken.add(_hash(fresh))
                names[row] = fresh
    return names


def _with_names(table: pa.Table, start: int, renamed: dict[int, str]) -> pa.Table:
    here = {row - start: name for row, name in renamed.items() if 0 <= row - start < len(table)}
    if not here:
        return table
    ids = table["id"].to_pylist()
    for offset, name in here.items():
        ids[offset] = name
    return table.set_column(0, CONVERSATIONS.field("id"), pa.array(ids, pa.string()))


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")
