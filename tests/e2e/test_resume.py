"""A killed run goes on and ends with the same bits; a second run does nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from digests import digests
from tiny import write_recipe

DRIVER = Path(__file__).with_name("killed_run.py")


def drive(recipe: Path, store: Path, *, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    """A run in its own process, which kills itself (SIGKILL) at its `kill_at`-th rename."""
    return subprocess.run(
        [sys.executable, str(DRIVER), str(recipe), str(store), str(kill_at)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An uninterrupted run, and how many renames it made."""
    store = tmp_path_factory.mktemp("whole")
    done = drive(recipe, store)
    assert done.returncode == 0, done.stderr
    return store, int(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_run_killed_at_many_points_ends_with_the_same_bits(
    recipe: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    store, renames = whole
    stride = max(2, renames // 14)
    kills, stages = 0, set()
    for _ in range(60):
        # Each attempt dies a little further on; odd ones before the rename, even ones after it.
        done = drive(recipe, tmp_path, kill_at=stride if kills % 2 else -stride)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        stages |= {
            path.parent.name for path in tmp_path.glob("artifacts/*/*.partial")
        }  # where it was caught
    assert done.returncode == 0, done.stderr
    assert kills >= 10
    assert {"sft", "distill", "synthesize"} <= stages
    assert digests(tmp_path) == digests(store)
    assert any(name.startswith("distilled/model/") for name in digests(store))


@pytest.mark.slow
def test_a_second_run_makes_nothing(recipe: Path, whole: tuple[Path, int]) -> None:
    store, _ = whole
    before = {path: path.stat().st_mtime_ns for path in store.rglob("manifest.json")}
    assert drive(recipe, store).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("manifest.json")} == before


@pytest.mark.slow
def test_two_runs_at_once_make_each_step_once(
    recipe: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    command = [sys.executable, str(DRIVER), str(recipe), str(tmp_path), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    said = "".join(stderr for _, stderr in outputs)
    for step in ("sft-reasoning (sft)", "distilled (distill)", "targets (score)"):
        assert said.count(step) == 1, said
    assert digests(tmp_path) == digests(whole[0])
