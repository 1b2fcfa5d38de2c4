"""Where results live on disk: artifacts by fingerprint, runs by name."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.artifact import MANIFEST, Artifact, open_artifact, tidy
from tutelage.core.errors import ArtifactError
from tutelage.core.files import write_json


@dataclass(frozen=True)
class Store:
    """A folder of artifacts and runs; several recipes and processes may share one."""

    root: Path

    def place(self, stage: str, fingerprint: str) -> Path:
        """Where the artifact of this identity is, or will be."""
        return self.root / "artifacts" / stage / fingerprint

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The finished artifact, or None. Raises ArtifactError when it is there but damaged."""
        place = self.place(stage, fingerprint)
        if not (place / MANIFEST).exists():
            return None
        tidy(place)
        return open_artifact(place)

    def partial(self, stage: str, fingerprint: str) -> Path:
        """Where its work happens until it is finished."""
        return self.place(stage, fingerprint).with_suffix(".partial")

    def lock(self, stage: str, fingerprint: str) -> Path:
        """The lock that gives it one maker at a time."""
        return self.root / "locks" / f"{stage}-{fingerprint}.lock"

    @property
    def memo(self) -> Path:
        """Content hashes of outside files, remembered by path, size and time of change."""
        return self.root / "hashes.json"

    @property
    def memory_of_answers(self) -> Path:
        """What models answered already, by content; it may be deleted at any time."""
        return self.root / "answers.sqlite"

    def remove(self, artifact: Path) -> None:
        """Remove a damaged artifact, so that the next run makes it again."""
        (artifact / MANIFEST).unlink(missing_ok=True)  # first: a half-removed one is not finished
        shutil.rmtree(artifact, ignore_errors=True)

    def run_folder(self, name: str) -> Path:
        """Where a run keeps its map of steps and its resolved recipe."""
        return self.root / "runs" / name

    def run_names(self) -> list[str]:
        """The runs of this store."""
        return sorted(path.parent.name for path in self.root.glob("runs/*/run.json"))

    def read_run(self, name: str) -> dict[str, Any]:
        """Step -> {stage, fingerprint, identity} as of the last run; empty when there was none.

        Raises ArtifactError when the file is there but is not what a run writes.
        """
        path = self.run_folder(name) / "run.json"
        try:
            return json.loads(path.read_text())["steps"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError) as error:
            raise ArtifactError(
                f"{path} cannot be read ({error}); remove it and run again"
            ) from None

    def write_run(self, name: str, steps: Mapping[str, Any]) -> None:
        """Replace the run's map of steps."""
        write_json(self.run_folder(name) / "run.json", {"name": name, "steps": dict(steps)})
