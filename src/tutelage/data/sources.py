"""Rows from files, the Hub and procedural tasks; what a row means is `rows.py`'s affair.

Every reader yields `(place, row)` in constant memory: the place is `file:line` or the like, so that
a bad row can be found again. A row that cannot be read is an `UnreadableRow`.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.errors import DataError
from tutelage.data.identity import source_files
from tutelage.recipe.curation import DataSource
from tutelage.tasks import LAB_KEY, TASKS

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
REFUSED_TASKS = {"codeio": "it runs programs inside this process to make and judge its rows"}
OUR_KEYS = ("reasoning", "prompts_only")
"""Of `task_config`, for every task: what the rows show of the solution. The rest is the task's."""
WORKED = {"gsm_symbolic": "answer_cot"}
"""Tasks of reasoning-gym 0.1.25 that keep a worked solution, and its name in their metadata."""
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
    suffix, compressed = _kind(path)
    reader = READERS.get(suffix)
    if reader is None or (compressed and reader is _parquet):
        raise DataError(
            f"{path}: unknown kind of file; known: {', '.join(READERS)}, all but the last also "
            f"with {' or '.join(COMPRESSED)} behind"
        )
    try:
        yield from reader(path)
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        kind = suffix[1:] + compressed
        raise DataError(f"{path}: cannot be read as {kind}: {error}") from error


def _kind(path: Path) -> tuple[str, str]:
    """The suffix that says what the rows are, and the one of its compression, or ""."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED else (suffix, "")


def _opened(path: Path) -> BinaryIO:
    """The file's bytes as a stream, unpacked on the way.

    Raises OSError, there or while reading, where an archive is cut off or damaged. What zstd wrote
    without a checksum (the default of most libraries) may be damaged unseen.
    """
    _, compressed = _kind(path)
    if not compressed:
        return path.open("rb")
    if not path.stat().st_size:  # pyarrow takes it for an archive of nothing
        raise OSError("Truncated compressed stream: 0 bytes")
    return io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSED[compressed]))


def _jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as stream:
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
    with _opened(path) as stream:
        contents = stream.read()
    try:
        rows = json.loads(contents.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of rows; for one row a line use .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}[{number}]", _checked(row)


def _delimited(path: Path) -> Iterator[Row]:
    delimiter = "\t" if _kind(path)[0] == ".tsv" else ","
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as stream:
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


READERS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _delimited, ".tsv": _delimited,
    ".parquet": _parquet,
}  # fmt: skip


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
    """Our own task of that name, or else reasoning-gym's."""
    name = source.source.removeprefix("task:")
    if not source.limit:
        raise DataError(f"task:{name} has no end of its own: set limit")
    yield from (_lab_task if name in TASKS else _gym_task)(name, source, seed)


def _lab_task(name: str, source: DataSource, seed: int) -> Iterator[Row]:
    task = TASKS[name]
    config = task.configure(source.task_config)
    for number, item in enumerate(task.items(config, seed=seed, count=source.limit), 1):
        solution = {"response": item.response, "thinking": item.thinking}
        row = {
            "prompt": item.prompt,
            **_solution(solution, reasoning=config.reasoning, prompts_only=config.prompts_only),
            "answer": item.answer,
            "task": name,
            "language": item.language,
            LAB_KEY: {"name": name, "meta": item.meta},
        }
        yield f"{name}[{number}]", row


def _solution(
    solution: Mapping[str, str], *, reasoning: bool, prompts_only: bool
) -> Mapping[str, str]:
    """What of the response and its chain a row is given."""
    if prompts_only:
        return {}
    return solution if reasoning else {"response": solution["response"]}


def _gym_task(name: str, source: DataSource, seed: int) -> Iterator[Row]:
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(f'task:{name} needs reasoning-gym: pip install "tutelage[tasks]"') from None
    if name in REFUSED_TASKS:
        raise DataError(f"task:{name} is refused: {REFUSED_TASKS[name]}; take another task")
    settings = {key: value for key, value in source.task_config.items() if key not in OUR_KEYS}
    shown = {key: _switch(name, key, source.task_config) for key in OUR_KEYS}
    if shown["reasoning"] and name not in WORKED:
        raise DataError(
            f"task:{name} has no worked solutions: leave reasoning out; {', '.join(WORKED)} have"
        )
    try:
        items = reasoning_gym.create_dataset(name, seed=seed, size=source.limit, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        near = _nearest_task(name)
        raise DataError(f"task:{name} cannot be made: {error}{near}") from error
    for number, item in enumerate(items, 1):
        yield f"{name}[{number}]", _gym_row(name, settings, item, **shown)


def _switch(name: str, key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise DataError(f"task:{name} cannot be made: {key} is true or false, not {value!r}")
    return value


def _nearest_task(name: str) -> str:
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.6)
    return f"; did you mean task:{close[0]}?" if close else ""


def _gym_row(
    name: str, settings: Mapping[str, Any], item: Mapping[str, Any],
    *, reasoning: bool, prompts_only: bool,
) -> dict[str, Any] | UnreadableRow:  # fmt: skip
    """A row with all that its task's own scorer needs to judge an answer later."""
    if item["answer"] is None:
        return UnreadableRow("has no gold answer: the task has many right ones and names none")
    entry = {key: item[key] for key in ("question", "answer", "metadata")}
    thinking = item["metadata"][WORKED[name]].strip() if reasoning else ""
    solution = {"response": item["answer"], "thinking": thinking}
    return {
        "prompt": item["question"],
        **_solution(solution, reasoning=reasoning, prompts_only=prompts_only),
        "answer": item["answer"],
        "task": name,
        "language": "en",
        "reasoning_gym": {"config": settings, "entry": entry},
    }
