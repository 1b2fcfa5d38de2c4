"""Stages that do nothing but tell that they ran, with faults to order, for runs in processes.

Imported by processes that a test starts, so it imports nothing heavy. What goes wrong is said in
files of the store's folder: `<fault>-<rows>` where `rows` is the limit of a data step.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage import jobs, pipeline
from tutelage.core import files
from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.recipe.base import Step
from tutelage.recipe.load import Variant
from tutelage.store import Store

_work = jobs._work
SECONDS = 0.05
FOREVER = 120.0
"""Of a step that hangs: longer than any test waits."""


def stage(step: Step, inputs: Mapping[str, Artifact], work: WorkDir) -> Mapping[str, int]:
    """Note the step and the process, then do as the fault says."""
    root = work.path.parents[2]
    name = f"{step.stage}-{step.sources[0].limit}" if step.stage == "data" else step.stage  # type: ignore[attr-defined]
    with (root / "log").open("a") as log:
        log.write(f"{name} {os.getpid()}\n")
    work.reporter.say("  half way")
    work.reporter.say("  nearly there", style="bold")
    if (root / f"bug-{name}").exists():
        raise KeyError(name)
    if (root / f"nest-{name}").exists():
        _nest(root)
    if (root / f"fail-{name}").exists():
        while any(root.glob("nest-*")) and "child" not in (root / "log").read_text():
            time.sleep(SECONDS)
        raise DataError(f"no rows in {name}; give some")
    if (root / f"kill-{name}").exists():
        (root / f"kill-{name}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if (root / f"killer-{name}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER if (root / f"hang-{name}").exists() else SECONDS)
    files.write_text(work.path / "part-00000.txt", f"{name} of {sorted(inputs)}")
    work.commit("part-00000", seconds=SECONDS, tokens={})
    return {"rows": 1}


def _nest(root: Path) -> None:
    """What a data step does: a process of its own, which waits for rows."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(FOREVER,))
    child.start()
    with (root / "log").open("a") as log:
        log.write(f"child {child.pid}\n")
    child.join()


def work(variants: Sequence[Variant], store: Store, until: str, messages: Any, parent: int) -> None:
    """A worker of `jobs` whose stages are fakes."""
    pipeline._run_stage = stage
    _work(variants, store, until, messages, parent)


def dies(variants: Sequence[Variant], store: Store, until: str, *_: Any) -> None:
    """A worker that the system kills before it has made anything."""
    with (store.root / "log").open("a") as log:
        log.write(f"born {os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def main(recipe: Path, root: Path) -> None:
    """A whole run with fake stages, for a test that kills it."""
    from tutelage.recipe.load import load

    jobs._work = work
    jobs.run(load(recipe), Store(root))


if __name__ == "__main__":
    import sys

    import fake_stages  # by its name, so that the processes it starts find `work` in it

    fake_stages.main(Path(sys.argv[1]), Path(sys.argv[2]))
