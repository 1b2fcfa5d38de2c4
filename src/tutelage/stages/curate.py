"""Stage `curate`: what earlier steps made goes through the funnel of a data step."""

import time
from collections.abc import Iterator, Mapping

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.core.errors import DataError
from tutelage.data.evaluation import evaluation_texts, tokenizer_file
from tutelage.data.funnel import run_funnel
from tutelage.data.prepare import Dropped, Job, RawRow
from tutelage.recipe.curation import Curate
from tutelage.records import CONVERSATIONS, read_rows


def run(config: Curate, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Narrow the rows of one or more steps down; returns counts.

    Raises DataError when none is left.
    """
    started = time.monotonic()
    job = Job(
        filters=config.filters,
        tokenizer=tokenizer_file(inputs.get("tokenizer")),
        evaluation=evaluation_texts(config.decontaminate, seed=config.seed),
        compare=config.duplicates.of if config.duplicates else "",
    )

    def check(bad: int, read: int, first: Dropped) -> None:
        raise DataError(f"{first.place}: {first.reason}")  # a step's own rows are whole

    steps = several(inputs, "data")
    origin = ", ".join(artifact.stage for artifact in steps)
    counts = run_funnel(_rows(steps), job, config, work, origin=origin, on_bad=check)
    work.commit("rows", seconds=time.monotonic() - started, tokens={})
    return counts


def _rows(steps: list[Artifact]) -> Iterator[RawRow]:
    names = CONVERSATIONS.names
    for artifact in steps:
        for number, row in enumerate(read_rows(artifact.shards()), 1):
            yield RawRow(f"{artifact.stage}[{number}]", {name: row.get(name) for name in names})
