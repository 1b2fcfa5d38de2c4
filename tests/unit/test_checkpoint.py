"""A restored run goes on bit for bit, and half a checkpoint is none."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from tutelage.core.errors import ArtifactError
from tutelage.train import checkpoint
from tutelage.train.checkpoint import Position, restore, save
from tutelage.train.optim import adamw


def tiny(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 1))
    model[1].weight.requires_grad_(False)  # a frozen part takes no room in a checkpoint
    return model


def start(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    model = tiny(seed)
    return model, adamw(model, lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Dropout draws from torch's generator, so the RNG must be restored, too."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        model(torch.full((3, 4), 1.0 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def test_a_restored_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = start(0)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, Position(3, 100, 1.5))
    train(model, optimizer, range(3, 7))

    other, its_optimizer = start(0)
    with torch.no_grad():  # whatever stood there before is overwritten
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.fill_(9.0)
    torch.manual_seed(999)
    assert restore(tmp_path, other, its_optimizer) == Position(3, 100, 1.5)
    train(other, its_optimizer, range(3, 7))
    assert state(other) == state(model)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        if left.requires_grad:
            for key, value in optimizer.state[left].items():
                assert torch.equal(value, its_optimizer.state[right][key])


def test_without_a_checkpoint_nothing_is_touched(tmp_path: Path) -> None:
    model, optimizer = start(0)
    before = state(model)
    assert restore(tmp_path, model, optimizer) is None
    assert state(model) == before


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    model, optimizer = start(0)
    for step in (9, 10, 11):
        train(model, optimizer, range(1))
        save(tmp_path, model, optimizer, Position(step, step, 0.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000011"]


def test_of_two_whole_checkpoints_the_newer_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = start(0)
    train(model, optimizer, range(1))
    save(tmp_path, model, optimizer, Position(9, 9, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # killed before clearing
        save(tmp_path, model, optimizer, Position(10, 10, 0.0))
    assert len(list(tmp_path.iterdir())) == 2
    found = restore(tmp_path, model, optimizer)
    assert found is not None
    assert found.step == 10


def test_a_checkpoint_that_was_cut_short_is_ignored_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = start(0)
    train(model, optimizer, range(2))
    save(tmp_path, model, optimizer, Position(2, 2, 0.0))
    kept = state(model)
    train(model, optimizer, range(2, 4))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, model, optimizer, Position(4, 4, 0.0))
    assert (tmp_path / "step-00000004.partial").exists()
    other, its_optimizer = start(1)
    found = restore(tmp_path, other, its_optimizer)
    assert found is not None
    assert found.step == 2
    frozen = {n for n, p in other.named_parameters() if not p.requires_grad}
    assert frozen == {"1.weight"}
    assert state(other) == kept
    save(tmp_path, model, optimizer, Position(4, 4, 0.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_checkpoint_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace, fsync = os.replace, checkpoint.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    monkeypatch.setattr(checkpoint, "fsync", lambda p: (events.append(p.name), fsync(p)))
    model, optimizer = start(0)
    train(model, optimizer, range(1))
    save(tmp_path, model, optimizer, Position(1, 1, 0.0))
    assert set(events[:3]) == {"weights.safetensors", "optimizer.safetensors", "state.json"}
    assert events[3:] == ["replace", tmp_path.name]


def test_vectors_are_not_decayed() -> None:
    model, optimizer = start(0)
    decayed, spared = (group["params"] for group in optimizer.param_groups)
    assert {p.ndim for p in decayed} == {2}
    assert {p.ndim for p in spared} == {1}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert len(decayed) + len(spared) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("wide", "said"), [(9, r"0.bias is \[8\] there.* \[9\]"), (8, "no such")])
def test_a_checkpoint_of_another_model_is_refused_by_name(
    tmp_path: Path, wide: int, said: str
) -> None:
    model, optimizer = start(0)
    train(model, optimizer, range(1))
    save(tmp_path, model, optimizer, Position(1, 1, 0.0))
    other = nn.Sequential(nn.Linear(4, wide))
    with pytest.raises(ArtifactError, match=said):
        restore(tmp_path, other, adamw(other, lr=1e-2, weight_decay=0.1))


def test_a_process_that_does_not_lead_writes_nothing(tmp_path: Path) -> None:
    model, optimizer = start(0)
    train(model, optimizer, range(1))
    save(tmp_path, model, optimizer, Position(1, 1, 0.0), leads=False)
    assert not list(tmp_path.iterdir())
