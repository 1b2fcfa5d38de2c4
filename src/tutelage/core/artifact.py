"""Finished results and the folders they are made in.

`artifacts/<stage>/<fingerprint>/` with a manifest is finished; anything else is not. Work happens
in `<fingerprint>.partial/`, whose ledger says which shards are whole, so that a killed step goes on
where it was. This module knows nothing of what a stage does.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tutelage.core import files
from tutelage.core.errors import ArtifactError
from tutelage.core.fingerprint import fingerprint
from tutelage.core.progress import Reporter
from tutelage.core.team import Team

if TYPE_CHECKING:
    from tutelage.core.shards import Executor

MANIFEST = "manifest.json"
LEDGER = "ledger.json"
SCRATCH = "scratch"  # inside a partial folder: checkpoints and the like, gone when it is finished
FORMAT = 1
TOKEN_KINDS = ("student_decoded", "teacher_decoded", "teacher_prefilled", "trained")
"""Four kinds of tokens, counted apart because their costs differ by 10x (method.md, section 5)."""


@dataclass(frozen=True)
class Artifact:
    """A finished result: its folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return self.manifest["stage"]

    @property
    def fingerprint(self) -> str:
        """Its identity's sha256."""
        return self.manifest["fingerprint"]

    @property
    def summary(self) -> Mapping[str, Any]:
        """The small figures its stage returned."""
        return self.manifest["summary"]

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings it was made with."""
        return self.manifest["identity"]["config"]

    def shards(self, pattern: str = "*.parquet") -> list[Path]:
        """Its files that match `pattern`, in name order."""
        return sorted(self.path.glob(pattern))


def open_artifact(path: Path) -> Artifact:
    """The artifact at `path`.

    Raises ArtifactError where there is none, where its manifest cannot be read, or where a file
    is missing or has another size than the manifest says (contents: see `verify`).
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not a finished artifact: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path / MANIFEST} cannot be read ({error}); `tutelage verify --repair` removes "
            "the damaged artifact so that the next run makes it again"
        ) from None
    for name, size in listed.items():
        _check_size(path / name, size)
    return Artifact(path, manifest)


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
        raise ArtifactError(
            f"{path} {state}; `tutelage verify --repair` removes the damaged artifact so that "
            "the next run makes it again"
        )


def verify(artifact: Artifact) -> list[str]:
    """What is wrong with the artifact's files, one line each; empty when every sha256 agrees."""
    problems = []
    for name, entry in artifact.manifest["files"].items():
        path = artifact.path / name
        try:
            _check_size(path, entry["bytes"])
        except ArtifactError as error:
            problems.append(str(error).split(";")[0])
            continue
        if files.sha256_file(path) != entry["sha256"]:
            problems.append(f"{path} has other contents than when it was made")
    extra = set(_results_below(artifact.path)) - set(artifact.manifest["files"])
    problems += [f"{artifact.path / name} does not belong to it" for name in sorted(extra)]
    if fingerprint(artifact.manifest["identity"]) != artifact.fingerprint:
        problems.append(f"{artifact.path / MANIFEST} does not match its own identity")
    return problems


@dataclass
class Site:
    """Where work is done, as far as a worker on another machine must know it; it can be pickled."""

    path: Path
    """The step's folder; a fleet sees it under the same path."""
    device: str = "cpu"
    workers: int = 1
    """Processes that work on rows may take."""
    sandbox: str = "bubblewrap"
    """Where generated programs run: `[runtime] sandbox`."""
    memory: Path | None = None
    """The store's memory of answers, for models that are asked the same again; None for none."""
    engines: Mapping[str, Any] = field(default_factory=dict)
    """How the model of a role is run (`recipe.engines`); a role that is not named: by
    transformers, here."""

    def scratch(self, name: str) -> Path:
        """A folder for checkpoints; it is removed when the step is finished."""
        folder = self.path / SCRATCH / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class Tracking:
    """Programs that show a training's figures while it runs, and what they are told it is."""

    kinds: tuple[str, ...]
    """By Accelerate's names."""
    folder: Path
    """For those that write files; outside the artifact."""
    recipe: str
    step: str


