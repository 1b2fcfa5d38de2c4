"""Training state on disk: weights, optimizer, position and RNG, without pickle.

A checkpoint is a folder that appears by one rename; the newest whole one wins and older ones go.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tutelage.core.files import fsync

STATE = "state.json"


@dataclass(frozen=True)
class Position:
    """Where a training run stands."""

    step: int
    """Optimizer steps done."""
    trained_tokens: int
    seconds: float


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position
) -> None:
    """Write a checkpoint below `folder`, then remove the older ones."""
    final = folder / f"step-{position.step:08d}"
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    named = _trained(model)
    save_file(
        {name: p.detach().contiguous() for name, p in named.items()},
        partial / "weights.safetensors",
    )
    save_moments(partial / "optimizer.safetensors", model, optimizer)
    (partial / STATE).write_text(json.dumps(asdict(position)))
    for path in partial.iterdir():
        fsync(path)
    os.replace(partial, final)
    fsync(folder)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position | None:
    """Load the newest checkpoint into model and optimizer; None when there is none."""
    whole = sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")
    if not whole:
        return None
    newest = whole[-1]
    weights = load_file(newest / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(weights[name])
    load_moments(newest / "optimizer.safetensors", model, optimizer)
    return Position(**json.loads((newest / STATE).read_text()))


def save_moments(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the optimizer's state, by the names of the model's parameters, and torch's RNG."""
    moments = {
        f"{name}|{key}": value.contiguous()
        for name, parameter in _trained(model).items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }
    moments["rng"] = torch.get_rng_state()
    save_file(moments, path)


def load_moments(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `save_moments`, over a model of the same parameters."""
    moments = load_file(path)
    torch.set_rng_state(moments.pop("rng"))
    named = _trained(model)
    for parameter in named.values():
        optimizer.state[parameter] = {}
    for key, value in moments.items():
        name, _, part = key.rpartition("|")
        # AdamW keeps its step count on the CPU, the moments where the parameter is.
        place = value if part == "step" else value.to(named[name].device)
        optimizer.state[named[name]][part] = place


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
