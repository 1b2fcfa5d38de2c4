"""`plan --measure`: the models of a plan, each run on a few hundred tokens in a process of its own.

Owns which models are measured (those that exist here; a step's model that is not made yet goes at
the pace of the one it comes from) and on which prompts. What is measured is `bench/probe.py`.
"""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

from tutelage.bench.pace import Pace
from tutelage.core.artifact import Artifact
from tutelage.core.errors import TutelageError
from tutelage.core.progress import Reporter
from tutelage.graph import Node
from tutelage.models import source as models
from tutelage.pipeline import Planned
from tutelage.recipe.engines import HERE, EngineTable
from tutelage.recipe.tables import Runtime, Sampling, Score
from tutelage.recipe.training import Training
from tutelage.store import Store

PROMPTS = 16


def measure(
    planned: Sequence[Planned], store: Store, *, runtime: Runtime, reporter: Reporter
) -> dict[str, Pace]:
    """The pace of every model that waiting steps use and that is here, by its node's name.

    A model that cannot be run is told and left out.
    """
    by_name = {item.node.name: item for item in planned}
    engines: dict[str, EngineTable] = {}
    trained: dict[str, int] = {}
    teachers: set[str] = set()
    for item in planned:
        if item.status not in ("run", "resume"):
            continue
        for role, name in item.node.inputs.items():
            if by_name[name].node.produces != "model":
                continue
            name = existing(name, by_name)
            engines.setdefault(name, item.node.engines.get(role, HERE))
            if isinstance(item.node.step, Score):
                teachers.add(name)
            if isinstance(item.node.step, Training) and role == "model":
                trained[name] = max(trained.get(name, 0), item.node.step.pack_tokens)
    found: dict[str, Pace] = {}
    alike: dict[str, list[str]] = {}  # two names of one model, run alike, are measured once
    for name, table in engines.items():
        key = f"{by_name[name].fingerprint} {table}"
        alike[key] = [*alike.get(key, []), name]
    for names in alike.values():
        artifact = _artifact(by_name[names[0]], store)
        called = " and ".join(names)
        if artifact is None:
            reporter.say(f"{called}: not measured, it is not on this machine (run fetches it)")
            continue
        reporter.say(f"measuring {called}")
        train = max(trained.get(name, 0) for name in names)
        prompts = _prompts(planned, store)
        try:
            pace = _in_a_process(artifact, engines[names[0]], prompts, runtime, train)
        except TutelageError as error:
            reporter.say(f"{called}: not measured: {error}")
            continue
        for name in names:
            found[name] = pace if name in teachers else replace(pace, targets=())
    return found


def existing(name: str, by_name: Mapping[str, Planned]) -> str:
    """The nearest model that is there: this one, or the one that it will be made from."""
    item = by_name[name]
    while item.status not in ("cached", "outside") and "model" in item.node.inputs:
        item = by_name[item.node.inputs["model"]]
    return item.node.name


def _artifact(item: Planned, store: Store) -> Artifact | None:
    node: Node = item.node
    if node.source is None:
        return store.find(node.stage, item.fingerprint)
    located = models.locate(node.source, memo=store.memo)
    return located.as_artifact(item.identity) if located.path else None


def _prompts(planned: Sequence[Planned], store: Store) -> list[Any]:
    """What the plan's own steps will ask, where that is made; else the bundled prompts."""
    from tutelage.records import prompt_messages, read_rows  # pyarrow, which a plan rarely needs

    by_name = {item.node.name: item for item in planned}
    for item in planned:
        if isinstance(item.node.step, Sampling):
            data = by_name[item.node.inputs["prompts"]]
            if artifact := store.find(data.node.stage, data.fingerprint):
                rows = islice(read_rows(artifact.shards()), PROMPTS)
                return [prompt_messages(row) for row in rows]
    from tutelage.bench.material import bundled_messages

    return bundled_messages(PROMPTS)


def _in_a_process(
    artifact: Artifact, table: EngineTable, prompts: Sequence[Any], runtime: Runtime, train: int
) -> Pace:
    if runtime.threads:
        os.environ["OMP_NUM_THREADS"] = str(runtime.threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_probe, artifact, table, prompts, runtime.device, train).result()


def _probe(
    artifact: Artifact, table: EngineTable, prompts: Sequence[Any], device: str, train: int
) -> Pace:
    from tutelage.bench.probe import ANSWERS, probe

    return probe(artifact, table, prompts, device=device, batch_rows=ANSWERS, train_tokens=train)
