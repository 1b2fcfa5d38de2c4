"""Rows from files, the Hub and procedural tasks; what a row means is `rows.py`'s affair.

Every reader yields `(place, row)` in constant memory: the place is `file:line` or the like, so that
a bad row can be found again. A row that cannot be read is an `UnreadableRow`.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.errors import DataError
from tutelage.data.identity import source_files
from tutelage.recipe.tables import DataSource

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
csv.field_size_limit(1 << 28)  # the default of 128 KiB cuts long answers


class UnreadableRow(Exception):
    """A row that is not even a row: bad JSON, bad encoding. Carries the reason."""


Row = tuple[str, dict[str, Any] | UnreadableRow]


def read_source(source: DataSource, *, seed: int) -> Iterator[Row]:
    """The rows of a source, in its own order, at most `limit` of them.

    Raises DataError when the source itself cannot be had.
    """
    if source.source.startswith("hub:"):
        rows = _hub(source)
    elif source.source.startswith("task:"):
        rows = _task(source, seed)
    else:
        rows = (row for path in source_files(source) for row in _file(path))
    for count, row in enumerate(rows):
        if source.limit and count >= source.limit:
            return
        yield row


def _file(path: Path) -> Iterator[Row]:
    readers = {
        ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet,
        ".csv": _delimited, ".tsv": _delimited,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    try:
        yield from reader(path)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip()  # a byte-order mark is not data
            if text:
                yield f"{path.name}:{number}", _parsed(text)


def _parsed(text: bytes) -> dict[str, Any] | UnreadableRow:
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UnreadableRow(f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:  # the latter: thousands of open brackets
        return UnreadableRow(f"not JSON: {error}")
    return _checked(row)


def _checked(row: Any) -> dict[str, Any] | UnreadableRow:
    """The row, if it is an object whose text can be stored as UTF-8."""
    if not isinstance(row, dict):
        return UnreadableRow("not a JSON object")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # "\ud83d" alone is legal JSON and no character
        return UnreadableRow("has half a character (a lone surrogate)")
    return row


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of rows; for one row a line use .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}[{number}]", _checked(row)


def _delimited(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        for row in reader:
            place = f"{path.name}:{reader.line_num}"
            if None in row or None in row.values():
                yield place, UnreadableRow("has another number of fields than the header")
            else:
                yield place, dict(row)


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name}[{number}]", row


def _hub(source: DataSource) -> Iterator[Row]:
    import datasets  # heavy: only when a Hub data set is asked for

    name = source.source.removeprefix("hub:")
    try:
        rows = datasets.load_dataset(
            name, source.subset or None, split=source.split,
            revision=source.revision or None, streaming=True,
        )  # fmt: skip
        for number, row in enumerate(rows, 1):
            yield f"{name}[{number}]", dict(row)
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"hub:{name} cannot be loaded: {reason}") from error


def _task(source: DataSource, seed: int) -> Iterator[Row]:
    name = source.source.removeprefix("task:")
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(f'task:{name} needs reasoning-gym: pip install "tutelage[tasks]"') from None
    if not source.limit:
        raise DataError(f"task:{name} has no end of its own: set limit")
    try:
        items = reasoning_gym.create_dataset(
            name, seed=seed, size=source.limit, **source.task_config
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"task:{name} cannot be made: {error}") from error
    for number, item in enumerate(items, 1):
        yield (
            f"{name}[{number}]",
            {"prompt": item["question"], "answer": item["answer"], "task": name, "language": "en"},
        )
