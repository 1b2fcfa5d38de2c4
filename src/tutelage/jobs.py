"""Several steps at a time: the pipeline in processes that share one store.

Each process runs the whole recipe; a step's lock lets one of them make it, and the others take the
next step that is ready. So nothing is handed out, and a process that dies loses only its own step,
which another makes again.
"""

import contextlib
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from typing import Any

from tutelage import pipeline
from tutelage.core import errors
from tutelage.core.errors import EngineError, TutelageError
from tutelage.core.progress import Bar, Reporter
from tutelage.models import source as models
from tutelage.recipe.load import Variant
from tutelage.store import Store

POLL_SECONDS = 0.5
DONE = "  done in"
"""How the pipeline's line on a finished step begins."""


def run(
    variants: Sequence[Variant], store: Store, *, until: str = "", reporter: Reporter | None = None
) -> pipeline.Result:
    """`pipeline.run` with `[runtime] jobs` processes; one job stays in this process.

    Raises the first failing step's own error; the other processes are stopped then, and what they
    were making goes on where it was when the recipe is run again.
    """
    reporter = reporter or Reporter()
    recipe = variants[0].recipe
    if recipe.runtime.jobs == 1:
        return pipeline.run(variants, store, until=until, reporter=reporter)
    started = time.monotonic()
    for node in pipeline.build(variants, until=until):
        if node.source:  # once, before two processes would fetch the same
            models.fetch(node.source, say=reporter.say)
    waiting = sum(
        item.status in ("run", "resume") for item in pipeline.plan(variants, store, until=until)
    )
    made = _in_processes(variants, store, until, reporter, waiting) if waiting else []
    alone = [_with_one_job(variant) for variant in variants]
    last = pipeline.run(alone, store, until=until, reporter=reporter)
    return pipeline.Result(last.artifacts, (*made, *last.made), time.monotonic() - started)


def _with_one_job(variant: Variant) -> Variant:
    recipe = variant.recipe
    workers = recipe.runtime.workers or max(1, (os.cpu_count() or 1) // recipe.runtime.jobs)
    runtime = recipe.runtime.model_copy(update={"jobs": 1, "workers": workers})
    return replace(variant, recipe=recipe.model_copy(update={"runtime": runtime}))


def _in_processes(
    variants: Sequence[Variant], store: Store, until: str, reporter: Reporter, steps: int
) -> list[str]:
    runtime = variants[0].recipe.runtime
    jobs = min(runtime.jobs, steps)
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    threads = runtime.threads or max(1, (os.cpu_count() or 1) // jobs)
    alone = [_with_one_job(variant) for variant in variants]
    with _environment(OMP_NUM_THREADS=str(threads)):  # torch reads it when a process imports it
        workers = [
            # Not daemons, which may have no children: a data step has its own workers.
            context.Process(target=_work, args=(alone, store, until, messages))
            for _ in range(jobs)
        ]
        for worker in workers:
            worker.start()
    reporter.say(f"{steps} steps, {jobs} at a time, {threads} threads each")
    try:
        with reporter.bar(steps, "steps", unit="steps") as bar:
            return _listen(workers, messages, reporter, bar)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _listen(
    workers: Sequence[BaseProcess], messages: Any, reporter: Reporter, bar: Bar
) -> list[str]:
    """Show what the workers say until all have ended; returns the names of the steps made."""
    made: list[str] = []
    lost: set[int | None] = set()
    ended = 0
    while ended < len(workers):
        try:
            kind, content = messages.get(timeout=POLL_SECONDS)
        except queue.Empty:
            dead = {w.pid for w in workers if w.exitcode not in (None, 0)} - lost
            for worker in workers:
                if worker.pid in dead:
                    reporter.say(
                        f"process {worker.pid} ended with {worker.exitcode} (out of memory?); "
                        "the others go on"
                    )
            lost |= dead
            if len(lost) + ended == len(workers) and ended == 0:
                raise EngineError(
                    "every process ended before its work was done; lower runtime.jobs, or look "
                    "for what killed them, and run again: finished steps are kept"
                ) from None
            if len(lost) + ended == len(workers):
                return made
            continue
        if kind == "failed":
            raise _error(content)
        if kind == "say":
            reporter.say(content)
        elif kind == "made":
            made.append(content["name"])
            reporter.say(content["line"])
            bar.advance(1)
        else:
            ended += 1
    return made


def _error(content: Mapping[str, str]) -> Exception:
    kind = getattr(errors, content["kind"], None)
    if isinstance(kind, type) and issubclass(kind, TutelageError):
        return kind(content["text"])
    return RuntimeError(f"in a process that made steps:\n{content['trace']}")


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Relay(Reporter):
    """A worker's voice: one line a finished step, and what it said in between, to the parent."""

    messages: Any = None
    lines: list[str] = field(default_factory=list)

    def say(self, text: str, *, style: str = "") -> None:
        if not text.startswith(DONE):
            if style == "bold":  # a step begins
                self.lines.clear()
            self.lines.append(text)
            return
        first, *between = self.lines or [""]
        for line in between:
            self.messages.put(("say", f"{first.partition(' ')[0]}: {line.strip()}"))
        name = first.partition(" (")[0]
        self.messages.put(("made", {"name": name, "line": f"{first}{text[1:]}"}))
        self.lines.clear()


def _work(variants: Sequence[Variant], store: Store, until: str, messages: Any) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        pipeline.run(variants, store, until=until, reporter=_Relay(quiet=True, messages=messages))
        messages.put(("ended", None))
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:  # reported by the parent, which raises it again
        messages.put(
            (
                "failed",
                {
                    "kind": type(error).__name__,
                    "text": str(error),
                    "trace": traceback.format_exc(),
                },
            )
        )


def _leave_with_parent() -> None:
    """A worker whose parent was killed would go on unseen."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
