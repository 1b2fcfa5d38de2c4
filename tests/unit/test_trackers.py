"""Trackers are told what the log holds; one that is not installed is named before the run."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from course import CPU, config, logged, plan
from tiny import write_model

from tutelage import pipeline
from tutelage.core.artifact import Tracking, WorkDir
from tutelage.core.errors import EngineError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.models.load import load_model
from tutelage.recipe.tables import Runtime
from tutelage.train.loop import train
from tutelage.train.objectives import CrossEntropy


class Kept(GeneralTracker):
    """A tracker that keeps what it is told, where no program is installed."""

    name = "kept"
    requires_logging_directory = False
    tracker = None
    made: list["Kept"] = []  # noqa: RUF012

    def __init__(self, project: str, **named: Any) -> None:
        super().__init__()
        self.project, self.named = project, named
        self.told: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False

    def start(self) -> None:
        Kept.made.append(self)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        raise AssertionError("nothing is told of the settings")

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "kept", Kept)
    monkeypatch.setattr(Kept, "made", [])
    return Kept


def run(where: Path, kind: str, steps: int = 3, **more: Any) -> None:
    model = load_model(write_model(where / "model", layers=1), dtype="float32", device=CPU)
    tracking = Tracking((kind,), where / "trackers", "recipe", "tuned")
    work = WorkDir.open(
        where / "work", reporter=Reporter(quiet=True), device="cpu", tracking=tracking
    )
    planned = plan(steps, held_out=True, **more)
    settings = config(held_out="h", evaluations=1)
    train(model, planned, CrossEntropy(), settings, work, device=CPU, label="t")


def test_a_tracker_is_told_each_line_of_the_log_and_is_closed(
    kept: type[Kept], tmp_path: Path
) -> None:
    run(tmp_path, "kept")
    (tracker,) = kept.made
    lines = logged(tmp_path / "work")
    assert (tracker.project, tracker.named) == ("recipe", {"name": "tuned"})
    assert [step for step, _ in tracker.told] == [1, 2, 3]
    for (_, told), line in zip(tracker.told, lines, strict=True):
        assert told == pytest.approx({k: v for k, v in line.items() if k != "step"}, abs=1e-6)
    assert "held_out_loss" in tracker.told[-1][1]
    assert tracker.finished


def test_a_tracker_is_closed_when_the_training_fails(kept: type[Kept], tmp_path: Path) -> None:
    def broken(done: int, steps: int) -> Any:
        """Injected fault."""
        raise EngineError("broken")

    with pytest.raises(EngineError, match="broken"):
        run(tmp_path, "kept", watch=broken)
    assert kept.made[0].finished


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="of the extra trackers")
def test_tensorboard_holds_the_logs_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "trackers" / "tuned"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    lines = logged(tmp_path / "work")
    assert [step for step, _ in found] == [1, 2, 3]
    assert [value for _, value in found] == pytest.approx(
        [line["loss"] for line in lines], abs=1e-5
    )
    files = [path.name for path in (tmp_path / "work").iterdir()]
    assert not [name for name in files if "events" in name]


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)  # stands for its absence
    with pytest.raises(RecipeError, match="trackers: wandb is not installed; pip install wandb"):
        pipeline._check_trackers(Runtime(trackers=("wandb",)))
    pipeline._check_trackers(Runtime())
