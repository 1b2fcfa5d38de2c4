"""The page of a run shows what the artifacts hold, and nothing in it acts or fetches."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tutelage.core.artifact import TOKEN_KINDS, Artifact, WorkDir, finish
from tutelage.core.errors import ArtifactError
from tutelage.core.files import write_json
from tutelage.core.fingerprint import fingerprint
from tutelage.core.progress import Reporter
from tutelage.records import ANSWERS, write_rows
from tutelage.report import figures, graph
from tutelage.report.page import write_page
from tutelage.report.run import Step, read_run

MARKUP = '<script>alert(1)</script> & "quoted" $x_1$ {{ 7*7 }}'


@dataclass
class Maker:
    """Makes artifacts as a run does: work folder, files, ledger, manifest."""

    root: Path
    made: dict[str, Artifact] = field(default_factory=dict)

    def external(self, name: str) -> Artifact:
        identity = {"stage": "external", "source": name}
        manifest = {
            "stage": "external", "fingerprint": fingerprint(identity), "identity": identity,
            "content": fingerprint(name), "inputs": {}, "summary": {}, "files": {}, "seconds": 0.0,
            "tokens": dict.fromkeys(TOKEN_KINDS, 0),
        }  # fmt: skip
        self.made[name] = Artifact(self.root, manifest)
        return self.made[name]

    def step(
        self, name: str, stage: str, inputs: Mapping[str, str], *, seconds: float = 1.0,
        tokens: Mapping[str, int] | None = None, config: Mapping[str, Any] | None = None,
        files: Mapping[str, Any] | None = None,
    ) -> Artifact:  # fmt: skip
        read = {role: self.made[source] for role, source in inputs.items()}
        identity = {
            "stage": stage, "version": 1, "config": config or {"seed": 17, "name": name},
            "inputs": {role: artifact.fingerprint for role, artifact in read.items()},
        }  # fmt: skip
        work = WorkDir.open(
            self.root / f"{fingerprint(identity)}.partial", reporter=Reporter(), device="cpu"
        )
        for file, content in (files or {}).items():
            if file.endswith(".parquet"):
                write_rows(work.path / file, content, ANSWERS)
            elif file.endswith(".jsonl"):
                lines = [json.dumps(line) + "\n" for line in content]
                (work.path / file).write_text("".join(lines))
            else:
                write_json(work.path / file, content)
        work.commit("all", seconds=seconds, tokens=tokens or {})
        self.made[name] = finish(
            work, self.root / fingerprint(identity), identity=identity, summary={},
            inputs={
                role: {"stage": a.stage, "fingerprint": a.fingerprint,
                       "content": a.manifest["content"]}
                for role, a in read.items()
            },
            provenance={"tutelage": "0.1", "git_commit": "abc123", "device": "cpu",
                        "versions": {"torch": "2.13.0"}, "argv": ["tutelage", "run"]},
            peak_memory_bytes=123_000_000,
        )  # fmt: skip
        return self.made[name]


def interval(estimate: float, width: float = 0.05, **more: Any) -> dict[str, Any]:
    return {
        "estimate": estimate, "low": round(estimate - width, 6), "high": round(estimate + width, 6),
        **(more or {"n": 24}),
    }  # fmt: skip


def metrics(start: float, steps: int = 30) -> list[dict[str, float]]:
    return [
        {"step": i + 1, "lr": 1e-5, "tokens": 100 * i, "loss": start / (1 + i / 20),
         "grad_norm": 1.0, "agreement": 0.5 + i / 100}
        for i in range(steps)
    ]  # fmt: skip


def scores(models: Mapping[str, Artifact], teacher: Artifact, **kl: float) -> dict[str, Any]:
    marks = {name: artifact.fingerprint for name, artifact in models.items()}
    names = list(models)
    return {
        "mode": "fast", "prompts": 24, "reference_tokens": 1200, "k": 10,
        "models": [
            {"role": f"models.{i}", "fingerprint": marks[name],
             "metrics": {"forward_kl": interval(kl[name]), "reverse_kl": interval(0.654321 + i),
                         "agreement": interval(0.61234), "entropy": interval(1.2345),
                         "answer_tokens": interval(88.25, 12.5), "rouge_l": interval(0.33333)}}
            for i, name in enumerate(names)
        ] + [
            {"role": "teacher", "fingerprint": teacher.fingerprint,
             "metrics": {"entropy": interval(1.11111), "answer_tokens": interval(90.5)}}
        ],
        "differences": [
            {"metric": "forward_kl", "model": marks[b], "against": marks[a],
             **interval(round(kl[b] - kl[a], 6), 0.02, p=0.0005)}
            for a, b in pairwise(names)
        ],
    }  # fmt: skip


def answers(models: list[Artifact], count: int = 2) -> list[dict[str, Any]]:
    return [
        {"model": model.fingerprint, "prompt_id": f"p{i}", "language": "en", "mode": "fast",
         "prompt": f"Question {i} {MARKUP}", "thinking": f"Thought {MARKUP}" if i == 0 else None,
         "answer": f"Answer {i} of model {number} {MARKUP}", "tokens": 12,
         "finish_reason": "length" if i else "stop",
         "rouge_l": 0.5 if number < len(models) - 1 else None}
        for number, model in enumerate(models) for i in range(count)
    ]  # fmt: skip


def whole_run(root: Path, evaluations: int = 1) -> dict[str, Artifact]:
    root.mkdir(parents=True, exist_ok=True)
    make = Maker(root)
    make.external("teacher")
    make.step("student", "prune", {"model": "teacher"}, config={"drop_layers": 8})
    make.step("holdout", "data", {})
    make.step("fast-data", "synthesize", {"teacher": "teacher", "prompts": "holdout"},
              tokens={"teacher_decoded": 4321})  # fmt: skip
    make.step("sft-fast", "sft", {"model": "student", "data.0": "fast-data"}, seconds=61.5,
              tokens={"trained": 30_000}, files={"metrics.jsonl": metrics(3)})  # fmt: skip
    make.step("rollouts", "rollout", {"model": "sft-fast", "prompts": "holdout"},
              tokens={"student_decoded": 2222})  # fmt: skip
    make.step("targets", "score", {"teacher": "teacher", "rollouts": "rollouts"},
              tokens={"teacher_prefilled": 3333})  # fmt: skip
    make.step("distill", "distill", {"model": "sft-fast", "targets": "targets"},
              tokens={"trained": 12_345}, files={"metrics.jsonl": metrics(1)})  # fmt: skip
    models = {name: make.made[name] for name in ("student", "sft-fast", "distill")}
    teacher = make.made["teacher"]
    inputs = {f"models.{i}": name for i, name in enumerate(models)} | {"teacher": "teacher"}
    table = scores(models, teacher, **{"student": 0.8, "sft-fast": 0.5, "distill": 0.4})
    for number in range(evaluations):
        make.step(
            f"scores{number or ''}", "evaluate", {**inputs, "prompts": "holdout"},
            files={"scores.json": table, "answers.parquet": answers([*models.values(), teacher])},
        )  # fmt: skip
    exported = {
        "files": [
            {"format": "q8_0", "file": "q8_0.gguf", "bytes": 145_000_000, "seconds": 3.0,
             "kl": {"mean": 0.0023, "p99": 0.0312}, "agreement": 0.987, "tokens_per_second": 41.5,
             "answers": [{"prompt": f"Ask {MARKUP}", "answer": f"Edge answer {MARKUP}"}],
             "fallbacks": [], "warnings": [f"Watch out {MARKUP}"]}
        ],
        "model_bytes": 538_000_000,
    }  # fmt: skip
    make.step("edge", "export", {"model": "distill", "prompts": "holdout"},
              files={"export.json": exported})  # fmt: skip
    return make.made


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return whole_run(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def page(artifacts: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("page"), artifacts)


def written(folder: Path, artifacts: Mapping[str, Artifact], name: str = "quickstart") -> str:
    write_page(folder / "report.html", name, artifacts)
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags with their attributes, text by tag, and tags that do not nest."""

    VOID = ("meta", "link", "br", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[tuple[float, str]] = []
        self.text = ""
        self.faults: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self._open or self._open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] == "data":
            self.data.append((float(self.tags[-1][1]["value"] or "nan"), data))


def test_the_headline_tells_the_way_from_the_start_to_the_distilled_model(page: str) -> None:
    text = Outline(page).text
    assert "fell from 0.800 [0.750, 0.850] (student) to 0.400 [0.350, 0.450] (distill)" in text
    assert "−50.0\xa0%" in text
    assert (
        "paired difference of distill against sft-fast, −0.100 [−0.120, −0.080], excludes 0" in text
    )


def test_every_figure_of_the_table_is_the_one_in_scores_json(
    page: str, artifacts: dict[str, Artifact]
) -> None:
    table = json.loads((artifacts["scores"].path / "scores.json").read_text())
    found = Outline(page).data
    expected = [
        entry["metrics"][key]["estimate"]
        for entry in table["models"]
        for key in ("forward_kl", "reverse_kl", "agreement", "entropy", "answer_tokens", "rouge_l")
        if key in entry["metrics"]
    ]
    assert [value for value, _ in found[: len(expected)]] == expected
    for value, text in found:
        scale = 0.01 if "%" in text else 1.0
        shown = float(text.replace("−", "-").replace("%", "").replace(",", ""))
        assert shown * scale == pytest.approx(value, abs=0.0006 if "%" in text else 0.05, rel=0.01)
    for entry in table["models"]:
        for key, kind in (("forward_kl", "nats"), ("agreement", "share")):
            if key in entry["metrics"]:
                shown = figures.figure(entry["metrics"][key], kind)
                assert shown
                assert f">{shown.text}</data><small>{shown.interval}</small>" in page


def test_a_measure_a_model_does_not_have_is_a_dash(page: str) -> None:
    row = re.search(r"<tr><th>teacher</th>\s*(<td class=\"cell.*?)</tr>", page, re.DOTALL)
    assert row
    assert row.group(1).count("–</td>") == 4  # forward_kl, reverse_kl, agreement, rouge_l
    assert row.group(1).count("<data") == 2


def test_markup_in_prompts_answers_and_names_is_shown_and_never_acts(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    renamed = {f"{MARKUP} {name}": artifact for name, artifact in artifacts.items()}
    page = written(tmp_path, renamed, name=MARKUP)
    outline = Outline(page)
    assert "script" not in {tag for tag, _ in outline.tags}
    assert not [key for _, attributes in outline.tags for key in attributes if key[:2] == "on"]
    for shown in (
        "Question 0 ",
        "Answer 1 of model 2 ",
        "Thought ",
        "Ask ",
        "Edge answer ",
        "Watch out ",
    ):
        assert shown + MARKUP in outline.text
    assert outline.faults == []


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    for tag, attributes in Outline(page).tags:
        for key in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(key) or ""
            assert value.startswith(("#", "data:")) or not value, (tag, key, value)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "default-src 'none'" in page


def test_tags_nest_and_ids_are_used_once(page: str) -> None:
    outline = Outline(page)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert outline.faults == []
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(|href=")#([^)"]+)', page)
    assert targets
    assert set(targets) <= set(ids)


def test_the_same_artifacts_give_the_same_bytes_in_any_order(
    tmp_path: Path, artifacts: dict[str, Artifact], page: str
) -> None:
    backwards = dict(reversed(artifacts.items()))
    assert written(tmp_path, backwards) == page


