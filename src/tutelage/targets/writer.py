"""Writes shards of the target store: row group by row group, in constant memory, whole or absent.

Owns the encodings of the columns and the checksums. A shard is an ordinary Parquet file; its schema
metadata holds, as JSON, `tutelage.store` (StoreMeta), `tutelage.row_groups` (a RowGroup each) and
`tutelage.decoding` (a line of arithmetic for each coded column).
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.files import atomic_path
from tutelage.targets.codec import TARGET_LISTS, TEXT_LISTS, arrow_schema, decoding, to_table
from tutelage.targets.group import gather
from tutelage.targets.schema import StoreMeta, TargetRow

META_KEY = b"tutelage.store"
GROUPS_KEY = b"tutelage.row_groups"
DECODING_KEY = b"tutelage.decoding"
ROW_GROUP_TOKENS = 1 << 16
"""Prompt and response tokens of a row group: at 17 ids a token 2 MB on disk and 8 MB in memory. A
larger one compresses no better and costs memory in a shuffled reading."""
ZSTD_LEVEL = 9
"""1 % smaller than level 3 at 0.65 of its speed (0.8M tokens/s); level 19: 2 % more, at a tenth."""
SPLIT = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in (*TEXT_LISTS, *TARGET_LISTS)}


@dataclass(frozen=True)
class RowGroup:
    """Where a row group stands in its file, and what its bytes must sum to."""

    offset: int
    bytes: int
    crc32: int
    rows: int
    tokens: int
    """Response tokens"""


@dataclass(frozen=True)
class ShardInfo:
    """What was written."""

    path: Path
    rows: int
    tokens: int
    """Response tokens"""
    ids: int
    """Stored ids, head and tail together"""
    bytes: int


def write_shard(path: Path, rows: Iterable[TargetRow], *, meta: StoreMeta) -> ShardInfo:
    """Write one Parquet file; it appears under `path` only when it is complete.

    Rows may come from a generator: no more than a row group of them is held.

    Raises:
        DataError: a row that cannot be right (see `group.gather`), naming it.
    """
    groups: list[RowGroup] = []
    ids = 0
    with atomic_path(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, _parquet_writer(sink, meta) as writer:
            for batch in _batches(rows):
                group = gather(batch, meta)
                start = sink.tell()
                writer.write_table(to_table(group, meta), row_group_size=len(group))
                data = _read_back(temporary, start)
                groups.append(
                    RowGroup(
                        offset=start, bytes=len(data), crc32=checksum(meta, data),
                        rows=len(group), tokens=len(group.response_ids_N),
                    )
                )  # fmt: skip
                ids += len(group.targets.head_ids_M) + len(group.targets.tail_ids_T)
            writer.add_key_value_metadata(
                {
                    META_KEY: meta.to_json(),
                    DECODING_KEY: json.dumps(decoding(meta)),
                    GROUPS_KEY: json.dumps([asdict(g) for g in groups]),
                }
            )
        size = temporary.stat().st_size
    return ShardInfo(
        path=path, rows=sum(group.rows for group in groups),
        tokens=sum(group.tokens for group in groups), ids=ids, bytes=size,
    )  # fmt: skip


def _parquet_writer(sink: pa.NativeFile, meta: StoreMeta) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        sink,
        arrow_schema(meta),
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=False,
        column_encoding=SPLIT,
        write_statistics=False,  # of codes and gaps they say nothing, and cost 1 KB a row group
        store_schema=False,
    )


def checksum(meta: StoreMeta, data: bytes | pa.Buffer) -> int:
    """crc32 of a row group's bytes, begun with the metadata: a changed tau must not pass either."""
    return zlib.crc32(data, zlib.crc32(meta.to_json().encode()))


def _read_back(path: Path, start: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read()


def _batches(rows: Iterable[TargetRow]) -> Iterator[list[TargetRow]]:
    batch: list[TargetRow] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += len(row.prompt_ids) + len(row.response_ids)
        if tokens >= ROW_GROUP_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch
