"""What files and other sources hold, by content: so that a changed file is a different step."""

import glob
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.core.errors import DataError
from tutelage.core.hashes import remembered_sha256
from tutelage.models.inspect import adapter_files
from tutelage.recipe.base import Step
from tutelage.recipe.curation import Data, DataSource, Funnel
from tutelage.recipe.evaluation import Evaluate, Task
from tutelage.recipe.tables import Convert, Merge
from tutelage.tasks import TASKS

CAPTURE_SETTINGS = "compression_config.yaml"
"""What DistillKit writes beside a capture."""
GYM_ROWS = 2
"""Rises when the same item of reasoning-gym becomes another row; 2: with its answer as response."""
BUNDLED_PROMPTS = Path(__file__).with_name("prompts.jsonl")


def source_files(source: DataSource) -> list[Path]:
    """The local files of a source, sorted; empty for `hub:` and `task:` sources.

    Raises DataError when a path or glob matches nothing.
    """
    name = source.source
    if name.startswith(("hub:", "task:")):
        return []
    if name.startswith("bundled:"):
        if name != "bundled:prompts":
            raise DataError(f"{name}: the only bundled data is bundled:prompts")
        return [BUNDLED_PROMPTS]
    return local_files(name)


def local_files(pattern: str) -> list[Path]:
    """The files of a path or glob, sorted. Raises DataError when there is none."""
    found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    found = [path for path in found if path.is_file()]
    if not found:
        raise DataError(
            f"{pattern}: no such file; check the path (relative to the recipe's folder)"
        )
    return found


def data_identity(step: Step, *, memo: Path) -> dict[str, Any]:
    """Content of what a step reads from outside; empty for a step that reads only others.

    sha256 of files; the version of the package behind a task.
    """
    if isinstance(step, Evaluate):
        return _tasks_identity(step.tasks, memo)
    if isinstance(step, Convert):
        files = local_files(step.source)
        beside = files[0].parent / CAPTURE_SETTINGS
        if not step.settings and beside.exists():
            files = [*files, beside]
        return {"sha256": _hashes(step.source, files, memo)}
    if isinstance(step, Merge):
        return {"sha256": _hashes(step.adapter, adapter_files(Path(step.adapter)), memo)}
    found: dict[str, Any] = {}
    if isinstance(step, Data):
        found = {str(index): _identity(source, memo) for index, source in enumerate(step.sources)}
    if isinstance(step, Funnel):
        for index, source in enumerate(step.decontaminate):
            found[f"decontaminate.{index}"] = _identity(source, memo)
    return found


def _identity(source: DataSource, memo: Path) -> dict[str, Any]:
    if source.source.startswith("task:"):
        ours = TASKS.get(source.source.removeprefix("task:"))
        made_by = (
            {"version": ours.version}
            if ours
            else {"reasoning_gym": _version("reasoning-gym"), "rows": GYM_ROWS}
        )
        return {"task": source.source, **made_by}
    if source.source.startswith("hub:"):
        return {"hub": source.source, "revision": source.revision or "main"}
    return {"sha256": _hashes(source.source, source_files(source), memo)}


def _tasks_identity(tasks: Sequence[Task], memo: Path) -> dict[str, Any]:
    """Content of the tasks' local rows; lm-eval, which words the prompts and keeps the score."""
    if not tasks:
        return {}
    found: dict[str, Any] = {"lm_eval": _version("lm_eval")}
    for task in tasks:
        for key in ("source", "shots_source"):
            if name := getattr(task, key):
                found[f"{task.name}.{key}"] = {"sha256": _hashes(name, local_files(name), memo)}
    return found


def _hashes(name: str, files: Sequence[Path], memo: Path) -> list[str]:
    try:
        return list(remembered_sha256(files, memo).values())
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error


def _version(package: str) -> str:
    """The version of the package that makes the rows: another one may make others."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
