"""Writing target shards: one Parquet file, in constant memory, whole or absent.

One row a response, lists a token or an entry; `docs/store.md` tells the columns. The metadata of
the store and a sha256 of every row group stand in the footer.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.files import atomic_path
from tutelage.targets.schema import StoreMeta, TargetRow

META_KEY, CHECKSUMS_KEY = b"tutelage.store", b"tutelage.checksums"
ROW_GROUP_ROWS = 256
COMPRESSION = "zstd"


def _tokens(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("verdict", pa.string()),
        pa.field("prompt_ids", _tokens(pa.int32()), nullable=False),
        pa.field("response_ids", _tokens(pa.int32()), nullable=False),
        pa.field("student_logp", _tokens(pa.float32()), nullable=False),
        pa.field("label_logp", _tokens(pa.float32()), nullable=False),
        pa.field("teacher_entropy", _tokens(pa.float32()), nullable=False),
        pa.field("head_counts", _tokens(pa.int32()), nullable=False),
        pa.field("head_ids", _tokens(pa.int32()), nullable=False),
        pa.field("head_logq", _tokens(pa.float32()), nullable=False),
        pa.field("tail_counts", _tokens(pa.int32()), nullable=False),
        pa.field("tail_ids", _tokens(pa.int32()), nullable=False),
    ]
)


def write_shard(path: Path, rows: Iterable[TargetRow], *, meta: StoreMeta) -> int:
    """Write rows as one file, a row group at a time; returns how many there were."""
    schema = SCHEMA.with_metadata({META_KEY: meta.to_json().encode()})
    waiting = iter(rows)
    count, checksums = 0, []
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression=COMPRESSION) as writer,
    ):
        for table in _tables(waiting, schema):
            writer.write_table(table)
            checksums.append(checksum(table))
            count += table.num_rows
        writer.add_key_value_metadata({CHECKSUMS_KEY: json.dumps(checksums)})
        writer.close()  # the footer must be on the file before its fsync
    return count


def checksum(table: pa.Table) -> str:
    """sha256 of a row group's values, whatever its encoding on disk."""
    digest = hashlib.sha256()
    for column in table.columns:
        for chunk in column.chunks:
            # IPC of one column: values and offsets, free of Parquet's own choices.
            batch = pa.record_batch([chunk], names=["c"])
            digest.update(batch.serialize())
    return digest.hexdigest()


def _tables(rows: Iterator[TargetRow], schema: pa.Schema) -> Iterator[pa.Table]:
    while group := list(islice(rows, ROW_GROUP_ROWS)):
        yield pa.Table.from_pylist([_record(row) for row in group], schema=schema)


def _record(row: TargetRow) -> dict[str, object]:
    targets = row.targets
    return {
        "id": row.id, "prompt_id": row.prompt_id, "source": row.source, "mode": row.mode,
        "finish_reason": row.finish_reason, "verdict": row.verdict,
        "prompt_ids": row.prompt_ids, "response_ids": row.response_ids,
        "student_logp": row.student_logp_N, "label_logp": targets.label_logp_N,
        "teacher_entropy": targets.entropy_N,
        "head_counts": targets.head_counts_N, "head_ids": targets.head_ids_M,
        "head_logq": targets.head_logq_M,
        "tail_counts": targets.tail_counts_N, "tail_ids": targets.tail_ids_T,
    }  # fmt: skip
