"""Stage `evaluate`: models against their teacher, on graded tests, and on standard tasks.

Each of the three has a file of its own beside this one; here they share the loading of models, the
memory of answers and the order of work.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.core.files import write_json
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.evaluation import Evaluate
from tutelage.stages.evaluate.distance import Distance
from tutelage.stages.evaluate.tests import Tests


def run(config: Evaluate, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Measure each model; `scores.json` holds the figures, the Parquet files the answers.

    Raises DataError for a test without gold answers or a task that cannot be had, EngineError where
    programs must run and there is no sandbox.
    """
    models = several(inputs, "models")
    scores: dict[str, Any] = {"mode": config.mode, "models": [], "differences": [], "tests": []}
    with Tests(config, inputs, work) as tests:
        tests.check(len(models))
        distance = Distance(config, inputs, work) if config.teacher else None
        for index, model in enumerate(models):
            loaded = _once(model, work)
            if distance:
                distance.measure(index, model, loaded)
            tests.measure(index, model, loaded)
    if distance:
        scores |= distance.finish(models)
    scores["tests"] = tests.finish(models)
    write_json(work.path / "scores.json", scores)
    return _summary(scores)


def _once(model: Artifact, work: WorkDir) -> Any:
    """Loads the model when it is first asked for: never, where all its parts are kept."""

    @cache
    def load() -> Loaded:
        return load_for_inference(model, device=work.device)

    return load


def _summary(scores: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {"prompts": scores["prompts"]} if "prompts" in scores else {}
    for index, entry in enumerate(scores["models"][:-1]):
        found[f"forward_kl.{index}"] = entry["metrics"]["forward_kl"]["estimate"]
    for number, test in enumerate(scores["tests"]):
        for index, entry in enumerate(test["models"]):
            found[f"accuracy.{number}.{index}"] = entry["metrics"]["accuracy"]["estimate"]
    return found