def test_every_subset_of_an_unfinished_run_has_a_page(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    names = list(artifacts)
    assert "No step has finished yet." in written(tmp_path, {})
    early = written(tmp_path, {name: artifacts[name] for name in names[:5]})
    assert "No evaluation has finished yet; 4 steps have." in early
    for name in ("scores", "edge", "distill", "targets"):
        assert Outline(written(tmp_path, {name: artifacts[name]})).faults == []


def test_a_teacher_that_is_not_among_the_artifacts_is_named_by_its_role(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    known = {name: artifacts[name] for name in artifacts if name != "teacher"}
    page = written(tmp_path, known)
    assert re.search(r'<tr class="dim"><th>teacher<br>.*?</th><td class="left">external</td>', page)
    assert "<h3>teacher <small>12 tokens</small></h3>" in page


def test_several_evaluations_each_have_their_part(tmp_path: Path) -> None:
    page = written(tmp_path, whole_run(tmp_path / "store", evaluations=2))
    assert [page.count(f"Models in scores{n} ") for n in ("", "1")] == [1, 1]
    ids = [a["id"] for _, a in Outline(page).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_totals_count_a_step_with_two_names_once(
    tmp_path: Path, artifacts: dict[str, Artifact]
) -> None:
    run = read_run("r", {**artifacts, "sft-again": artifacts["sft-fast"]})
    assert run.totals()["trained"] == 42_345
    assert run.totals()["seconds"] == pytest.approx(61.5 + 8)
    assert run.label(artifacts["sft-fast"].fingerprint) == "sft-again = sft-fast"
    page = written(tmp_path, artifacts)
    for figure in ("42,345", "2,222", "3,333", "4,321"):
        assert f"<dd>{figure}</dd>" in page


def test_steps_come_after_what_they_read(artifacts: dict[str, Artifact]) -> None:
    seen: set[str] = set()
    for step in read_run("r", artifacts).steps:
        assert set(step.reads) <= seen
        seen.add(step.fingerprint)
    assert len(seen) == len(artifacts)


def test_steps_free_of_each_other_stand_in_the_order_they_were_finished(tmp_path: Path) -> None:
    make = Maker(tmp_path)
    for name in ("a", "b", "c"):
        make.step(name, "data", {})
    times = {"a": "2026-01-03T00:00:00Z", "b": "2026-01-01T00:00:00Z", "c": "2026-01-02T00:00:00Z"}
    dated = {
        name: Artifact(artifact.path, {**artifact.manifest, "finished": times[name]})
        for name, artifact in make.made.items()
    }
    assert [step.label for step in read_run("r", dated).steps] == ["b", "c", "a"]


def test_edges_of_the_drawing_run_from_left_to_right_past_every_layer() -> None:
    read = {"a": "", "b": "a", "c": "b", "d": "ca", "e": "d", "f": ""}
    steps = [Step(name, "sft", name, tuple(marks), None) for name, marks in read.items()]
    found = graph.layout(steps)
    column = {place: index for index, places in enumerate(found.layers) for place in places}
    assert len(found.edges) == 5
    for edge in found.edges:
        assert [column[place] - column[edge[0]] for place in edge] == list(range(len(edge)))
    for places in found.layers:
        rows = sorted(found.rows[place] for place in places)
        assert all(b - a > 0.59 for a, b in pairwise(rows))


def test_the_curves_have_axes_with_units_one_a_training_step(page: str) -> None:
    assert page.count(">nats per token</text>") == 2
    assert page.count(">optimizer step</text>") == 2
    assert "Loss of distill over 30 steps" in page
    assert "loss 2.861 → 1.250" in page  # means of the first and of the last three of 30


def test_drawings_take_their_colours_from_the_scheme_of_the_page(page: str) -> None:
    assert "fill: var(--ink)" in page
    assert re.findall(r"(?:fill|stroke): (?!none|var)[^;\"]+", page) == []


def test_the_chart_of_models_writes_each_forward_kl(page: str) -> None:
    for text in ("0.800 [0.750, 0.850]", "0.500 [0.450, 0.550]", "0.400 [0.350, 0.450]"):
        assert f">{text}</text>" in page


def test_at_most_six_prompts_are_shown_and_every_language_has_its_turn(tmp_path: Path) -> None:
    make = Maker(tmp_path)
    model, teacher = make.step("distill", "distill", {}), make.external("teacher")
    rows = answers([model, teacher], count=9)
    for row in rows:
        row["language"] = "ar" if row["prompt_id"] == "p8" else "en"
    make.step(
        "scores", "evaluate", {"models.0": "distill", "teacher": "teacher"},
        files={"scores.json": scores({"distill": model}, teacher, distill=0.4),
               "answers.parquet": rows},
    )  # fmt: skip
    page = written(tmp_path, make.made)
    assert re.findall(r"Question (\d)", page) == ["0", "1", "2", "3", "4", "8"]
    assert page.index("Answer 0 of model 0") < page.index("Answer 0 of model 1")


def test_an_interval_that_holds_zero_is_said_to(tmp_path: Path) -> None:
    make = Maker(tmp_path)
    models = {name: make.step(name, "distill", {}) for name in ("one", "two")}
    teacher = make.external("teacher")
    table = scores(models, teacher, one=0.5, two=0.49)
    make.step("scores", "evaluate", {"models.0": "one"}, files={"scores.json": table})
    text = Outline(written(tmp_path, make.made)).text
    assert "−0.010 [−0.030, 0.010], does not exclude 0." in text
    assert "the interval includes 0" in text


def graded(estimate: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high, "n": 40}


def graded_scores(models: Mapping[str, Artifact], test: str) -> dict[str, Any]:
    """`scores.json` of an evaluation without a teacher: a data step's test, and a task."""
    marks = {name: artifact.fingerprint for name, artifact in models.items()}
    entries = [
        {"role": f"models.{i}", "fingerprint": mark, "warnings": [f"Careful {MARKUP}"] if i else [],
         "metrics": {"accuracy": graded(0.25 * i, 0.1 * i, 0.4 * i),
                     "answer_tokens": graded(9, 8, 10),
                     "pass@4": graded(0.75, 0.7, 0.8), "pass@10": graded(0.85, 0.8, 0.9),
                     "truncated_share": graded(0.125, 0.1, 0.2), "empty_share": graded(0, 0, 0.1),
                     "fast_thinking_share": graded(0.5, 0.4, 0.6),
                     "tokens_per_correct": graded(36.0 if i else None, 20.0 if i else None, None)}}
        for i, mark in enumerate(marks.values())
    ]  # fmt: skip
    of = {"model": marks["distill"], "against": marks["start"]}
    differences = [
        {"metric": "accuracy", **of, **graded(0.25, 0.05, 0.4), "p": 0.013, "test": "mcnemar",
         "only_a": 12, "only_b": 2, "p_holm": 0.026},
        {"metric": "answer_tokens", **of, **graded(0, -1, 1), "p": 0.9, "test": "paired bootstrap",
         "p_holm": 0.9},
    ]  # fmt: skip
    common = {"mode": "fast", "items": 40, "models": entries, "differences": differences}
    task = {"lm_eval_task": "gsm8k", "version": "3.0", "metric": "exact_match", "shots": 5,
            "filter": "flexible-extract", "lm_eval": "0.4.9"}  # fmt: skip
    return {
        "mode": "fast", "models": [], "differences": [],
        "tests": [
            {"test": test, "temperature": 0.7, **common},
            {"test": "gsm8k", "temperature": 0.0, "task": task, **common},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def graded_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("graded")
    make = Maker(folder)
    models = {
        "start": make.step("start", "sft", {}),
        "distill": make.step("distill", "distill", {}),
    }
    sums = make.step("sums", "data", {})
    make.step(
        "scores", "evaluate", {"models.0": "start", "models.1": "distill", "tests.0": "sums"},
        files={"scores.json": graded_scores(models, sums.fingerprint)},
    )  # fmt: skip
    return written(folder, make.made)


def test_tests_without_a_teacher_have_a_table_each(graded_page: str) -> None:
    text = " ".join(Outline(graded_page).text.split())
    assert "sums 40 items, fast mode, temperature 0.7" in text
    assert (
        "gsm8k 40 items, fast mode, greedy, 5 shots, score: exact_match (flexible-extract), task "
        "version 3.0, lm-eval 0.4.9" in text
    )
    assert "held-out prompts" not in text
    assert re.search(r"Accuracy.*pass@4.*pass@10.*Answer length.*Tokens a correct", text)


def test_a_figure_that_is_not_defined_is_a_dash(graded_page: str) -> None:
    row = re.search(r"<tr><th>start</th>\s*(<td class=\"cell.*?)</tr>", graded_page, re.DOTALL)
    assert row
    assert row.group(1).rstrip().endswith("–</td>")
    assert "36.0</data><small>[20.0, –]</small>" in graded_page


def test_differences_of_a_test_tell_p_and_what_stays_of_it_among_many(graded_page: str) -> None:
    text = Outline(graded_page).text.replace("\xa0", " ")
    assert (
        "Accuracy, distill against start: 25.0 % [5.0 %, 40.0 %] (p = 0.013; p = 0.026 among all "
        "comparisons of the table (Holm); McNemar: 12 items only distill, 2 only start got right; "
        "the interval excludes 0)" in text
    )


def test_without_a_teacher_the_headline_is_the_first_test(graded_page: str) -> None:
    text = Outline(graded_page).text.replace("\xa0", " ")
    assert (
        "Accuracy on 40 items of sums in fast mode: 0.0 % [0.0 %, 0.0 %] (start), then 25.0 % "
        "[10.0 %, 40.0 %] (distill)." in text
    )


def test_warnings_of_a_test_are_shown_and_never_act(graded_page: str) -> None:
    assert "<script" not in graded_page
    assert f"distill: Careful {MARKUP}" in Outline(graded_page).text


def test_a_table_that_is_no_json_is_named(tmp_path: Path) -> None:
    make = Maker(tmp_path)
    scored = make.step("scores", "evaluate", {}, files={"scores.json": {}})
    (scored.path / "scores.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"scores\.json cannot be read .*verify --repair"):
        write_page(tmp_path / "page.html", "run", make.made)


@pytest.mark.parametrize(
    ("written_as", "expected"),
    [
        (figures.number(0.0), "0.000"), (figures.number(-0.5), "−0.500"),
        (figures.number(0.00123), "0.0012"), (figures.share(0.4567), "45.7\xa0%"),
        (figures.duration(61.5), "61.5 s"), (figures.duration(7260), "2 h 01 min"),
        (figures.duration(600), "10 min"), (figures.size(145_000_000), "145 MB"),
        (figures.size(0), "–"), (figures.size(999), "999 B"), (figures.size(999_600), "1 MB"),
        (figures.count(1234), "1,234"), (figures.p_value(0.0005), "p\xa0<\xa00.001"),
        (figures.p_value(0.04), "p\xa0=\xa00.040"),
    ],
)  # fmt: skip
def test_figures_are_written_as_a_person_reads_them(written_as: str, expected: str) -> None:
    assert written_as == expected
