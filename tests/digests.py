"""What a run left, by content: to say that two runs ended with the same bytes."""

import json
from pathlib import Path

REPEATABLE = ("data", "prune", "synthesize", "sft", "rollout", "score", "distill", "evaluate")
"""Stages whose every byte must agree; a report and an export also tell how long things took."""


def digests(store: Path) -> dict[str, str]:
    """Every file of the repeatable stages by step, with its sha256."""
    steps = json.loads((store / "runs/tiny/run.json").read_text())["steps"]
    found = {}
    for step, entry in steps.items():
        if entry["stage"] in REPEATABLE:
            manifest = store / "artifacts" / entry["stage"] / entry["fingerprint"] / "manifest.json"
            for name, file in json.loads(manifest.read_text())["files"].items():
                found[f"{step}/{name}"] = file["sha256"]
    return found
