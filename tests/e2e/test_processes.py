"""Two real processes train together: the losses of one, resume over their number, and a killed one.

Everything goes through the command line, with gloo and one thread a process.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import write_model

RECIPE = """
name = "team"
seed = 3
[models.m]
source = "{model}"
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts", limit = 300 }}]
part = "train"
limit = 110
[steps.answers]
stage = "synthesize"
teacher = "m"
prompts = "prompts"
mode = "fast"
max_tokens = 8
[steps.tuned]
stage = "sft"
model = "m"
data = "answers"
lr = 1e-3
batch_tokens = 512
pack_tokens = 160
epochs = 4
max_steps = 20
checkpoint_minutes = 0
[steps.rollouts]
stage = "rollout"
model = "tuned"
prompts = "prompts"
mode = "fast"
max_tokens = 8
[steps.targets]
stage = "score"
teacher = "m"
rollouts = "rollouts"
tau = 0.02
[steps.distilled]
stage = "distill"
model = "tuned"
targets = "targets"
lr = 1e-3
batch_tokens = 512
pack_tokens = 160
epochs = 4
max_steps = 20
gauge_points = 3
checkpoint_minutes = 0
"""
PATIENCE = 60
TRAINED = ("sft", "distill")


def started(recipe: Path, store: Path, processes: int, *settings: str) -> subprocess.Popen[str]:
    words = [f"--set=runtime.processes={processes}", *(f"--set={each}" for each in settings)]
    return subprocess.Popen(
        [sys.executable, "-m", "tutelage", "run", recipe, "--store", store, *words],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said


def metrics(store: Path, stage: str) -> list[dict[str, Any]]:
    (path,) = store.glob(f"artifacts/{stage}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_same(store: Path, other: Path) -> None:
    for stage in TRAINED:
        left, right = metrics(store, stage), metrics(other, stage)
        assert len(left) == len(right) == 20
        for one, two in zip(left, right, strict=True):
            assert list(one) == list(two)
            assert two == pytest.approx(one, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    path = folder / "team.toml"
    path.write_text(RECIPE.format(model=write_model(folder / "model")))
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of one process."""
    store = tmp_path_factory.mktemp("alone")
    ended(started(recipe, store, 1))
    return store


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(
    recipe: Path, alone: Path, tmp_path: Path, sharding: str
) -> None:
    ended(started(recipe, tmp_path, 2, f'runtime.sharding="{sharding}"'))
    assert any("staleness" in line for line in metrics(tmp_path, "distill"))
    check_same(alone, tmp_path)


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line_and_one_process_goes_on(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    process = started(recipe, tmp_path, 2, 'runtime.sharding="fsdp"')
    team = wait_for_training(process, tmp_path)
    os.kill(team[1], signal.SIGKILL)
    said = ended(process, 2)
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "process 1 of 2 (from 0) was ended by signal 9 (out of memory?)" in errors[0]
    assert not any(alive(pid) for pid in team)
    (state,) = tmp_path.glob("artifacts/sft/*.partial/scratch/checkpoints/step-*/state.json")
    assert 0 < json.loads(state.read_text())["step"] < 20
    ended(started(recipe, tmp_path, 1))
    check_same(alone, tmp_path)


@pytest.mark.slow
def test_what_one_process_began_two_go_on_with(recipe: Path, alone: Path, tmp_path: Path) -> None:
    process = started(recipe, tmp_path, 1)
    wait_for_training(process, tmp_path)
    process.kill()
    ended(process, -signal.SIGKILL)
    ended(started(recipe, tmp_path, 2, 'runtime.sharding="ddp"'))
    check_same(alone, tmp_path)


def wait_for_training(process: subprocess.Popen[str], store: Path) -> list[int]:
    """Until a checkpoint is there; the processes of the team, by rank."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        found = list(store.glob("artifacts/sft/*.partial/scratch/checkpoints/step-*[!l]"))
        if found and int(found[0].name[5:13]) >= 2:
            children = psutil.Process(process.pid).children()
            return [child.pid for child in sorted(children, key=lambda c: c.create_time())]
        time.sleep(0.005)
    raise AssertionError("no checkpoint was seen")


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
