"""Stage `score` over a tiny teacher: what the store holds, what a budget buys, what stops the step.

The teacher is a real model whose logits were scaled up, so that heads and tails both occur.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, EngineError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.models.load import load_model
from tutelage.recipe.load import parse
from tutelage.recipe.tables import Score
from tutelage.recipe.training import Distill
from tutelage.records import ROLLOUTS, write_rows
from tutelage.stages import score
from tutelage.targets.calibrate import HEAD_BYTES, TAIL_BYTES, TOKEN_BYTES
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow
from tutelage.train.objectives import loss_spec

VOCAB = 320
EOS = 318
EMBEDDING = "model.embed_tokens.weight"
SCALE = 12.0
"""Of the tied embedding: a random model's logits then spread like a language model's."""


def write_teacher(folder: Path) -> Path:
    write_model(folder, layers=1)
    edit_weights(folder, lambda weights: weights.mul_(SCALE))
    return folder


def edit_weights(folder: Path, change: Callable[[torch.Tensor], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors[EMBEDDING])
    save_file(tensors, path, metadata={"format": "pt"})


def rollout(index: int, tokens: int, *, finish: str = "stop") -> dict[str, Any]:
    rng = np.random.default_rng([index, tokens])
    return {
        "id": f"answer-{index}", "prompt_id": f"prompt-{index}", "source": "lab", "mode": "fast",
        "prompt_ids": rng.integers(0, 256, 4 + index % 3).tolist(),
        "response_ids": rng.integers(0, 256, tokens).tolist(),
        "student_logp": (-rng.exponential(2, tokens)).tolist(), "finish_reason": finish, "text": "",
    }  # fmt: skip


class Stage:
    """The stage in a folder: `run` returns its summary, then `rows` and `meta` are the store's."""

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder, self.teacher = folder, teacher

    @property
    def paths(self) -> list[Path]:
        return sorted((self.folder / "work").glob("part-*.parquet"))

    @property
    def rows(self) -> list[TargetRow]:
        return list(TargetReader(self.paths))

    @property
    def meta(self) -> StoreMeta:
        return TargetReader(self.paths).meta

    def run(self, rollouts: Sequence[dict[str, Any]], **settings: Any) -> dict[str, float]:
        config = Score.model_validate(
            {"stage": "score", "teacher": "t", "rollouts": "r", "seed": 3, **settings}
        )
        (self.folder / "rollouts").mkdir(exist_ok=True)
        write_rows(self.folder / "rollouts" / "part-00000.parquet", rollouts, ROLLOUTS)
        made_by = {"inputs": {"model": {"fingerprint": "student"}}, "fingerprint": "r"}
        external = {"stage": "external", "fingerprint": "teacher", "identity": {}}
        inputs = {
            "rollouts": Artifact(self.folder / "rollouts", made_by),
            "teacher": Artifact(self.teacher, external),
        }
        work = WorkDir.open(
            self.folder / "work", reporter=Reporter(quiet=True), device="cpu"
        )  # fmt: skip
        return score.run(config, inputs, work)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture
def stage(tmp_path: Path, teacher: Path) -> Stage:
    return Stage(tmp_path, teacher)


