"""Training state on disk: weights, optimizer, position and RNG, without pickle.

A checkpoint is a folder that appears by one rename; the newest whole one wins and older ones go.
Where several processes train, every one asks for it to be saved, since each may hold a shard, and
rank 0 writes: whole tensors, that any number of processes can go on from.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tutelage.core.errors import ArtifactError
from tutelage.core.files import fsync
from tutelage.train.team import like, whole

STATE = "state.json"
WEIGHTS = "weights.safetensors"
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a training run stands."""

    step: int
    """Optimizer steps done."""
    trained_tokens: int
    seconds: float
    best_loss: float = math.inf
    """Least loss of the held-out rows so far."""
    best_step: int = 0
    """Steps done when it was found."""
    looks_since: int = 0
    """Looks at the held-out rows since then."""


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position, *,
    leads: bool = True, average: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Write a checkpoint below `folder`, then remove the older ones; only gather unless `leads`.

    `average` is that of the weights, by parameter, where the training keeps one.
    """
    final = folder / f"step-{position.step:08d}"
    partial = final.with_suffix(".partial")
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _write(partial / WEIGHTS, dict(trained(model)), leads=leads)
    if average:
        _write(partial / AVERAGE, average, leads=leads)
    save_moments(partial / "optimizer.safetensors", model, optimizer, leads=leads)
    if not leads:
        return
    (partial / STATE).write_text(json.dumps(asdict(position)))
    for path in partial.iterdir():
        fsync(path)
    os.replace(partial, final)
    fsync(folder)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None when there is none."""
    found = sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
    return found[-1] if found else None


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position | None:
    """Load the newest checkpoint into model and optimizer; None when there is none."""
    found = newest(folder)
    return load(found, model, optimizer) if found else None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Load one checkpoint. Raises ArtifactError where it is of another model."""
    load_weights(path / WEIGHTS, model)
    load_moments(path / "optimizer.safetensors", model, optimizer)
    return Position(**json.loads((path / STATE).read_text()))


def save_weights(path: Path, model: nn.Module, *, leads: bool = True) -> None:
    """Write the trained weights alone; the file is there when it is whole."""
    partial = path.with_suffix(".partial")
    _write(partial, dict(trained(model)), leads=leads)
    if leads:
        fsync(partial)
        os.replace(partial, path)


def load_weights(path: Path, model: nn.Module) -> None:
    """The inverse of `save_weights`. Raises ArtifactError where they are of another model."""
    _copy(path, trained(model))


def load_average(checkpoint: Path, average: Mapping[str, Tensor]) -> bool:
    """Copy a checkpoint's average of the weights; False where it keeps none yet."""
    if not (checkpoint / AVERAGE).is_file():
        return False
    _copy(checkpoint / AVERAGE, average)
    return True


def save_moments(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, leads: bool = True
) -> None:
    """Write the optimizer's state, by the names of the model's parameters, and torch's RNG."""
    moments = {
        f"{name}|{key}": value
        for name, parameter in trained(model).items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }
    _write(path, moments | {"rng": torch.get_rng_state()}, leads=leads)


def load_moments(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `save_moments`. Raises ArtifactError where they are of another model."""
    moments = load_file(path)
    torch.set_rng_state(moments.pop("rng"))
    named = trained(model)
    parts = {key: key.rpartition("|")[::2] for key in moments}
    _check_same(
        {parts[key][0]: value for key, value in moments.items() if parts[key][1] != "step"},
        named, path,
    )  # fmt: skip
    for parameter in named.values():
        optimizer.state[parameter] = {}
    for key, value in moments.items():
        name, part = parts[key]
        # AdamW keeps its step count on the CPU unless it is fused, the moments where the parameter
        # is.
        if part == "step":
            place = value.to(named[name].device) if optimizer.defaults.get("fused") else value
        else:
            place = like(value, named[name])
        optimizer.state[named[name]][part] = place


@torch.no_grad()
def _copy(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Whole tensors from a file, each into the one of its name, of which this may be a shard."""
    found = load_file(path)
    _check_same(found, wanted, path)
    if missing := sorted(wanted.keys() - found.keys()):
        raise ArtifactError(
            f"{path} is of another model: it lacks {missing[0]}; remove the checkpoint, and the "
            "training begins anew"
        )
    for name, tensor in wanted.items():
        tensor.copy_(like(found[name], tensor))


def _write(path: Path, tensors: Mapping[str, Tensor], *, leads: bool) -> None:
    """One tensor at a time is whole elsewhere than at rank 0, where all are, on the CPU."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if leads:
            gathered[name] = value.cpu().contiguous()
    if leads:
        save_file(gathered, path)


def _check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Moments may lack a parameter that never had a gradient; none may be of another shape."""
    for name, tensor in found.items():
        shape = tuple(wanted[name].shape) if name in wanted else None
        if tuple(tensor.shape) != shape:
            has = f"has the shape {list(shape)}" if shape else "has no such parameter"
            raise ArtifactError(
                f"{path} is of another model: {name} is {list(tensor.shape)} there, and this model "
                f"{has}; remove the checkpoint, and the training begins anew"
            )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
