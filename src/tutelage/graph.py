"""The graph of a recipe's steps: who reads whom, in an order that can be run, and each identity."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tutelage.core.errors import RecipeError
from tutelage.core.fingerprint import fingerprint
from tutelage.recipe.base import Step
from tutelage.recipe.engines import EngineTable, Server
from tutelage.recipe.evaluation import Ablation
from tutelage.recipe.load import Variant
from tutelage.recipe.screening import Screen
from tutelage.recipe.tables import (
    Merge,
    ModelSource,
    New,
    Prune,
    Recipe,
    Report,
    Score,
    references,
    settings,
)

KIND_NAMES = {
    "model": "a model", "conversations": "conversations (a data or synthesize step)",
    "rollouts": "a rollout or screen step", "targets": "targets (a score or convert step)",
    "scores": "an evaluate step",
}  # fmt: skip

TOKENIZER_ROLES = {"new": ("tokenizer_of",), "convert": ("model",)}
"""Inputs by stage of which only the tokenizer is read; of other stages, `tokenizer`."""


@dataclass(frozen=True)
class Node:
    """One thing to have: a step, or a model from outside (then `step` is None)."""

    name: str
    step: Step | None
    source: ModelSource | None
    inputs: Mapping[str, str]
    """Role -> name of the node read."""
    engines: Mapping[str, EngineTable] = field(default_factory=dict)
    """Role -> how its model is run, where the recipe says something of it."""

    @property
    def stage(self) -> str:
        """The stage, or `external`."""
        return self.step.stage if self.step else "external"

    @property
    def produces(self) -> str:
        """The kind of its result."""
        return self.step.produces if self.step else "model"


def build(variants: Sequence[Variant], *, until: str = "") -> list[Node]:
    """The nodes of all variants in an order in which each comes after what it reads.

    With `until`, only the named step and what it needs. Raises RecipeError on an unknown or
    unfit reference, a cycle, or a name that is both a model and a step.
    """
    nodes: dict[str, Node] = {}
    for variant in variants:
        suffix = f"@{variant.label}" if variant.label else ""
        for node in _of_recipe(variant.recipe):
            renamed = {role: name + suffix for role, name in node.inputs.items()}
            name = node.name + suffix
            nodes[name] = replace(node, name=name, inputs=renamed)
    for name, step in variants[0].recipe.steps.items():
        if isinstance(step, Ablation):
            nodes[name] = _over_all_cells(name, step, variants, nodes)
    ordered = _ordered(nodes)
    if not until:
        return ordered
    wanted = [name for name in nodes if until in (name, name.partition("@")[0])]
    if not wanted:
        raise RecipeError(f"--until {until}: no such step{_nearest(until, nodes)}")
    needed = closure(nodes, wanted)
    return [node for node in ordered if node.name in needed]


def closure(nodes: Mapping[str, Node], names: Iterable[str]) -> set[str]:
    """The named nodes and everything they read, directly or not."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += nodes[name].inputs.values()
    return seen


