"""What a step with conversations holds, in figures and samples: for the terminal and for the page.

Reads an artifact's rows, `funnel.json` and `quarantine/*.jsonl` with a row group and one line in
memory, whatever their size. Knows no step but by these files, and nothing of how it is shown.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.core.artifact import Artifact
from tutelage.core.errors import ArtifactError
from tutelage.records import RowFiles
from tutelage.report.histograms import COLUMNS, Histogram, histograms
from tutelage.report.plain import plain
from tutelage.report.run import read_json

FUNNEL, QUARANTINE = "funnel.json", "quarantine"


@dataclass(frozen=True)
class FunnelStep:
    """One narrowing: how many rows it dropped, and how many were left after it."""

    name: str
    dropped: int
    left: int


@dataclass(frozen=True)
class Sample:
    """One row as it is shown: long texts cut, control characters made visible."""

    id: str
    place: str
    """Where it stands in its source, or in the artifact (`row 12`, from 0)."""
    reason: str
    """Why it was dropped; empty for a row that was kept."""
    notes: tuple[tuple[str, str], ...]
    """(name, value): mode, language, the row it repeats, the evaluation item it holds, ..."""
    prompt: str
    """The last user message; empty where the row could not be read."""
    thinking: str
    answer: str


@dataclass(frozen=True)
class Dropped:
    """A quarantine file: its name without the ending, its rows, and some of them."""

    name: str
    count: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Look:
    """All there is to see of a step."""

    rows: int
    read: int | None
    """Rows that came in; None where the step has no funnel."""
    funnel: tuple[FunnelStep, ...]
    histograms: tuple[Histogram, ...]
    kept: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]


def look(artifact: Artifact, *, samples: int, seed: int) -> Look:
    """Figures of all rows, and `samples` rows kept and as many of each quarantine file.

    The same artifact and seed give the same samples, in the order of the files. Raises
    ArtifactError where the step made no conversations or a file cannot be read.
    """
    paths = artifact.shards()
    if not paths:
        raise ArtifactError(f"the step is of stage {artifact.stage}: it holds no conversations")
    files = RowFiles(paths)
    files.check_columns(COLUMNS)
    funnel = artifact.path / FUNNEL
    told = read_json(funnel) if funnel.exists() else {"read": None, "steps": []}
    return Look(
        rows=len(files),
        read=told["read"],
        funnel=tuple(FunnelStep(s["name"], s["dropped"], s["left"]) for s in told["steps"]),
        histograms=histograms(files),
        kept=tuple(
            _sample(row, place=f"row {number}")
            for number in _chosen(len(files), samples, seed)
            for row in files.rows(range(number, number + 1))
        ),
        dropped=tuple(
            _drawn(path, count, _chosen(count, samples, seed))
            for path in _quarantine(artifact)
            for count in [_count_lines(path)]
        ),
    )


def dropped(artifact: Artifact, name: str, *, start: int, count: int) -> Dropped:
    """`count` rows of one quarantine file in its own order, from row `start`, counted from 0.

    Raises ArtifactError naming the nearest file where there is none of this name.
    """
    paths = {path.stem: path for path in _quarantine(artifact)}
    if name not in paths:
        close = get_close_matches(name, list(paths), n=1)
        there = f"it dropped rows in: {', '.join(paths)}" if paths else "it dropped no row"
        hint = f"did you mean {close[0]!r}?" if close else there
        raise ArtifactError(f"the step has no quarantine file {name!r}; {hint}")
    total = _count_lines(paths[name])
    return _drawn(paths[name], total, range(start, min(start + count, total)))


def _quarantine(artifact: Artifact) -> list[Path]:
    """The quarantine files, in the order of the funnel, then by name."""
    funnel = artifact.path / FUNNEL
    steps = read_json(funnel)["steps"] if funnel.exists() else []
    place = {step["name"]: number for number, step in reversed(list(enumerate(steps)))}
    paths = (artifact.path / QUARANTINE).glob("*.jsonl")
    return sorted(paths, key=lambda path: (place.get(path.stem, len(place)), path.stem))


def _chosen(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below `total`, rising."""
    rng = np.random.Generator(np.random.Philox(seed))
    return sorted(rng.choice(total, size=min(count, total), replace=False).tolist())


def _drawn(path: Path, count: int, numbers: Sequence[int]) -> Dropped:
    return Dropped(path.stem, count, tuple(_dropped_samples(path, numbers)))


def _dropped_samples(path: Path, numbers: Sequence[int]) -> Iterator[Sample]:
    wanted, last = set(numbers), max(numbers, default=-1)
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if number in wanted:
                yield _dropped_sample(line, f"{path}:{number + 1}")
            if number >= last:
                return


def _dropped_sample(line: bytes, where: str) -> Sample:
    try:
        entry = json.loads(line)
        notes = {k: v for k, v in entry.items() if k not in ("place", "id", "reason", "row")}
        row = entry.get("row") or {"id": entry.get("id"), "messages": []}
        return _sample(row, place=entry["place"], reason=entry["reason"], notes=notes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{where} cannot be read ({error}); `tutelage verify` says whether the file was changed"
        ) from error


def _count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def _sample(
    row: Mapping[str, Any], *, place: str, reason: str = "", notes: Mapping[str, Any] | None = None
) -> Sample:
    messages = row["messages"]
    users = [message["content"] for message in messages if message["role"] == "user"]
    said = messages[-1] if messages and messages[-1]["role"] == "assistant" else {}
    known = {
        "source": row.get("source"), "mode": row.get("mode"), "language": row.get("language"),
        "difficulty": row.get("difficulty"), "turns": len(users) if len(users) > 1 else None,
        "gold": row.get("answer"), **(notes or {}),
    }  # fmt: skip
    return Sample(
        id=plain(row.get("id")), place=plain(place), reason=plain(reason),
        notes=tuple((plain(k), plain(v)) for k, v in known.items() if v is not None),
        prompt=plain(users[-1] if users else ""), thinking=plain(said.get("thinking")),
        answer=plain(said.get("content")),
    )  # fmt: skip
