"""Real stages in two processes: the bytes of one, also when one of the two is killed at work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from digests import digests
from tiny import write_recipe

PATIENCE = 200


def started(recipe: Path, store: Path, jobs: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "tutelage", "run", recipe, "--store", store,
        "--set", f"runtime.jobs={jobs}", "--set", "runtime.threads=1",
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes."""
    store = tmp_path_factory.mktemp("alone")
    ended(started(recipe, store, 1))
    return digests(store)


@pytest.mark.slow
def test_two_jobs_make_each_step_once_and_the_bytes_of_one(
    recipe: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    said = ended(started(recipe, tmp_path, 2))
    assert digests(tmp_path) == alone
    assert any(name.startswith("distilled/model/") for name in alone)
    names = [line.split()[0] for line in said.splitlines() if ") done in" in line]
    assert len(names) == len(set(names)) == 12  # 11 steps and the cut student


@pytest.mark.slow
def test_a_worker_killed_while_it_trains_changes_no_byte(
    recipe: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    process = started(recipe, tmp_path, 2)
    killed = owner_of_training(process, tmp_path)
    os.kill(killed, signal.SIGKILL)
    said = ended(process)
    assert f"process {killed} ended with -9" in said
    assert digests(tmp_path) == alone


def owner_of_training(process: subprocess.Popen[str], store: Path) -> int:
    """The worker that is making an sft step, from its lock."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        for owner in store.glob("**/*.owner"):
            try:
                pid = json.loads(owner.read_text())["pid"]
                busy = "sft" in str(owner) and psutil.Process(pid).ppid() == process.pid
            except (OSError, ValueError, psutil.NoSuchProcess):  # just made or just gone
                continue
            if busy and list(store.glob("artifacts/sft/*.partial/scratch/checkpoints/*")):
                return pid
        time.sleep(0.005)
    raise AssertionError("no worker was seen at an sft step")
