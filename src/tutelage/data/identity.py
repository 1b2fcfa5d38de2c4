"""What a data step's sources hold, by content: so that a changed file is a different step."""

import glob
import json
from pathlib import Path
from typing import Any

from tutelage.core.errors import DataError
from tutelage.core.files import sha256_file, write_json
from tutelage.recipe.tables import Data, DataSource

BUNDLED_PROMPTS = Path(__file__).with_name("prompts.jsonl")


def source_files(source: DataSource) -> list[Path]:
    """The local files of a source, sorted; empty for `hub:` and `task:` sources.

    Raises DataError when a path or glob matches nothing.
    """
    name = source.source
    if name.startswith(("hub:", "task:")):
        return []
    if name.startswith("bundled:"):
        if name != "bundled:prompts":
            raise DataError(f"{name}: the only bundled data is bundled:prompts")
        return [BUNDLED_PROMPTS]
    found = sorted(Path(match) for match in glob.glob(name, recursive=True))
    found = [path for path in found if path.is_file()]
    if not found:
        raise DataError(f"{name}: no such file; check the path (relative to the recipe's folder)")
    return found


def data_identity(step: Data, *, memo: Path) -> dict[str, Any]:
    """Content of each source: sha256 of its files; version of the package behind a task."""
    return {str(index): _identity(source, memo) for index, source in enumerate(step.sources)}


def _identity(source: DataSource, memo: Path) -> dict[str, Any]:
    if source.source.startswith("task:"):
        return {"task": source.source}
    if source.source.startswith("hub:"):
        return {"hub": source.source, "revision": source.revision or "main"}
    return {"sha256": [remembered_sha256(path, memo) for path in source_files(source)]}


def remembered_sha256(path: Path, memo: Path) -> str:
    """sha256 of a file, not read again while its path, size and time of change stay the same."""
    state = path.stat()
    key = f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}"
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):  # no memo yet, or a damaged one: it only saves time
        known = {}
    if key not in known:
        known = {**known, key: sha256_file(path)}
        write_json(memo, known)
    return known[key]
