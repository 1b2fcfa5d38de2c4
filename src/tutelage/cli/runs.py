"""Finding what a run made: its artifacts by step, its damage, its models."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tutelage.core.artifact import MANIFEST, Artifact, open_artifact
from tutelage.core.artifact import verify as verify_artifact
from tutelage.core.errors import ArtifactError
from tutelage.store import Store


def artifacts(store: Store, name: str) -> tuple[str, dict[str, Artifact]]:
    """The run's name and its finished artifacts by step, in the order they were finished.

    Raises ArtifactError when there is no such run or one of its artifacts is damaged.
    """
    name = _name(store, name)
    found = {
        step: open_artifact(store.place(entry["stage"], entry["fingerprint"]))
        for step, entry in store.read_run(name).items()
        if store.place(entry["stage"], entry["fingerprint"]).exists()
    }
    return name, found


def _name(store: Store, name: str) -> str:
    names = store.run_names()
    if not names:
        raise ArtifactError(f"no run in {store.root}; start with `tutelage run RECIPE`")
    if not name:
        return max(names, key=lambda n: (store.run_folder(n) / "run.json").stat().st_mtime)
    if name not in names:
        raise ArtifactError(f"no run {name!r} in {store.root}; there is: {', '.join(names)}")
    return name


def pick(found: Mapping[str, Artifact], step: str, run: str) -> Artifact:
    """The artifact of one step. Raises ArtifactError naming the nearest step."""
    if step not in found:
        close = get_close_matches(step, list(found), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(found)}"
        raise ArtifactError(f"run {run!r} has no finished step {step!r}; {hint}")
    return found[step]


def brief(artifact: Artifact) -> dict[str, Any]:
    """The fields of a manifest a script would ask for."""
    keys = ("stage", "fingerprint", "summary", "tokens", "seconds", "peak_memory_bytes", "finished")
    return {"path": str(artifact.path), **{key: artifact.manifest[key] for key in keys}}


def verify(store: Store, run: str, step: str, *, repair: bool) -> dict[str, list[str]]:
    """What is wrong with each step's artifact; with `repair`, damaged ones are removed."""
    name = _name(store, run)
    entries = store.read_run(name)
    if step and step not in entries:
        raise ArtifactError(f"run {name!r} has no step {step!r}; it has: {', '.join(entries)}")
    problems: dict[str, list[str]] = {}
    for key, entry in entries.items():
        if step in ("", key):
            path = store.place(entry["stage"], entry["fingerprint"])
            problems[key] = _problems(path)
            if repair and problems[key]:
                store.remove(path)
    return problems


def _problems(path: Path) -> list[str]:
    if not (path / MANIFEST).exists():
        return [f"{path} is gone; the next run makes it again"]
    try:
        return verify_artifact(open_artifact(path))
    except ArtifactError as error:
        return [str(error).split(";")[0]]


def model_directory(store: Store, run: str, model: str) -> Path:
    """The Hugging Face directory behind a step, or a directory or GGUF file given as such."""
    path = Path(model)
    if (path / "config.json").exists() or path.suffix == ".gguf":
        return path
    if model.startswith("bundled:"):
        from tutelage.models import catalog

        return catalog.pull(model.removeprefix("bundled:"))
    name, found = artifacts(store, run)
    artifact = pick(found, model, name)
    directory = artifact.path / "model"
    if not directory.exists():
        raise ArtifactError(
            f"step {model!r} is a {artifact.stage} step: it made no model to talk to"
        )
    return directory
