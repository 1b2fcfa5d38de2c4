"""What an `evaluate` step found, as the page shows it: table, chart, differences, answers.

Reads `scores.json` and `answers.parquet`. Knows the measures' names and units, not how they come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.artifact import Artifact
from tutelage.records import read_rows
from tutelage.report import charts
from tutelage.report.figures import Figure, figure, number, p_value, share
from tutelage.report.run import Run, Step, read_json

MAX_PROMPTS = 6  # whose answers are shown
MEASURES = {
    "forward_kl": ("Forward KL", "nats/token", "nats"),
    "reverse_kl": ("Reverse KL", "nats/token", "nats"),
    "agreement": ("Agreement", "likeliest token", "share"),
    "topk_overlap": ("Top-k overlap", "of k ids", "share"),
    "overlap_mass": ("Overlap mass", "probability", "share"),
    "entropy": ("Entropy", "nats/token", "nats"),
    "answer_tokens": ("Answer length", "tokens", "tokens"),
    "truncated_share": ("Cut off", "of answers", "share"),
    "rouge_l": ("ROUGE-L", "to teacher", "plain"),
}
"""Name in `scores.json` -> title, unit, kind of figure; any other is shown under its own name."""


@dataclass(frozen=True)
class Column:
    """A measure of the table."""

    key: str
    title: str
    unit: str
    kind: str


@dataclass(frozen=True)
class ModelRow:
    """A model's figures, one a column; None where it has none."""

    label: str
    figures: Sequence[Figure | None]


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt."""

    label: str
    thinking: str
    text: str
    note: str


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt and the answers to it, in the models' order, the teacher's last."""

    text: str
    language: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Evaluation:
    """One `evaluate` step."""

    label: str
    mode: str
    prompts: int
    reference_tokens: int
    k: int
    columns: Sequence[Column]
    rows: Sequence[ModelRow]
    differences: Sequence[str]
    sentence: str
    chart: str
    answers: Sequence[Prompt]
    weight: tuple[bool, bool]
    """Of its sentence as the headline: whether a distilled model is in it, whether it is fast."""


def read_evaluation(run: Run, step: Step, artifact: Artifact, key: str) -> Evaluation:
    """The evaluation of a finished step; `key` keeps its chart's ids apart from other charts'."""
    scores = read_json(artifact.path / "scores.json")
    labels = {entry["role"]: _label(run, entry) for entry in scores["models"]}
    columns = _columns(scores["models"])
    distilled = any(run.stage(entry["fingerprint"]) == "distill" for entry in scores["models"])
    return Evaluation(
        label=step.label, mode=scores["mode"], prompts=scores["prompts"],
        reference_tokens=scores["reference_tokens"], k=scores["k"], columns=columns,
        rows=[_row(labels[entry["role"]], entry["metrics"], columns) for entry in scores["models"]],
        differences=[_in_words(run, entry) for entry in scores["differences"]],
        sentence=_sentence(run, scores), chart=_chart(labels, scores, step.label, key),
        answers=_answers(artifact, scores["models"], labels),
        weight=(distilled, scores["mode"] == "fast"),
    )  # fmt: skip


def _label(run: Run, entry: Mapping[str, Any]) -> str:
    label = run.label(entry["fingerprint"])
    return label if entry["role"] != "teacher" or label == "teacher" else f"{label} (teacher)"


def _columns(models: Sequence[Mapping[str, Any]]) -> list[Column]:
    present = {name for entry in models for name in entry["metrics"]}
    known = [Column(name, *MEASURES[name]) for name in MEASURES if name in present]
    return known + [Column(name, name, "", "plain") for name in sorted(present - set(MEASURES))]


def _row(label: str, metrics: Mapping[str, Any], columns: Sequence[Column]) -> ModelRow:
    return ModelRow(
        label, [figure(metrics[c.key], c.kind) if c.key in metrics else None for c in columns]
    )


def _in_words(run: Run, entry: Mapping[str, Any]) -> str:
    name = entry["metric"]
    title, _, kind = MEASURES.get(name, (name, "", "plain"))
    shown = figure(entry, kind)
    unit = {"nats": " nats a token", "tokens": " tokens"}.get(kind, "")
    verdict = "excludes 0" if _excludes_zero(entry) else "includes 0, so it may be chance"
    tested = f"{p_value(entry['p'])}; " if "p" in entry else ""
    return (
        f"{title}, {run.label(entry['model'])} against {run.label(entry['against'])}: "
        f"{shown.text} {shown.interval}{unit} ({tested}the interval {verdict})"
    )