def identities(
    nodes: Sequence[Node], external: Callable[[Node], Mapping[str, Any]],
    data_identity: Callable[[Step], Any],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The identity of each node: stage, version, settings, outside content, identities of inputs.

    Two nodes with equal identities are one result, whatever they are called.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        if node.step is None:
            found[node.name] = {"stage": "external", **external(node)}
            continue
        found[node.name] = {
            "stage": node.stage,
            "version": node.step.version,
            "config": settings(node.step),
            "inputs": {role: fingerprint(found[name]) for role, name in node.inputs.items()},
        }
        if outside := data_identity(node.step):
            found[node.name]["outside"] = outside
        meanings = {role: engine.meaning() for role, engine in node.engines.items()}
        if meanings := {role: meaning for role, meaning in meanings.items() if meaning}:
            found[node.name]["engines"] = meanings
    return found


def _of_recipe(recipe: Recipe) -> list[Node]:
    if both := set(recipe.models) & set(recipe.steps):
        raise RecipeError(f"{min(both)!r} names both a model and a step; rename one")
    nodes: dict[str, Node] = {}
    for name, source in recipe.models.items():
        if source.new:
            step = New(stage="new", **source.new.model_dump())
            nodes[name] = Node(name, step, None, _inputs(step))
            continue
        base = f"{name}:source" if source.is_pruned or source.adapter else name
        nodes[base] = Node(base, None, source, {})
        if source.is_pruned:
            step = Prune(
                stage="prune", model=base,
                drop_layers=source.drop_layers, keep_layers=source.keep_layers,
            )  # fmt: skip
            nodes[name] = Node(name, step, None, {"model": base})
        if source.adapter:
            step = Merge(stage="merge", model=base, adapter=source.adapter)
            nodes[name] = Node(name, step, None, {"model": base})
    for name, step in recipe.steps.items():
        nodes[name] = Node(name, step, None, _inputs(step), _engines(step, recipe))
    for name, node in nodes.items():
        if isinstance(node.step, New) and name in recipe.models:
            _check_references(f"models.{name}.new", node.step, nodes)
    for name, step in recipe.steps.items():
        _check_references(f"steps.{name}", step, nodes)
        _check_arms(name, step, nodes)
    _check_engines(recipe, nodes)
    return [
        _with_ancestors(node, nodes)
        for node in nodes.values()
        if not isinstance(node.step, Ablation)  # it stands over all cells, not in one
    ]


def _engines(step: Step, recipe: Recipe) -> dict[str, EngineTable]:
    return {
        role: recipe.engines[name]
        for role, _, name in references(step)
        if role.partition(".")[0] in step.engine_roles and name in recipe.engines
    }


def _check_engines(recipe: Recipe, nodes: Mapping[str, Node]) -> None:
    """A served model has a server and only answers and reads; targets are what engines can give."""
    for name in recipe.engines:
        if name not in nodes or nodes[name].produces != "model":
            models = {n: node for n, node in nodes.items() if node.produces == "model"}
            raise RecipeError(
                f"engines.{name}: no model or step that makes one{_nearest(name, models)}"
            )
    served = {name for name, source in recipe.models.items() if source.is_served}
    for name in served:
        if not isinstance(recipe.engines.get(name), Server):
            raise RecipeError(
                f"models.{name}: a served model needs [engines.{name}], kind = 'server'"
            )
    for name, step in recipe.steps.items():
        for role, kind, to in references(step):
            key = role.partition(".")[0]
            reads = (*step.engine_roles, *TOKENIZER_ROLES.get(step.stage, ("tokenizer",)))
            if kind == "model" and to in served and key not in reads:
                raise RecipeError(
                    f"steps.{name}.{key}: {to!r} is served elsewhere: it can "
                    f"answer and read, but stage {step.stage} needs its weights here"
                )
        if isinstance(step, Score):
            try:
                step.top(_engines(step, recipe).values())
            except ValueError as error:
                raise RecipeError(f"steps.{name}: {error}") from None
        if isinstance(step, Screen) and step.delta_ifd:
            for role, engine in _engines(step, recipe).items():
                if not engine.scores:
                    raise RecipeError(
                        f"steps.{name}.{role}: its engine only answers, it cannot read; take "
                        "vllm's or sglang's"
                    )


def _inputs(step: Step) -> dict[str, str]:
    return {role: to for role, _, to in references(step)}


def _check_references(place_of: str, step: Step, nodes: Mapping[str, Node]) -> None:
    for role, kind, to in references(step):
        place = f"{place_of}.{role.partition('.')[0]}"
        if to not in nodes:
            raise RecipeError(f"{place}: no step or model {to!r}{_nearest(to, nodes)}")
        if kind not in ("any", nodes[to].produces):
            found = f"of stage {nodes[to].stage}" if nodes[to].step else "a model"
            raise RecipeError(f"{place}: needs {KIND_NAMES[kind]}, but {to!r} is {found}")


def _check_arms(name: str, step: Step, nodes: Mapping[str, Node]) -> None:
    for arm, table in step.arms.items() if isinstance(step, Ablation) else ():
        for to, key in ((arm, ""), (table.start, ".start")):
            if to and to not in nodes:
                raise RecipeError(
                    f"steps.{name}.arms.{arm}{key}: no step or model {to!r}{_nearest(to, nodes)}"
                )


def _over_all_cells(
    name: str, step: Ablation, variants: Sequence[Variant], nodes: Mapping[str, Node]
) -> Node:
    """A page over the whole matrix reads the scores of every cell and all that is behind them."""
    _ordered(nodes)  # a cycle is told as such before it is walked
    suffixes = [f"@{variant.label}" if variant.label else "" for variant in variants]
    scores = [score + suffix for suffix in suffixes for score in step.scores]
    return Node(name, step, None, {node: node for node in sorted(closure(nodes, scores))})


def _with_ancestors(node: Node, nodes: Mapping[str, Node]) -> Node:
    """A report reads every step behind the ones it names, under their names, which it shows."""
    if not isinstance(node.step, Report):
        return node
    _ordered(nodes)  # a cycle is told as such before it is walked
    return Node(
        node.name, node.step, None,
        {name: name for name in sorted(closure(nodes, node.step.steps))},
    )  # fmt: skip


def _ordered(nodes: Mapping[str, Node]) -> list[Node]:
    """Depth first, in the recipe's own order where the graph leaves a choice."""
    state: dict[str, str] = {}
    ordered: list[Node] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == "done":
            return
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise RecipeError(f"the steps read each other in a circle: {cycle}")
        for needed in nodes[name].inputs.values():
            visit(needed, (*path, name))
        state[name] = "done"
        ordered.append(nodes[name])

    for name in nodes:
        visit(name, ())
    return ordered


def _nearest(name: str, known: Iterable[str]) -> str:
    names = [n for n in known if ":" not in n]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