@pytest.fixture(scope="module")
def logq(teacher: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    """The teacher's log-probabilities [N, V] at each token of a rollout's response."""
    model = load_model(teacher, dtype="float32", device=torch.device("cpu")).eval()

    def dense(one: dict[str, Any]) -> np.ndarray:
        ids = torch.tensor([one["prompt_ids"] + one["response_ids"]])
        with torch.inference_mode():
            logits_TV = model(input_ids=ids).logits[0].double()
        first = len(one["prompt_ids"]) - 1
        return logits_TV[first:-1].log_softmax(-1).numpy()

    return dense


Dense = Callable[[dict[str, Any]], np.ndarray]


def some(count: int, *, tokens: int = 12) -> list[dict[str, Any]]:
    return [rollout(index, tokens + index % 5) for index in range(count)]


# What is stored


def test_heads_labels_and_entropy_are_the_teachers(stage: Stage, logq: Dense) -> None:
    rollouts = some(6)
    stage.run(rollouts, tau=0.05, shard_rows=4)
    for row, one in zip(stage.rows, rollouts, strict=True):
        assert row.id == one["id"]
        assert row.response_ids.tolist() == one["response_ids"]
        assert row.prompt_ids.tolist() == one["prompt_ids"]
        np.testing.assert_allclose(row.student_logp_N, one["student_logp"], atol=0.1)
        logq_NV = logq(one)
        heads = np.split(row.targets.head_ids_M, row.targets.head_counts_N.cumsum()[:-1])
        for head, logq_V in zip(heads, logq_NV, strict=True):
            assert set(head.tolist()) == set(np.flatnonzero(np.exp(logq_V) >= 0.05).tolist())
        label_N = logq_NV[np.arange(len(logq_NV)), one["response_ids"]]
        np.testing.assert_allclose(row.targets.label_logp_N, label_N, atol=0.2, rtol=0.02)
        entropy_N = -(np.exp(logq_NV) * logq_NV).sum(1)
        np.testing.assert_allclose(row.targets.entropy_N, entropy_N, atol=0.05)
    assert stage.meta.student == "student"
    assert stage.meta.teacher == "teacher"
    assert (stage.meta.estimator, stage.meta.tau) == ("threshold", 0.05)


def test_the_summary_counts_what_the_store_holds(stage: Stage) -> None:
    summary = stage.run(some(6), tau=0.05, shard_rows=4)
    rows = stage.rows
    tokens = sum(len(row.response_ids) for row in rows)
    ids = sum(len(r.targets.head_ids_M) + len(r.targets.tail_ids_T) for r in rows)
    gain = sum(float((r.targets.label_logp_N - r.student_logp_N).sum()) for r in rows)
    assert summary["rows"] == 6
    assert summary["response_tokens"] == tokens
    assert summary["ids_per_token"] == pytest.approx(ids / tokens)
    assert summary["logq_minus_logp"] == pytest.approx(gain / tokens)
    size = sum(path.stat().st_size for path in stage.paths)
    assert summary["bytes_per_token"] == pytest.approx(size / tokens)
    assert (summary["empty"], summary["tau"]) == (0, 0.05)


def test_the_shards_and_the_batches_change_no_target(stage: Stage, tmp_path: Path) -> None:
    rollouts = some(9)
    stage.run(rollouts, tau=0.05, shard_rows=2)
    (tmp_path / "whole").mkdir()
    whole = Stage(tmp_path / "whole", stage.teacher)
    whole.run(rollouts, tau=0.05, shard_rows=256, logit_chunk_mb=1)
    for row, other in zip(stage.rows, whole.rows, strict=True):
        np.testing.assert_array_equal(row.targets.head_ids_M, other.targets.head_ids_M)
        np.testing.assert_array_equal(row.targets.tail_ids_T, other.targets.tail_ids_T)


def test_an_answer_that_was_cut_off_gets_no_end(stage: Stage) -> None:
    cut, whole = rollout(0, 8, finish="length"), rollout(1, 8)
    whole["response_ids"][-1] = EOS
    stage.run([cut, whole], tau=0.05)
    first, second = stage.rows
    assert first.finish_reason == "length"
    assert first.response_ids.tolist() == cut["response_ids"]
    assert EOS not in first.response_ids
    assert second.finish_reason == "stop"
    assert second.response_ids[-1] == EOS
    assert len(first.targets) == len(second.targets) == 8


# A budget


@pytest.mark.parametrize("budget", [4.0, 12.0, 30.0])
def test_a_budget_of_ids_is_met(stage: Stage, budget: float) -> None:
    summary = stage.run(some(40), budget=budget, budget_unit="ids", shard_rows=16)
    assert summary["ids_per_token"] == pytest.approx(budget, rel=0.15)
    assert stage.meta.tau == summary["tau"]
    found = json.loads((stage.folder / "work" / "calibration.json").read_text())
    assert found == {"tau": summary["tau"], "budget": budget, "unit": "ids"}


@pytest.mark.parametrize("budget", [12.0, 37.0])
def test_a_budget_of_bytes_is_met_at_the_bytes_an_entry_costs(stage: Stage, budget: float) -> None:
    """Real bytes a token differ: V = 320 has shorter ids, and a small shard a heavy footer."""
    stage.run(some(40), budget=budget, shard_rows=16)
    rows = stage.rows
    tokens = sum(len(row.response_ids) for row in rows)
    head = sum(len(row.targets.head_ids_M) for row in rows) / tokens
    tail = sum(len(row.targets.tail_ids_T) for row in rows) / tokens
    size = TOKEN_BYTES + HEAD_BYTES * head + TAIL_BYTES * tail
    assert size == pytest.approx(budget, rel=0.15)
    assert head > 0
    assert tail > 0


def test_a_budget_is_found_at_the_temperature_of_the_targets(stage: Stage) -> None:
    summary = stage.run(some(40), budget=8.0, budget_unit="ids", temperature=0.5)
    assert summary["ids_per_token"] == pytest.approx(8, rel=0.15)


def test_a_budget_nothing_fits_is_one_line(stage: Stage) -> None:
    with pytest.raises(RecipeError, match=r"budget of 0\.5 ids a token is under the least, 1\.0"):
        stage.run(some(4), budget=0.5, budget_unit="ids")


def test_a_killed_step_goes_on_with_the_tau_it_found(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, settings = some(12), {"budget": 8.0, "budget_unit": "ids", "shard_rows": 4}
    write, written = score.write_shard, []

    def killed(path: Path, *arguments: Any, **options: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(score, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.run(rollouts, **settings)
    assert written == ["part-00000.parquet", "part-00001.parquet"]

    def found_anew(*_: object) -> float:
        raise AssertionError("tau was sought a second time")

    with monkeypatch.context() as patch:
        patch.setattr(score, "tau_for_budget", found_anew)
        resumed = stage.run(rollouts, **settings)
    (tmp_path / "whole").mkdir()
    whole = Stage(tmp_path / "whole", stage.teacher)
    assert whole.run(rollouts, **settings) == resumed
    assert [p.read_bytes() for p in whole.paths] == [p.read_bytes() for p in stage.paths]


def test_a_budget_looks_at_answers_from_all_over(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "CALIBRATION_ROWS", 4)
    rollouts = [rollout(index, 0 if index % 2 else 20) for index in range(16)]
    summary = stage.run(rollouts, budget=8.0, budget_unit="ids")
    assert summary["empty"] == 8
    assert summary["ids_per_token"] == pytest.approx(8, rel=0.3)


def test_a_budget_is_found_where_the_chosen_answers_are_empty(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "CALIBRATION_ROWS", 4)
    rollouts = [rollout(index, 20 if index % 2 else 0) for index in range(16)]
    summary = stage.run(rollouts, budget=8.0, budget_unit="ids")
    assert summary["ids_per_token"] == pytest.approx(8, rel=0.3)


# A fixed head


def fixed(stage: Stage, head: int, draws: int) -> list[TargetRow]:
    stage.run(some(5), estimator="fixed", head=head, draws=draws)
    return stage.rows


def test_a_plain_top_k_is_the_largest_and_nothing_else(stage: Stage, logq: Dense) -> None:
    rows = fixed(stage, 4, 0)
    assert (stage.meta.estimator, stage.meta.tau) == ("top-4", None)
    assert (stage.meta.has_head, stage.meta.has_tail, stage.meta.has_label) == (True, False, True)
    for row, one in zip(rows, some(5), strict=True):
        logq_NV = logq(one)
        best_NK = np.argsort(-logq_NV, 1)[:, :4]
        found_ids_NK = row.targets.head_ids_M.reshape(-1, 4)
        np.testing.assert_array_equal(np.sort(found_ids_NK), np.sort(best_NK))  # codes may tie
        wanted_NK = np.take_along_axis(np.exp(logq_NV), best_NK, 1)
        found_NK = np.exp(row.targets.head_logq_M.reshape(-1, 4))
        np.testing.assert_allclose(found_NK, wanted_NK, atol=1e-3)
        assert len(row.targets.tail_ids_T) == 0


def test_pure_sampling_is_draws_alone_and_each_carries_its_share(stage: Stage) -> None:
    rows = fixed(stage, 0, 6)
    assert (stage.meta.estimator, stage.meta.tau) == ("pure-6", None)
    assert (stage.meta.has_head, stage.meta.has_tail) == (False, True)
    for row in rows:
        assert len(row.targets.head_ids_M) == 0
        assert set(row.targets.tail_counts_N.tolist()) == {6}
        np.testing.assert_allclose(row.targets.tail_unit_N(), 1 / 6, rtol=1e-6)


def test_a_head_with_draws_keeps_both_and_they_sum_to_one(stage: Stage, logq: Dense) -> None:
    rows = fixed(stage, 2, 3)
    assert stage.meta.estimator == "head-2+3"
    assert (stage.meta.has_head, stage.meta.has_tail) == (True, True)
    for row, one in zip(rows, some(5), strict=True):
        best_NK = np.argsort(-logq(one), 1)[:, :2]
        np.testing.assert_array_equal(row.targets.head_ids_M.reshape(-1, 2), best_NK)
        tail_NS = row.targets.tail_ids_T.reshape(-1, 3)
        assert not (tail_NS[:, :, None] == best_NK[:, None, :]).any()
        mass_N = np.exp(row.targets.head_logq_M.reshape(-1, 2)).sum(1)
        np.testing.assert_allclose(mass_N + 3 * row.targets.tail_unit_N(), 1, atol=1e-5)


def spec(stage: Stage, **settings: Any) -> Any:
    config = Distill.model_validate(
        {"stage": "distill", "model": "m", "targets": "t", "seed": 0, **settings}
    )
    return loss_spec(config, stage.meta)


def treatments(stage: Stage, **settings: Any) -> list[str]:
    return [term.treatment for term in spec(stage, **settings).terms]


def test_the_loss_treats_each_estimator_as_it_must(stage: Stage, tmp_path: Path) -> None:
    made = {}
    for head, draws in ((4, 0), (0, 6), (2, 3)):
        folder = tmp_path / f"{head}-{draws}"
        folder.mkdir()
        made[head, draws] = Stage(folder, stage.teacher)
        fixed(made[head, draws], head, draws)
    assert treatments(made[4, 0]) == ["bucket"]
    assert treatments(made[0, 6]) == ["unbiased"]
    assert treatments(made[2, 3]) == ["unbiased"]
    assert treatments(made[2, 3], divergence="reverse_kl") == ["bucket"]
    assert treatments(made[4, 0], outside="renormalised") == ["renormalised"]
    assert treatments(made[4, 0], divergence="policy_gradient") == ["sampled"]
    with pytest.raises(RecipeError, match=r"outside = unbiased.*top-4.*score with a threshold"):
        spec(made[4, 0], outside="unbiased")
    for settings in ({"outside": "bucket"}, {"divergence": "jsd"}):
        with pytest.raises(RecipeError, match="outside = bucket needs a head.*pure-6"):
            spec(made[0, 6], **settings)
    assert spec(made[0, 6]).temperature == 1.0


def test_a_reverse_share_needs_a_head_too(stage: Stage) -> None:
    """Its bucket over no head is one class on both sides: a term that is 0 and says nothing."""
    fixed(stage, 0, 6)
    with pytest.raises(RecipeError, match="needs a head"):
        spec(stage, reverse_share=0.25)


def test_what_was_captured_without_labels_gives_no_policy_gradient() -> None:
    meta = StoreMeta(
        student="", teacher="", tokenizer="", chat_template="", vocab_size=VOCAB, temperature=1.0,
        engine="distillkit", dtype="", estimator="distillkit-50", tau=None,
    )  # fmt: skip
    config = Distill(stage="distill", model="m", targets="t", seed=0, divergence="policy_gradient")
    with pytest.raises(RecipeError, match=r"policy_gradient needs .* distillkit-50"):
        loss_spec(config, meta)
    config = Distill(stage="distill", model="m", targets="t", seed=0)
    assert [term.treatment for term in loss_spec(config, meta).terms] == ["bucket"]


# Empty answers


def test_empty_answers_are_counted_and_left_out_and_change_no_other(
    stage: Stage, tmp_path: Path
) -> None:
    """A shard of empty answers alone is there, and holds no row."""
    rollouts = [rollout(index, 0 if index in (0, 4, 5, 6, 7) else 9) for index in range(9)]
    summary = stage.run(rollouts, tau=0.05, shard_rows=4)
    assert summary["empty"] == 5
    assert summary["rows"] == 4
    assert [path.name for path in stage.paths] == [f"part-0000{n}.parquet" for n in range(3)]
    assert [row.id for row in stage.rows] == [f"answer-{n}" for n in (1, 2, 3, 8)]
    (tmp_path / "whole").mkdir()
    whole = Stage(tmp_path / "whole", stage.teacher)
    whole.run([rollout(index, 9) for index in range(9)], tau=0.05)
    by_id = {row.id: row for row in whole.rows}
    for row in stage.rows:
        np.testing.assert_array_equal(row.targets.tail_ids_T, by_id[row.id].targets.tail_ids_T)


def test_answers_that_are_all_empty_are_refused(stage: Stage) -> None:
    with pytest.raises(DataError, match="every rollout is empty"):
        stage.run([rollout(index, 0) for index in range(3)], tau=0.05)
    with pytest.raises(DataError, match="every rollout is empty"):
        stage.run([], tau=0.05)


# A broken teacher


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"tau": 0.05}, {"estimator": "fixed", "head": 4},
                                      {"budget": 8.0}])  # fmt: skip
def test_a_teacher_that_is_not_finite_stops_the_step(
    tmp_path: Path, settings: dict[str, Any], value: float
) -> None:
    broken = write_teacher(tmp_path / "broken")
    edit_weights(broken, lambda weights: weights[300].fill_(value))
    stage = Stage(tmp_path, broken)
    with pytest.raises(EngineError, match=r"row answer-\d: teacher logits are not finite"):
        stage.run(some(3), **settings)
    assert stage.paths == []


def test_the_answer_a_teacher_breaks_on_is_told_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where token 300 is read: the head has no row of it, so that other answers are fine."""
    stage = Stage(tmp_path, write_teacher(tmp_path / "teacher"))
    rollouts = [rollout(index, 0 if index < 2 else 9) for index in range(8)]
    rollouts[6]["response_ids"][2] = 300
    whole = score.TransformersScorer._response_hidden

    def broken(self: Any, chosen: Any) -> torch.Tensor:
        hidden_ND = whole(self, chosen)
        owners = [one for one in chosen for _ in one.response_ids]
        bad = [300 in one.response_ids for one in owners]
        return hidden_ND.masked_fill(torch.tensor(bad)[:, None], torch.nan)

    monkeypatch.setattr(score.TransformersScorer, "_response_hidden", broken)
    with pytest.raises(EngineError, match="answer-6"):
        stage.run(rollouts, tau=0.05, shard_rows=4)


# Settings that cannot be


def refusal(**settings: Any) -> str:
    raw = {
        "name": "r", "models": {"m": {"source": "./m"}},
        "steps": {"targets": {"stage": "score", "teacher": "m", "rollouts": "r", **settings}},
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        parse(raw, "recipe.toml")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("recipe.toml: steps.targets")
    return said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": 0.1, "budget": 12.0}, "tau and budget exclude each other"),
        ({"estimator": "fixed", "tau": 0.1}, "tau is a setting of estimator = 'threshold'"),
        ({"estimator": "fixed", "budget": 9.0}, "budget is a setting of estimator = 'threshold'"),
        ({"estimator": "fixed", "budget_unit": "ids"}, "budget_unit is a setting of"),
        ({"head": 4}, "head is a setting of estimator = 'fixed'"),
        ({"draws": 4, "budget": 9.0}, "draws is a setting of estimator = 'fixed'"),
        ({"estimator": "fixed", "head": 0}, "store nothing of the teacher"),
        ({"estimator": "exact"}, "'threshold' or 'fixed'"),
        ({"tau": 0.0}, "tau: Input should be greater than 0, got 0.0"),
        ({"tau": 1.5}, "tau: Input should be less than or equal to 1, got 1.5"),
        ({"tau": float("nan")}, "tau: Input should be a finite number"),
        ({"budget": -1.0}, "budget: Input should be greater than or equal to 0"),
        ({"budget": 9.0, "budget_unit": "bits"}, "'ids' or 'bytes'"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"estimator": "fixed", "head": -1}, "head: Input should be greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict[str, Any], said: str) -> None:
    assert said in refusal(**settings)


def test_a_head_of_more_ids_than_there_are_is_one_line(stage: Stage) -> None:
    with pytest.raises(RecipeError, match="head of 321 ids from a vocabulary of 320"):
        stage.run(some(2), estimator="fixed", head=321)
