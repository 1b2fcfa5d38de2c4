"""A tiny training to look at: real model, real loop, killed and resumed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.core.artifact import WorkDir
from tutelage.core.progress import Reporter
from tutelage.models.load import load_model
from tutelage.recipe.training import Sft
from tutelage.train import checkpoint
from tutelage.train.batches import Example
from tutelage.train.loop import Plan, train
from tutelage.train.objectives import CrossEntropy

CPU = torch.device("cpu")
SEQUENCES = [(np.arange(12, dtype=np.int32) * step + step) % 300 for step in range(1, 9)]
EXAMPLES = [Example(ids, np.arange(12) > 3) for ids in SEQUENCES]
HELD = (6, 7)


class Killed(Exception):
    """Stands for a kill -9: what is not on disk is gone."""


def config(**settings: Any) -> Sft:
    values = {
        "stage": "sft", "model": "m", "data": ("d",), "seed": 0, "lr": 3e-3, "warmup_share": 0.0,
        "checkpoint_minutes": 0,
    }  # fmt: skip
    return Sft.model_validate(values | settings)


def plan(steps: int, *, held_out: bool = False, **more: Any) -> Plan:
    rows = [[[number % 6, (number + 1) % 6]] for number in range(steps)]
    held = [list(HELD)] if held_out else []
    return Plan(EXAMPLES.__getitem__, str, rows, held_out=held, **more)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(
    model_folder: Path, where: Path, settings: Sft, planned: Plan, *, objective: Any = None
) -> tuple[torch.nn.Module, dict[str, float]]:
    model = load_model(model_folder, dtype="float32", device=CPU)
    work = WorkDir.open(where, reporter=Reporter(quiet=True), device="cpu")
    last = train(model, planned, objective or CrossEntropy(), settings, work, device=CPU, label="t")
    return model, last


def killed_after(saves: int) -> Callable[..., None]:
    """`checkpoint.save` that is killed once it has saved so many times."""
    save, count = checkpoint.save, 0

    def counted(*args: Any, **named: Any) -> None:
        nonlocal count
        save(*args, **named)
        count += 1
        if count == saves:
            raise Killed

    return counted


def logged(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
