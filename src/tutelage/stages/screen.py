"""Stage `screen`: the rollouts that are worth scoring; the others are put aside with the reason.

Filters stand in one order: empty, truncated, looping, verdict, Delta-IFD. A rollout falls by the
first that does not take it, so that models read only what is left. Figures of every shard go to
scratch first, one engine in memory at a time; then rows are written, in the order they came in,
which is done again where it was cut short.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.core.artifact import Artifact, Site, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import atomic_path, write_json, write_text
from tutelage.core.shards import MakeShard, OnTokens, Shard, run_shards, shards
from tutelage.data.difficulty import alone_openings, mean_nll
from tutelage.data.prepare import Dropped
from tutelage.data.screening import delta_ifd, find_loop, is_empty, said_ids, student_of
from tutelage.engines.base import Engine, Scorable
from tutelage.engines.opening import opened
from tutelage.evals.graders import can_grade, resolved
from tutelage.evals.grading import Given, Grading
from tutelage.models.load import directory_of, load_tokenizer
from tutelage.recipe.screening import Screen
from tutelage.records import ROLLOUTS, RowFiles, read_rows, write_rows
from tutelage.text.chat import ChatFormat

EMPTY, TRUNCATED, LOOPING, VERDICT, DELTA_IFD = FILTERS = (
    "empty", "truncated", "looping", "verdict", "delta_ifd",
)  # fmt: skip
"""Why a rollout falls, in this order; each has its `quarantine/<name>.jsonl`."""
LOOK, TEACHER, STUDENT = "look", "teacher", "student"
"""Passes: what needs no model; then each model reads. The last two are roles of inputs too."""
QUARANTINE = "quarantine"
SHOWN = ("id", "prompt_id", "source", "mode", "finish_reason", "text", "task", "language")
"""Columns of a rollout that its line in quarantine has."""

Row = Mapping[str, Any]
Found = dict[str, Any]
"""Of one rollout: "drop" and "reason" where it fell, "verdict", "ungradable", "loop"."""


def run(config: Screen, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, Any]:
    """Keep what every filter takes; returns rows in and out and what each filter took.

    `ungradable` rollouts had no gold answer the verifier could judge by; they are kept.
    Raises DataError when nothing is left, when `student` did not write the rollouts, or when a
    verifier can judge none; RecipeError for an unknown verifier.
    """
    if config.verifier:
        resolved(config.verifier, {})
    writer = student_of(inputs["rollouts"])
    if STUDENT in inputs and inputs[STUDENT].fingerprint != writer:
        raise DataError(
            f"student is not the model that wrote the rollouts ({writer[:12]}): their "
            "log-probabilities are another model's; name the model of the rollout step"
        )
    rollouts = RowFiles(inputs["rollouts"].shards())
    parts = shards(len(rollouts), config.shard_rows)
    site = work.site()
    run_shards(
        work, _named(parts, LOOK), partial(_looking, config, inputs, site),
        label="rollouts looked at", tokens_each=1, here=not config.verifier,
    )  # fmt: skip
    if config.delta_ifd:
        longest = max(rollouts.lengths("response_ids"), default=0)
        for role, times in ((TEACHER, 2), (STUDENT, 1)):
            run_shards(
                work, _named(parts, role), partial(_reading, config, inputs, site, role),
                label=f"{role} reads", tokens_each=times * longest,
            )  # fmt: skip
    return {**_written(config, rollouts, parts, work), "student": writer}


def _named(parts: Sequence[Shard], kind: str) -> list[Shard]:
    return [Shard(part.index, part.items, kind) for part in parts]


def _figures(site: Site, kind: str, index: int) -> Path:
    return site.scratch("figures") / f"{kind}-{index:05d}.json"


def _chat(inputs: Mapping[str, Artifact]) -> ChatFormat:
    """How the student writes: rollouts are in its template, whoever reads them."""
    return ChatFormat.from_tokenizer(load_tokenizer(directory_of(inputs[STUDENT])))


# --- without a model ----------------------------------------------------------------------------


@contextlib.contextmanager
def _looking(config: Screen, inputs: Mapping[str, Artifact], site: Site) -> Iterator[MakeShard]:
    rollouts = RowFiles(inputs["rollouts"].shards())
    with Grading(site.sandbox, workers=site.workers) as grading:
        judge = _Judge(config, inputs, grading) if config.verifier else None

        def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
            rows = list(rollouts.rows(shard.items))
            found = [_looked(config, row) for row in rows]
            if judge:
                left = [i for i, one in enumerate(found) if "drop" not in one]
                judged = judge.verdicts([rows[i] for i in left])
                for i, one in zip(left, judged, strict=True):
                    found[i] = {**found[i], **one}
            write_json(_figures(site, LOOK, shard.index), found)
            on_tokens(len(rows))
            return {}

        yield make


def _looked(config: Screen, row: Row) -> Found:
    """What the rollout itself says; a loop is told even where loops are kept."""
    cut = row["finish_reason"] == "length"
    loop = find_loop(
        said_ids(row), period=config.loop_period, repeats=config.loop_repeats,
        tokens=config.loop_tokens, same=config.loop_same,
    )  # fmt: skip
    told: Found = {"cut": cut, "loop": loop is not None}
    if is_empty(row):
        return {**told, "drop": EMPTY, "reason": "it says nothing"}
    if cut and config.truncated == "drop":
        tokens = len(row["response_ids"])
        return {**told, "drop": TRUNCATED, "reason": f"cut off at {tokens} tokens"}
    if loop and config.looping == "drop":
        reason = f"its last {loop.tokens} tokens repeat {loop.period} over and over"
        return {**told, "drop": LOOPING, "reason": reason}
    return told


class _Judge:
    """The verifier, over answers without their chains and the gold answers of their prompts."""

    def __init__(self, config: Screen, inputs: Mapping[str, Artifact], grading: Grading) -> None:
        self._config, self._grading, self._chat = config, grading, _chat(inputs)
        self._prompts = {row["id"]: row for row in read_rows(inputs["prompts"].shards())}
        self._faults: dict[str, str] = {}

    def verdicts(self, rows: Sequence[Row]) -> list[Found]:
        self._look_at_golds({row["prompt_id"] for row in rows})
        able = [i for i, row in enumerate(rows) if not self._faults[row["prompt_id"]]]
        judged = self._grading.grade_all(
            self._config.verifier, [self._given(rows[i]) for i in able]
        )
        found: list[Found] = [{"ungradable": self._faults[row["prompt_id"]]} for row in rows]
        for i, verdict in zip(able, judged, strict=True):
            said = "correct" if verdict.correct else "wrong"
            found[i] = {"verdict": said}
            if self._config.verdict not in ("all", said):
                reason = f"{said}: {verdict.reason}"
                found[i] = {**found[i], "drop": VERDICT, "reason": reason}
        return found

    def _look_at_golds(self, names: set[str]) -> None:
        """Why each prompt's answers cannot be graded, or "".

        A verifier that turns the gold answer itself down (numeric for text) judges nothing.
        """
        new = sorted(names - self._faults.keys())
        rows = [self._prompts[name] for name in new if self._can(name)]
        faults = iter(self._grading.gold_faults(self._config.verifier, rows))
        for name in new:
            if not self._can(name):
                self._faults[name] = "no gold answer"
            else:
                fault = next(faults)
                self._faults[name] = fault and f"the verifier turns the gold answer down: {fault}"

    def _can(self, name: str) -> bool:
        row = self._prompts.get(name)
        return row is not None and can_grade(self._config.verifier, row, row["answer"])

    def _given(self, rollout: Row) -> Given:
        row = self._prompts[rollout["prompt_id"]]
        _, answer = self._chat.decode_response(rollout["response_ids"], rollout["mode"])
        return Given(answer, row["answer"], row)


# --- with a model -------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(
    config: Screen, inputs: Mapping[str, Artifact], site: Site, role: str
) -> Iterator[MakeShard]:
    """NLL of each answer that is left: by itself and, for the teacher, behind its prompt.

    The student's own NLL behind the prompt was stored when it sampled.
    """
    rollouts = RowFiles(inputs["rollouts"].shards())
    openings = alone_openings(_chat(inputs))
    with opened(role, inputs, site) as engine:
        scorer = engine.scorer(chunk_bytes=config.logit_chunk_mb * 2**20)

        def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
            looked = json.loads(_figures(site, LOOK, shard.index).read_text())
            rows = list(rollouts.rows(shard.items))
            prompts = [[openings[row["mode"]]] for row in rows]
            if role == TEACHER:
                prompts = [
                    [row["prompt_ids"], *alone] for row, alone in zip(rows, prompts, strict=True)
                ]
            left = [
                i for i, one in enumerate(looked)
                if "drop" not in one and _fits(engine, rows[i], prompts[i])
            ]  # fmt: skip
            read = [
                Scorable(tuple(prompt), tuple(rows[i]["response_ids"]), name=rows[i]["id"])
                for i in left
                for prompt in prompts[i]
            ]
            nll = iter(map(mean_nll, scorer.label_logps(read, on_tokens=on_tokens)))
            found: list[list[float] | None] = [None] * len(rows)
            for i in left:
                found[i] = [next(nll) for _ in prompts[i]]
            write_json(_figures(site, role, shard.index), found)
            seen = sum(len(one.prompt_ids) + len(one.response_ids) for one in read)
            return {"teacher_prefilled": seen} if role == TEACHER else {}

        yield make


def _fits(engine: Engine, row: Row, prompts: Sequence[Sequence[int]]) -> bool:
    longest = max(map(len, prompts)) + len(row["response_ids"])
    return engine.context is None or longest <= engine.context


def _deltas(site: Site, part: Shard, rows: Sequence[Row]) -> tuple[list[float], list[bool]]:
    """Delta-IFD of a shard's rows, NaN where there is none, and which rows both models read."""
    by_role = [json.loads(_figures(site, r, part.index).read_text()) for r in (TEACHER, STUDENT)]
    unknown = [math.nan] * 2
    read = [None not in both for both in zip(*by_role, strict=True)]
    teacher = [one or unknown for one in by_role[0]]
    student = [(one or unknown)[0] for one in by_role[1]]
    own = [mean_nll(np.array(row["student_logp"], np.float32)) if here else math.nan
           for row, here in zip(rows, read, strict=True)]  # fmt: skip
    given, alone = [one[0] for one in teacher], [one[1] for one in teacher]
    return delta_ifd(given, alone, own, student).tolist(), read


