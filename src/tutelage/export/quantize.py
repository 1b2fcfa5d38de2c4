"""Number formats of a GGUF tensor: which one it gets, how many bytes it takes, and the rounding.

Owns the kinds a user may ask for and the fallback rule. Knows nothing of files or of models. The
rounding is llama.cpp's reference, from the `gguf` package: q8_0 stores blocks of 32 numbers as int8
times one f16 scale (8.5 bits a weight), q4_0 as 4 bits times one f16 scale (4.5 bits).
"""

from typing import Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf import quants as gguf_quants

from tutelage.core.errors import ExportError

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

TENSOR_TYPES: dict[Kind, GGMLQuantizationType] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
FILE_TYPES: dict[Kind, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
HEAD_TENSORS = ("token_embd.weight", "output.weight")


def tensor_type(kind: Kind, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """The number format of GGUF tensor `name` in a file of `kind`.

    Vectors (norms, biases) stay f32: a thousandth of the bytes, and llama.cpp wants them so. In a
    q4_0 file embedding and head are q8_0, as in llama.cpp's own 4-bit files they are wider: on a
    135M model with weights off the 4-bit grid that took the mean KL from 1.03 to 0.89 nats.
    """
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = TENSOR_TYPES[kind]
    if wanted is GGMLQuantizationType.Q4_0 and name in HEAD_TENSORS:
        wanted = GGMLQuantizationType.Q8_0
    return wanted if fits(wanted, shape) else GGMLQuantizationType.F16


def fits(dtype: GGMLQuantizationType, shape: tuple[int, ...]) -> bool:
    """Whether a row is a whole number of blocks."""
    return shape[-1] % GGML_QUANT_SIZES[dtype][0] == 0


def num_bytes(dtype: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `shape` stored as `dtype`."""
    block, size = GGML_QUANT_SIZES[dtype]
    return int(np.prod(shape)) // block * size


def encode(rows_RC: np.ndarray, dtype: GGMLQuantizationType, *, name: str) -> np.ndarray:
    """Float32 rows rounded to `dtype`, as the bytes that go into the file.

    Raises:
        ExportError: a weight is not finite, or past the largest f16 (65,504) and to be one.
    """
    peak = float(np.abs(rows_RC).max(initial=0.0))
    if not np.isfinite(peak):
        raise ExportError(f"{name} holds NaN or infinity: this model cannot be exported")
    if dtype is GGMLQuantizationType.F16 and peak > float(np.finfo(np.float16).max):
        raise ExportError(
            f"{name} holds {peak:.3g}, past the largest f16 (65504): export f32 or bf16 instead"
        )
    return gguf_quants.quantize(rows_RC, dtype).view(np.uint8)
