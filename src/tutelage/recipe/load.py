"""Reading a recipe: TOML, `--set` and the matrix in; typed tables or one clear line out."""

import difflib
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutelage.core.errors import RecipeError
from tutelage.recipe.base import Table
from tutelage.recipe.curation import Columns, DataSource
from tutelage.recipe.engines import ENGINE_TYPES
from tutelage.recipe.evaluation import Arm, Claim, Task
from tutelage.recipe.rounds import expanded
from tutelage.recipe.tables import STEP_TYPES, Fleet, ModelSource, Recipe, Route, Runtime
from tutelage.recipe.training import Lora

NEW = "new"
"""The `source` of a model that is made from nothing."""
TABLES_BELOW: Mapping[str, type[Table]] = {
    "columns": Columns, "sources": DataSource, "decontaminate": DataSource, "tasks": Task,
    "claims": Claim, "arms": Arm, "routes": Route, "lora": Lora,
}  # fmt: skip
"""Tables inside a step by the key they stand under, the innermost first."""


@dataclass(frozen=True)
class Variant:
    """One cell of the matrix: its label (empty without a matrix) and its recipe."""

    label: str
    recipe: Recipe


def load(path: Path, overrides: Sequence[str] = ()) -> list[Variant]:
    """The recipe at `path` with `KEY=VALUE` overrides, one variant per cell of its matrix.

    Relative paths of sources are taken from the recipe's own folder.
    Raises RecipeError in one line: unreadable TOML, unknown keys (with the nearest known one),
    wrong types, unknown override paths.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `tutelage init {path}` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"--set {override}: expected KEY=VALUE, as steps.distill.lr=2e-5")
        raw = _with(raw, key.strip(), _value(text.strip()), f"--set {override}")
    matrix = raw.pop("matrix", {})
    return [
        Variant(label, _parse(_anchored(cell, path.parent), str(path)))
        for label, cell in _cells(raw, matrix, str(path))
    ]


def parse(raw: dict[str, Any], place: str) -> Variant:
    """The one variant of a recipe made in memory; `place` names it in errors."""
    return Variant("", _parse(raw, place))


def _cells(raw: dict[str, Any], matrix: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(matrix, Mapping) or not all(
        isinstance(v, list) and v for v in matrix.values()
    ):
        raise RecipeError(f"{place}: [matrix] maps keys to lists, as seed = [1, 2, 3]")
    if any(key.partition(".")[0] == "runtime" for key in matrix):
        raise RecipeError(f"{place}: [matrix] cannot vary [runtime], which changes no result")
    for values in itertools.product(*matrix.values()):
        cell, labels = raw, []
        for key, value in zip(matrix, values, strict=True):
            cell = _with(cell, key, value, f"{place}: [matrix] {key}")
            labels.append(f"{key.rpartition('.')[2]}={value}")
        yield ",".join(labels), cell


def _with(raw: dict[str, Any], key: str, value: Any, place: str) -> dict[str, Any]:
    """A copy of `raw` with the dotted key set; every table on the way must exist or be optional."""
    head, _, rest = key.partition(".")
    if not head:
        raise RecipeError(f"{place}: an empty key")
    if not rest:
        return {**raw, head: value}
    below = raw.get(head, {})
    if head not in raw and head in ("steps", "models"):
        raise RecipeError(f"{place}: the recipe has no [{head}]")
    if not isinstance(below, dict):
        raise RecipeError(f"{place}: {head} is not a table")
    name = rest.partition(".")[0]
    if head in ("steps", "models") and name not in below:
        raise RecipeError(f"{place}: no {head[:-1]} named {name!r}{_nearest(name, below)}")
    return {**raw, head: _with(below, rest, value, place)}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string, so that --set runtime.device=cpu needs no quotes


def _anchored(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative source paths, made relative to the recipe's folder instead of the shell's."""
    models = raw.get("models", {})
    steps = raw.get("steps", {})
    if not isinstance(models, dict) or not isinstance(steps, dict):
        return raw
    return {
        **raw,
        "models": {name: _fixed(t, folder, "tokenizer", "adapter") for name, t in models.items()},
        "steps": {name: _fixed_step(step, folder) for name, step in steps.items()},
    }


