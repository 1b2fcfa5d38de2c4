"""Looks at rows that are not learnt from: their loss, the best weights so far, when to stop.

All of it follows from the weights at fixed steps and stands in the checkpoint's position, so that a
resumed training keeps and stops as one that was not killed does.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tutelage.core.errors import EngineError
from tutelage.train import checkpoint
from tutelage.train.batches import PackedRow, stack
from tutelage.train.checkpoint import Position
from tutelage.train.team import Joined

HELD_OUT_LOSS = "held_out_loss"
BEST_STEP = "best_step"


def is_due(done: int, steps: int, points: int) -> bool:
    """Whether one of `points` even points over `steps` lies at step `done`; the last one does."""
    return done * points // steps > (done - 1) * points // steps


def mean_loss(
    trainee: nn.Module, passes: Sequence[tuple[Sequence[PackedRow], float]], team: Joined, *,
    device: torch.device, autocast: Callable[..., AbstractContextManager[None]],
) -> float:  # fmt: skip
    """Mean loss of a target over the passes of all ranks, without dropout; nats for cross-entropy.

    `passes` are this rank's packed rows, each with 1, or with 0 where it only keeps step. Raises
    EngineError on every rank where the loss is not finite.
    """
    total, targets = 0.0, 0.0
    trainee.eval()
    with torch.no_grad():
        for rows, counts in passes:
            batch = stack(rows)
            with autocast():
                out = trainee(batch, device)
            total += counts * float(out.loss_sum)
            targets += counts * len(batch.labels_N)
    trainee.train()
    total, targets = team.sums([total, targets])
    if not math.isfinite(total):
        raise EngineError(f"the loss of the held-out rows is {total}; lower lr")
    return total / targets


def told(position: Position, loss: float) -> Position:
    """The position after a look at its step found `loss`: best so far, or one look more without."""
    if loss < position.best_loss:
        return replace(position, best_loss=loss, best_step=position.step, looks_since=0)
    return replace(position, looks_since=position.looks_since + 1)


class Best:
    """The weights of the least held-out loss, on disk beside the checkpoints.

    Those of an older checkpoint stay until a newer one is whole, which is the caller's to say.
    """

    def __init__(self, folder: Path, model: nn.Module, team: Joined) -> None:
        self._folder, self._model, self._team = folder, model, team

    def save(self, step: int) -> None:
        """Keep the model's weights as they are; every rank must ask."""
        checkpoint.save_weights(self._path(step), self._model, leads=self._team.leads)

    def drop_others(self, step: int) -> None:
        """Once a checkpoint names `step` as the best, no other can be asked for."""
        for path in self._folder.glob("step-*"):
            if path != self._path(step):
                path.unlink()

    def restore(self, step: int) -> None:
        """Give the model the kept weights; only where they are written, after `Joined.release`."""
        if self._team.leads:
            checkpoint.load_weights(self._path(step), self._model)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.safetensors"
