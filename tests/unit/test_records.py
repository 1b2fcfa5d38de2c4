"""Rows of Parquet files by number: the same as reading them all, from one row group at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tutelage.core.errors import ArtifactError
from tutelage.records import RowFiles, count_rows, read_rows

SCHEMA = pa.schema(
    [("number", pa.int64()), ("ids", pa.list_(pa.int32())), ("codes", pa.list_(pa.float32()))]
)


def row(number: int) -> dict[str, Any]:
    return {"number": number, "ids": list(range(number % 4)), "codes": [0.5] * (number % 3)}


def write(folder: Path, *files: Sequence[int]) -> list[Path]:
    """Files with row groups of these sizes; rows are numbered through all of them."""
    paths, number = [], 0
    for index, groups in enumerate(files):
        paths.append(folder / f"part-{index}.parquet")
        with pq.ParquetWriter(paths[-1], SCHEMA) as writer:
            for size in groups:
                rows = [row(number + i) for i in range(size)]
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                number += size
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """18 rows; one file has no row at all."""
    return write(tmp_path_factory.mktemp("rows"), [3, 1, 4], [], [5], [2, 3])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 18), st.integers(0, 18), st.integers(0, 18), st.integers(0, 18))
def test_any_two_ranges_are_what_reading_everything_gives(
    paths: list[Path], first: int, stop: int, second: int, end: int
) -> None:
    everything = list(read_rows(paths))
    files = RowFiles(paths)
    assert len(files) == len(everything) == count_rows(paths) == 18
    for wanted in (range(first, stop), range(second, end)):  # the second finds a group open
        assert list(files.rows(wanted)) == everything[wanted.start : wanted.stop]
        pieces = list(files.tables(wanted))
        assert all(len(piece) for piece in pieces)
        assert sum(map(len, pieces)) == len(wanted)


def test_a_row_group_is_read_once_for_neighbouring_ranges(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RowFiles(paths)
    read: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, index: int, **options: Any) -> pa.Table:
        read.append(index)
        return whole(self, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for number in range(18):
        assert list(files.rows(range(number, number + 1))) == [row(number)]
    assert read == [0, 1, 2, 0, 0, 1]


def test_lengths_are_summed_over_columns_row_by_row(paths: list[Path]) -> None:
    files = RowFiles(paths)
    assert files.lengths("ids") == [n % 4 for n in range(18)]
    assert files.lengths("ids", "codes") == [n % 4 + n % 3 for n in range(18)]


def test_no_file_and_files_without_a_row_have_no_rows(tmp_path: Path) -> None:
    for files in (RowFiles([]), RowFiles(write(tmp_path, [], []))):
        assert len(files) == 0
        assert list(files.rows(range(0))) == []
        assert files.lengths("ids") == []


def test_a_missing_column_is_told_with_the_file_and_what_it_has(tmp_path: Path) -> None:
    paths = write(tmp_path, [2], [2])
    pq.write_table(pa.table({"ids": [[1]], "other": [1]}), paths[1])
    RowFiles(paths).check_columns(["ids"])
    with pytest.raises(ArtifactError, match=r"part-1\.parquet has no column 'codes'.*'other'"):
        RowFiles(paths).check_columns(["ids", "codes"])


@pytest.mark.parametrize("damage", ["cut", "not Parquet", "gone"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, damage: str) -> None:
    paths = write(tmp_path, [2], [2])
    if damage == "gone":
        paths[1].unlink()
    else:
        paths[1].write_bytes(paths[1].read_bytes()[:-9] if damage == "cut" else b"rows\n" * 9)
    with pytest.raises(ArtifactError, match=r"part-1\.parquet cannot be read as Parquet"):
        RowFiles(paths)


def test_a_row_group_that_cannot_be_read_is_named_when_it_is(tmp_path: Path) -> None:
    paths = write(tmp_path, [2], [2, 2])
    data = bytearray(paths[1].read_bytes())
    group = pq.read_metadata(paths[1]).row_group(1).column(1)
    data[group.data_page_offset : group.data_page_offset + 12] = b"\xff" * 12
    paths[1].write_bytes(data)
    files = RowFiles(paths)
    assert list(files.rows(range(4))) == [row(n) for n in range(4)]
    with pytest.raises(ArtifactError, match=r"part-1\.parquet cannot be read"):
        list(files.rows(range(3, 6)))
    with pytest.raises(ArtifactError, match=r"part-1\.parquet cannot be read"):
        files.lengths("ids")
