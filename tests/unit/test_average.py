"""Averages of the weights: against the weights of every step, kept aside, and over a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from course import CPU, Killed, config, killed_after, plan, run, weights
from tiny import write_model

from tutelage.models.load import load_model
from tutelage.train import checkpoint
from tutelage.train.average import snapshot_share
from tutelage.train.loop import Seen

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """The weights before the first step, and after each, without an average."""
    found = [weights(load_model(folder, dtype="float32", device=CPU))]
    for steps in range(1, STEPS + 1):
        where = tmp_path_factory.mktemp("plain")
        model, _ = run(folder, where, config(lr_schedule="constant"), plan(steps))
        found.append(weights(model))
    return found


def trained(folder: Path, where: Path, **settings: Any) -> dict[str, torch.Tensor]:
    model, _ = run(folder, where, config(lr_schedule="constant", **settings), plan(STEPS))
    return weights(model)


def test_the_exponential_average_is_its_recursion_over_every_steps_weights(
    folder: Path, path: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    found = trained(folder, tmp_path, ema=0.4)
    for name, value in found.items():
        wanted = path[0][name].double()
        for step in range(1, STEPS + 1):
            decay = min(0.4, (1 + step) / (10 + step))
            wanted = decay * wanted + (1 - decay) * path[step][name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, path[-1][name])


@pytest.mark.parametrize(
    ("last", "every", "taken"), [(1, 1, [6]), (3, 1, [4, 5, 6]), (2, 3, [3, 6]), (9, 2, [2, 4, 6])]
)
def test_the_mean_of_snapshots_is_that_of_the_weights_at_their_steps(
    folder: Path, path: list[dict[str, torch.Tensor]], tmp_path: Path,
    last: int, every: int, taken: list[int],
) -> None:  # fmt: skip
    found = trained(folder, tmp_path, average_last=last, average_every=every)
    for name, value in found.items():
        wanted = torch.stack([path[step][name].double() for step in taken]).mean(0)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 5, 12])
@pytest.mark.parametrize("last", [1, 3, 20])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_snapshot_weighs_the_same(steps: int, last: int, every: int) -> None:
    weight: dict[int, float] = {}
    for done in range(1, steps + 1):
        share = snapshot_share(done, steps=steps, last=last, every=every)
        weight = {step: value * (1 - share) for step, value in weight.items()}
        if share:
            weight[done] = share
    wanted = list(range(steps, 0, -every))[:last]
    assert sorted(weight) == sorted(wanted)
    assert list(weight.values()) == pytest.approx([1 / len(wanted)] * len(wanted))


@pytest.mark.parametrize(
    "settings", [{"ema": 0.5}, {"average_last": 3}, {"average_last": 2, "average_every": 2}]
)
@pytest.mark.parametrize("saves", [1, 3, 5])
def test_a_killed_training_resumes_to_the_same_average_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, saves: int
) -> None:
    whole = trained(folder, tmp_path / "whole", **settings)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint, "save", killed_after(saves))
        trained(folder, tmp_path / "killed", **settings)
    resumed = trained(folder, tmp_path / "killed", **settings)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_an_end_before_the_first_snapshot_keeps_the_weights(
    folder: Path, path: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    settings = config(lr_schedule="constant", average_last=2)
    watched = plan(STEPS, watch=lambda done, steps: Seen(stop=done == 2))
    model, _ = run(folder, tmp_path, settings, watched)
    assert all(torch.equal(value, path[2][name]) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ema": 1.0}, "ema"),
        ({"ema": 0.9, "average_last": 2}, "average_last counts from the planned end"),
        ({"held_out": "h", "keep": "best", "average_last": 2}, "average_last counts from"),
        ({"average_every": 5}, "average_every is the distance"),
    ],
)
def test_averages_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**settings)
