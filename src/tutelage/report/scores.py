"""What an `evaluate` step found, as the page shows it: tables, chart, differences, answers.

Two parts, of which a step has one or both: the distance to the teacher, and graded tests. Reads
`scores.json` and `answers.parquet`. Knows the measures' names and units, not how they come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.artifact import Artifact
from tutelage.records import read_rows
from tutelage.report import charts
from tutelage.report.figures import MISSING, Figure, figure, number, p_value, share
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
    "accuracy": ("Accuracy", "of answers", "share"),
    "empty_share": ("Empty", "of answers", "share"),
    "raised_share": ("Grader raised", "of answers", "share"),
    "fast_thinking_share": ("Thinks in fast", "of answers", "share"),
    "tokens_per_correct": ("Tokens a correct", "answer", "tokens"),
}
"""Name in `scores.json` -> title, unit, kind of figure; any other is shown under its own name."""

TEST_MEASURES = ("accuracy", "answer_tokens", "truncated_share", "empty_share", "raised_share",
                 "fast_thinking_share", "tokens_per_correct")  # fmt: skip
"""Columns of a test, in this order; pass@k stand behind the first."""


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
class Distance:
    """The part that compares models with their teacher."""

    prompts: int
    reference_tokens: int
    k: int
    columns: Sequence[Column]
    rows: Sequence[ModelRow]
    differences: Sequence[str]
    chart: str
    answers: Sequence[Prompt]


@dataclass(frozen=True)
class Test:
    """One graded test or task under one condition."""

    title: str
    """The data step's label or the task's name."""
    note: str
    columns: Sequence[Column]
    rows: Sequence[ModelRow]
    differences: Sequence[str]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """One `evaluate` step."""

    label: str
    mode: str
    sentence: str
    distance: Distance | None
    tests: Sequence[Test]
    weight: tuple[bool, bool, bool]
    """Of its sentence as the headline: whether a distilled model is in it, whether it is fast,
    whether it is about the distance to the teacher."""


def read_evaluation(run: Run, step: Step, artifact: Artifact, key: str) -> Evaluation:
    """The evaluation of a finished step; `key` keeps its chart's ids apart from other charts'."""
    scores = read_json(artifact.path / "scores.json")
    tests = scores.get("tests", [])
    entries = [*scores["models"], *[entry for test in tests for entry in test["models"]]]
    distilled = any(run.stage(entry["fingerprint"]) == "distill" for entry in entries)
    return Evaluation(
        label=step.label, mode=scores["mode"],
        sentence=_sentence(run, scores) or _tests_sentence(run, tests),
        distance=_distance(run, step, artifact, scores, key) if scores["models"] else None,
        tests=[_test(run, test) for test in tests],
        weight=(distilled, scores["mode"] == "fast", bool(scores["models"])),
    )  # fmt: skip


def _distance(
    run: Run, step: Step, artifact: Artifact, scores: Mapping[str, Any], key: str
) -> Distance:
    labels = {entry["role"]: _label(run, entry) for entry in scores["models"]}
    columns = _columns(scores["models"])
    return Distance(
        prompts=scores["prompts"], reference_tokens=scores["reference_tokens"], k=scores["k"],
        columns=columns,
        rows=[_row(labels[entry["role"]], entry["metrics"], columns) for entry in scores["models"]],
        differences=[_in_words(run, entry) for entry in scores["differences"]],
        chart=_chart(labels, scores, step.label, key),
        answers=_answers(artifact, scores["models"], labels),
    )  # fmt: skip


def _test(run: Run, test: Mapping[str, Any]) -> Test:
    models = test["models"]
    present = {name for entry in models for name in entry["metrics"]}
    passed = sorted((name for name in present if name.startswith("pass@")), key=_k)
    known = [name for name in TEST_MEASURES if name in present]
    names = [*known[:1], *passed, *known[1:]]
    columns = [Column(name, *MEASURES.get(name, (name, "of items", "share"))) for name in names]
    return Test(
        title=_title(run, test), note=_note(test), columns=columns,
        rows=[_row(run.label(e["fingerprint"]), e["metrics"], columns) for e in models],
        differences=[_in_words(run, entry) for entry in test["differences"]],
        warnings=[
            f"{run.label(entry['fingerprint'])}: {warning}"
            for entry in models
            for warning in entry.get("warnings", ())
        ],
    )  # fmt: skip


def _k(name: str) -> int:
    return int(name.partition("@")[2])


def _title(run: Run, test: Mapping[str, Any]) -> str:
    return test["test"] if "task" in test else run.label(test["test"])


def _note(test: Mapping[str, Any]) -> str:
    """Under which conditions, and by whose rules."""
    words = [f"{test['items']:,} items", f"{test['mode']} mode"]
    words.append(f"temperature {test['temperature']:g}" if test["temperature"] else "greedy")
    if facts := test.get("task"):
        rule = f"{facts['metric']} ({facts['filter']})"
        words += [f"{facts['shots']} shots", f"score: {rule}", f"task version {facts['version']}"]
        words.append(f"lm-eval {facts['lm_eval']}")
    return ", ".join(words)


def _tests_sentence(run: Run, tests: Sequence[Mapping[str, Any]]) -> str:
    """The first test: its first model and its last."""
    if not tests:
        return ""
    models = tests[0]["models"]
    ends = [models[0], *models[1:][-1:]]
    told = [
        f"{shown.text} {shown.interval}".strip() + f" ({run.label(entry['fingerprint'])})"
        for entry in ends
        if (shown := figure(entry["metrics"]["accuracy"], "share"))
    ]
    return (
        f"Accuracy on {tests[0]['items']:,} items of {_title(run, tests[0])} in "
        f"{tests[0]['mode']} mode: {', then '.join(told)}."
    )


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
    told = f"{shown.text} {shown.interval}".strip() if shown else MISSING
    facts = [*_tested(run, entry), _verdict(entry)]
    return (
        f"{title}, {run.label(entry['model'])} against {run.label(entry['against'])}: "
        f"{told}{unit} ({'; '.join(facts)})"
    )


def _verdict(entry: Mapping[str, Any]) -> str:
    if entry["low"] is None or entry["high"] is None:
        return "one item tells no interval"
    verdict = "excludes 0" if _excludes_zero(entry) else "includes 0, so it may be chance"
    return f"the interval {verdict}"


def _tested(run: Run, entry: Mapping[str, Any]) -> list[str]:
    """The p-value, corrected where a table has many, and what it is of."""
    found = []
    if entry.get("p") is not None:
        found.append(p_value(entry["p"]))
    if entry.get("p_holm") is not None:
        found.append(f"{p_value(entry['p_holm'])} among all comparisons of the table (Holm)")
    if "only_a" in entry:
        found.append(
            f"McNemar: {entry['only_a']} items only {run.label(entry['model'])}, "
            f"{entry['only_b']} only {run.label(entry['against'])} got right"
        )
    return found


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
    assert shown
    return f"{shown.text} {shown.interval} ({run.label(entry['fingerprint'])})"


def _last_step(run: Run, scores: Mapping[str, Any], mark: str) -> str:
    for entry in scores["differences"]:
        if entry["metric"] == "forward_kl" and entry["model"] == mark:
            verdict = "excludes 0" if _excludes_zero(entry) else "does not exclude 0"
            shown = figure(entry, "nats")
            assert shown
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
