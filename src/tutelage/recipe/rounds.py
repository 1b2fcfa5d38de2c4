"""`rounds = R` of a distill step, made into the steps it stands for.

A step `d` on targets `t` of rollouts `r` becomes, with R = 2: `d-round1`, the first half of the
training on `t` as it is; `d-round2-r`, `r` answered by `d-round1`; `d-round2-t`, `t` of those
answers; and `d`, the second half on them. Both halves are of one schedule. Steps between rollouts
and targets (`screen`) are repeated too. `r` and `t` themselves stay as they are, so what is stored
of them is taken.
"""

from typing import Any

from tutelage.core.errors import RecipeError
from tutelage.recipe.base import Step
from tutelage.recipe.engines import EngineTable, Server
from tutelage.recipe.screening import Screen
from tutelage.recipe.tables import Recipe, Rollout, Score
from tutelage.recipe.training import Distill

SEED_STRIDE = 1_000_003
"""Between the seeds of a round's answers and the next one's: far from those of a matrix."""


def expanded(recipe: Recipe) -> Recipe:
    """The recipe with every distill step of several rounds as visible steps of one round each.

    Raises RecipeError: targets that cannot be refreshed, epochs or max_steps that do not divide, a
    name that is taken.
    """
    steps: dict[str, Step] = {}
    engines = dict(recipe.engines)
    for name, step in recipe.steps.items():
        if isinstance(step, Distill) and step.rounds > 1:
            engines |= _engines_of_students(name, step, recipe)
            for new, made in _rounds(name, step, recipe).items():
                if new != name and (new in recipe.steps or new in recipe.models):
                    raise RecipeError(
                        f"steps.{new}: the rounds of {name!r} make a step of this name; rename one"
                    )
                steps[new] = made
        else:
            steps[name] = step
    return recipe.model_copy(update={"steps": steps, "engines": engines})


def _engines_of_students(name: str, step: Distill, recipe: Recipe) -> dict[str, EngineTable]:
    """The student of a round answers as the first one did; no server has it yet. RecipeError."""
    engine = recipe.engines.get(step.model)
    if engine is None:
        return {}
    if isinstance(engine, Server):
        raise RecipeError(
            f"steps.{name}.rounds: {step.model!r} answers behind a server, which has no student "
            "that is still to be trained; run it by vllm or transformers"
        )
    students = [f"{name}-round{number}" for number in range(1, step.rounds)]
    return {student: recipe.engines.get(student, engine) for student in students}


def _rounds(name: str, step: Distill, recipe: Recipe) -> dict[str, Step]:
    """The steps of all rounds in their order; the last is `name` itself."""
    for field in ("epochs", "max_steps"):
        value = getattr(step, field)
        if value % step.rounds:
            raise RecipeError(
                f"steps.{name}.{field}: {value} cannot be shared by {step.rounds} rounds; take "
                f"{-(-value // step.rounds) * step.rounds}"
            )
    chain = _chain(name, step, recipe)
    made: dict[str, Step] = {}
    model, targets = step.model, step.targets
    for number in range(1, step.rounds + 1):
        if number > 1:
            targets = _refreshed(f"{name}-round{number}-", chain, recipe, model, number, made)
        own = name if number == step.rounds else f"{name}-round{number}"
        edges = [
            round(step.schedule[0] + step.part * n / step.rounds, 12) for n in (number - 1, number)
        ]
        made[own] = step.model_copy(
            update={
                "model": model, "targets": targets, "rounds": 1,
                "epochs": step.epochs // step.rounds, "max_steps": step.max_steps // step.rounds,
                "schedule": tuple(edges),
            }
        )  # fmt: skip
        model = own
    return made


def _chain(name: str, step: Distill, recipe: Recipe) -> list[str]:
    """Names from the rollout step to the targets, which `step` reads. Raises RecipeError."""
    found, at = [], step.targets
    while isinstance(here := recipe.steps.get(at), Score | Screen):
        if at in found:
            raise RecipeError(f"steps.{at}.rollouts: the steps read each other in a circle")
        found.append(at)
        at = here.rollouts
    if not isinstance(here, Rollout):
        raise RecipeError(
            f"steps.{name}.rounds: the targets {step.targets!r} must come from a rollout step "
            f"through score, but {at!r} is " + (f"of stage {here.stage}" if here else "no step")
        )
    if here.model != step.model:
        raise RecipeError(
            f"steps.{name}.rounds: {at!r} is answered by {here.model!r}, but the model in training "
            f"is {step.model!r}; rounds refresh the answers of the student itself"
        )
    return [at, *reversed(found)]


def _refreshed(
    prefix: str, chain: list[str], recipe: Recipe, model: str, number: int, made: dict[str, Step]
) -> str:
    """Add the chain's steps once more, answered by `model`; returns the name of the targets."""
    below = ""
    for old in chain:
        step = recipe.steps[old]
        update: dict[str, Any] = {}
        if isinstance(step, Rollout | Score):
            update["seed"] = (step.seed + (number - 1) * SEED_STRIDE) % 2**63
        if isinstance(step, Rollout):
            update["model"] = model
        else:
            update["rollouts"] = below
        if isinstance(step, Screen) and step.student:
            update["student"] = model
        below = prefix + old
        made[below] = step.model_copy(update=update)
    return below
