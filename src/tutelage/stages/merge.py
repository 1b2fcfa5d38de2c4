"""Stage `merge`: an adapter from outside, or of an earlier run, merged into its base."""

import time
from collections.abc import Mapping
from pathlib import Path

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.models.adapters import apply, base_fingerprint
from tutelage.models.load import load_for_training, save_student
from tutelage.recipe.tables import Merge


def run(config: Merge, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Write the whole model. Raises ModelError where the adapter is for another base."""
    started = time.monotonic()
    loaded = load_for_training(inputs["model"], device=work.device)
    memo = work.scratch("base") / "hashes.json"
    apply(loaded, Path(config.adapter), base=base_fingerprint(loaded.directory, memo=memo))
    save_student(loaded, work.path / "model")
    work.commit("merge", seconds=time.monotonic() - started, tokens={})
    return {"parameters": sum(p.numel() for p in loaded.model.parameters())}
