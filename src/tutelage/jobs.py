"""Several steps at a time: the pipeline in processes that share one store.

Each process runs the whole recipe; a step's lock lets one of them make it, and the others take the
next step that is ready. So nothing is handed out, and a process that dies loses only its own step,
which another makes again.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from tutelage import following, pipeline
from tutelage.core.errors import EngineError, RecipeError
from tutelage.core.fault import Fault
from tutelage.core.progress import Bar, Reporter
from tutelage.core.team import this_process
from tutelage.models import source as models
from tutelage.recipe.load import Variant
from tutelage.store import Store

POLL_SECONDS = 0.5
STOP_SECONDS = 10.0
"""A worker that was told to end and has not by then is killed."""
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
    if this_process().size > 1:
        return _in_a_team(variants, store, until, reporter)
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


def _in_a_team(
    variants: Sequence[Variant], store: Store, until: str, reporter: Reporter
) -> pipeline.Result:
    """One process of those that train together: rank 0 is the pipeline, the others follow."""
    runtime = variants[0].recipe.runtime
    if runtime.jobs > 1:
        raise RecipeError("runtime.jobs = 1 is needed where several processes train together")
    if runtime.threads:
        os.environ["OMP_NUM_THREADS"] = str(runtime.threads)
    from tutelage.train.team import opened

    team = opened(this_process(), device=runtime.device)
    team.sharding = runtime.sharding
    if team.leads:
        result = pipeline.run(variants, store, until=until, reporter=reporter, team=team)
    else:
        following.follow(variants, store, until=until, team=team)
        result = pipeline.Result({})
    team.part()
    return result


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
    share = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs)
    threads = runtime.threads or share
    alone = [_with_one_job(variant) for variant in variants]
    workers: dict[Connection, BaseProcess] = {}
    try:
        with _environment(OMP_NUM_THREADS=str(threads)):  # torch reads it when it is imported
            for _ in range(jobs):
                reader, worker = _started(alone, store, until)
                workers[reader] = worker
        reporter.say(f"{steps} steps, {jobs} at a time, {threads} threads each")
        with reporter.bar(steps, "steps", unit="steps") as bar:
            return _listen(workers, reporter, bar)
    finally:
        for worker in workers.values():
            worker.terminate()
        for reader, worker in workers.items():
            _ended(worker)
            reader.close()


def _started(
    variants: Sequence[Variant], store: Store, until: str
) -> tuple[Connection, BaseProcess]:
    """A process at work, and the end of a pipe of its own: one that is killed blocks no other."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    # Not a daemon: a data step starts processes of its own, which a daemon may not.
    worker = context.Process(target=_work, args=(variants, store, until, writer, os.getpid()))
    worker.start()
    writer.close()  # the worker's copy is the only one, so that its death is the pipe's end
    return reader, worker


def _ended(worker: BaseProcess) -> int | None:
    worker.join(STOP_SECONDS)
    if worker.exitcode is None:
        worker.kill()
        worker.join()
    return worker.exitcode


def _listen(workers: Mapping[Connection, BaseProcess], reporter: Reporter, bar: Bar) -> list[str]:
    """Show what the workers say until all have ended; returns the names of the steps made."""
    made: list[str] = []
    at_work = dict(workers)
    lost = 0
    while at_work:
        for reader in wait(list(at_work)):
            assert isinstance(reader, Connection)
            try:
                kind, content = reader.recv()
            except (EOFError, OSError):  # it was killed, perhaps in the middle of a message
                worker = at_work.pop(reader)
                lost += 1
                reporter.say(
                    f"process {worker.pid} ended with {_ended(worker)} (out of memory?); "
                    f"{len(at_work)} others go on"
                )
                continue
            if kind == "failed":
                raise content.error()
            if kind == "say":
                reporter.say(content)
            elif kind == "made":
                made.append(content["name"])
                reporter.say(content["line"])
                bar.advance(1)
            else:
                del at_work[reader]
    if lost == len(workers):
        raise EngineError(
            "every process ended before its work was done; lower runtime.jobs, or look "
            "for what killed them, and run again: finished steps are kept"
        )
    return made


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
            if style == "bold" and not text.startswith(" "):  # a step begins
                self.lines.clear()
            self.lines.append(text)
            return
        first, *between = self.lines or [""]
        for line in between:
            self.messages.send(("say", f"{first.partition(' ')[0]}: {line.strip()}"))
        name = first.partition(" (")[0]
        self.messages.send(("made", {"name": name, "line": f"{first}{text[1:]}"}))
        self.lines.clear()


def _work(
    variants: Sequence[Variant], store: Store, until: str, messages: Any, parent: int
) -> None:
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _leave())
    try:
        pipeline.run(variants, store, until=until, reporter=_Relay(quiet=True, messages=messages))
        messages.send(("ended", None))
    except KeyboardInterrupt:
        _leave()
    except BaseException as error:  # reported by the parent, which raises it again
        messages.send(("failed", Fault.of(error)))


def _leave_with(parent: int) -> None:
    """A worker whose parent was killed, even before it was asked, would go on unseen."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    _leave()


def _leave() -> NoReturn:
    """End at once, and the processes of a data step too: they would wait for rows for ever."""
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(1)
