"""From a GGUF file to a safetensors directory, once, whole or not at all.

Knows nothing of where the file came from. torch is imported only while a conversion runs.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tutelage.core import files
from tutelage.core.errors import ModelError
from tutelage.core.fingerprint import fingerprint
from tutelage.core.lock import file_lock

CONVERSION = 1
"""Rises when the same GGUF file gives other bytes; older conversions are then made again."""
MARKER = "tutelage.json"


def converted_identity(gguf_sha256: str) -> str:
    """sha256 that stands for the conversion of that file, known before it is made."""
    return fingerprint({"gguf": gguf_sha256, "conversion": CONVERSION})


def is_converted(directory: Path, *, gguf_sha256: str) -> bool:
    """Whether `directory` is a whole conversion of that file: by its marker, names and sizes."""
    try:
        marker = json.loads((directory / MARKER).read_text())
        listed = marker["files"].items()
        if (marker["gguf_sha256"], marker["conversion"]) != (gguf_sha256, CONVERSION):
            return False
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no marker, a damaged one, or a file gone: converted again


def convert(
    gguf: Callable[[], Path],
    directory: Path,
    *,
    gguf_sha256: str,
    say: Callable[[str], None],
    write: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Make `directory` from a GGUF file unless it is there already; returns `directory`.

    With `write`, what it makes of another source instead: `gguf` and `gguf_sha256` are then that
    source and what stands for its content. `gguf` is called only when the file is needed and
    returns its path. A second process waits for the first. The work happens in
    `<directory>.partial`, the marker with each file's sha256 comes last, then one `os.replace`: a
    kill at any point leaves nothing that would be accepted.
    Raises ModelError when the disk is full or the file cannot be read.
    """
    if is_converted(directory, gguf_sha256=gguf_sha256):
        return directory
    lock = directory.with_name(directory.name + ".lock")
    with file_lock(lock, on_wait=lambda owner: say(f"waiting for {owner}: same model")):
        if is_converted(directory, gguf_sha256=gguf_sha256):
            return directory
        try:
            _convert(gguf(), directory, gguf_sha256, write or write_model)
        except Exception as error:  # any library may meet the full disk; the rest goes on up
            if files.is_disk_full(error):
                raise ModelError(
                    f"no room left in {directory.parent}; make some and run again"
                ) from error
            raise
    return directory


def _convert(
    gguf: Path, directory: Path, gguf_sha256: str, write: Callable[[Path, Path], None]
) -> None:
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(gguf, partial)
    listed = {}
    for path in sorted(partial.iterdir()):
        files.fsync(path)
        listed[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    files.write_json(
        partial / MARKER,
        {"gguf_sha256": gguf_sha256, "conversion": CONVERSION, "files": listed},
    )
    shutil.rmtree(directory, ignore_errors=True)  # an older conversion, or a damaged one
    os.replace(partial, directory)
    files.fsync(directory.parent)


def write_model(gguf: Path, directory: Path) -> None:
    """Write the model (fp32), tokenizer, chat template and generation settings of `gguf`."""
    import torch

    from tutelage.models.gguf_file import read_gguf_model, read_gguf_tokenizer
    from tutelage.models.load import save_model

    model = read_gguf_model(gguf, dtype=torch.float32)
    save_model(model, read_gguf_tokenizer(gguf), directory, dtype="float32")