def _by_delta(config: Screen, delta: float, read: bool) -> Found:
    least, most = config.delta_ifd
    if not read:
        return {"drop": DELTA_IFD, "reason": "longer than a model's context: it was not read"}
    if math.isnan(delta):
        return {"drop": DELTA_IFD, "reason": "the answer alone has an NLL of 0: there is no IFD"}
    if not least <= delta <= most:
        reason = f"IFD_teacher - IFD_student = {delta:.3f}, not in {least:g} to {most:g}"
        return {"delta": delta, "drop": DELTA_IFD, "reason": reason}
    return {"delta": delta}


# --- what is written ----------------------------------------------------------------------------


def _written(
    config: Screen, rollouts: RowFiles, parts: Sequence[Shard], work: WorkDir
) -> dict[str, Any]:
    """Rows that stay, what fell beside them, and the counts of both."""
    counts: Counter[str] = Counter({"rows": 0, "read": len(rollouts)})
    deltas: list[float] = []
    for part in parts:
        rows = list(rollouts.rows(part.items))
        found = json.loads(_figures(work, LOOK, part.index).read_text())
        if config.delta_ifd:
            pairs = zip(*_deltas(work, part, rows), strict=True)
            found = [one if "drop" in one else {**one, **_by_delta(config, *pair)}
                     for one, pair in zip(found, pairs, strict=True)]  # fmt: skip
        _write(work, part, rows, found)
        deltas += [one["delta"] for one in found if "delta" in one]
        for row, one in zip(rows, found, strict=True):
            counts.update(_counted(row, one))
    _put_aside(work)
    if config.verifier and not counts["correct"] + counts["wrong"] and counts["ungradable"]:
        raise DataError(
            f"the verifier {config.verifier!r} can judge none of {counts['ungradable']} rollouts: "
            "prompts must be the rows that were answered, with gold answers of its kind"
        )
    if not counts["rows"]:
        raise DataError(_nothing_left(counts, work))
    return _summary(config, counts, deltas)


