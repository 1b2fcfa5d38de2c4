"""Steps with rows, written by hand in the form the stages write: for tests of what shows them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.core.artifact import Artifact, WorkDir, finish
from tutelage.core.files import write_json
from tutelage.core.fingerprint import fingerprint
from tutelage.core.progress import Reporter
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.store import Store

MIXTURE_THEN_FAST = """
[[curriculum]]
mix = { reasoning = 3, fast = 1 }
share = 0.8
[[curriculum]]
mix = { fast = 1 }
share = 0.2
lr_scale = 0.5
"""
"""Stages of an `sft` step, as TOML; the last one's table is open for more settings."""


def conversation(
    number: int, *, asked: Sequence[str] = ("Question?",), said: str = "Answer.",
    thinking: str | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row whose user says `asked` one after the other, answered each time with `said`."""
    messages = []
    for text in asked:
        messages.append({"role": "user", "content": text, "thinking": None})
        messages.append({"role": "assistant", "content": said, "thinking": thinking})
    row = {
        "id": f"row-{number}", "source": "hand.jsonl", "language": "en",
        "mode": "reasoning" if thinking else "fast", "messages": messages, "complete": True,
        "answer": None, "task": None, "difficulty": None, "meta": None,
    }  # fmt: skip
    return {**row, **more}


def dropped(row: Mapping[str, Any], reason: str, **more: Any) -> dict[str, Any]:
    """A line of a quarantine file."""
    return {"place": f"hand.jsonl:{row['id']}", "id": row["id"], "reason": reason, **more,
            "row": row}  # fmt: skip


def step(
    store: Store, name: str, rows: Sequence[Mapping[str, Any]] = (), *, stage: str = "data",
    funnel: Mapping[str, Any] | None = None, curriculum: Mapping[str, Any] | None = None,
    quarantine: Mapping[str, Sequence[Mapping[str, Any] | str]] | None = None,
) -> Artifact:  # fmt: skip
    """A finished step of the run `hand`; a quarantine line that is text is written as it is."""
    identity = {"stage": stage, "version": 2, "config": {"seed": 5, "name": name}, "inputs": {}}
    mark = fingerprint(identity)
    work = WorkDir.open(store.partial(stage, mark), reporter=Reporter(), device="cpu")
    if rows:
        write_rows(work.path / "conversations.parquet", rows, CONVERSATIONS)
    for file, content in (("funnel.json", funnel), ("curriculum.json", curriculum)):
        if content:
            write_json(work.path / file, content)
    for file, lines in (quarantine or {}).items():
        path = work.path / "quarantine" / f"{file}.jsonl"
        path.parent.mkdir(exist_ok=True)
        written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    work.commit("rows", seconds=1.0, tokens={})
    artifact = finish(
        work, store.place(stage, mark), identity=identity, inputs={}, summary={}, provenance={},
        peak_memory_bytes=1,
    )  # fmt: skip
    steps = {**store.read_run("hand"), name: {"stage": stage, "fingerprint": mark}}
    store.write_run("hand", steps)
    return artifact


def funnel(read: int, **drops: int) -> dict[str, Any]:
    """`funnel.json` of a step that read so many rows and dropped these, in this order."""
    steps, left = [], read
    for name, count in drops.items():
        left -= count
        steps.append({"name": name, "dropped": count, "left": left})
    return {"read": read, "steps": steps}
