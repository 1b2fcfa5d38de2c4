"""What made a result: versions, commit, device, command line. Recorded, never part of identity."""

import functools
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from tutelage import __version__

LIBRARIES = (
    "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pyarrow",
    "datasets", "gguf", "xllamacpp", "reasoning-gym",
)  # fmt: skip
GIT_SECONDS = 5


def provenance(*, device: str, threads: str) -> dict[str, object]:
    """The facts a reader needs to repeat a step: versions, git commit, device, argv."""
    return {
        "tutelage": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "git_commit": _git_commit(Path.cwd()),
        "device": device,
        "threads": threads,
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@functools.cache  # 2 ms each: a step of 11 libraries must not wait for them
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(folder: Path) -> str | None:
    """The commit of the folder's checkout, with `+` when files differ from it; None outside one."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout: a run needs neither
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True, text=True, check=True, timeout=GIT_SECONDS,
    ).stdout.strip()  # fmt: skip
