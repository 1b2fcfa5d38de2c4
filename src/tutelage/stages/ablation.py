"""Stage `ablation`: all cells of a matrix in one page of arms, costs and verdicts on claims.

Reads the graded answers of every cell's evaluate steps and the manifests of all that is behind
them. An arm is known in a cell by the fingerprint of the step of its name, so a result that cells
share (a teacher, say) is an arm in each of them.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ArtifactError, DataError, RecipeError
from tutelage.core.files import write_json
from tutelage.evals import claims
from tutelage.evals.claims import Answers, Condition, Decision, Resampling
from tutelage.evals.stats import LEVEL, Interval
from tutelage.models.costs import Costs, costs, unmatched
from tutelage.recipe.evaluation import Ablation
from tutelage.report.ablation import write_page
from tutelage.report.ablation_words import lines

VERDICTS = "verdicts.parquet"
COLUMNS = (
    "model", "test", "item", "mode", "temperature", "sample", "prompt", "thinking", "correct",
    "tokens", "finish_reason",
)  # fmt: skip
MEANS = ("correct", "tokens", "cut", "thinks")
"""What is averaged over an item's samples, in the order of the fields of `Answers`."""

Graded = dict[tuple[str, Condition], "_Items"]
"""(fingerprint of the model, condition) -> its items."""


@dataclass(frozen=True)
class _Items:
    """One model's graded answers in one condition, in the order of their keys."""

    keys: Sequence[str]
    means: Sequence[np.ndarray]


