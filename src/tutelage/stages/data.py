"""Stage `data`: sources in, one Parquet file of conversations out, bad rows set aside by place."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import write_text
from tutelage.data.rows import conversation
from tutelage.data.sources import UnreadableRow, read_source
from tutelage.recipe.tables import Data, DataSource
from tutelage.records import CONVERSATIONS, write_rows

QUARANTINE = "quarantine.jsonl"


def run(config: Data, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Read, split, shuffle, cut; returns counts.

    Raises DataError when more than `max_bad_share` of the rows are bad, or none is left.
    """
    started = time.monotonic()
    good: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    for place, row in _rows(config):
        if isinstance(row, DataError):
            bad.append({"place": place, "reason": str(row)})
        else:
            good.append(row)
    _check_bad(config, len(good), bad)
    kept = [row for row in good if _is_in_part(row, config)]
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(kept))
    kept = [kept[i] for i in order[: config.limit or None]]
    if not kept:
        raise DataError(
            f"no row is left of {len(good)} read (part = {config.part!r}, "
            f"holdout_share = {config.holdout_share}); add sources or widen the part"
        )
    write_rows(work.path / "conversations.parquet", _with_unique_ids(kept), CONVERSATIONS)
    if bad:
        write_text(work.path / QUARANTINE, "".join(json.dumps(row) + "\n" for row in bad))
        work.reporter.say(f"  {len(bad)} bad rows set aside, first: {_line(bad[0])}")
    work.commit("rows", seconds=time.monotonic() - started, tokens={})
    return {"rows": len(kept), "read": len(good) + len(bad), "bad": len(bad)}


def _rows(config: Data) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    for source in config.sources:
        for place, row in read_source(source, seed=config.seed):
            if isinstance(row, UnreadableRow):
                yield place, DataError(str(row))
                continue
            try:
                yield place, conversation(row, source, place=place, name=_name(source))
            except DataError as error:
                yield place, error


def _name(source: DataSource) -> str:
    """A source's short name: files by their own name, so that no folder of a machine is kept."""
    name = source.source
    return name if name.startswith(("hub:", "task:", "bundled:")) else Path(name).name


def _check_bad(config: Data, good: int, bad: list[dict[str, str]]) -> None:
    if good + len(bad) == 0:
        names = ", ".join(source.source for source in config.sources)
        raise DataError(f"no rows at all in {names}")
    if len(bad) > config.max_bad_share * (good + len(bad)):
        raise DataError(
            f"{len(bad)} of {good + len(bad)} rows are bad (max_bad_share = "
            f"{config.max_bad_share}), first: {_line(bad[0])}"
        )


def _line(bad: Mapping[str, str]) -> str:
    return f"{bad['place']}: {bad['reason']}"


def _is_in_part(row: Mapping[str, Any], config: Data) -> bool:
    """By a hash of the prompt's text alone: stable when other rows come or go."""
    if config.part == "all":
        return True
    prompt = [m["content"].strip() for m in row["messages"] if m["role"] == "user"]
    digest = hashlib.sha256("\n".join(prompt).encode("utf-8")).digest()
    held_out = int.from_bytes(digest[:8], "big") / 2**64 < config.holdout_share
    return held_out == (config.part == "holdout")


def _with_unique_ids(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    counts: dict[str, int] = {}
    taken = {row["id"] for row in rows}
    for row in rows:
        count = counts[row["id"]] = counts.get(row["id"], 0) + 1
        name = row["id"] if count == 1 else f"{row['id']}#{count}"
        while count > 1 and name in taken:  # some other row is called so by itself
            name += "#"
        taken.add(name)
        yield {**row, "id": name}