def _excludes_zero(entry: Mapping[str, Any]) -> bool:
    return entry["low"] > 0 or entry["high"] < 0


def _sentence(run: Run, scores: Mapping[str, Any]) -> str:
    """Forward KL from the first model of the list to the last distilled one, and the last step."""
    rated = [entry for entry in scores["models"] if "forward_kl" in entry["metrics"]]
    if not rated:
        return ""
    start = rated[0]
    distilled = [entry for entry in rated if run.stage(entry["fingerprint"]) == "distill"]
    end = (distilled or rated)[-1]
    where = f"on {scores['prompts']:,} held-out prompts in {scores['mode']} mode"
    first, last = start["metrics"]["forward_kl"], end["metrics"]["forward_kl"]
    if start is end:
        return f"Forward KL to the teacher {where} is {_told(run, end)} nats a token."
    moved = "fell" if last["estimate"] < first["estimate"] else "rose"
    change = ""
    if first["estimate"]:
        change = f", {share(last['estimate'] / first['estimate'] - 1)}"
    return (
        f"Forward KL to the teacher {where} {moved} from {_told(run, start)} to {_told(run, end)} "
        f"nats a token{change}{_last_step(run, scores, end['fingerprint'])}."
    )


def _told(run: Run, entry: Mapping[str, Any]) -> str:
    shown = figure(entry["metrics"]["forward_kl"], "nats")
    return f"{shown.text} {shown.interval} ({run.label(entry['fingerprint'])})"


def _last_step(run: Run, scores: Mapping[str, Any], mark: str) -> str:
    for entry in scores["differences"]:
        if entry["metric"] == "forward_kl" and entry["model"] == mark:
            verdict = "excludes 0" if _excludes_zero(entry) else "does not exclude 0"
            shown = figure(entry, "nats")
            return (
                f"; the paired difference of {run.label(mark)} against "
                f"{run.label(entry['against'])}, {shown.text} {shown.interval}, {verdict}"
            )
    return ""


def _chart(labels: Mapping[str, str], scores: Mapping[str, Any], name: str, key: str) -> str:
    rows = []
    for entry in scores["models"]:
        if kl := entry["metrics"].get("forward_kl"):
            text = f"{number(kl['estimate'])} [{number(kl['low'])}, {number(kl['high'])}]"
            rows.append((labels[entry["role"]], kl["estimate"], kl["low"], kl["high"], text))
    if not rows:
        return ""
    caption = f"Forward KL to the teacher of each model in {name}, with intervals"
    return charts.intervals(key, caption, rows, "forward KL to the teacher, nats per token")


def _answers(
    artifact: Artifact, models: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> list[Prompt]:
    """The shown prompts. A model that is its own teacher has one column, the last."""
    path = artifact.path / "answers.parquet"
    rows = list(read_rows([path])) if path.exists() else []
    found = {(row["prompt_id"], row["model"]): row for row in rows}
    teacher_last = sorted(models, key=lambda entry: entry["role"] == "teacher")
    columns: dict[str, str] = {}
    for entry in reversed(teacher_last):
        columns.setdefault(entry["fingerprint"], labels[entry["role"]])
    order = list(reversed(columns))
    return [
        Prompt(
            row["prompt"], row["language"] or "",
            [
                _answer(columns[mark], found[row["prompt_id"], mark])
                for mark in order
                if (row["prompt_id"], mark) in found
            ],
        )
        for row in _spread({row["prompt_id"]: row for row in rows}.values())
    ]  # fmt: skip


def _spread(rows: Any) -> list[Mapping[str, Any]]:
    """At most MAX_PROMPTS rows, by turns from each language, then in their own order."""
    turns: dict[str | None, int] = {}
    ranked = []
    for index, row in enumerate(rows):
        turn = turns[row["language"]] = turns.get(row["language"], -1) + 1
        ranked.append((turn, index, row))
    chosen = sorted(ranked, key=lambda item: item[:2])[:MAX_PROMPTS]
    return [row for _, _, row in sorted(chosen, key=lambda item: item[1])]


def _answer(label: str, row: Mapping[str, Any]) -> Answer:
    notes = [f"{row['tokens']:,} tokens"]
    if row["finish_reason"] == "length":
        notes.append("cut off")
    if row["rouge_l"] is not None:
        notes.append(f"ROUGE-L {number(row['rouge_l'])}")
    return Answer(label, row["thinking"] or "", row["answer"], " · ".join(notes))
