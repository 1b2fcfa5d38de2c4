"""Held-out rows: their loss is the model's own, the best weights are kept, training stops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from course import CPU, EXAMPLES, HELD, Killed, config, killed_after, logged, plan, run, weights
from tiny import write_model
from torch.nn import functional

from tutelage.core.errors import EngineError
from tutelage.models.load import load_model
from tutelage.train import checkpoint
from tutelage.train.checkpoint import Position
from tutelage.train.heldout import told
from tutelage.train.loop import Seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), layers=1)


def looked(**settings: Any) -> Any:
    return config(held_out="h", **settings)


# So fast that it unlearns what it never sees: the held-out loss falls, then rises.
FAST = {"lr": 3e-2, "lr_schedule": "constant", "evaluations": 12}
STEPS = 12


@torch.no_grad()
def plain_loss(model: torch.nn.Module) -> float:
    """Each held-out example alone, through the model's own logits."""
    total, targets = 0.0, 0
    for index in HELD:
        ids = torch.from_numpy(EXAMPLES[index].ids_L).long()
        mask = torch.from_numpy(EXAMPLES[index].mask_L)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(functional.cross_entropy(logits[mask], ids[1:][mask], reduction="sum"))
        targets += int(mask.sum())
    return total / targets


def curve(where: Path) -> list[float | None]:
    return [line.get("held_out_loss") for line in logged(where)]


def test_the_logged_figure_is_the_models_loss_on_rows_it_does_not_learn(
    folder: Path, tmp_path: Path
) -> None:
    model, last = run(folder, tmp_path, looked(evaluations=2), plan(4, held_out=True))
    found = curve(tmp_path)
    assert [value is not None for value in found] == [False, True, False, True]
    assert last["held_out_loss"] == pytest.approx(plain_loss(model), rel=1e-5)
    assert found[-1] == pytest.approx(last["held_out_loss"], abs=1e-6)
    half, _ = run(folder, tmp_path / "plain", config(), plan(4))
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(half).items())


def test_without_held_out_rows_nothing_is_looked_at(folder: Path, tmp_path: Path) -> None:
    _, last = run(folder, tmp_path, config(), plan(3))
    assert curve(tmp_path) == [None] * 3
    assert "held_out_loss" not in last


def test_the_best_weights_are_kept_and_not_the_last(folder: Path, tmp_path: Path) -> None:
    model, last = run(folder, tmp_path, looked(keep="best", **FAST), plan(STEPS, held_out=True))
    losses = curve(tmp_path)
    least = min(range(STEPS), key=lambda step: losses[step] or 0.0)
    assert 0 < least < STEPS - 1  # or the test would see nothing
    assert last["best_step"] == least + 1
    assert plain_loss(model) == pytest.approx(losses[least], rel=1e-4)
    assert last["held_out_loss"] == pytest.approx(losses[least], abs=1e-6)
    kept = [path.name for path in (tmp_path / "scratch" / "best").iterdir()]
    assert kept == [f"step-{least + 1:08d}.safetensors"]


def test_it_stops_after_so_many_looks_without_a_gain(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a", looked(**FAST), plan(STEPS, held_out=True))
    losses = [value or 0.0 for value in curve(tmp_path / "a")]
    # The first look that is the second in a row above one before them.
    end = next(n for n in range(2, STEPS) if min(losses[n - 1 : n + 1]) >= min(losses[: n - 1]))
    assert end < STEPS - 1
    run(folder, tmp_path / "b", looked(patience=2, **FAST), plan(STEPS, held_out=True))
    assert curve(tmp_path / "b") == losses[: end + 1]


@pytest.mark.parametrize("settings", [{}, {"ema": 0.3}], ids=["raw", "averaged"])
@pytest.mark.parametrize("minutes", [0, 100], ids=["each step", "gains only"])
def test_a_killed_training_keeps_the_same_best_and_stops_at_the_same_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any], minutes: int,
) -> None:  # fmt: skip
    planned = plan(STEPS, held_out=True)
    chosen = looked(keep="best", patience=3, checkpoint_minutes=minutes, **FAST, **settings)
    whole, last = run(folder, tmp_path / "whole", chosen, planned)
    assert 1 < last["best_step"] < STEPS
    losses = [value or 0.0 for value in curve(tmp_path / "whole")]
    gains = sum(value < min(losses[:n], default=9.0) for n, value in enumerate(losses))
    for saves in range(1, gains + 1):  # more where each step is saved
        where = tmp_path / f"killed-{saves}"
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(checkpoint, "save", killed_after(saves))
            run(folder, where, chosen, planned)
        resumed, found = run(folder, where, chosen, planned)
        assert found == last
        assert all(
            torch.equal(value, weights(whole)[name]) for name, value in weights(resumed).items()
        )
        assert (where / "metrics.jsonl").read_text() == (
            tmp_path / "whole" / "metrics.jsonl"
        ).read_text()


def test_the_average_is_looked_at_where_it_is_what_will_be_saved(
    folder: Path, tmp_path: Path
) -> None:
    model, last = run(
        folder, tmp_path, looked(ema=0.9, evaluations=1, **{"lr": 3e-2}), plan(5, held_out=True)
    )
    assert last["held_out_loss"] == pytest.approx(plain_loss(model), rel=1e-5)


def test_looks_at_held_out_rows_and_another_watch_stand_side_by_side(
    folder: Path, tmp_path: Path
) -> None:
    watched = plan(4, held_out=True, watch=lambda done, steps: Seen({"drift": done}, done == 2))
    run(folder, tmp_path, looked(evaluations=4), watched)
    lines = logged(tmp_path)
    assert [line["drift"] for line in lines] == [1, 2]
    assert all("held_out_loss" in line for line in lines)


def test_a_loss_that_is_not_finite_says_so(folder: Path, tmp_path: Path) -> None:
    class Broken:
        """Injected fault: a loss of nan on the held-out rows alone."""

        def __call__(self, hidden_ND: Any, head: Any, batch: Any) -> Any:
            from tutelage.train.objectives import CrossEntropy

            out = CrossEntropy()(hidden_ND, head, batch)
            return type(out)(out.loss_sum * float("nan"), {}) if HELD[0] in batch.examples else out

    with pytest.raises(EngineError, match="loss of the held-out rows is nan; lower lr"):
        run(folder, tmp_path, looked(), plan(2, held_out=True), objective=Broken())


def test_a_gain_resets_the_looks_without_one() -> None:
    position = Position(1, 0, 0.0)
    for step, loss in enumerate([3.0, 4.0, 2.0, 2.0, 5.0], start=1):
        position = told(Position(step, 0, 0.0, *standing(position)), loss)
    assert standing(position) == (2.0, 3, 2)


def standing(position: Position) -> tuple[float, int, int]:
    return position.best_loss, position.best_step, position.looks_since


@pytest.mark.parametrize("settings", [{"keep": "best"}, {"patience": 2}])
def test_keeping_and_stopping_need_held_out_rows(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need held-out rows: set held_out"):
        config(**settings)


def test_the_model_itself_has_the_loss_it_is_given(folder: Path) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    assert 5.0 < plain_loss(model) < 6.5  # the log of 320 ids is 5.8
