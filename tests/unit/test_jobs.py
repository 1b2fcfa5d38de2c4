"""Several steps at a time: real processes over one store, with fake stages in them."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fake_stages
import psutil
import pytest
from rich.console import Console

from tutelage import jobs, pipeline
from tutelage.core.errors import DataError, EngineError
from tutelage.core.progress import Reporter
from tutelage.recipe.load import load
from tutelage.store import Store

RECIPE = """
name = "several"
[runtime]
jobs = 2
threads = 1
[models.m]
source = "new"
new = { tokenizer = "characters", data = ["one"] }
[steps]
one = { stage = "data", sources = [{ source = "bundled:prompts", limit = 1 }] }
two = { stage = "data", sources = [{ source = "bundled:prompts", limit = 2 }] }
three = { stage = "data", sources = [{ source = "bundled:prompts", limit = 3 }] }
again = { stage = "data", sources = [{ source = "bundled:prompts", limit = 3 }] }
tuned = { stage = "sft", model = "m", data = "two", lr = 1e-3 }
"""
MADE = {"data-1", "data-2", "data-3", "new", "sft"}
"""What is made: `again` is the same as `three`."""
PATIENCE = 60.0


class Project:
    """The recipe, a store, and what its processes did."""

    def __init__(self, folder: Path) -> None:
        self.recipe, self.store = folder / "several.toml", Store(folder / "store")
        self.store.root.mkdir()
        self.recipe.write_text(RECIPE)
        self.said = io.StringIO()

    def run(self, *overrides: str, until: str = "") -> pipeline.Result:
        reporter = Reporter(Console(file=self.said, force_terminal=False, width=200))
        return jobs.run(load(self.recipe, overrides), self.store, until=until, reporter=reporter)

    def order(self, fault: str) -> None:
        (self.store.root / fault).touch()

    @property
    def ran(self) -> list[tuple[str, int]]:
        """(step, process), in the order in which they began."""
        log = self.store.root / "log"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return [(name, int(pid)) for name, pid in map(str.split, lines)]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.ran]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(jobs, "_work", fake_stages.work)
    monkeypatch.setattr(pipeline, "_run_stage", fake_stages.stage)
    return Project(tmp_path)


def awaited(condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_two_jobs_make_every_step_once_and_give_what_one_gives(
    project: Project, tmp_path: Path
) -> None:
    result = project.run()
    assert Counter(project.names) == Counter(MADE)
    assert sorted(result.made) in (
        ["m", "one", "three", "tuned", "two"], ["again", "m", "one", "tuned", "two"]
    )  # fmt: skip
    assert os.getpid() not in {pid for _, pid in project.ran}
    other = tmp_path / "other"
    other.mkdir()
    alone = Project(other)
    one = alone.run("runtime.jobs=1")
    assert {pid for _, pid in alone.ran} == {os.getpid()}
    assert {name: a.manifest["files"] for name, a in result.artifacts.items()} == {
        name: a.manifest["files"] for name, a in one.artifacts.items()
    }


def test_each_step_is_told_in_one_line_after_what_it_said(project: Project) -> None:
    project.run()
    said = project.said.getvalue().splitlines()
    assert said[0] == "5 steps, 2 at a time, 1 threads each"
    assert sum(line.startswith("tuned (sft) done in ") for line in said) == 1
    last = next(index for index, line in enumerate(said) if line.startswith("tuned (sft)"))
    own = [line for line in said[:last] if line.startswith("tuned: ")]
    assert own == ["tuned: half way", "tuned: nearly there"]
    assert sum("done in" in line for line in said) == 5


def test_the_bar_counts_every_step_that_was_to_be_made(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "tutelage.core.progress._PlainBar.show", lambda bar: seen.append((bar.done, bar.total))
    )
    project.run()
    assert seen == [(done, 5) for done in range(1, 6)]


def test_a_finished_recipe_starts_no_process(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run("runtime.jobs=1")
    monkeypatch.setattr(jobs, "_started", lambda *_: pytest.fail("a process was started"))
    assert project.run().made == ()


def test_no_more_processes_are_started_than_there_are_steps(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = jobs._started
    monkeypatch.setattr(jobs, "_started", lambda *a: started.append(1) or start(*a))
    project.run("runtime.jobs=8", until="m")
    assert len(started) == 2
    assert Counter(project.names) == Counter(["data-1", "new"])


def test_a_failing_step_is_told_as_its_own_error_and_the_others_are_stopped(
    project: Project,
) -> None:
    project.order("fail-data-2")
    project.order("hang-data-1")
    with pytest.raises(DataError) as caught:
        project.run()
    assert str(caught.value) == "step 'two': no rows in data-2; give some"
    pids = {pid for _, pid in project.ran}
    assert len(pids) == 2
    assert awaited(lambda: not any(map(alive, pids)))
    for fault in ("fail-data-2", "hang-data-1"):
        (project.store.root / fault).unlink()
    assert len(project.run().artifacts) == 6  # what was stopped goes on


def test_a_bug_in_a_step_comes_with_the_trace_of_its_process(project: Project) -> None:
    project.order("bug-data-2")
    with pytest.raises(KeyError, match="data-2") as caught:
        project.run()
    (trace,) = caught.value.__notes__
    assert "fake_stages.py" in trace
    assert "'two'" in trace


def test_a_killed_process_loses_only_its_own_step_which_another_makes(project: Project) -> None:
    project.order("kill-data-2")
    result = project.run()
    counts = Counter(project.names)
    assert counts.pop("data-2") == 2
    assert set(counts.values()) == {1}
    assert set(counts) == MADE - {"data-2"}
    killed = project.ran[project.names.index("data-2")][1]
    assert f"process {killed} ended with -9 (out of memory?); 1 others go on" in (
        project.said.getvalue()
    )
    assert set(result.artifacts) == {"m", "one", "two", "three", "again", "tuned"}
    assert os.getpid() not in {pid for _, pid in project.ran}


def test_a_step_that_kills_every_process_is_an_error_and_not_tried_here(project: Project) -> None:
    project.order("killer-data-2")
    with pytest.raises(EngineError, match="every process ended before its work was done; lower"):
        project.run()
    assert project.names.count("data-2") == 2
    assert os.getpid() not in {pid for _, pid in project.ran}


def test_processes_that_die_at_once_are_an_error_and_no_endless_wait(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_work", fake_stages.dies)
    with pytest.raises(EngineError, match="run again: finished steps are kept"):
        project.run()
    assert project.names == ["born", "born"]


def test_workers_leave_when_their_parent_is_killed(project: Project) -> None:
    for name in ("data-1", "data-2"):
        project.order(f"hang-{name}")
    command = [sys.executable, fake_stages.__file__, str(project.recipe), str(project.store.root)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        try:
            assert awaited(lambda: {"data-1", "data-2"} <= set(project.names))
        finally:
            parent.send_signal(signal.SIGKILL)
    assert awaited(lambda: not any(alive(pid) for _, pid in project.ran))


def test_an_interrupt_from_the_terminal_ends_all_processes(project: Project) -> None:
    for name in ("data-1", "data-2"):
        project.order(f"hang-{name}")
    command = [sys.executable, fake_stages.__file__, project.recipe, project.store.root]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as parent:
        try:
            assert awaited(lambda: {"data-1", "data-2"} <= set(project.names))
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to all of them
            assert parent.wait(PATIENCE) == -signal.SIGINT
        finally:
            parent.kill()
    assert awaited(lambda: not any(alive(pid) for _, pid in project.ran))


@pytest.mark.parametrize("stopped_by", ["failing step", "killed parent"])
def test_a_step_may_start_processes_which_end_with_it(project: Project, stopped_by: str) -> None:
    project.order("nest-data-1")
    if stopped_by == "failing step":
        project.order("fail-data-2")
        with pytest.raises(DataError, match="no rows in data-2"):
            project.run()
    else:
        command = [sys.executable, fake_stages.__file__, project.recipe, project.store.root]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
            try:
                assert awaited(lambda: "child" in project.names)
            finally:
                parent.kill()
    assert "child" in project.names
    assert awaited(lambda: not any(alive(pid) for _, pid in project.ran))
