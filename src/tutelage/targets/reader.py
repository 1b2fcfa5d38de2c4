"""Reading target shards: a row group at a time, each one checked against its checksum."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.errors import ArtifactError
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets
from tutelage.targets.writer import CHECKSUMS_KEY, META_KEY, checksum


class TargetReader:
    """The rows of a store's shards, in order; `meta` tells where they come from.

    Raises ArtifactError naming the file when one is no target shard, is cut short, or was made
    under other metadata than the first.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise ArtifactError("a target store without a file; score again")
        self.paths = tuple(paths)
        self.metas = [_meta(path) for path in paths]
        self.meta = self.metas[0]
        for path, meta in zip(self.paths, self.metas, strict=True):
            if meta != self.meta:
                raise ArtifactError(f"{path} was made under other settings than {self.paths[0]}")

    def __len__(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.paths)

    def __iter__(self) -> Iterator[TargetRow]:
        """Every row. Raises ArtifactError naming file and row group where the contents differ."""
        for path in self.paths:
            with _open(path) as file:
                sums = json.loads((file.metadata.metadata or {})[CHECKSUMS_KEY])
                for group in range(file.num_row_groups):
                    yield from _rows(_read_group(path, file, group, sums[group]), self.meta.tau)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as Parquet: {error}") from error


def _meta(path: Path) -> StoreMeta:
    with _open(path) as file:
        footer = file.metadata.metadata or {}
    if META_KEY not in footer or CHECKSUMS_KEY not in footer:
        raise ArtifactError(f"{path} is no target shard: its footer lacks the store's metadata")
    return StoreMeta.from_json(footer[META_KEY].decode())


def _read_group(path: Path, file: pq.ParquetFile, group: int, wanted: str) -> pa.Table:
    try:
        table = file.read_row_group(group)
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path}, row group {group}: cannot be read: {error}") from error
    if checksum(table.combine_chunks()) != wanted:
        raise ArtifactError(f"{path}, row group {group}: its contents have changed since scoring")
    return table


def _rows(table: pa.Table, tau: float | None) -> Iterator[TargetRow]:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}

    def array(name: str, index: int) -> np.ndarray:
        return columns[name][index].values.to_numpy(zero_copy_only=False)

    def text(name: str, index: int) -> Any:
        return columns[name][index].as_py()

    for index in range(table.num_rows):
        targets = TokenTargets(
            head_counts_N=array("head_counts", index), head_ids_M=array("head_ids", index),
            head_logq_M=array("head_logq", index), tail_counts_N=array("tail_counts", index),
            tail_ids_T=array("tail_ids", index), label_logp_N=array("label_logp", index),
            entropy_N=array("teacher_entropy", index), tau=tau,
        )  # fmt: skip
        yield TargetRow(
            id=text("id", index), prompt_id=text("prompt_id", index),
            source=text("source", index), mode=text("mode", index),
            finish_reason=text("finish_reason", index), verdict=text("verdict", index),
            prompt_ids=array("prompt_ids", index), response_ids=array("response_ids", index),
            student_logp_N=array("student_logp", index), targets=targets,
        )  # fmt: skip
