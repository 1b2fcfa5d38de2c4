"""The steps of a run as the page shows them: order, edges, labels and costs, from manifests alone.

A step is its fingerprint: names that share one are one step, counted once. What a step read but the
run does not hold (a model from outside, a removed result) becomes a step without an artifact.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.artifact import TOKEN_KINDS, Artifact
from tutelage.core.errors import ArtifactError

SHORT = 12  # digits of a fingerprint that are shown


@dataclass(frozen=True)
class Step:
    """One result of the run; `artifact` is None when only its readers are here."""

    label: str
    stage: str
    fingerprint: str
    reads: tuple[str, ...]
    """Fingerprints of its inputs, each once, in the order of its roles."""
    artifact: Artifact | None

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest, empty without an artifact."""
        return self.artifact.manifest if self.artifact else {}

    @property
    def seconds(self) -> float:
        """Working time."""
        return self.manifest.get("seconds", 0.0)

    @property
    def bytes(self) -> int:
        """Size of its files on disk."""
        return sum(entry["bytes"] for entry in self.manifest.get("files", {}).values())

    def tokens(self, kind: str) -> int:
        """Tokens of a kind."""
        return self.manifest.get("tokens", {}).get(kind, 0)


@dataclass(frozen=True)
class Run:
    """The steps in an order in which each comes after what it reads."""

    name: str
    steps: Sequence[Step]

    def label(self, fingerprint: str) -> str:
        """The names of the step with this fingerprint, or the start of the fingerprint."""
        found = (step.label for step in self.steps if step.fingerprint == fingerprint)
        return next(found, fingerprint[:SHORT])

    def of(self, *stages: str) -> list[tuple[Step, Artifact]]:
        """The finished steps of these stages, in order."""
        return [(s, s.artifact) for s in self.steps if s.artifact and s.stage in stages]

    def stage(self, fingerprint: str) -> str:
        """The stage that made this fingerprint; empty when nothing here knows."""
        return next((s.stage for s in self.steps if s.fingerprint == fingerprint), "")

    def totals(self) -> dict[str, float]:
        """Seconds, bytes and tokens of each kind over all steps, each step once."""
        return {
            "seconds": sum(step.seconds for step in self.steps),
            "bytes": sum(step.bytes for step in self.steps),
            **{kind: sum(step.tokens(kind) for step in self.steps) for kind in TOKEN_KINDS},
        }


def read_run(name: str, artifacts: Mapping[str, Artifact]) -> Run:
    """The run over its artifacts by step name; pages themselves (`report` steps) are left out.

    The order depends on what the artifacts hold, not on the order of the mapping.
    """
    names: dict[str, list[str]] = {}
    by_mark: dict[str, Artifact] = {}
    for key in sorted(artifacts):
        if artifacts[key].stage != "report":
            names.setdefault(artifacts[key].fingerprint, []).append(key)
            by_mark[artifacts[key].fingerprint] = artifacts[key]
    steps = {mark: _step(" = ".join(names[mark]), by_mark[mark]) for mark in by_mark}
    for artifact in by_mark.values():
        for role, entry in artifact.manifest["inputs"].items():
            if entry["fingerprint"] not in by_mark:
                absent = _absent(role, entry)
                # The role `teacher` names it best, whichever reader comes first.
                if absent.fingerprint not in steps or absent.label == "teacher":
                    steps[absent.fingerprint] = absent
    return Run(name, _ordered(steps))


def _step(label: str, artifact: Artifact) -> Step:
    marks = [entry["fingerprint"] for entry in artifact.manifest["inputs"].values()]
    reads = tuple(dict.fromkeys(marks))
    return Step(label, artifact.stage, artifact.fingerprint, reads, artifact)


def _absent(role: str, entry: Mapping[str, Any]) -> Step:
    mark = entry["fingerprint"]
    label = "teacher" if role == "teacher" else mark[:SHORT]
    return Step(label, entry.get("stage", "external"), mark, (), None)


def _ordered(steps: Mapping[str, Step]) -> list[Step]:
    """Depth first from what was finished first, so that the order is that of the work."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        for mark in step.reads:
            visit(steps[mark])
        ordered.setdefault(step.fingerprint, step)

    for step in sorted(steps.values(), key=lambda s: (s.manifest.get("finished", ""), s.label)):
        visit(step)
    return list(ordered.values())


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ArtifactError when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); `tutelage verify --repair` removes the damaged "
            "artifact so that the next run makes it again"
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`. Raises ArtifactError when one is no JSON."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error})") from error