@dataclass
class WorkDir(Site):
    """The folder a stage writes in, its ledger of finished shards, and its voice to the user."""

    reporter: Reporter = field(default_factory=Reporter)
    ledger: dict[str, dict[str, Any]] = field(default_factory=dict)
    executor: "Executor | None" = None
    """Who makes shards (`core.shards`); None: this process."""
    tracking: "Tracking | None" = None
    """Where the figures of a training go beside its log; None: nowhere."""
    team: Team = field(default_factory=Team)
    """The processes that make this step together; others than rank 0 have a folder of their own,
    which nobody keeps."""

    @classmethod
    def open(
        cls, path: Path, *, reporter: Reporter, executor: "Executor | None" = None, **site: Any
    ) -> "WorkDir":  # fmt: skip
        """Make the folder, or go on with what an earlier attempt left in it.

        `site` are the other fields of `Site`.
        """
        path.mkdir(parents=True, exist_ok=True)
        for stale in path.rglob("*.tmp"):  # what a kill left of an unfinished atomic write
            stale.unlink()
        ledger = path / LEDGER
        done = json.loads(ledger.read_text()) if ledger.exists() else {}
        return cls(path, reporter=reporter, ledger=done, executor=executor, **site)

    def site(self) -> Site:
        """What a worker elsewhere is given of it."""
        return Site(**{each.name: getattr(self, each.name) for each in fields(Site)})

    def done(self, part: str) -> bool:
        """Whether the part of this name is finished."""
        return part in self.ledger and self.ledger[part].get("done", False)

    def commit(
        self, part: str, *, seconds: float, tokens: Mapping[str, int], done: bool = True,
        **facts: Any,
    ) -> None:  # fmt: skip
        """Record a part whose files are in place: what it cost and any small facts about it.

        The ledger is written after the files, so a kill in between only does the part again.
        """
        if unknown := set(tokens) - set(TOKEN_KINDS):
            raise ValueError(f"unknown kinds of tokens: {sorted(unknown)}")
        entry = {"done": done, "seconds": round(seconds, 3), "tokens": dict(tokens), **facts}
        self.ledger = {**self.ledger, part: entry}
        files.write_json(self.path / LEDGER, self.ledger)

    def tokens(self) -> dict[str, int]:
        """Tokens of each kind over all parts."""
        return {
            kind: sum(entry["tokens"].get(kind, 0) for entry in self.ledger.values())
            for kind in TOKEN_KINDS
        }

    def seconds(self) -> float:
        """Working time over all parts and attempts, without what a kill threw away."""
        return sum(entry["seconds"] for entry in self.ledger.values())


def finish(
    work: WorkDir, final: Path, *, identity: Mapping[str, Any], inputs: Mapping[str, Any],
    summary: Mapping[str, Any], provenance: Mapping[str, Any], peak_memory_bytes: int,
) -> Artifact:  # fmt: skip
    """Turn a work folder into the artifact at `final`: fsync, manifest last, one `os.replace`."""
    listed = {}
    for name, path in _results_below(work.path).items():
        files.fsync(path)
        listed[name] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    manifest = {
        "format": FORMAT,
        "stage": identity["stage"],
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "inputs": inputs,
        "summary": summary,
        "tokens": work.tokens(),
        "seconds": round(work.seconds(), 3),
        "peak_memory_bytes": peak_memory_bytes,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "provenance": provenance,
        "content": fingerprint(listed),
        "files": listed,
    }
    files.write_json(work.path / MANIFEST, manifest)
    shutil.rmtree(final, ignore_errors=True)  # what a removal that was cut short left: no manifest
    os.replace(work.path, final)
    files.fsync(final.parent)
    tidy(final)
    return open_artifact(final)


def tidy(path: Path) -> None:
    """Remove from a finished artifact what only its making needed.

    After the rename, not before: a kill in between would leave a ledger whose checkpoints are gone.
    """
    if (path / LEDGER).exists() or (path / SCRATCH).exists():
        (path / LEDGER).unlink(missing_ok=True)
        shutil.rmtree(path / SCRATCH, ignore_errors=True)


def _results_below(path: Path) -> dict[str, Path]:
    """Every file of a result by its name in it: all but the manifest and what `tidy` removes."""
    found = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    return {
        name: file
        for name, file in found.items()
        if name not in (MANIFEST, LEDGER) and not name.startswith(f"{SCRATCH}/")
    }


def measure_peak() -> Callable[[], int]:
    """Start measuring; the returned function gives the peak resident bytes since then.

    On Linux the kernel's high-water mark is reset, so each step has its own peak; elsewhere it is
    the peak of the whole process so far.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or a container that forbids it: the whole process's peak, then
        import resource

        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _high_water_mark


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def several(inputs: Mapping[str, Artifact], role: str) -> list[Artifact]:
    """The inputs of a list field, in its order: roles `role.0`, `role.1`, ..."""
    count = sum(key.startswith(f"{role}.") for key in inputs)
    return [inputs[f"{role}.{index}"] for index in range(count)]
