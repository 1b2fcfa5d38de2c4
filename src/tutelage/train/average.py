"""Averages of the weights over a training: what is saved in place of the last weights.

`ema`: a_t = d a_(t-1) + (1 - d) w_t with d = min(ema, (1 + t) / (10 + t)), so that the start is
soon forgotten. `average_last`: the mean of snapshots that lie evenly before the end (merging of
checkpoints as between the iterations of arXiv 2505.22375), kept as one running mean. Either costs
one more copy of the trained weights, and lives in the checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tutelage.recipe.training import Training
from tutelage.train import checkpoint


class Weighing(Protocol):
    """How much the weights after a step add to the average."""

    def __call__(self, done: int, /) -> float:
        """Share of the new average that the weights after step `done` (from 1) have."""
        ...


class Average:
    """One average of a model's trained weights. Every rank keeps that of its own shards."""

    def __init__(self, model: nn.Module, share: Weighing) -> None:
        self._trained = checkpoint.trained(model)
        self._share = share
        self.has_any = False
        """Whether weights of a step are in it; until then it is the model as it began."""
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}

    def load(self, folder: Path) -> None:
        """Take over what a checkpoint keeps of it. Raises ArtifactError for another model's."""
        self.has_any = checkpoint.load_average(folder, self.weights)

    @torch.no_grad()
    def update(self, done: int) -> None:
        """After optimizer step `done`."""
        share = self._share(done)
        if share:
            self.has_any = True
            for name, parameter in self._trained.items():
                self.weights[name].mul_(1 - share).add_(parameter, alpha=share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the model holds the average, and this the model's weights."""
        self._swap()
        yield
        self._swap()

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the average for good."""
        for name, parameter in self._trained.items():
            parameter.copy_(self.weights[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            held = parameter.detach().clone()  # of one tensor at a time
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(held)


def averaging(model: nn.Module, config: Training, *, steps: int) -> Average | None:
    """The average that a training of `steps` optimizer steps asks for; None for none.

    Made from the model as it begins: an average that is under way is loaded into it.
    """
    if config.ema:
        return Average(model, lambda done: 1 - min(config.ema, (1 + done) / (10 + done)))
    if config.average_last:
        return Average(
            model,
            lambda done: snapshot_share(
                done, steps=steps, last=config.average_last, every=config.average_every
            ),
        )
    return None


def snapshot_share(done: int, *, steps: int, last: int, every: int) -> float:
    """1/n at the n-th snapshot, which keeps a running mean of equal parts; 0 at other steps."""
    later, off = divmod(steps - done, every)
    if off or later >= last:
        return 0.0
    earlier = min(last - 1 - later, (done - 1) // every)  # a short training has fewer
    return 1 / (earlier + 1)


def stored(average: Average | None) -> dict[str, Tensor]:
    """What a checkpoint keeps of it."""
    return average.weights if average and average.has_any else {}
