"""Who speaks and who loads what in a team of processes; the store is torch's own, in memory."""

import os
import signal

import numpy as np
import pytest
import torch
from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage]

from tutelage import launch
from tutelage.core import team as core_team
from tutelage.core.errors import EngineError, RecipeError
from tutelage.core.team import Team, TeammateLost, team_of
from tutelage.recipe.load import parse
from tutelage.recipe.training import Sft
from tutelage.train.batches import Example
from tutelage.train.loop import Plan, _check_team, _passes
from tutelage.train.team import Joined

CPU = torch.device("cpu")


def config(**settings: object) -> Sft:
    values = {"stage": "sft", "model": "m", "data": ("d",), "seed": 0, "lr": 1e-3} | settings
    return Sft.model_validate(values)


def test_a_place_is_read_as_a_launcher_gives_it() -> None:
    assert team_of({}) == Team()
    assert team_of({"WORLD_SIZE": "1", "RANK": "0"}) == Team()
    assert team_of({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}) == Team(3, 4, 1)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_row_counts_once_and_is_loaded_by_its_own_rank(
    size: int, rows: int, together: int
) -> None:
    step = [[2 * row, 2 * row + 1] for row in range(rows)]
    counted: list[int] = []
    passes_of: set[int] = set()
    for rank in range(size):
        loaded: list[int] = []

        def load(index: int, loaded: list[int] = loaded) -> Example:
            loaded.append(index)
            return Example(np.arange(4, dtype=np.int32), np.array([False, True, True, True]))

        team = Joined(Team(rank, size), CPU)
        plan = Plan(load, str, [step])
        passes = _passes(team, step, plan, config(rows_together=together))
        passes_of.add(len(passes))
        own = [index for each, counts in passes if counts for row in each for index in row.examples]
        counted += own
        # A rank that has none loads one that counts nothing.
        assert loaded == (own or [0])
    assert sorted(counted) == list(range(2 * rows))
    assert len(passes_of) == 1


def test_more_processes_than_examples_are_refused() -> None:
    _check_team(Joined(Team(0, 2), CPU), [[[0]], [[1]]], config())
    with pytest.raises(EngineError, match="3 processes for 2 examples; set runtime.processes to 2"):
        _check_team(Joined(Team(0, 3), CPU), [[[0]], [[1]], [[0]]], config())


def test_an_error_is_said_once_and_by_whom_it_befell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_team, "GRACE_SECONDS", 0.0)
    monkeypatch.delenv(core_team.LAUNCHER, raising=False)
    store = HashStore()
    first, second = (Team(rank, 2, store=store) for rank in range(2))
    lost = TeammateLost("another has ended")
    assert first.should_tell(lost)  # nobody knows better
    assert not second.should_tell(lost)
    assert second.should_tell(EngineError("a row is damaged"))
    assert not first.should_tell(lost)
    assert Team().should_tell(EngineError("alone"))


def test_what_rank_0_tells_the_others_hear_in_order() -> None:
    store = HashStore()
    first, second = (Team(rank, 2, store=store) for rank in range(2))
    for word in ("one", "two", ""):
        first.tell(word)
    assert [second.hear() for _ in range(3)] == ["one", "two", ""]


def test_the_exit_code_is_the_first_failing_processes_and_a_kill_is_told() -> None:
    assert launch.exit_code({1: 2, 0: 1}, 2) == 1
    with pytest.raises(EngineError, match=r"process 1 of 2 \(from 0\) was ended by signal 9"):
        launch.exit_code({0: 2, 1: -signal.SIGKILL}, 2)


def test_jobs_and_processes_exclude_each_other() -> None:
    recipe = {
        "name": "r", "runtime": {"jobs": 2, "processes": 2},
        "steps": {"d": {"stage": "data", "sources": [{"source": "bundled:prompts"}]}},
    }  # fmt: skip
    with pytest.raises(RecipeError, match="set one of them"):
        parse(recipe, "r.toml")
    assert "WORLD_SIZE" not in os.environ