def _fixed_step(step: Any, folder: Path) -> Any:
    if not isinstance(step, dict):
        return step
    below = {
        key: [_fixed(table, folder) for table in step[key]]
        for key in ("sources", "decontaminate", "tasks")
        if isinstance(step.get(key), list)
    }
    return {**_fixed(step, folder, "adapter"), **below}


def _fixed(table: Any, folder: Path, *more: str) -> Any:
    if not isinstance(table, dict):
        return table
    found = {
        key: str(folder / Path(table[key]).expanduser())
        for key in ("source", "shots_source", *more)
        if isinstance(table.get(key), str) and _is_local(table[key], folder)
    }
    return {**table, **found}


def _is_local(source: str, folder: Path) -> bool:
    if source in ("", NEW):  # a folder `new` beside the recipe is `./new`
        return False
    return (
        source.startswith((".", "~"))
        or (folder / Path(source).expanduser()).exists()
        or (":" not in source and any(sign in source for sign in "*?["))
    )


def _parse(raw: dict[str, Any], place: str) -> Recipe:
    steps = raw.get("steps")
    if isinstance(steps, dict):
        seed = raw.get("seed", 0)
        raw = {**raw, "steps": {name: _seeded(step, seed) for name, step in steps.items()}}
    models = raw.get("models")
    if isinstance(models, dict):
        raw = {**raw, "models": {n: _seeded_new(m, raw.get("seed", 0)) for n, m in models.items()}}
    try:
        return expanded(Recipe.model_validate(raw))
    except ValidationError as error:
        raise RecipeError(f"{place}: {_explain(error)}") from None


def _seeded(step: Any, seed: Any) -> Any:
    """The recipe's seed is the default of every step that has one."""
    if not isinstance(step, dict) or "seed" in step:
        return step
    kind = STEP_TYPES.get(str(step.get("stage", "")))
    return {**step, "seed": seed} if kind and "seed" in kind.model_fields else step


def _seeded_new(model: Any, seed: Any) -> Any:
    """A new model's weights are drawn from the recipe's seed too."""
    if not isinstance(model, dict) or not isinstance(model.get("new"), dict):
        return model
    return {**model, "new": {"seed": seed, **model["new"]}}


def _explain(error: ValidationError) -> str:
    """The first fault of a validation, in one line, with the nearest known name."""
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    parts = [str(part) for part in fault["loc"]]
    # pydantic puts the tag of the union into the path: steps.distill.distill.lr
    tags = {"steps": STEP_TYPES, "engines": ENGINE_TYPES}.get(parts[0], {})
    if len(parts) > 2 and parts[2] in tags:
        del parts[2]
    where = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        known = _table_at(fault["loc"]).model_fields
        return f"{where}: unknown key{_nearest(parts[-1], known)}{more}"
    if fault["type"] == "union_tag_invalid":
        tag = fault.get("ctx", {}).get("tag", "")
        key = "kind" if parts[0] == "engines" else "stage"
        return f"{where}.{key}: no {key} {tag!r}{_nearest(tag, tags)}{more}"
    if fault["type"] == "union_tag_not_found" and parts[0] == "engines":
        return f"{where}: an engine needs a kind, one of {', '.join(ENGINE_TYPES)}{more}"
    if fault["type"] == "union_tag_not_found":
        return f"{where}: a step needs a stage, one of {', '.join(STEP_TYPES)}{more}"
    if fault["type"] == "missing":
        return f"{where}: is required{more}"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault["input"]
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message}{shown}{more}"


def _table_at(location: Sequence[str | int]) -> type[Table]:
    """The table type a validation error's path leads into (its last part is the unknown key)."""
    parts = [str(part) for part in location]
    if parts[0] == "steps" and len(parts) > 3:
        kind = STEP_TYPES[parts[2]]
        below = next((key for key in TABLES_BELOW if key in parts[3:-1]), "")
        return TABLES_BELOW.get(below, kind)
    if parts[0] == "engines" and len(parts) > 3:
        return ENGINE_TYPES[parts[2]]
    if parts[:2] == ["runtime", "ray"] and len(parts) > 2:
        return Fleet
    return {"models": ModelSource, "runtime": Runtime}.get(
        parts[0] if len(parts) > 1 else "", Recipe
    )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
