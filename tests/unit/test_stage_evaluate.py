"""Stage `evaluate` on tiny models: distance, tests and tasks, each alone and all together.

Where verdicts must be known, what answers is a fake that says by the prompt what it is told to.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import write_model

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, EngineError, RecipeError, TutelageError
from tutelage.core.progress import Reporter
from tutelage.engines.base import Completion
from tutelage.evals import graders
from tutelage.models.load import load_for_inference
from tutelage.recipe.evaluation import Evaluate
from tutelage.records import CONVERSATIONS, read_rows, write_rows
from tutelage.stages import evaluate
from tutelage.stages.evaluate import tests as graded_tests
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import load_tokenizer

Row = dict[str, Any]
SUMS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    {"question": "What is 40 + 2?", "answer": "It is 42.\n#### 42"},
    {"question": "What is 999 + 1?", "answer": "It is 1,000.\n#### 1,000"},
]
CHOICE = {"A": "一", "B": "二", "C": "三", "D": "四"}
PROGRAMS = [
    {
        "task_id": "Own/0", "prompt": "def double(x):\n", "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    }
]  # fmt: skip
CUT = "..."
"""What ends an answer that was cut off."""


def asked(name: str, question: str, gold: str | None, **more: Any) -> Row:
    messages = [{"role": "user", "content": question, "thinking": None}]
    return {
        "id": name, "source": "a.jsonl", "language": "en", "mode": "fast", "complete": True,
        "messages": messages, "answer": gold, "task": None, "difficulty": None, "meta": None,
        **more,
    }  # fmt: skip


ROWS = [asked(f"r{n}", f"What is {n} + {n}?", str(2 * n)) for n in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("evaluated"), layers=1)


class Stage:
    """The stage in a folder, what it said, and which models it loaded."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self._patch = folder, model, monkeypatch
        self.said = io.StringIO()
        self.loaded: list[str] = []
        self.sandbox = "bubblewrap"
        monkeypatch.setattr(evaluate, "load_for_inference", self._load)

    def _load(self, artifact: Artifact, *, device: str) -> Any:
        self.loaded.append(artifact.fingerprint)
        return load_for_inference(artifact, device=device)

    def rows(self, name: str, rows: Sequence[Row]) -> Artifact:
        folder = self.folder / name
        write_rows(folder / "conversations.parquet", rows, CONVERSATIONS)
        return Artifact(folder, {"stage": "data", "fingerprint": name * 8, "identity": {}})

    def file(self, name: str, rows: Sequence[Row]) -> str:
        path = self.folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return str(path)

    def run(
        self, *, models: Sequence[str] = ("student",), tests: Mapping[str, Sequence[Row]] = {},
        prompts: Sequence[Row] = (), **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """`scores.json`."""
        inputs = {f"models.{n}": self._model(name) for n, name in enumerate(models)}
        inputs |= {f"tests.{n}": self.rows(name, tests[name]) for n, name in enumerate(tests)}
        if prompts:
            inputs |= {"teacher": self._model("teacher"), "prompts": self.rows("held", prompts)}
            settings |= {"teacher": "teacher", "prompts": "held"}
        config = Evaluate.model_validate(
            {"stage": "evaluate", "models": list(models), "tests": list(tests), "seed": 5,
             "max_tokens": 6, "bootstrap": 50, **settings}
        )  # fmt: skip
        reporter = Reporter(console=Console(file=self.said, width=400))
        work = WorkDir.open(
            self.folder / "work", reporter=reporter, device="cpu", sandbox=self.sandbox,
            memory=self.folder / "answers.sqlite",
        )  # fmt: skip
        self.summary = evaluate.run(config, inputs, work)
        return json.loads((work.path / "scores.json").read_text())

    def _model(self, name: str) -> Artifact:
        return Artifact(
            self.model, {"stage": "external", "fingerprint": name * 8, "identity": {}}
        )  # fmt: skip

    def verdicts(self) -> list[Row]:
        return list(read_rows([self.folder / "work" / "verdicts.parquet"]))

    def says(self, answer: Callable[[str, str, int], str]) -> None:
        """Answers become `answer(model, prompt, key)`."""
        tokenizer = load_tokenizer(self.model)
        chat = ChatFormat.from_tokenizer(tokenizer)

        class Told:
            def __init__(self, loaded: Any, *, model: str, **_: Any) -> None:
                self.model = model

            def sample(self, prompts: Any, params: Any, *, keys: Any, on_tokens: Any) -> Any:
                return [self._one(ids, key) for ids, key in zip(prompts, keys, strict=True)]

            def _one(self, ids: Sequence[int], key: int) -> Completion:
                text = answer(self.model, str(tokenizer.decode(list(ids))), key)
                made = tokenizer.encode(text.removesuffix(CUT), add_special_tokens=False)
                cut = text.endswith(CUT)
                made = made if cut else [*made, next(iter(chat.stop_ids))]
                return Completion(tuple(made), (0.0,) * len(made), "length" if cut else "stop")

        self._patch.setattr(graded_tests, "Answerer", Told)


@pytest.fixture
def stage(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, model, monkeypatch)


def right(model: str, prompt: str, key: int) -> str:
    number = prompt.partition("What is ")[2].partition(" ")[0]
    return str(2 * int(number))


# --- what is measured -----------------------------------------------------------------------------


def test_distance_tests_and_tasks_stand_in_one_table_of_scores(stage: Stage) -> None:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    choices = [{"Question": f"{n}?", **CHOICE, "Answer": "B"} for n in range(3)]
    found = stage.run(
        models=["student", "better"], tests={"sums": ROWS}, prompts=ROWS[:2],
        tasks=[
            {"name": "gsm8k", "source": stage.file("gsm8k", SUMS), "limit": 2},
            {"name": "cmmlu_agronomy", "source": stage.file("cmmlu", choices)},
        ],
    )  # fmt: skip
    assert [entry["role"] for entry in found["models"]] == ["models.0", "models.1", "teacher"]
    assert [(test["test"], test["items"]) for test in found["tests"]] == [
        ("sums" * 8, 4), ("gsm8k", 2), ("cmmlu_agronomy", 3),
    ]  # fmt: skip
    for test in found["tests"]:
        assert (test["mode"], test["temperature"]) == ("fast", 0.0)
        marks = [(entry["role"], entry["fingerprint"]) for entry in test["models"]]
        assert marks == [("models.0", "student" * 8), ("models.1", "better" * 8)]
        (accuracy, tokens) = test["differences"]
        assert accuracy["estimate"] == 0.0  # the same weights
        assert {"p", "p_holm"} <= tokens.keys()
    assert len(stage.verdicts()) == 2 * (4 + 2 + 3)
    facts = found["tests"][1]["task"]
    assert facts["lm_eval_task"] == "gsm8k"
    assert (facts["metric"], facts["filter"]) == ("exact_match", "flexible-extract")
    assert facts["version"]
    assert facts["lm_eval"]
    assert facts["shots"] == 0
    assert "exact_match,strict-match" in found["tests"][1]["models"][0]["all"]
    assert "task" not in found["tests"][0]
    assert {"prompts", "forward_kl.0", "accuracy.2.1"} <= stage.summary.keys()


def test_without_a_teacher_there_is_no_distance(stage: Stage) -> None:
    stage.says(right)
    found = stage.run(tests={"sums": ROWS})
    assert found["models"] == []
    assert "prompts" not in found
    assert found["tests"][0]["models"][0]["metrics"]["accuracy"]["estimate"] == 1.0


def test_each_answer_is_kept_with_its_verdict(stage: Stage) -> None:
    stage.says(lambda model, prompt, key: right(model, prompt, key) if key < 3 else "17")
    stage.run(tests={"sums": ROWS})
    rows = stage.verdicts()
    assert [row["correct"] for row in rows] == [1.0, 1.0, 1.0, 0.0]
    assert rows[3]["answer"] == "17"
    assert rows[3]["gold"] == "6"
    assert "17" in rows[3]["reason"]
    assert rows[3]["prompt"] == "What is 3 + 3?"


def test_samples_at_a_temperature_give_pass_at_k(stage: Stage) -> None:
    stage.says(lambda model, prompt, key: right(model, prompt, key) if key >> 32 else "no")
    found = stage.run(
        tests={"sums": ROWS}, temperatures=[0.0, 0.7], samples=2, pass_at=[1, 2]
    )  # fmt: skip
    greedy, sampled = found["tests"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, 0.7)
    metrics = sampled["models"][0]["metrics"]
    assert metrics["pass@1"]["estimate"] == 0.5
    assert metrics["pass@2"]["estimate"] == 1.0
    assert "pass@2" not in greedy["models"][0]["metrics"]
    assert [row["sample"] for row in stage.verdicts()[4:8]] == [0, 1, 0, 1]


def test_more_samples_and_more_items_keep_those_that_were_drawn(stage: Stage) -> None:
    drawn: dict[tuple[int, int], set[tuple[str, int]]] = {}
    for samples, items in ((1, 2), (3, 4)):
        seen = drawn[samples, items] = set()

        def said(model: str, prompt: str, key: int, seen: Any = seen) -> str:
            seen.add((prompt, key))
            return "1"

        stage.says(said)
        stage.folder = stage.folder / "next"
        stage.run(tests={"sums": ROWS[:items]}, temperatures=[0.7], samples=samples)
    assert [len(keys) for keys in drawn.values()] == [2, 12]
    assert drawn[1, 2] < drawn[3, 4]


def test_two_models_are_compared_on_the_same_items(stage: Stage) -> None:
    stage.says(lambda model, *of: right(model, *of) if model.startswith("better") else "no idea")
    found = stage.run(models=["student", "better"], tests={"sums": ROWS})
    difference = found["tests"][0]["differences"][0]
    assert (difference["metric"], difference["estimate"]) == ("accuracy", 1.0)
    assert (difference["only_a"], difference["only_b"]) == (4, 0)
    assert difference["p"] == 0.125  # 2 * 0.5 ** 4


def test_a_model_that_was_measured_is_not_loaded_again(stage: Stage) -> None:
    stage.says(right)

    def killed(model: str, prompt: str, key: int) -> str:
        if model.startswith("second"):
            raise KeyboardInterrupt
        return right(model, prompt, key)

    stage.says(killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(models=["first", "second"], tests={"sums": ROWS})
    stage.loaded.clear()
    stage.says(right)
    found = stage.run(models=["first", "second"], tests={"sums": ROWS})
    assert stage.loaded == ["second" * 8]
    assert [m["metrics"]["accuracy"]["estimate"] for m in found["tests"][0]["models"]] == [1, 1]


def test_a_task_gets_its_own_length_and_the_recipes_system_prompt(stage: Stage) -> None:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    seen: list[str] = []

    def said(model: str, prompt: str, key: int) -> str:
        seen.append(prompt)
        return "It is 5."

    stage.says(said)
    task = {"name": "gsm8k", "source": stage.file("gsm8k", SUMS), "max_tokens": 9}
    found = stage.run(tasks=[task], system="Be brief.", max_tokens=6)
    assert found["tests"][0]["models"][0]["metrics"]["accuracy"]["estimate"] == pytest.approx(1 / 3)
    assert len(seen) == 3
    assert all("system\nBe brief." in prompt for prompt in seen)


# --- bad input ------------------------------------------------------------------------------------


def refused(stage: Stage, error: type[TutelageError], **settings: Any) -> str:
    """The error, which must come before any model is loaded."""
    with pytest.raises(error) as caught:
        stage.run(**settings)
    assert stage.loaded == []
    return str(caught.value)


def test_an_unknown_task_is_told_with_the_nearest_name(stage: Stage) -> None:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    assert "no task 'gsm8kk'; did you mean 'gsm8k'?" in refused(
        stage, RecipeError, tasks=["gsm8kk"]
    )


def test_a_missing_local_file_is_told_before_a_model_is_loaded(stage: Stage) -> None:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    task = {"name": "gsm8k", "source": str(stage.folder / "gone.jsonl")}
    assert "gone.jsonl" in refused(stage, DataError, tests={"sums": ROWS}, tasks=[task])


def test_a_test_without_gold_answers_is_told_before_a_model_is_loaded(stage: Stage) -> None:
    rows = [*ROWS, asked("bare", "Why?", None)]
    assert "row 'bare' has no gold answer" in refused(stage, DataError, tests={"sums": rows})


def test_programs_without_a_sandbox_are_told_before_a_model_is_loaded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    task = {"name": "humaneval", "source": stage.file("humaneval", PROGRAMS)}
    monkeypatch.setenv("PATH", str(stage.folder))
    assert "bwrap" in refused(stage, EngineError, tasks=[task])


def test_programs_run_where_the_recipe_says_so(stage: Stage) -> None:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    stage.sandbox = "none"  # the program is our own
    stage.says(lambda model, prompt, key: "    return 2 * x\n```")
    task = {"name": "humaneval", "source": stage.file("humaneval", PROGRAMS)}
    found = stage.run(tasks=[task])
    assert found["tests"][0]["models"][0]["metrics"]["accuracy"]["estimate"] == 1.0


def test_one_task_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="the task gsm8k stands there twice"):
        Evaluate.model_validate(
            {"stage": "evaluate", "models": ["m"], "seed": 0, "tasks": ["gsm8k", "gsm8k"]}
        )


def test_a_grader_that_raises_counts_as_wrong_and_is_shown(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(answer: str, gold: str, *, row: Any) -> Any:
        raise ZeroDivisionError(answer)

    monkeypatch.setitem(graders.GRADERS, "exact", broken)
    stage.says(right)
    found = stage.run(tests={"sums": ROWS}, grader="exact")
    entry = found["tests"][0]["models"][0]
    assert entry["metrics"]["accuracy"]["estimate"] == 0.0
    assert "ZeroDivisionError" in stage.verdicts()[0]["reason"]
    assert "the grader raised at 100.0% of the answers" in entry["warnings"][0]
    assert "WARNING: models.0 in sumssumssums: the grader raised" in stage.said.getvalue()


def test_an_empty_answer_is_wrong(stage: Stage) -> None:
    stage.says(lambda *_: "")
    found = stage.run(tests={"sums": ROWS})
    metrics = found["tests"][0]["models"][0]["metrics"]
    assert metrics["accuracy"]["estimate"] == 0.0
    assert metrics["empty_share"]["estimate"] == 1.0
    assert metrics["tokens_per_correct"]["estimate"] is None


def test_a_model_that_never_closes_its_chain_is_warned_of(stage: Stage) -> None:
    stage.says(right)  # answers at once, with no </think>
    found = stage.run(tests={"sums": ROWS}, mode="reasoning")
    (warning,) = found["tests"][0]["models"][0]["warnings"]
    assert "was this model taught the think markers?" in warning


def test_a_model_that_thinks_and_answers_is_not_warned_of(stage: Stage) -> None:
    stage.says(lambda *of: f"Twice it.\n</think>\n\n{right(*of)}")
    found = stage.run(tests={"sums": ROWS}, mode="reasoning")
    entry = found["tests"][0]["models"][0]
    assert entry["metrics"]["accuracy"]["estimate"] == 1.0
    assert entry["warnings"] == []
    assert stage.verdicts()[0]["thinking"] == "Twice it."


@pytest.mark.parametrize(("cut", "warned"), [(1, False), (2, True)])
def test_more_answers_cut_off_than_allowed_are_warned_of(
    stage: Stage, cut: int, warned: bool
) -> None:
    stage.says(lambda model, prompt, key: right(model, prompt, key) + (CUT if key < cut else ""))
    found = stage.run(tests={"sums": ROWS}, max_truncated_share=0.25)
    warnings = found["tests"][0]["models"][0]["warnings"]
    assert [("cut off at max_tokens = 6: this score measures length" in w) for w in warnings] == (
        [True] if warned else []
    )
    assert ("WARNING" in stage.said.getvalue()) == warned
