"""A Hugging Face model folder as one GGUF file.

Owns the order of the file: header, key-value pairs, tensor table, then each tensor's bytes, in
blocks, so that the peak memory does not grow with the model. Knows no architecture (`families`), no
tokenizer (`vocab`), no rounding (`quantize`), no storage (`weights`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFWriter,
    size_label,
)

from tutelage.core.errors import ExportError
from tutelage.core.files import atomic_path, is_disk_full
from tutelage.export import families, quantize, vocab, weights
from tutelage.export.quantize import Kind

OWN_PREFIX = "tutelage."


@dataclass(frozen=True)
class GgufMetadata:
    """What the file says of itself.

    Fields:
        name, licence: shown by runtimes; licence as an SPDX id.
        lineage: models it came from, the nearest first (its base, then its teacher).
        languages: ISO 639 codes.
        provenance: pairs kept under `tutelage.<key>`, for example the artifact's fingerprint.
    """

    name: str
    licence: str
    lineage: tuple[str, ...] = ()
    description: str = ""
    languages: tuple[str, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GgufInfo:
    """What was written; `fallbacks` name tensors wider than asked, `warnings` tell of risks."""

    path: Path
    bytes: int
    tensors: int
    fallbacks: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Planned:
    """One tensor of the file to be; its source is an array where no checkpoint holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: GGMLQuantizationType
    source: weights.StoredTensor | np.ndarray

    @property
    def num_bytes(self) -> int:
        return quantize.num_bytes(self.dtype, self.shape)


def tensor_bytes(model_dir: Path, *, kind: Kind) -> int:
    """Bytes of tensor data that `write_gguf` will write: for a progress bar, or an estimate."""
    return sum(item.num_bytes for item in _plan(model_dir, families.read_model(model_dir), kind))


def write_gguf(
    model_dir: Path,
    out: Path,
    *,
    kind: Kind,
    chat_template: str | None = None,
    metadata: GgufMetadata,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> GgufInfo:
    """Write `out` whole or not at all.

    Matrices are stored as `kind`; vectors as f32; with q4_0, embedding and head as q8_0. In a
    block-quantised file a matrix whose rows are no multiple of 32 is f16, and named in `fallbacks`.

    Args:
        chat_template: Jinja text; None takes the folder's own.
        on_bytes: called with each number of tensor bytes written; they sum to `tensor_bytes`.

    Raises:
        ExportError: an architecture, tokenizer, tensor or setting that GGUF cannot carry; a missing
            chat template; a full disk.
    """
    model = families.read_model(model_dir)
    planned = _plan(model_dir, model, kind)
    rows = planned[0].shape[0]  # token_embd.weight comes first
    vocabulary = vocab.read_vocabulary(model_dir, size=rows)
    template = chat_template or vocab.read_chat_template(model_dir)
    vocabulary = vocab.fit_to_template(vocabulary, template)
    try:
        with atomic_path(out) as temporary:
            writer = GGUFWriter(temporary, model.arch_name)
            _write_general(writer, metadata, planned, kind)
            families.write_metadata(writer, model, vocab_size=rows)
            vocab.write_vocabulary(writer, vocabulary, chat_template=template)
            _write_table(writer, planned)
            with temporary.open("ab") as stream:
                _pad(stream)
                for item in planned:
                    _write_tensor(stream, model, item, on_bytes)
    except OSError as error:
        full = "the disk is full; free some space and run again"
        reason = full if is_disk_full(error) else error.strerror or str(error)
        raise ExportError(f"{out} cannot be written: {reason}") from error
    fallbacks = tuple(_fallback(item, kind) for item in planned if _fell_back(item, kind))
    return GgufInfo(out, out.stat().st_size, len(planned), fallbacks, vocabulary.warnings)


def _plan(model_dir: Path, model: families.Model, kind: Kind) -> list[_Planned]:
    stored = weights.find_tensors(model_dir)
    planned = []
    for name, source in families.map_names(model, stored).items():
        tensor = stored[source]
        dtype = quantize.tensor_type(kind, name, tensor.shape)
        planned.append(_Planned(name, tensor.shape, dtype, tensor))
    for name, vector in families.extra_tensors(model).items():
        planned.append(_Planned(name, vector.shape, GGMLQuantizationType.F32, vector))
    return planned


def _write_general(
    writer: GGUFWriter, metadata: GgufMetadata, planned: list[_Planned], kind: Kind
) -> None:
    parameters = sum(int(np.prod(item.shape)) for item in planned)
    writer.add_type("model")
    writer.add_name(metadata.name)
    writer.add_license(metadata.licence)
    writer.add_description(metadata.description)
    writer.add_size_label(size_label(parameters, 0, 0, 0))
    if metadata.languages:
        writer.add_languages(metadata.languages)
    if metadata.lineage:
        writer.add_base_model_count(len(metadata.lineage))
    for index, name in enumerate(metadata.lineage):
        writer.add_base_model_name(index, name)
    for key, value in metadata.provenance.items():
        writer.add_string(OWN_PREFIX + key, value)
    writer.add_file_type(quantize.FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _write_table(writer: GGUFWriter, planned: list[_Planned]) -> None:
    for item in planned:
        writer.add_tensor_info(
            item.name, item.shape, np.dtype(np.float32), item.num_bytes, raw_dtype=item.dtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensor(
    stream: BinaryIO,
    model: families.Model,
    item: _Planned,
    on_bytes: Callable[[int], None],
) -> None:
    """Tensor bytes in blocks, then zeros to a multiple of 32, as the tensor table promises."""
    name = item.name if isinstance(item.source, np.ndarray) else item.source.name
    for rows_RC in _rows(model, item.source):
        data = quantize.encode(rows_RC, item.dtype, name=name)
        stream.write(data.tobytes())
        on_bytes(data.nbytes)
    _pad(stream)


def _rows(model: families.Model, source: weights.StoredTensor | np.ndarray) -> Iterator[np.ndarray]:
    if isinstance(source, np.ndarray):
        yield source[:, None]
        return
    multiple = families.row_multiple(model, source.name)
    for rows_RC in weights.blocks(source, multiple=multiple):
        yield families.convert_rows(model, source.name, rows_RC)


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % GGUF_DEFAULT_ALIGNMENT))


def _fell_back(item: _Planned, kind: Kind) -> bool:
    return len(item.shape) > 1 and not quantize.fits(quantize.TENSOR_TYPES[kind], item.shape)


def _fallback(item: _Planned, kind: Kind) -> str:
    return (
        f"{item.name}: rows of {item.shape[-1]} are no multiple of 32, kept f16 instead of {kind}"
    )
