"""The pipeline: from a recipe to finished artifacts. Read this first.

`plan` says what would run and why; `run` runs it. A step is known by the sha256 of everything that
decides its bytes (`graph.identities`), so what is finished is never made again, equal steps are
made once, and a killed step goes on where it was. What a stage does is its own affair: it is given
its settings, its inputs and a folder (`stages/<stage>.py`), and meets no other stage.
"""

import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from typing import Any

from tutelage.core import files
from tutelage.core.artifact import Artifact, Tracking, WorkDir, finish, measure_peak
from tutelage.core.errors import (
    ArtifactError,
    DataError,
    EngineError,
    ModelError,
    RecipeError,
    TutelageError,
)
from tutelage.core.fingerprint import differences, fingerprint
from tutelage.core.lock import file_lock
from tutelage.core.progress import Reporter
from tutelage.core.provenance import provenance
from tutelage.core.shards import Executor
from tutelage.core.team import Team
from tutelage.data.identity import data_identity
from tutelage.evals.benchmarks import lm_eval_name
from tutelage.graph import Node, build, identities
from tutelage.models import source as models
from tutelage.recipe.base import Step
from tutelage.recipe.evaluation import Evaluate
from tutelage.recipe.load import Variant
from tutelage.recipe.screening import Screen
from tutelage.recipe.tables import New, Runtime, Score
from tutelage.recipe.training import Distill
from tutelage.store import Store

TOGETHER = ("sft", "distill")
"""Stages that a team of processes makes together; rank 0 makes the others."""
TO_LOWER = dict.fromkeys(
    ("sft", "distill", "online"),
    "lower rows_together (packed rows in one pass), then pack_tokens (their length), set "
    "gradient_checkpointing = true, or part the model with runtime.processes and sharding = fsdp",
) | {"score": "lower logit_chunk_mb"}
"""What takes the memory of a stage; the loss's own chunks of logits are bounded."""
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "OutOfMemoryError")


@dataclass(frozen=True)
class Planned:
    """One step of a plan: what it is, whether it is there already, and if not, why not."""

    node: Node
    identity: Mapping[str, Any]
    status: str
    """`cached`, `run`, `resume`, `same` (as an earlier step of this plan) or `outside`."""
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What a person should know before it runs."""

    @property
    def fingerprint(self) -> str:
        """The identity's sha256."""
        return fingerprint(self.identity)


@dataclass(frozen=True)
class Result:
    """What a run leaves: each step's artifact, and which of them were made now."""

    artifacts: Mapping[str, Artifact]
    made: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class _Run:
    """A run under way."""

    name: str
    store: Store
    reporter: Reporter
    runtime: Runtime
    planned: Mapping[str, Planned]
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    team: Team = field(default_factory=Team)


def plan(variants: Sequence[Variant], store: Store, *, until: str = "") -> list[Planned]:
    """Every step in the order it would run, with its status and the reasons for it.

    Raises RecipeError on a graph that cannot be or a task that is unknown, ModelError when a
    student and its teacher have different vocabularies.
    """
    nodes = build(variants, until=until)
    _check_tasks(nodes)
    outside = {
        node.name: models.locate(node.source, memo=store.memo) for node in nodes if node.source
    }
    _check_vocabularies(nodes, outside)
    known = identities(
        nodes, lambda node: outside[node.name].identity,
        lambda step: data_identity(step, memo=store.memo),
    )  # fmt: skip
    _check_writers(nodes, known)
    previous = store.read_run(variants[0].recipe.name)
    first: dict[str, str] = {}
    planned = []
    for node in nodes:
        earlier = first.setdefault(fingerprint(known[node.name]), node.name)
        status, reasons = _status(node, known, earlier, store, previous)
        notes = _notes(node, {each.name: each for each in nodes})
        planned.append(Planned(node, known[node.name], status, reasons, notes))
    return planned


def _notes(node: Node, nodes: Mapping[str, Node]) -> tuple[str, ...]:
    """What an engine cannot give, and what the loss makes of it. Raises RecipeError."""
    if isinstance(node.step, Score) and (top := node.step.top(node.engines.values())):
        return (f"the engine gives the {top} likeliest ids: top-{top} targets, without a tail",)
    if isinstance(node.step, Distill):
        read = nodes[node.inputs["targets"]]
        if isinstance(read.step, Score) and read.step.top(read.engines.values()):
            if node.step.outside == "unbiased":
                raise RecipeError(
                    f"steps.{node.name}.outside: unbiased needs sampled tails, and the engine of "
                    f"{read.name} gives the likeliest ids only; take auto or bucket"
                )
            if node.step.divergence == "forward_kl" and node.step.outside == "auto":
                return ("its targets have no tail: what is outside their ids is one bucket",)
    return ()


