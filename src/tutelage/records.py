"""What crosses from stage to stage: the Arrow schemas of rows, and nothing about who makes them.

A *conversation* is a list of messages; a *prompt* is a conversation whose last message is the
user's. A *rollout* is one sampled answer, by token ids exactly as sampled.
"""

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
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(f"{path} cannot be read as Parquet: {error}") from error


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
