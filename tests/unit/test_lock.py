"""One owner at a time, over real processes; a killed owner is no obstacle."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tutelage.core.lock import file_lock, owner_of

HOLD = """
import sys, time
from pathlib import Path
from tutelage.core.lock import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
COUNT = """
import sys, time
from pathlib import Path
from tutelage.core.lock import file_lock
lock, number = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(20):
    with file_lock(lock):
        value = int(number.read_text())
        time.sleep(0.001)
        number.write_text(str(value + 1))
"""
Owner = subprocess.Popen[str]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], Owner]]:
    """Start a process that holds the lock until its input is closed."""
    started: list[Owner] = []

    def start() -> Owner:
        owner = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "a.lock")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(owner)
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        return owner

    yield start
    for owner in started:
        owner.kill()
        owner.wait()
        for pipe in (owner.stdin, owner.stdout):
            assert pipe is not None
            pipe.close()


def test_a_lock_held_elsewhere_is_refused_without_waiting_and_its_owner_named(
    tmp_path: Path, hold: Callable[[], Owner]
) -> None:
    owner = hold()
    with file_lock(tmp_path / "a.lock", wait=False) as held:
        assert not held
    assert owner_of(tmp_path / "a.lock").startswith(f"process {owner.pid} on ")


def test_a_waiter_is_told_once_and_gets_the_lock_when_the_owner_ends(
    tmp_path: Path, hold: Callable[[], Owner]
) -> None:
    owner = hold()
    told: list[str] = []

    def on_wait(who: str) -> None:
        told.append(who)
        assert owner.stdin is not None
        owner.stdin.close()  # the owner ends in good order

    with file_lock(tmp_path / "a.lock", on_wait=on_wait) as held:
        assert held
        assert owner.wait(timeout=30) == 0
    assert len(told) == 1
    assert f"process {owner.pid}" in told[0]


def test_the_lock_of_a_killed_owner_is_taken_over_at_once(
    tmp_path: Path, hold: Callable[[], Owner]
) -> None:
    owner = hold()
    owner.kill()
    owner.wait()
    assert (tmp_path / "a.lock.owner").exists()  # it could not clean up after itself
    started = time.monotonic()
    with file_lock(tmp_path / "a.lock", wait=False) as held:
        assert held
    assert time.monotonic() - started < 1
    assert owner_of(tmp_path / "a.lock") == "another process"


def test_an_error_inside_the_block_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), file_lock(tmp_path / "a.lock"):
        raise RuntimeError
    with file_lock(tmp_path / "a.lock", wait=False) as held:
        assert held


def test_two_processes_exclude_each_other(tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path / "b.lock"), str(number)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert number.read_text() == "40"  # unlocked, updates would be lost
