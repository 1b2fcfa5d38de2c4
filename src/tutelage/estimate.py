"""What a plan would cost before anything is spent: tokens, minutes, disk and peak memory per step.

Rows and lengths come from finished steps where there are any, else from the recipe's limits, so the
figures are upper bounds. Minutes are floating-point operations at a rate a CPU core is known to
reach.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutelage.core.artifact import open_artifact
from tutelage.data.identity import source_files
from tutelage.models.source import locate
from tutelage.pipeline import Planned
from tutelage.recipe.tables import (
    Data,
    Distill,
    Evaluate,
    Export,
    ModelSource,
    Prune,
    Rollout,
    Score,
    Sft,
    Step,
    Synthesize,
)  # fmt: skip
from tutelage.store import Store

CORE_FLOPS = 25e9
"""Per core and second: half of what large matrix products reach, as these are not all large."""
PROMPT_TOKENS = 64
"""A prompt with its template, where nothing better is known."""
ANSWER_SHARE = 0.7
"""Of `max_tokens`, where nothing better is known."""
TARGET_BYTES = 40
"""A stored target token, its sampled id and log-probs."""
OPERATIONS = {"decode": 2, "read": 2, "train": 6}
"""Floating-point operations per parameter and token: forward 2, backward 4."""


@dataclass(frozen=True)
class Estimate:
    """Upper bounds for one step; zeros where there is nothing to tell."""

    rows: int = 0
    decoded: int = 0
    read: int = 0
    trained: int = 0
    minutes: float | None = 0.0
    """None while a model is not on this machine, so that its size is not known."""
    disk_bytes: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class _Model:
    parameters: int
    bytes: int


def estimate(planned: Sequence[Planned], store: Store) -> dict[str, Estimate]:
    """An estimate for each step of a plan, by name."""
    found: dict[str, Estimate] = {}
    models: dict[str, _Model] = {}
    for item in planned:
        node = item.node
        if node.source:
            models[node.name] = _outside(node.source, store)
            found[node.name] = Estimate()
            continue
        assert node.step is not None
        if node.produces == "model":
            models[node.name] = models[node.inputs["model"]]  # an upper bound for a pruned one
        known = _finished(item, store)
        inputs = {role: found[name] for role, name in node.inputs.items()}
        used = {role: models[name] for role, name in node.inputs.items() if name in models}
        found[node.name] = known or _timed(_guess(node.step, inputs, used), node.stage, used)
    return found


def _finished(item: Planned, store: Store) -> Estimate | None:
    """A finished step costs nothing more; its true counts serve the steps after it."""
    if item.status != "cached":
        return None
    artifact = open_artifact(store.place(item.node.stage, item.fingerprint))
    tokens = artifact.manifest["tokens"]
    return Estimate(
        rows=int(artifact.summary.get("rows", 0)),
        decoded=tokens["student_decoded"] + tokens["teacher_decoded"],
        read=tokens["teacher_prefilled"],
    )


def _guess(step: Step, inputs: Mapping[str, Estimate], models: Mapping[str, _Model]) -> Estimate:
    model = models.get("model", models.get("teacher", _Model(0, 0)))
    if isinstance(step, Data):
        rows = _data_rows(step)
        return Estimate(rows=rows, disk_bytes=rows * 400)
    if isinstance(step, Synthesize | Rollout):
        rows = inputs["prompts"].rows * step.samples
        longest = step.max_tokens
        if isinstance(step, Synthesize) and step.mode == "reasoning":
            longest += step.max_think_tokens
        decoded = int(rows * longest * ANSWER_SHARE)
        return Estimate(
            rows, decoded=decoded, disk_bytes=decoded * 12, memory_bytes=int(model.bytes * 1.6)
        )
    if isinstance(step, Score):
        rollouts = inputs["rollouts"]
        return Estimate(
            rollouts.rows, decoded=rollouts.decoded,
            read=rollouts.decoded + rollouts.rows * PROMPT_TOKENS,
            disk_bytes=rollouts.decoded * TARGET_BYTES, memory_bytes=int(model.bytes * 1.6),
        )  # fmt: skip
    if isinstance(step, Sft | Distill):
        sources = [e for role, e in inputs.items() if role.startswith(("data", "targets"))]
        rows = sum(source.rows for source in sources)
        each = sum(source.decoded for source in sources) + rows * PROMPT_TOKENS
        trained = each * step.epochs
        if step.max_steps:
            trained = min(trained, step.max_steps * step.batch_tokens)
        # Weights, gradients, two moments in fp32, and the checkpoint being written beside them.
        return Estimate(
            rows, trained=trained, disk_bytes=model.bytes, memory_bytes=int(model.bytes * 5)
        )
    if isinstance(step, Evaluate):
        rows, count = inputs["prompts"].rows, len(step.models)
        decoded = int(rows * step.max_tokens * ANSWER_SHARE) * (count + 2)
        return Estimate(
            rows, decoded=decoded, read=2 * count * rows * (PROMPT_TOKENS + step.max_tokens),
            memory_bytes=int(model.bytes * 2.6),
        )  # fmt: skip
    if isinstance(step, Export):
        return Estimate(
            step.questions, decoded=step.questions * step.max_tokens * len(step.formats),
            disk_bytes=model.bytes, memory_bytes=int(model.bytes * 2.2),
        )  # fmt: skip
    if isinstance(step, Prune):
        return Estimate(disk_bytes=model.bytes, memory_bytes=int(model.bytes * 2))
    return Estimate()


def _timed(guess: Estimate, stage: str, models: Mapping[str, _Model]) -> Estimate:
    parameters = max((model.parameters for model in models.values()), default=0)
    if models and not parameters:
        return Estimate(**{**guess.__dict__, "minutes": None})
    work = {"decode": guess.decoded, "read": guess.read, "train": guess.trained}
    if stage == "score":
        work["decode"] = 0  # its decoded count only tells how long the answers are
    operations = sum(tokens * OPERATIONS[kind] * parameters for kind, tokens in work.items())
    rate = CORE_FLOPS * (os.cpu_count() or 1)
    return Estimate(**{**guess.__dict__, "minutes": operations / rate / 60})


def _outside(source: ModelSource, store: Store) -> _Model:
    facts = locate(source, memo=store.memo).facts
    return _Model(facts.parameters, facts.parameters * 4) if facts else _Model(0, 0)


def _data_rows(step: Data) -> int:
    rows = sum(source.limit or _lines(source_files(source)) for source in step.sources)
    if step.part != "all":
        share = step.holdout_share if step.part == "holdout" else 1 - step.holdout_share
        rows = round(rows * share)
    return min(rows, step.limit) if step.limit else rows


def _lines(paths: Sequence[Path]) -> int:
    """Rows of line-based files, by counting; other kinds are not opened for an estimate."""
    count = 0
    for path in paths:
        if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv"):
            with path.open("rb") as stream:
                count += sum(1 for _ in stream)
    return count