def run(config: Ablation, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Write `ablation.json` with every number and `index.html` from it; say each verdict.

    Raises RecipeError for an arm, a start or a claim that the inputs know nothing of, ArtifactError
    or DataError where a cell lacks an arm's answers.
    """
    started = time.monotonic()
    cells = _cells(config, inputs)
    named = sorted({*config.arms, *(arm.start for arm in config.arms.values() if arm.start)})
    made = {name: [_step(name, cell, inputs) for cell in cells] for name in named}
    table = _table(config, cells, made, inputs)
    how = Resampling(config.bootstrap, config.seed)
    decisions = claims.decide(config.claims, table, how)
    spent = _spent(config, made, inputs)
    record = {
        "title": config.title,
        "description": config.description,
        "cells": cells,
        "level": LEVEL,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        **_power(config, len(cells)),
        "claims": [_claim_entry(decision) for decision in decisions],
        "conditions": [_condition_entry(config, c, table[c], how) for c in sorted(table)],
        "arms": _arm_entries(config, cells, spent, inputs),
        "groups": _groups(config, spent),
    }
    write_json(work.path / "ablation.json", record)
    write_page(work.path / "index.html", record)
    for text, style in lines(record):
        work.reporter.say(text, style=style)
    work.commit("page", seconds=time.monotonic() - started, tokens={})
    verdicts = [decision.verdict for decision in decisions]
    return {
        "cells": len(cells),
        "arms": len(config.arms),
        "claims": len(verdicts),
        "holds": verdicts.count(claims.HOLDS),
        "reversed": verdicts.count(claims.REVERSED),
        "not_seen": verdicts.count(claims.NOT_SEEN),
    }


def _cells(config: Ablation, inputs: Mapping[str, Artifact]) -> list[str]:
    """The labels after `@`, numbers in their order; one empty label without a matrix.

    Raises ArtifactError where a cell lacks one of the evaluate steps.
    """
    cells = sorted({role.partition("@")[2] for role in inputs}, key=_natural)
    for cell in cells:
        for step in config.scores:
            if _role(step, cell) not in inputs:
                raise ArtifactError(
                    f"the result of {_role(step, cell)!r} is not there: every cell needs each of "
                    f"its evaluate steps ({', '.join(config.scores)})"
                )
    return cells


def _natural(label: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", label)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _role(name: str, cell: str) -> str:
    return f"{name}@{cell}" if cell else name


def _step(name: str, cell: str, inputs: Mapping[str, Artifact]) -> Artifact:
    role = _role(name, cell)
    if role not in inputs:
        where = f" in cell {cell}" if cell else ""
        raise RecipeError(
            f"{name!r} is no step behind the evaluate steps{where}: an arm or start must be one of "
            "the models they evaluate, or what these came from"
        )
    return inputs[role]


def _table(
    config: Ablation, cells: Sequence[str], made: Mapping[str, Sequence[Artifact]],
    inputs: Mapping[str, Artifact],
) -> dict[Condition, dict[str, Answers]]:  # fmt: skip
    """The answers of arms and starts, for each condition in which an arm was evaluated.

    Raises ArtifactError where one is missing in some cells only, or an arm in all of them.
    """
    read: dict[str, Graded] = {}
    graded: list[Graded] = []
    for cell in cells:
        together: Graded = {}
        scores = [_step(name, cell, inputs) for name in config.scores]
        for artifact in {a.fingerprint: a for a in scores}.values():
            mark = artifact.fingerprint
            read[mark] = read.get(mark) or _graded(artifact)
            _join(together, read[mark], _names(config, cell, inputs), cell)
        graded.append(together)
    marks = {artifact.fingerprint for name in config.arms for artifact in made[name]}
    conditions = {c for cell in graded for mark, c in cell if mark in marks}
    table: dict[Condition, dict[str, Answers]] = {condition: {} for condition in conditions}
    for name, artifacts in made.items():
        for condition in conditions:
            if answers := _answers(name, artifacts, condition, cells, graded):
                table[condition][name] = answers
    for name in config.arms:
        if not any(name in arms for arms in table.values()):
            raise ArtifactError(
                f"arm {name!r} has no graded answer in any cell: add it to the models of an "
                f"evaluate step among scores ({', '.join(config.scores)})"
            )
    return table


def _names(config: Ablation, cell: str, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    """Fingerprint -> step of this cell; of equal steps the one that a claim asks about.

    A stage does not know what its inputs are called, so verdicts name a test by its fingerprint.
    """
    asked = {claim.test for claim in config.claims}
    found: dict[str, str] = {}
    for role, artifact in inputs.items():
        step, _, label = role.partition("@")
        if label == cell and (artifact.fingerprint not in found or step in asked):
            found[artifact.fingerprint] = step
    return found


def _join(together: Graded, more: Graded, names: Mapping[str, str], cell: str) -> None:
    for (model, condition), items in more.items():
        key = model, replace(condition, test=names.get(condition.test, condition.test))
        if key in together:
            where = f" of cell {cell}" if cell else ""
            raise DataError(
                f"two evaluate steps{where} graded model {key[0][:12]} on {key[1]}: which counts? "
                "Leave one out of scores"
            )
        together[key] = items


def _answers(
    name: str, artifacts: Sequence[Artifact], condition: Condition, cells: Sequence[str],
    graded: Sequence[Graded],
) -> Answers | None:  # fmt: skip
    """None where no cell has any. Raises ArtifactError naming a cell where only that one lacks."""
    found = [
        cell.get((artifact.fingerprint, condition))
        for cell, artifact in zip(graded, artifacts, strict=True)
    ]
    if not any(found):
        return None
    for cell, items in zip(cells, found, strict=True):
        if items is None:
            raise ArtifactError(
                f"cell {cell} has no graded answer of {name!r} at {condition}, but others have: "
                "run that cell's evaluate step with the same models and tests"
            )
        if len(items.keys) < 2:
            raise DataError(f"{condition}: an interval needs at least 2 items; there is 1")
    whole = [items for items in found if items]
    fields = [tuple(items.means[index] for items in whole) for index in range(len(MEANS))]
    return Answers([items.keys for items in whole], *fields)


def _graded(artifact: Artifact) -> Graded:
    """Every model's answers in every condition, means over samples.

    An item's key ends in a checksum of its prompt: two cells may give one name to two prompts.
    """
    path = artifact.path / VERDICTS
    table = _read(path)
    cut = [reason == "length" for reason in table["finish_reason"].to_pylist()]
    thinks = [bool(chain and chain.strip()) for chain in table["thinking"].to_pylist()]
    table = table.append_column("cut", pa.array(cut, pa.bool_()))
    table = table.append_column("thinks", pa.array(thinks, pa.bool_()))
    keys = ["model", "test", "mode", "temperature", "item"]
    # Threads would add samples in any order: a sum of floats would differ in its last digit.
    items = table.group_by(keys, use_threads=False).aggregate(
        [*((name, "mean") for name in MEANS), ("sample", "count"), ("sample", "count_distinct"),
         ("prompt", "min")]
    )  # fmt: skip
    if items["sample_count"] != items["sample_count_distinct"]:
        raise DataError(f"{path}: an item has the same sample of one model twice")
    rows = items.sort_by([(key, "ascending") for key in keys]).to_pylist()
    groups: dict[tuple[str, Condition], list[dict[str, Any]]] = {}
    for row in rows:
        condition = Condition(row["test"], row["mode"], row["temperature"])
        groups.setdefault((row["model"], condition), []).append(row)
    return {
        key: _Items(
            [f"{row['item']}#{crc32(row['prompt_min'].encode()):08x}" for row in group],
            [np.array([row[f"{name}_mean"] for row in group], np.float64) for name in MEANS],
        )
        for key, group in groups.items()
    }


def _read(path: Path) -> pa.Table:
    if not path.exists():
        raise ArtifactError(
            f"{path} is not there: the evaluate step graded no tests; give it tests or tasks"
        )
    try:
        return pq.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be read as verdicts: {error}") from error


def _power(config: Ablation, seeds: int) -> dict[str, Any]:
    """What the number of seeds can show at all: the least p, and how many seeds are needed."""
    tests = sum(claim.expect != "open" for claim in config.claims)
    return {
        "tests": tests,
        "least_p": 2 / 2**seeds if seeds > 1 else None,
        "seeds_needed": claims.seeds_needed(tests),
    }


def _claim_entry(decision: Decision) -> dict[str, Any]:
    comparison = decision.comparison
    return {
        **decision.claim.model_dump(mode="json"),
        **asdict(decision.condition),
        "difference": _entry(comparison.difference.interval),
        "p": comparison.difference.p_value,
        "p_test": comparison.test,
        "p_holm": decision.p_holm,
        "seed_differences": list(comparison.seed_differences),
        "seeds_with_sign": decision.seeds_with_sign,
        "share": _entry(decision.share),
        "share_undefined": decision.share_undefined,
        "verdict": decision.verdict,
    }


def _condition_entry(
    config: Ablation, condition: Condition, table: Mapping[str, Answers], how: Resampling
) -> dict[str, Any]:
    first = next(iter(table.values()))
    arms: dict[str, Any] = {}
    for name, arm in config.arms.items():
        if name not in table:
            continue
        figures = claims.arm_figures(table[name], how)
        gain = None
        if arm.start in table and arm.start != name:
            gain = claims.compare(table[name], table[arm.start], "accuracy", how)
        arms[name] = {
            "seed_means": list(figures.seed_means),
            "accuracy": _entry(figures.accuracy),
            "to_start": _entry(gain.difference.interval) if gain else None,
            "tokens": _entry(figures.tokens),
            "truncated_share": _entry(figures.truncated_share),
            "thinking_share": _entry(figures.thinking_share),
            "tokens_per_correct": _entry(figures.tokens_per_correct),
        }
    return {
        **asdict(condition),
        "items": len(first.items[0]),
        "shared_items": first.shared_items,
        "arms": arms,
    }


def _spent(
    config: Ablation, made: Mapping[str, Sequence[Artifact]], inputs: Mapping[str, Artifact]
) -> dict[str, list[Costs]]:
    """Each arm's costs beyond its start, one a cell."""
    known = {artifact.fingerprint: artifact for artifact in inputs.values()}
    return {
        name: [
            costs(artifact, start, known)
            for artifact, start in zip(
                made[name], made[arm.start] if arm.start else [None] * len(made[name]), strict=True
            )
        ]
        for name, arm in config.arms.items()
    }


def _arm_entries(
    config: Ablation, cells: Sequence[str], spent: Mapping[str, Sequence[Costs]],
    inputs: Mapping[str, Artifact],
) -> dict[str, Any]:  # fmt: skip
    names: dict[str, str] = {}
    for role, artifact in inputs.items():
        step = role.partition("@")[0]
        # `student:source` is what a pruned model was cut from, often a model of its own name too
        if ":" not in step or artifact.fingerprint not in names:
            names[artifact.fingerprint] = step
    references = _references(config, spent)
    return {
        name: {
            **arm.model_dump(mode="json"),
            "teachers": list(
                dict.fromkeys(names[m] for cost in spent[name] for m in cost.teachers)
            ),
            "own_lineage": any(cost.own_lineage for cost in spent[name]),
            "flops": _flops(spent[name]),
            "flops_of": references.get(arm.group),
            "flops_relative": _relative(spent, name, references.get(arm.group)),
            "costs": {
                cell: _cost_entry(cost) for cell, cost in zip(cells, spent[name], strict=True)
            },
        }
        for name, arm in config.arms.items()
    }


def _references(config: Ablation, spent: Mapping[str, Sequence[Costs]]) -> dict[str, str]:
    """For each group the arm whose FLOPs the others are told in.

    One that a claim measures gains by (`share_of`) where the group has it; otherwise the first that
    cost anything. Arms in no group beside groups (a start, a teacher) are compared with nothing.
    """
    measured = [claim.share_of for claim in config.claims if claim.share_of]
    grouped = any(arm.group for arm in config.arms.values())
    found: dict[str, str] = {}
    for name in (*measured, *config.arms):
        if _flops(spent[name]) and (config.arms[name].group or not grouped):
            found.setdefault(config.arms[name].group, name)
    return found


def _relative(
    spent: Mapping[str, Sequence[Costs]], name: str, reference: str | None
) -> float | None:
    return _flops(spent[name]) / _flops(spent[reference]) if reference else None


def _flops(cells: Sequence[Costs]) -> float:
    """FLOPs of a cell, on average."""
    return sum(sum(cost.flops.values()) for cost in cells) / len(cells)


def _groups(config: Ablation, spent: Mapping[str, Sequence[Costs]]) -> list[dict[str, Any]]:
    """Arms that were to have one budget, and those that had another."""
    names = dict.fromkeys(arm.group for arm in config.arms.values() if arm.group)
    groups = []
    for group in names:
        arms = [name for name, arm in config.arms.items() if arm.group == group]
        trained = [name for name in arms if any(cost.steps for cost in spent[name])]
        odd = unmatched({name: spent[name] for name in arms})
        groups.append({"name": group, "arms": arms, "trained": trained, "unmatched": odd})
    return groups


def _cost_entry(cost: Costs) -> dict[str, Any]:
    return {
        "seconds": round(cost.seconds, 3),
        "tokens": dict(cost.tokens),
        "flops": dict(cost.flops),
        "steps": cost.steps,
        "examples": cost.examples,
        "given_flops": cost.given_flops,
    }


def _entry(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {
        "estimate": round(interval.estimate, 6),
        "low": round(interval.low, 6),
        "high": round(interval.high, 6),
        "n": interval.n,
        "method": interval.method,
    }