def _write(work: WorkDir, part: Shard, rows: Sequence[Row], found: Sequence[Found]) -> None:
    both = list(zip(rows, found, strict=True))
    kept = [{**row, "verdict": one.get("verdict", row["verdict"])}
            for row, one in both if "drop" not in one]  # fmt: skip
    write_rows(work.path / f"{part.name}.parquet", kept, ROLLOUTS)
    for name in FILTERS:
        lines = [_line(row, one) for row, one in both if one.get("drop") == name]
        if lines:
            write_text(_aside(work, name) / f"{part.name}.jsonl", "".join(lines))


def _line(row: Row, one: Found) -> str:
    shown = {name: row[name] for name in SHOWN}
    more = {name: one[name] for name in ("verdict", "delta") if name in one}
    return Dropped(one["drop"], row["id"], row["id"], one["reason"], shown, more).line()


def _counted(row: Row, one: Found) -> dict[str, int]:
    stays = "drop" not in one
    return {
        "rows": stays,
        "response_tokens": stays * len(row["response_ids"]),
        f"dropped_{one.get('drop')}": not stays,
        "cut": one["cut"],
        "loops": one["loop"],
        str(one.get("verdict")): "verdict" in one,
        "ungradable": "ungradable" in one,
    }


def _aside(site: Site, name: str) -> Path:
    return site.scratch(f"aside-{name}")


def _put_aside(work: WorkDir) -> None:
    for name in FILTERS:
        if parts := sorted(_aside(work, name).glob("*.jsonl")):
            with atomic_path(work.path / QUARANTINE / f"{name}.jsonl") as path:
                path.write_bytes(b"".join(part.read_bytes() for part in parts))


def _summary(config: Screen, counts: Counter[str], deltas: Sequence[float]) -> dict[str, Any]:
    graded = ("correct", "wrong", "ungradable") if config.verifier else ()
    return {
        "rows": counts["rows"],
        "read": counts["read"],
        **{f"dropped_{name}": counts[f"dropped_{name}"]
           for name in FILTERS if counts[f"dropped_{name}"]},
        **{name: counts[name] for name in graded},
        "truncated_share": counts["cut"] / counts["read"],
        "looping_share": counts["loops"] / counts["read"],
        **({"mean_delta_ifd": float(np.mean(deltas))} if deltas else {}),
        "response_tokens": counts["response_tokens"],
    }  # fmt: skip


def _nothing_left(counts: Counter[str], work: WorkDir) -> str:
    fell = [f"{counts[f'dropped_{name}']} {name}" for name in FILTERS if counts[f"dropped_{name}"]]
    told = f": {', '.join(fell)}; see {work.path / QUARANTINE}" if fell else ""
    return f"no rollout is left of {counts['read']}{told}"
