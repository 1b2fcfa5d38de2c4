"""What a model on disk is, by its headers alone: facts for a plan, a digest for identity.

No torch, no transformers: `config.json`, the JSON at the head of each safetensors file, or a GGUF
header tell it. Loading is `load.py`; where a model comes from is `source.py`.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.core.errors import ModelError
from tutelage.core.fingerprint import fingerprint
from tutelage.core.hashes import remembered_sha256
from tutelage.text.tokenizer import tokenizer_digest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000
"""Bytes; the format's own bound on a header, so a damaged length cannot exhaust the memory."""
CONTENT_PATTERNS = (
    "*.safetensors", INDEX, "*.gguf", "config.json", "generation_config.json", "tokenizer*",
    "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.py",
)  # fmt: skip
"""Files that decide what a model computes: weights, configuration, tokenizer, remote code."""
PANGU = "PanguEmbedded"
"""The `model_type` that `pangu.py` makes plain Llama of."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""PEFT's layout of an adapter."""
HEAD = "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"
"""Ends the name of what old checkpoints store though it follows from the configuration."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a model and the size of its weights."""

    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    vocab_size: int
    tie_embeddings: bool
    parameters: int
    dtype: str
    """Of most of the parameters; for a GGUF file its most used quantisation, such as `q4_1`."""
    tokenizer_digest: str | None
    """None for a GGUF file or an openPangu checkpoint: known once it is converted."""
    bytes: int
    """Of the weights on disk."""


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """The key-value pairs of a GGUF file and the list of its tensors; no tensor is read.

    The `gguf` package takes about 2 s for 49,152 tokens: not for a plan.
    """

    path: Path
    reader: Any

    @classmethod
    def read(cls, path: Path) -> "GgufHeader":
        """Open `path`. Raises ModelError when it is missing or not a GGUF file."""
        from gguf import GGUFReader

        if not path.is_file():
            raise ModelError(f"{path}: no such GGUF file; check the path")
        try:
            return cls(path, GGUFReader(path))
        except (ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{path} is not a readable GGUF file ({error})") from None

    @property
    def tensors(self) -> list[Any]:
        """Name, shape, quantisation and number of elements of each tensor."""
        return self.reader.tensors

    @property
    def architecture(self) -> str:
        """Such as `llama`; the prefix of the keys that describe the model."""
        return str(self.value("general.architecture"))

    def value(self, key: str) -> Any:
        """The value of a key, or None."""
        field = self.reader.get_field(key)
        return field.contents() if field else None

    def whole(self, key: str) -> int:
        """A whole number of the model's description. Raises ModelError when it is not there."""
        found = self.value(f"{self.architecture}.{key}")
        if not isinstance(found, int):
            raise ModelError(
                f"{self.path} has no {self.architecture}.{key}: not a decoder-only text model"
            )
        return found


def describe(path: Path) -> ModelFacts:
    """The facts of a Hugging Face directory, or of a `.gguf` file (without its tokenizer digest).

    Raises ModelError when a file is missing, cut short or not of a decoder-only language model.
    """
    if path.suffix == ".gguf":
        return _describe_gguf(path)
    config = read_config(path)
    files = weight_files(path)
    tensors = {name: tensor for file in files for name, tensor in _header(file).items()}
    for name in [name for name in tensors if name.endswith(COMPUTED)]:
        del tensors[name]
    if config.get("tie_word_embeddings") is True:  # stored all the same, as in openPangu
        tensors.pop(HEAD, None)
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.size
    dtype = counts.most_common(1)[0][0]
    return replace(
        describe_unseen(path),
        # Not from config.json: it leaves the key out where it equals its class's default.
        tie_embeddings=HEAD not in tensors,
        parameters=sum(counts.values()),
        dtype=DTYPES.get(dtype, dtype.lower()),
        bytes=sum(file.stat().st_size for file in files),
    )


def _tokenizer_digest(path: Path, config: Mapping[str, Any]) -> str | None:
    """None where there is no `tokenizer.json` yet, as it is made of another file (`pangu.py`)."""
    if config.get("model_type") == PANGU and not (path / "tokenizer.json").exists():
        return None
    return tokenizer_digest(path)


def describe_unseen(path: Path) -> ModelFacts:
    """What config and tokenizer in `path` say of a model whose weights are elsewhere.

    Its size stays unknown (0 parameters), as the config may be a smaller relative's.
    """
    config = read_config(path)
    heads = _whole(config, "num_attention_heads", path)
    return ModelFacts(
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        layers=_whole(config, "num_hidden_layers", path),
        hidden_size=_whole(config, "hidden_size", path),
        intermediate_size=_whole(config, "intermediate_size", path),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        vocab_size=_whole(config, "vocab_size", path),
        tie_embeddings=False,
        parameters=0,
        dtype="unknown",
        tokenizer_digest=_tokenizer_digest(path, config),
        bytes=0,
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's `config.json`. Raises ModelError where there is none or it is not JSON."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory; check the path")
    return _read_json(directory / "config.json", f"{directory} is not a model directory")


def weight_files(directory: Path) -> list[Path]:
    """The directory's safetensors files, all present.

    Raises ModelError when there are none (with the way out when there are only pickled weights),
    or when a shard named by the index is missing.
    """
    index = directory / INDEX
    if index.exists():
        listed = _read_json(index, f"{directory}: the index of shards is damaged").get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ModelError(f"{index} lists no weights; copy or download the model again")
        names = sorted(set(listed.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(
                f"{directory} lacks {len(missing)} of its {len(names)} weight files "
                f"({missing[0]} is the first); copy or download the model again"
            )
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    raise ModelError(_no_weights(directory))


def adapter_files(directory: Path) -> list[Path]:
    """Configuration and weights of a stored adapter. Raises ModelError when one is missing."""
    for name in ADAPTER_FILES:
        if not (directory / name).is_file():
            raise ModelError(
                f"{directory} holds no adapter: there is no {name} in it; check the path, or save "
                "it again with PEFT's save_pretrained"
            )
    return [directory / name for name in ADAPTER_FILES]


def content_digest(path: Path, *, cache: Path) -> str:
    """sha256 over names and contents of what decides the model (see `CONTENT_PATTERNS`).

    `path` is a directory or one file. A file is not read again while its path, size and time of
    change stay as remembered in the JSON file `cache`; README, logs and pictures do not count.
    Raises ModelError when nothing is there.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted({file for pattern in CONTENT_PATTERNS for file in path.glob(pattern)})
    if not files:
        raise ModelError(f"{path} holds no model; check the path")
    digests = remembered_sha256(files, cache)
    # A single file counts by content alone: it may be renamed freely.
    if path.is_file():
        return digests[path]
    return fingerprint({file.name: digest for file, digest in digests.items()})


def _header(file: Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file: 8 bytes of length, then JSON, then the data."""
    damaged = f"{file} is cut short or damaged; copy or download the model again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT + 1
        if length > HEADER_LIMIT:
            raise ModelError(damaged)
        try:
            entries = json.loads(stream.read(length))
        except ValueError:
            raise ModelError(damaged) from None
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != 8 + length + end or not entries:
        raise ModelError(damaged)
    return {name: _Tensor(e["dtype"], tuple(e["shape"])) for name, e in entries.items()}


def _no_weights(directory: Path) -> str:
    pickled = next((p.name for p in sorted(directory.glob("*.bin"))), None)
    if pickled:
        return (
            f"{directory} has only pickled weights ({pickled}), which can run code when read; "
            "convert them to safetensors first (in transformers: load the model, then "
            "save_pretrained), or take a revision that has safetensors"
        )
    if any(directory.glob("*.gguf")):
        return f"{directory} has no safetensors; name its .gguf file itself as the source"
    return f"{directory} has no weights ({SINGLE} or {INDEX}); copy or download the model again"


def _read_json(path: Path, problem: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{problem}: it has no {path.name}; check the path") from None
    except ValueError as error:
        raise ModelError(f"{problem}: {path.name} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{problem}: {path.name} is not a JSON object")
    return value


def _whole(config: Mapping[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ModelError(
            f"{path / 'config.json'} has no whole number {key!r}: "
            "only decoder-only text models of the Llama shape are understood"
        )
    return value


def _describe_gguf(path: Path) -> ModelFacts:
    header = GgufHeader.read(path)
    counts: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    names = {tensor.name: tensor for tensor in header.tensors}
    heads = header.whole("attention.head_count")
    return ModelFacts(
        architecture=header.architecture,
        layers=header.whole("block_count"),
        hidden_size=header.whole("embedding_length"),
        intermediate_size=header.whole("feed_forward_length"),
        heads=heads,
        kv_heads=header.value(f"{header.architecture}.attention.head_count_kv") or heads,
        vocab_size=int(names["token_embd.weight"].shape[-1]),
        tie_embeddings="output.weight" not in names,
        parameters=sum(counts.values()),
        dtype=counts.most_common(1)[0][0],
        tokenizer_digest=None,
        bytes=path.stat().st_size,
    )
