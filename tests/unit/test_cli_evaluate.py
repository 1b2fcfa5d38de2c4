"""`tutelage evaluate`: standard tasks for one model, from the command line alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_command
from tiny import write_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install tutelage[evals]")

from tutelage.engines import answerer
from tutelage.recipe.load import parse
from tutelage.store import Store

SUMS = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(4)]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", layers=1)


@pytest.fixture
def evaluate(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    monkeypatch.chdir(tmp_path)

    def run(*words: object, code: int = 0, of: object = model, tasks: str = "gsm8k") -> str:
        return run_command(
            monkeypatch, capsys, "evaluate", of, "--tasks", tasks, "--store", "store",
            "--max-tokens", 8, *words, code=code,
        )  # fmt: skip

    return run


LOCAL = ("--file", "gsm8k=sums.jsonl")


def test_a_score_comes_with_interval_length_and_cost(evaluate: Command) -> None:
    said = evaluate(*LOCAL, "--limit", 3)
    (row,) = [line for line in said.splitlines() if line.startswith("gsm8k ")]
    name, items, score, interval, *_, metric = row.split()
    assert (name, items, score, metric) == ("gsm8k", "3", "0.000", "exact_match")
    assert interval == "0.000–0.561"  # Wilson: z^2 / (n + z^2)
    assert "WARNING: gsm8k:" in said  # a random model does not stop within 8 tokens
    assert "lm-eval " in said


def test_json_holds_what_scores_json_says_of_the_tasks(evaluate: Command) -> None:
    found = json.loads(evaluate(*LOCAL, "--json"))
    scores = json.loads((Path(found["path"]) / "scores.json").read_text())
    assert found["tests"] == scores["tests"]
    assert found["tests"][0]["items"] == len(SUMS)


def test_more_items_ask_the_model_only_what_is_new(
    evaluate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = answerer.TransformersSampler.sample

    def counted(self: Any, prompts: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return real(self, prompts, *args, **more)

    monkeypatch.setattr(answerer.TransformersSampler, "sample", counted)
    evaluate(*LOCAL, "--limit", 3)
    evaluate(*LOCAL, "--limit", 3)
    evaluate(*LOCAL)
    assert asked == [3, 1]


def test_a_step_of_a_run_is_evaluated_by_its_name(
    evaluate: Command, model: Path, tmp_path: Path
) -> None:
    from tutelage import pipeline

    recipe = {
        "name": "made", "models": {"m": {"source": str(model)}},
        "steps": {"cut": {"stage": "prune", "model": "m", "keep_layers": [0]}},
    }  # fmt: skip
    pipeline.run([parse(recipe, "made")], Store(tmp_path / "store"))
    found = json.loads(evaluate(*LOCAL, "--json", of="cut"))
    assert found["model"] == "cut"
    assert "did you mean 'cut'" in evaluate(*LOCAL, "--run", "made", of="cutt", code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--file", "gsm8k"), "--file gsm8k: expected TASK=PATH"),
        (("--file", "gsm8k=gone.jsonl"), "--file gsm8k=gone.jsonl: there is no such file"),
        (("--file", "drop=sums.jsonl"), "drop is not among --tasks gsm8k"),
        ((*LOCAL, "--sandbox", "none"), "add --allow-unsandboxed"),
        ((*LOCAL, "--shots", "4"), "4 solved examples are wanted and 3 are there"),
    ],
)
def test_a_wrong_option_is_one_line(evaluate: Command, words: tuple[str, ...], said: str) -> None:
    assert said in evaluate(*words, code=2)


def test_an_unknown_task_is_told_with_the_nearest_one(evaluate: Command) -> None:
    assert "no task 'gsm8kk'; did you mean 'gsm8k'?" in evaluate(tasks="gsm8kk", code=2)
    assert "--tasks names no task" in evaluate(tasks=" , ", code=2)
