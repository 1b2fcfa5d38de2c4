"""Stage `data`: sources in, the conversations worth keeping out, and every drop with its reason."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.data.evaluation import evaluation_texts, tokenizer_file
from tutelage.data.funnel import run_funnel
from tutelage.data.prepare import Dropped, Job, RawRow, raw_row
from tutelage.data.sources import read_source
from tutelage.recipe.curation import Data, DataSource


def run(config: Data, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Read, filter, narrow down, shuffle, cut; returns counts.

    Raises DataError when more than `max_bad_share` of the rows are bad, or none is left.
    """
    started = time.monotonic()
    job = Job(
        sources=config.sources,
        names=tuple(map(_name, config.sources)),
        filters=config.filters,
        tokenizer=tokenizer_file(inputs.get("tokenizer")),
        evaluation=evaluation_texts(config.decontaminate, seed=config.seed),
        compare=config.duplicates.of if config.duplicates else "",
    )

    def check(bad: int, read: int, first: Dropped) -> None:
        line = f"{first.place}: {first.reason}"
        if bad > config.max_bad_share * read:
            raise DataError(
                f"{bad} of {read} rows are bad (max_bad_share = {config.max_bad_share}), "
                f"first: {line}"
            )
        work.reporter.say(f"  {bad} bad rows set aside, first: {line}")

    origin = ", ".join(source.source for source in config.sources)
    counts = run_funnel(_rows(config), job, config, work, origin=origin, on_bad=check)
    work.commit("rows", seconds=time.monotonic() - started, tokens={})
    return counts


def _rows(config: Data) -> Iterator[RawRow]:
    for number, source in enumerate(config.sources):
        for place, row in read_source(source, seed=config.seed):
            yield raw_row(place, row, number)


def _name(source: DataSource) -> str:
    """A source's short name: files by their own name, so that no folder of a machine is kept."""
    name = source.source
    return name if name.startswith(("hub:", "task:", "bundled:")) else Path(name).name
