"""`plan --measure`: a tiny model run in a process of its own, and what a plan makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_command
from tiny import RECIPE, write_model, write_recipe

from tutelage import pipeline
from tutelage.bench.pace import Pace
from tutelage.core.progress import Reporter
from tutelage.estimate import estimate
from tutelage.measure import existing, measure
from tutelage.recipe.load import load
from tutelage.store import Store
from tutelage.targets.calibrate import cost_of_top, expected_cost
from tutelage.targets.estimator import Threshold

QUIET = Reporter(quiet=True)
PACE = Pace(0.5, 0.01, 0.25, 10**9, 2 * 10**9, tokens=400, answers=16, ended=4)


def test_a_plan_is_measured_end_to_end_and_says_what_targets_would_weigh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, store = write_recipe(tmp_path), tmp_path / "store"
    told = run_command(
        monkeypatch, capsys, "plan", recipe, "--store", store, "--measure", "--json", code=0
    )
    rows = {row["step"]: row for row in json.loads(told)}
    pace = rows["teacher"]["pace"]
    assert pace["answers"] == 16
    assert 16 <= pace["tokens"] <= 16 * 24
    assert pace["decode_s"] > pace["read_s"] > 0
    # The student starts as the teacher's own weights, cut: measured once, and trained.
    assert rows["student:source"]["pace"]["train_s"] > 0
    assert rows["student:source"]["pace"]["targets"] == []
    settings = {one["setting"]: one for one in pace["targets"]}
    assert settings["tau = 0.005"]["mass"] > settings["tau = 0.05"]["mass"]
    assert settings["top-10"]["ids"] == 10
    assert not settings["top-10"]["unbiased"]
    assert rows["rollouts"]["estimate"]["minutes"] == pytest.approx(
        rows["rollouts"]["estimate"]["decoded"] * pace["decode_s"] / 60, rel=1e-6
    )
    shown = run_command(monkeypatch, capsys, "plan", recipe, "--store", store, code=0)
    assert "upper bounds" in shown


def test_a_model_that_is_not_here_is_told_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "away.toml"
    path.write_text(RECIPE.format(teacher="somebody/away-135m"))
    planned = pipeline.plan(load(path), Store(tmp_path / "store"))
    runtime = load(path)[0].recipe.runtime
    assert measure(planned, Store(tmp_path / "store"), runtime=runtime, reporter=QUIET) == {}


def test_a_broken_model_is_told_and_the_others_are_measured(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    broken = write_model(tmp_path / "broken", seed=1)
    source = 'source = "{}"'
    student = f"[models.student]\n{source}"
    text = recipe.read_text()
    old, new = student.format(tmp_path / "teacher"), student.format(broken)
    recipe.write_text(text.replace(old, new))
    (broken / "tokenizer_config.json").write_text("{}")
    sizes = (broken / "config.json").read_text()
    wrong = sizes.replace('"intermediate_size": 64', '"intermediate_size": 48')
    (broken / "config.json").write_text(wrong)
    store = Store(tmp_path / "store")
    said: list[str] = []

    class Ear(Reporter):
        def say(self, text: str, *, style: str = "") -> None:
            said.append(text)

    found = measure(
        pipeline.plan(load(recipe), store), store, runtime=load(recipe)[0].recipe.runtime,
        reporter=Ear(quiet=True),
    )  # fmt: skip
    assert set(found) == {"teacher"}
    assert any(line.startswith("student:source: not measured: ") for line in said)


def test_a_step_that_is_not_made_yet_goes_at_the_pace_of_what_it_comes_from(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path / "store")
    planned = pipeline.plan(load(write_recipe(tmp_path)), store)
    by_name = {item.node.name: item for item in planned}
    assert existing("distilled", by_name) == "student:source"
    assert existing("teacher", by_name) == "teacher"
    paces = {"teacher": PACE, "student:source": replace(PACE, decode_s=1.0)}
    costs = estimate(planned, store, paces=paces)
    taught = costs["fast-answers"]
    assert taught.decoded == int(8 * PACE.answer_tokens(8))  # the teacher's own answers
    assert taught.minutes == pytest.approx(taught.decoded * 0.5 / 60)
    # Nobody knows how long a student's answers will be that is still to be trained.
    assert costs["rollouts"].decoded == int(8 * 8 * 0.7)
    assert costs["rollouts"].minutes == pytest.approx(costs["rollouts"].decoded / 60)
    assert costs["distilled"].minutes == pytest.approx(costs["distilled"].trained * 0.25 / 60)
    assert costs["distilled"].memory_bytes == 2 * 10**9
    assert costs["targets"].minutes == pytest.approx(costs["targets"].read * 0.01 / 60)


def test_training_that_was_not_measured_has_no_minutes_rather_than_a_guess(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    planned = pipeline.plan(load(write_recipe(tmp_path)), store)
    unfit = replace(PACE, train_s=None, train_bytes=0)
    costs = estimate(planned, store, paces={"teacher": unfit, "student:source": unfit})
    assert costs["distilled"].minutes is None
    assert costs["rollouts"].minutes is not None


def test_the_length_of_answers_that_were_cut_is_the_likeliest_one() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 100, size=20_000)
    cut = np.minimum(lengths, 24)
    seen = replace(PACE, tokens=int(cut.sum()), ended=int((lengths <= 24).sum()))
    assert seen.answer_tokens(10_000) == pytest.approx(100, rel=0.05)
    assert seen.answer_tokens(50) == pytest.approx(np.minimum(lengths, 50).mean(), rel=0.03)
    assert replace(PACE, ended=0).answer_tokens(64) == 64


def test_the_costs_shown_are_those_of_the_estimator() -> None:
    torch.manual_seed(0)
    logits_NV = torch.randn(400, 300) * 2
    cost = expected_cost(logits_NV.softmax(-1), 0.02)
    made = Threshold(0.02)(logits_NV, torch.zeros(400, dtype=torch.long), torch.rand(400, 1))
    ids = (len(made.head_ids_M) + len(made.tail_ids_T)) / 400
    assert cost.ids == pytest.approx(ids, rel=0.01)
    assert cost.mass == pytest.approx(float(np.exp(made.head_logq_M).sum()) / 400, rel=1e-4)
    top = cost_of_top(logits_NV.softmax(-1), 500)
    assert top.ids == 300
    assert top.mass == pytest.approx(1)


def test_a_teacher_in_memory_beside_a_model_counts_with_its_weights(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    planned = pipeline.plan(load(write_recipe(tmp_path)), store)
    costs = estimate(planned, store, paces={"teacher": PACE, "student:source": PACE})
    weights = (tmp_path / "teacher" / "model.safetensors").stat().st_size
    assert costs["scores"].memory_bytes == pytest.approx(10**9 + weights, abs=20_000)
    assert costs["rollouts"].memory_bytes == 10**9
