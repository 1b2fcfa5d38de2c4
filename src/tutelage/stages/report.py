"""Stage `report`: the page of a run, written from the artifacts of the steps behind it."""

import time
from collections.abc import Mapping

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.recipe.tables import Report
from tutelage.report.page import write_page


def run(config: Report, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Write `index.html`; the inputs are named by their steps."""
    started = time.monotonic()
    write_page(work.path / "index.html", ", ".join(config.steps), inputs)
    work.commit("page", seconds=time.monotonic() - started, tokens={})
    return {"steps": len(inputs)}
