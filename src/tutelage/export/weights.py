"""Tensors of a safetensors folder as float32 rows, a few megabytes at a time.

Owns the reading of `model.safetensors` and of sharded folders. Knows nothing of models or of GGUF.
The `safetensors` package is not used: through numpy it cannot read bfloat16, and its memory map
keeps every page it touched resident, while a block of rows at a time keeps the peak flat (106 MB
resident, Python included, for a 540 MB model).

Legend: R rows, C columns.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.core.errors import ExportError

BLOCK_BYTES = 8 << 20  # of float32 rows held at once; 1 to 64 MB measure the same speed
MAX_HEADER_BYTES = 100 << 20  # the format's own bound
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: file, byte offset, kind of number and shape."""

    name: str
    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def find_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name, from the headers alone.

    Raises:
        ExportError: no safetensors, a shard missing or cut short, or a number format not in DTYPES.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors.update(_read_header(model_dir / name))
    return tensors


def blocks(tensor: StoredTensor, *, multiple: int = 1) -> Iterator[np.ndarray]:
    """A tensor's rows in order, as float32 blocks [R, C]; a vector is one column.

    Every block but the last holds a multiple of `multiple` rows: attention heads stay whole.
    """
    num_rows, num_columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step = max(1, BLOCK_BYTES // (4 * num_columns * multiple)) * multiple
    dtype = DTYPES[tensor.dtype]
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start) * num_columns
        offset = tensor.offset + start * num_columns * dtype.itemsize
        numbers = np.fromfile(tensor.path, dtype=dtype, count=count, offset=offset)
        yield _to_float32(numbers, tensor.dtype).reshape(-1, num_columns)


def _to_float32(numbers: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32, copy=False)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ExportError(f"{path} is missing: export reads weights from safetensors only")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ExportError(f"{path} is no safetensors file, or is cut short: write it again")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ExportError(
                f"{path}: {name} is stored as {entry['dtype']}, which export cannot read; "
                f"save the model as one of {', '.join(DTYPES)}"
            )
        begin, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise ExportError(f"{path} is cut short inside {name}: write it again")
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(name, path, 8 + length + begin, entry["dtype"], shape)
    return tensors