def _status(
    node: Node, known: Mapping[str, Mapping[str, Any]], earlier: str, store: Store,
    previous: Mapping[str, Any],
) -> tuple[str, tuple[str, ...]]:  # fmt: skip
    if node.step is None:
        return "outside", ()
    if earlier != node.name:
        return "same", (f"same as {earlier}",)
    identity = known[node.name]
    stage, mark = node.stage, fingerprint(identity)
    if store.find(stage, mark):
        return "cached", ()
    if store.partial(stage, mark).exists():
        return "resume", ("an earlier run was interrupted here",)
    before = previous.get(node.name)
    if before is None:
        return "run", ("never run",)
    return "run", tuple(_changes(node, before["identity"], identity)) or ("result was removed",)


def _changes(node: Node, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs from the step's last finished run, in the recipe's own words."""
    prefix = f"steps.{node.name}."
    lines = []
    if old["stage"] != new["stage"]:
        return [f"{prefix}stage: {old['stage']} -> {new['stage']}"]
    if old["version"] != new["version"]:
        lines.append(f"{new['stage']} stage: version {old['version']} -> {new['version']}")
    lines += [prefix + line for line in differences(old["config"], new["config"])]
    for role in sorted({*old["inputs"], *new["inputs"]}):
        if old["inputs"].get(role) != new["inputs"].get(role):
            lines.append(f"input {role} ({node.inputs.get(role, 'gone')}) changed")
    for line in differences(old.get("outside"), new.get("outside")):
        lines.append(f"source changed: {line}")
    for line in differences(old.get("engines"), new.get("engines")):
        lines.append(f"engine changed: {line}")
    return lines


def _check_tasks(nodes: Sequence[Node]) -> None:
    """A misspelt task must not be found after hours of training, when it is asked."""
    for node in nodes:
        for task in node.step.tasks if isinstance(node.step, Evaluate) else ():
            try:
                lm_eval_name(task.name)
            except TutelageError as error:
                raise type(error)(f"steps.{node.name}.tasks: {error}") from None


def _check_vocabularies(nodes: Sequence[Node], outside: Mapping[str, models.External]) -> None:
    """Teacher and student must share ids: refuse a pair before anything is spent on it."""
    by_name = {node.name: node for node in nodes}

    def root(name: str) -> Node:
        node = by_name[name]
        above = node.inputs.get("tokenizer_of") or node.inputs.get("model")
        return root(above) if above else node

    for node in nodes:
        if node.stage not in ("screen", "score", "evaluate", "distill", "online"):
            continue
        read = by_name[node.inputs["targets"]] if node.stage == "distill" else node
        # A converted store names no teacher but whose ids it holds; an evaluation may have none.
        teacher = read.inputs.get("teacher") or read.inputs.get("model")
        if teacher is None:
            continue
        further = [name for role, name in read.inputs.items() if role.startswith("routes.")]
        students = [name for role, name in node.inputs.items() if role.startswith("models.")]
        if node.stage in ("distill", "online"):
            students.append(node.inputs["model"])
        if "rollouts" in node.inputs:
            students.append(_writer(node, by_name))
        for taught_by, student in product((teacher, *further), students):
            left, right = root(taught_by), root(student)
            known = [_vocabulary(one, outside) for one in (right, left)]
            if None not in known and known[0] != known[1]:
                sizes = " and ".join(_ids(one, outside) for one in (right, left))
                raise ModelError(
                    f"steps.{node.name}: {right.name} and its teacher {left.name} have "
                    f"different vocabularies ({sizes} ids); "
                    "distillation by token needs one tokenizer: take a teacher of the same family"
                )


def _writer(node: Node, by_name: Mapping[str, Node]) -> str:
    """The model that wrote the rollouts a node reads, through any number of screens."""
    while "rollouts" in node.inputs:
        node = by_name[node.inputs["rollouts"]]
    return node.inputs["model"]


def _check_writers(nodes: Sequence[Node], known: Mapping[str, Mapping[str, Any]]) -> None:
    """A screen's student wrote its rollouts, or their stored log-probabilities are not its own."""
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if isinstance(node.step, Screen) and (named := node.inputs.get("student")):
            writer = _writer(node, by_name)
            if fingerprint(known[named]) != fingerprint(known[writer]):
                raise RecipeError(
                    f"steps.{node.name}.student: the rollouts were written by {writer!r}, not by "
                    f"{named!r}; name their writer"
                )


def _vocabulary(node: Node, outside: Mapping[str, models.External]) -> Any:
    """Ids and how many logits there are: padded to other sizes, two models cannot be compared.

    Of a new model that trains its own, what decides about it; None while nobody knows.
    """
    if isinstance(node.step, New):
        return node.step.tokenizer, node.step.vocab_size, dict(node.inputs)
    facts = outside[node.name].facts
    return (facts.tokenizer_digest, facts.vocab_size) if facts else None


def _ids(node: Node, outside: Mapping[str, models.External]) -> str:
    if isinstance(node.step, New):
        return f"at most {node.step.vocab_size:,}"
    facts = outside[node.name].facts
    return f"{facts.vocab_size:,}" if facts else "unknown"


def run(
    variants: Sequence[Variant], store: Store, *, until: str = "", reporter: Reporter | None = None,
    team: Team | None = None,
) -> Result:  # fmt: skip
    """Run what is not finished, in order; returns every step's artifact.

    `team`: the other processes that follow this one (`following`).

    A step whose lock another process holds is left for later while others can run. Raises the
    stage's own TutelageError with the step's name in front.
    """
    reporter = reporter or Reporter()
    recipe = variants[0].recipe
    _check_trackers(recipe.runtime)
    started = time.monotonic()
    if recipe.runtime.threads:  # torch reads it once, when it is first imported
        os.environ["OMP_NUM_THREADS"] = str(recipe.runtime.threads)
    for node in build(variants, until=until):
        if node.source:
            models.fetch(node.source, say=reporter.say)
    try:
        planned = {p.node.name: p for p in plan(variants, store, until=until)}
        files.write_json(
            store.run_folder(recipe.name) / "recipe.json",
            {v.label or recipe.name: v.recipe.model_dump(mode="json") for v in variants},
        )
        state = _Run(recipe.name, store, reporter, recipe.runtime, planned, team=team or Team())
        waiting = list(planned)
        while waiting:
            waiting = _pass(state, waiting)
        state.team.tell("")
    except OSError as error:  # between the steps: a lock, the run's own record
        if files.is_disk_full(error):
            raise ArtifactError(
                f"{store.root}: the disk is full; make room and run again: finished steps are kept"
            ) from error
        raise
    return Result(state.artifacts, tuple(state.made), time.monotonic() - started)


def _pass(state: _Run, waiting: Sequence[str]) -> list[str]:
    """Try each waiting step once without blocking; if none could go on, wait for the first."""
    left = []
    for name in waiting:
        inputs = state.planned[name].node.inputs.values()
        if not all(i in state.artifacts for i in inputs) or not _try(state, name, wait=False):
            left.append(name)
    if len(left) == len(waiting):
        ready = next(
            name for name in left
            if all(i in state.artifacts for i in state.planned[name].node.inputs.values())
        )  # fmt: skip
        _try(state, ready, wait=True)
        left.remove(ready)
    return left


def _try(state: _Run, name: str, *, wait: bool) -> bool:
    """Have the step's artifact, by finding or making it; False when somebody else is making it."""
    planned = state.planned[name]
    node, mark = planned.node, planned.fingerprint
    if node.source:
        located = models.locate(node.source, memo=state.store.memo)
        state.artifacts[name] = located.as_artifact(planned.identity)
        return True
    artifact = state.store.find(node.stage, mark)
    if artifact is None:
        lock = state.store.lock(node.stage, mark)
        with file_lock(lock, wait=wait, on_wait=lambda owner: _say_waiting(state, name, owner)) as (
            held
        ):
            if not held:
                return False
            artifact = state.store.find(node.stage, mark) or _make(state, planned)
    state.artifacts[name] = artifact
    _record(state, planned)
    return True


def _say_waiting(state: _Run, name: str, owner: str) -> None:
    state.reporter.say(f"{name}: waiting for {owner}, which is making it")


def _record(state: _Run, planned: Planned) -> None:
    entry = {
        "stage": planned.node.stage,
        "fingerprint": planned.fingerprint,
        "identity": planned.identity,
    }
    # Read again each time: another run of the same name may have finished other steps meanwhile.
    with file_lock(state.store.run_folder(state.name) / "run.lock"):
        steps = state.store.read_run(state.name)
        if steps.get(planned.node.name) != entry:
            state.store.write_run(state.name, {**steps, planned.node.name: entry})


def _make(state: _Run, planned: Planned) -> Artifact:
    node = planned.node
    assert node.step is not None
    final = state.store.place(node.stage, planned.fingerprint)
    inputs = {role: state.artifacts[name] for role, name in node.inputs.items()}
    state.reporter.say(f"{node.name} ({node.stage})", style="bold")
    try:
        runtime = state.runtime
        work = WorkDir.open(
            state.store.partial(node.stage, planned.fingerprint), reporter=state.reporter,
            executor=_executor(runtime), device=runtime.device,
            workers=runtime.workers or os.cpu_count() or 1, sandbox=runtime.sandbox,
            memory=state.store.memory_of_answers, engines=node.engines,
            tracking=_tracking(state, node.name),
            team=state.team if node.stage in TOGETHER else Team(),
        )  # fmt: skip
        peak = measure_peak()
        work.team.tell(json.dumps([node.name, planned.fingerprint]))
        summary = _run_stage(node.step, inputs, work)
        _check_unchanged(node.step, planned, state.store)
        artifact = finish(
            work, final, identity=planned.identity, summary=summary,
            inputs={role: _input_entry(artifact) for role, artifact in inputs.items()},
            provenance=provenance(
                device=runtime.device, threads=os.environ.get("OMP_NUM_THREADS", "")
            ),
            peak_memory_bytes=peak(),
        )  # fmt: skip
    except Exception as error:  # the one named boundary: every fault gets its step's name
        raise _attributed(error, node) from error
    state.made.append(node.name)
    state.reporter.say(f"  done in {artifact.manifest['seconds']:,.1f} s  {_shown(summary)}")
    return artifact


def take_part(node: Node, inputs: Mapping[str, Artifact], work: WorkDir) -> None:
    """Join a step that another process makes; what comes of it is that one's."""
    assert node.step is not None
    try:
        _run_stage(node.step, inputs, work)
    except Exception as error:
        raise _attributed(error, node) from error


def _executor(runtime: Runtime) -> Executor | None:
    if runtime.executor == "local":
        return None
    from tutelage.engines.fleet import RayFleet

    return RayFleet(runtime.ray, threads=runtime.threads)


def _tracking(state: _Run, name: str) -> Tracking | None:
    kinds, folder = state.runtime.trackers, state.store.run_folder(state.name) / "trackers"
    return Tracking(kinds, folder, state.name, name) if kinds else None


def _check_trackers(runtime: Runtime) -> None:
    """Before anything is spent, not when the first training begins. Raises RecipeError."""
    for kind in runtime.trackers:
        if find_spec(kind) is None:
            raise RecipeError(
                f"runtime.trackers: {kind} is not installed; pip install {kind}, or leave it out: "
                "metrics.jsonl holds the same figures"
            )


def _check_unchanged(step: Step, planned: Planned, store: Store) -> None:
    """What a step read from outside must be what its identity says, or it would lie for ever."""
    now = data_identity(step, memo=store.memo)
    if changed := differences(planned.identity.get("outside"), now or None):
        raise DataError(f"a source changed while it was read ({changed[0]}); run again")


def _run_stage(
    step: Step, inputs: Mapping[str, Artifact], work: WorkDir
) -> Mapping[str, int | float | str]:
    return importlib.import_module(f"tutelage.stages.{step.stage}").run(step, inputs, work)


def _input_entry(artifact: Artifact) -> dict[str, str]:
    return {
        "stage": artifact.stage,
        "fingerprint": artifact.fingerprint,
        "content": artifact.manifest["content"],
    }


def _attributed(error: Exception, node: Node) -> Exception:
    """The error with its step's name; a full disk and a full memory become clear lines."""
    name = node.name
    if isinstance(error, TutelageError):
        return type(error)(f"step {name!r}: {error}")
    if files.is_disk_full(error):
        return ArtifactError(
            f"step {name!r}: the disk is full; make room and run again: finished parts are kept"
        )
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        return EngineError(
            f"step {name!r}: out of memory; {TO_LOWER.get(node.stage, 'lower batch_rows')}"
        )
    error.add_note(f"in step {name!r}")
    return error


def _shown(summary: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in [kv for kv in summary.items() if not isinstance(kv[1], Mapping)][:6]
    )
