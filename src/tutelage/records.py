"""What crosses from stage to stage: the Arrow schemas of rows, and nothing about who makes them.

A *conversation* is a list of messages; a *prompt* is a conversation whose last message is the
user's. A *rollout* is one sampled answer, by token ids exactly as sampled.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.errors import ArtifactError
from tutelage.core.files import atomic_path

Mode = Literal["reasoning", "fast"]

MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("thinking", pa.string()),  # an assistant's chain; null or "" is a fast answer
    ]
)

CONVERSATIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
        pa.field("complete", pa.bool_(), nullable=False),  # False: cut off, so no end of turn
        pa.field("answer", pa.string()),  # the gold answer, where a verifier has one
        pa.field("task", pa.string()),
        pa.field("difficulty", pa.float64()),  # 0 = the student always solves it, 1 = never
        pa.field("meta", pa.string()),  # JSON: what else the source said of the row
    ]
)

ROLLOUTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("student_logp", pa.list_(pa.float32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("task", pa.string()),
        pa.field("language", pa.string()),
        pa.field("verdict", pa.string()),  # what a grader said; null: not graded
    ]
)

ANSWERS = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),  # fingerprint of the model's artifact
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("thinking", pa.string()),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("rouge_l", pa.float64()),  # against the teacher's answer; null for the teacher
    ]
)

VERDICTS = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),  # fingerprint of the model's artifact
        pa.field("test", pa.string(), nullable=False),  # the data step's or the task's name
        pa.field("item", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("temperature", pa.float64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("thinking", pa.string()),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("gold", pa.string()),
        pa.field("correct", pa.float64(), nullable=False),  # 0 or 1, or a measure in between
        pa.field("reason", pa.string(), nullable=False),  # why it was judged so
        pa.field("tokens", pa.int32(), nullable=False),  # decoded, chain included
        pa.field("finish_reason", pa.string(), nullable=False),  # stop, length, or choice: none
    ]
)
"""One graded answer a row: what evaluation and ablation count."""

ROW_GROUP_ROWS = 4096


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write rows as one Parquet file, atomically, row group by row group; returns their count."""
    count = 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for batch in _batched(rows, ROW_GROUP_ROWS):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
        writer.close()  # the footer must be on the file before its fsync
    return count


def read_rows(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files, in order, in constant memory.

    Raises ArtifactError naming the file that cannot be read.
    """
    for path in paths:
        with _readable(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS):
                yield from batch.to_pylist()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path} cannot be read as Parquet: {error}") from error


class RowFiles:
    """The rows of Parquet files by number, a row group in memory at a time.

    Raises ArtifactError naming the file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._groups: list[tuple[Path, int]] = []
        self._starts = [0]
        self._open: tuple[int, pa.Table] | None = None
        for path in paths:
            with _readable(path), pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    self._groups.append((path, group))
                    rows = file.metadata.row_group(group).num_rows
                    self._starts.append(self._starts[-1] + rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises ArtifactError naming a file that lacks one."""
        for path, schema in self._schemas():
            if missing := [name for name in columns if name not in schema.names]:
                raise ArtifactError(f"{path} has no column {missing[0]!r}; it has {schema.names}")

    def check_lists(self, depths: Mapping[str, int]) -> None:
        """Each column is there, so many lists of integers deep, and has a value in every row.

        Raises ArtifactError naming file and column.
        """
        self.check_columns(list(depths))
        for path, schema in self._schemas():
            for name, depth in depths.items():
                kind = schema.field(name).type
                for _ in range(depth):
                    kind = kind.value_type if pa.types.is_list(kind) else pa.null()
                if not pa.types.is_integer(kind):
                    raise ArtifactError(
                        f"{path}: column {name!r} is {schema.field(name).type}, not integers "
                        f"{depth} lists deep"
                    )
        for path, group in self._groups:
            with _readable(path), pq.ParquetFile(path) as file:
                table = file.read_row_group(group, columns=list(depths))
            if empty := [name for name in depths if table[name].null_count]:
                raise ArtifactError(f"{path}: column {empty[0]!r} has a row without a value")

    def _schemas(self) -> Iterator[tuple[Path, pa.Schema]]:
        for path in dict.fromkeys(path for path, _ in self._groups):
            with _readable(path):
                yield path, pq.read_schema(path)

    def tables(self, wanted: range) -> Iterator[pa.Table]:
        """The rows of these numbers, rising by one, in pieces."""
        position = wanted.start
        while position < wanted.stop:
            group = bisect_right(self._starts, position) - 1
            first = position - self._starts[group]
            stop = min(self._starts[group + 1], wanted.stop)
            yield self._table(group).slice(first, stop - position)
            position = stop

    def rows(self, wanted: range) -> Iterator[dict[str, Any]]:
        """The same as dictionaries."""
        for table in self.tables(wanted):
            yield from table.to_pylist()

    def lengths(self, *columns: str) -> list[int]:
        """For each row, the summed length of these list columns; nothing else is read."""
        found: list[int] = []
        for path, group in self._groups:
            with _readable(path), pq.ParquetFile(path) as file:
                table = file.read_row_group(group, columns=list(columns))
            counts = [table[name].combine_chunks().value_lengths().to_pylist() for name in columns]
            found += [sum(row) for row in zip(*counts, strict=True)]
        return found

    def _table(self, group: int) -> pa.Table:
        if self._open is None or self._open[0] != group:
            path, index = self._groups[group]
            with _readable(path), pq.ParquetFile(path) as file:
                self._open = (group, file.read_row_group(index))
        return self._open[1]


def count_rows(paths: Sequence[Path]) -> int:
    """Rows over the files, from their footers alone."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def _batched(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def prompt_messages(row: Mapping[str, Any]) -> list[Any]:
    """A row's messages up to its last user message: what is to be answered."""
    messages = row["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[: last + 1]
