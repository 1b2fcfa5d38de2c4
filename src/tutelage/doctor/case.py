"""The patient: a recipe's graph, what of it is here already, and rows of its own to look at."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, EngineError, ModelError, TutelageError
from tutelage.core.fingerprint import fingerprint
from tutelage.core.progress import Reporter
from tutelage.data.identity import data_identity
from tutelage.data.sources import read_source
from tutelage.graph import Node, build, identities
from tutelage.models import source as models
from tutelage.pipeline import Planned, plan
from tutelage.recipe.base import Step
from tutelage.recipe.curation import Data
from tutelage.recipe.load import Variant
from tutelage.recipe.tables import Recipe
from tutelage.records import read_rows
from tutelage.store import Store

MOST_ROWS = 2_000
"""Rows of a step that are looked at; a source that is read for it gives no more either."""


@dataclass(frozen=True)
class Rows:
    """Rows of a conversations step."""

    records: Sequence[Mapping[str, Any]]
    note: str = ""
    """In what they may differ from the step's own; empty: they are the step's own, all of them."""


@dataclass(frozen=True)
class Pair:
    """A student and a teacher that a step brings together, by the names of their nodes."""

    step: str
    student: str
    teacher: str


@dataclass
class Case:
    """One cell of a recipe, and what is on this machine of it."""

    recipe: Recipe
    nodes: Mapping[str, Node]
    planned: Mapping[str, Planned]
    outside: Mapping[str, models.External]
    store: Store
    reporter: Reporter
    scratch: Path
    refusal: str = ""
    """Why `tutelage plan` refuses its models, data or tasks; empty: it does not."""
    mismatch: bool = False
    """Whether that is because student and teacher have other vocabularies."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What one check found and another needs, such as loaded tokenizers."""
    problems: dict[str, str] = field(default_factory=dict)
    """Why the rows of a step cannot be had, by its name."""
    _rows: dict[str, Rows | None] = field(default_factory=dict)

    @classmethod
    def open(
        cls, variants: Sequence[Variant], store: Store, *, reporter: Reporter, scratch: Path
    ) -> "Case":
        """The first cell of the recipe. Raises RecipeError as a plan; see `refusal`."""
        first = variants[:1]
        nodes = build(first)
        outside = {
            node.name: models.locate(node.source, memo=store.memo) for node in nodes if node.source
        }
        refusal, mismatch = "", False
        try:
            planned = plan(first, store)
        except (ModelError, DataError, EngineError) as error:  # a finding, not the end
            refusal, mismatch = str(error), isinstance(error, ModelError)
            planned = _planned_anyway(nodes, outside, store)
        return cls(
            first[0].recipe,
            {_plain(node.name): node for node in nodes}, {_plain(p.node.name): p for p in planned},
            {_plain(name): one for name, one in outside.items()},
            store, reporter, scratch, refusal, mismatch,
        )  # fmt: skip

    def inputs(self, name: str) -> dict[str, str]:
        """Role -> name of what a node reads."""
        return {role: _plain(to) for role, to in self.nodes[name].inputs.items()}

    def steps(self, *kinds: type[Step]) -> Iterator[tuple[str, Any]]:
        """(name, step) of every step of these kinds, in the graph's order."""
        for name, node in self.nodes.items():
            if node.step is not None and isinstance(node.step, kinds):
                yield name, node.step

    def identity(self, name: str) -> str:
        """Fingerprint of what a node is: two names of one result are equal."""
        return self.planned[name].fingerprint

    def artifact(self, name: str) -> Artifact | None:
        """The model or result as far as it is here."""
        node, item = self.nodes[name], self.planned[name]
        if node.source is None:
            return self.store.find(node.stage, item.fingerprint)
        located = self.outside[name]
        return located.as_artifact(item.identity) if located.path else None

    def nearest(self, name: str) -> tuple[str, Artifact | None]:
        """The model itself where it is here, else the nearest one that it will be made from."""
        while (artifact := self.artifact(name)) is None and "model" in self.inputs(name):
            name = self.inputs(name)["model"]
        return name, artifact

    def root(self, name: str) -> str:
        """The model from which a model has its tokenizer."""
        while above := self.inputs(name).get("tokenizer_of") or self.inputs(name).get("model"):
            name = above
        return name

    def directory(self, name: str) -> Path | None:
        """Where the tokenizer and the config of a model lie; None until they are here."""
        artifact = self.nearest(name)[1] or self.artifact(self.root(name))
        if artifact is None:
            return None
        return artifact.path if artifact.stage == "external" else artifact.path / "model"

    def asking(self, name: str) -> str:
        """The step whose prompts a `distill` or `online` step learns answers to."""
        name = self.inputs(name).get("targets", name)
        while "rollouts" in self.inputs(name):
            name = self.inputs(name)["rollouts"]
        return name

    def teachers(self, name: str) -> list[str]:
        """Who scores in a step: for `distill`, in the step whose targets it learns from."""
        inputs = self.inputs(name)
        if "targets" in inputs:
            return self.teachers(inputs["targets"])
        further = [to for role, to in inputs.items() if role.startswith("routes.")]
        return ([inputs["teacher"]] if "teacher" in inputs else []) + further

    def taught(self) -> list[Pair]:
        """Who learns from whom by distillation, each pair once."""
        found: dict[tuple[str, str], Pair] = {}
        for name, node in self.nodes.items():
            if node.stage in ("distill", "online"):
                student = self.inputs(name)["model"]
                for teacher in self.teachers(name):
                    found.setdefault((student, teacher), Pair(name, student, teacher))
        return list(found.values())

    def rows(self, name: str) -> Rows | None:
        """Rows of a conversations step: its own, or those it will be made from; None for none."""
        if name not in self._rows:
            try:
                self._rows[name] = self._found_rows(name)
            except TutelageError as error:
                self._rows[name], self.problems[name] = None, str(error)
        return self._rows[name]

    def _found_rows(self, name: str) -> Rows | None:
        if artifact := self.artifact(name):
            records = list(islice(read_rows(artifact.shards()), MOST_ROWS + 1))
            cut = f"the first {MOST_ROWS} rows" if len(records) > MOST_ROWS else ""
            return Rows(records[:MOST_ROWS], cut)
        step = self.nodes[name].step
        if isinstance(step, Data):
            return self._read(name, step)
        inputs = {
            to: rows
            for to in self.inputs(name).values()
            if self.nodes[to].produces == "conversations" and (rows := self.rows(to))
        }
        if not inputs:
            return None
        records = [record for rows in inputs.values() for record in rows.records]
        return Rows(records, f"rows of {', '.join(inputs)}, which it is made from")

    def _read(self, name: str, step: Data) -> Rows | None:
        """The step made in the scratch folder, of the beginning of each source."""
        if any(source.source.startswith("hub:") for source in step.sources):
            return None
        cut = False
        sources = []
        for source in step.sources:
            if not source.limit or source.limit > MOST_ROWS:
                further = islice(read_source(source, seed=step.seed), MOST_ROWS, None)
                cut |= next(further, None) is not None
                source = source.model_copy(update={"limit": MOST_ROWS})
            sources.append(source)
        inputs = {
            role: artifact
            for role, to in self.inputs(name).items()
            if (artifact := self.nearest(to)[1])
        }
        if len(inputs) < len(self.inputs(name)):
            return None
        work = WorkDir.open(self.scratch / name, reporter=Reporter(quiet=True))
        stage = importlib.import_module("tutelage.stages.data")
        stage.run(step.model_copy(update={"sources": tuple(sources)}), inputs, work)
        records = list(read_rows(sorted(work.path.glob("*.parquet"))))
        note = f"of the first {MOST_ROWS} rows of its sources" if cut else ""
        return Rows(records[:MOST_ROWS], note)


def _planned_anyway(
    nodes: Sequence[Node], outside: Mapping[str, models.External], store: Store
) -> list[Planned]:
    known = identities(
        nodes, lambda node: outside[node.name].identity,
        lambda step: data_identity(step, memo=store.memo),
    )  # fmt: skip

    def status(node: Node) -> str:
        if node.step is None:
            return "outside"
        return "cached" if store.find(node.stage, fingerprint(known[node.name])) else "run"

    return [Planned(node, known[node.name], status(node)) for node in nodes]


def _plain(name: str) -> str:
    """A node's name without the label of its matrix cell: only one cell is looked at."""
    return name.partition("@")[0]
