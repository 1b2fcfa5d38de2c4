"""Whether what runs models, programs and benchmarks is there and answers."""

import importlib.metadata
import importlib.util
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tutelage.core.artifact import Site
from tutelage.core.errors import TutelageError
from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.evals.graders import CODE, resolved
from tutelage.evals.sandbox import available
from tutelage.recipe.base import Step
from tutelage.recipe.curation import Data
from tutelage.recipe.engines import EngineTable, Server
from tutelage.recipe.evaluation import Evaluate
from tutelage.recipe.tables import Export

SECONDS = 20.0
"""A server that does not say its models' names within it is as good as down."""
CODE_TASKS = ("humaneval", "mbpp")
READS = ("score", "screen")


def installed(module: str) -> bool:
    """Whether a package can be imported, without doing it."""
    return importlib.util.find_spec(module) is not None


def check(case: Case) -> list[Finding]:
    """Every check of this file."""
    return [*_engines(case), *_fleet(case), *_sandbox(case), *_packages(case)]


def _engines(case: Case) -> Iterator[Finding]:
    asked: dict[str, tuple[EngineTable, str, bool]] = {}
    for name, node in case.nodes.items():
        if case.planned[name].status not in ("run", "resume"):
            continue
        for role, table in node.engines.items():
            to = case.inputs(name)[role]
            reads = node.stage in READS or asked.get(to, (table, "", False))[2]
            asked[to] = (table, name, reads)
    for model, (table, step, reads) in asked.items():
        yield _engine(case, model, table, step, reads)


def _engine(case: Case, model: str, table: EngineTable, step: str, reads: bool) -> Finding:
    name = f"engine of {model}"
    module = table.kind if table.extra else ""
    if module and not installed(module):
        return against(
            name, f"{step} runs it by {table.kind}, which is not installed",
            f"pip install 'tutelage[{table.extra}]'",
        )  # fmt: skip
    if not isinstance(table, Server):
        version = f" {importlib.metadata.version(module)}" if module else ", in this process"
        return ok(name, f"{table.kind}{version}")
    if reads and not table.scores:
        return against(name, f"{step} reads with it, and {table.api} only answers", "another api")
    artifact = case.artifact(model) or case.nearest(model)[1]
    if artifact is None:
        return unchecked(name, f"its tokenizer is not here yet, so {table.url} is not asked")
    from tutelage.engines.opening import opened  # torch

    once = table.model_copy(
        update={"retries": 0, "timeout_seconds": min(SECONDS, table.timeout_seconds)}
    )
    case.reporter.say(f"asking {table.url}")
    try:
        with opened("model", {"model": artifact}, Site(case.scratch, engines={"model": once})) as (
            engine
        ):
            if reads:
                engine.scorer(chunk_bytes=1 << 20)
            context = f", context {engine.context:,}" if engine.context else ""
            return ok(name, f"{table.url} answers, with the tokenizer that is here{context}")
    except TutelageError as error:
        return against(name, f"{table.url}: {error}", "start it, or mend url, model and key_env")


def _fleet(case: Case) -> Iterator[Finding]:
    runtime = case.recipe.runtime
    if runtime.executor != "ray":
        return
    if not installed("ray"):
        yield against("ray", "executor = 'ray', and it is not installed",
                      "pip install 'tutelage[ray]'")  # fmt: skip
        return
    version = importlib.metadata.version("ray")
    address = runtime.ray.address
    if address == "local":
        yield ok("ray", f"{version}, started on this machine when a step begins")
        return
    problem = _cluster_problem(address)
    if problem:
        yield against("ray", f"no cluster at {address}: {problem}",
                      "start one (ray start --head), or address = 'local'")  # fmt: skip
    else:
        yield ok("ray", f"{version}; the cluster at {address} answers")


def _cluster_problem(address: str) -> str:
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            return str(error)
        return ""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "ray status gives no answer"
    return "" if done.returncode == 0 else "ray status finds none"


def _sandbox(case: Case) -> Iterator[Finding]:
    wanted = list(_runs_programs(case))
    if not wanted:
        return
    where = ", ".join(dict.fromkeys(wanted))
    if case.recipe.runtime.sandbox == "none":
        yield warn("sandbox", f"programs of {where} run as you, with your files and network",
                   "runtime.sandbox = 'bubblewrap'")  # fmt: skip
    elif problem := available():
        yield against("sandbox", f"{where} runs programs, and there can be no sandbox: {problem}",
                      "apt-get install bubblewrap util-linux")  # fmt: skip
    else:
        yield ok("sandbox", f"bubblewrap works, for the programs of {where}")


def _runs_programs(case: Case) -> Iterator[str]:
    for name, step in case.steps(Step):
        verifier = getattr(step, "verifier", "") or (
            step.grader if isinstance(step, Evaluate) and step.tests else ""
        )
        if verifier and _is_code(case, name, verifier):
            yield name
        for task in step.tasks if isinstance(step, Evaluate) else ():
            if task.name.startswith(CODE_TASKS):
                yield f"{name} ({task.name})"


def _is_code(case: Case, name: str, verifier: str) -> bool:
    if verifier == CODE:
        return True
    rows: list[Any] = []
    for to in case.inputs(name).values():
        if case.nodes[to].produces == "conversations" and (found := case.rows(to)):
            rows += found.records[:50]
    return any(resolved(verifier, row) == CODE for row in rows)


def _packages(case: Case) -> Iterator[Finding]:
    for module, extra, why in dict.fromkeys(_needed(case)):
        if installed(module):
            continue
        yield against(module, f"{why} needs {module}, which is not installed",
                      f"pip install 'tutelage[{extra}]'")  # fmt: skip
    tasks = [task.name for _, step in case.steps(Evaluate) for task in step.tasks]
    if tasks and installed("lm_eval"):
        yield ok("lm-eval", f"{importlib.metadata.version('lm_eval')}, for {', '.join(tasks)}")


def _needed(case: Case) -> Iterator[tuple[str, str, str]]:
    from tutelage.tasks import TASKS

    for name, step in case.steps(Step):
        if isinstance(step, Evaluate) and step.tasks:
            yield "lm_eval", "evals", name
        if isinstance(step, Export):
            yield "xllamacpp", "edge", name
        if getattr(step, "verifier", "") == "math" or getattr(step, "grader", "") == "math":
            yield "math_verify", "tasks", name
        for table in getattr(step, "filters", ()):
            if table.name == "language":
                yield "py3langid", "data", name
        for source in step.sources if isinstance(step, Data) else ():
            kind, _, task = source.source.partition(":")
            if kind == "task" and task not in TASKS:
                yield "reasoning_gym", "tasks", name
