"""Stage `report`: the page of a run, written from the artifacts of the steps behind it."""

import time
from collections.abc import Mapping

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.recipe.tables import Report
from tutelage.report.page import write_page


def run(config: Report, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Write `index.html`; the inputs are named by their steps."""
    started = time.monotonic()
    named = {artifact.fingerprint: name for name, artifact in inputs.items() if ":" not in name}
    shown = {
        name: artifact
        for name, artifact in inputs.items()
        # `student:source` is what a pruned model was cut from, often the teacher under its own name
        if ":" not in name or artifact.fingerprint not in named
    }
    write_page(work.path / "index.html", config.title, shown)
    work.commit("page", seconds=time.monotonic() - started, tokens={})
    return {"steps": len(inputs)}
