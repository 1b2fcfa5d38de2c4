"""The figures of a training in TensorBoard, trackio or Weights & Biases, by Accelerate's trackers.

They are beside `metrics.jsonl`, never instead of it, and outside the artifact: a tracker's files
hold times and names of machines.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from tutelage.core.artifact import Tracking

Track = Callable[[Mapping[str, float]], None]
"""Takes an entry of the log: the figures of an optimizer step, with its number as `step`."""


@contextmanager
def tracking(where: Tracking | None, *, begun: int) -> Iterator[Track]:
    """Hands figures to every tracker of `where`; to none without it.

    `begun` is the last step that an earlier attempt is known to have told: what it told beyond is
    told again.
    """
    trackers: list[GeneralTracker] = []
    try:
        for kind in where.kinds if where else ():
            assert where
            trackers.append(_opened(kind, where, begun))
            trackers[-1].start()

        def track(entry: Mapping[str, float]) -> None:
            figures = {name: value for name, value in entry.items() if name != "step"}
            for tracker in trackers:
                tracker.log(figures, step=int(entry["step"]))

        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def _opened(kind: str, where: Tracking, begun: int) -> GeneralTracker:
    """A local one writes in a folder of the step; a served one has a project for the recipe."""
    tracker = LOGGER_TYPE_TO_CLASS[kind]
    if tracker.requires_logging_directory:
        again = {"purge_step": begun + 1} if kind == "tensorboard" and begun else {}
        return tracker(where.step, str(where.folder), **again)
    return tracker(where.recipe, name=where.step)
