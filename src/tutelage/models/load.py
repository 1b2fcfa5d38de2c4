"""Models and tokenizers in memory: loading, the parts a loss needs, saving, and the device.

Weights come from safetensors or GGUF only. Shapes: D hidden width, V vocabulary.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tutelage.core.artifact import Artifact
from tutelage.core.errors import ModelError
from tutelage.core.files import write_json
from tutelage.models.device import pick_device
from tutelage.models.gguf_file import one_line, read_gguf_model, read_gguf_tokenizer
from tutelage.models.inspect import read_config, weight_files
from tutelage.text import tokenizer as text_tokenizer

transformers_logging.disable_progress_bar()  # a step has one bar, ours

SHARD_SIZE = "2GB"
TOKENIZER_PATTERNS = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model",
)  # fmt: skip
HEAD_TOLERANCE = 0.02
"""Of the largest logit; both sides are the same operations, so bf16 rounding is far below it."""


@dataclass(frozen=True)
class Loaded:
    """A model ready for use, its tokenizer, and the directory both came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    device: torch.device


class BackboneAndHead(NamedTuple):
    """The module that gives hidden states, and the output layer that makes logits of them."""

    backbone: nn.Module
    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    """logits = softcap * tanh(raw / softcap), as in Gemma 2; None for none."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits [N, V] of hidden states, the product itself in the model's own dtype.

        For reading, not for training: the soft-cap is applied in place.
        """
        logits_NV = nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V).float()
        if self.softcap:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV


def load_for_inference(artifact: Artifact, *, device: str, dtype: str = "auto") -> Loaded:
    """The artifact's model in evaluation mode, as it is stored or in another dtype.

    Raises ModelError, EngineError.
    """
    return _load(artifact, dtype=dtype, device=device)


def load_for_training(artifact: Artifact, *, device: str) -> Loaded:
    """The artifact's model with fp32 weights; lower precision is the training loop's affair.

    Raises ModelError, EngineError.
    """
    return _load(artifact, dtype="float32", device=device)


def _load(artifact: Artifact, *, dtype: str, device: str) -> Loaded:
    # A step's own result holds no code but what a trusted model from outside brought along.
    trusted = artifact.stage != "external" or bool(
        artifact.manifest["identity"].get("trust_remote_code")
    )
    return load_directory(
        directory_of(artifact), device=device, dtype=dtype, trust_remote_code=trusted
    )


def directory_of(artifact: Artifact) -> Path:
    """Where the model of a step's result, or of a model from outside, lies."""
    return artifact.path / "model" if artifact.stage != "external" else artifact.path


def load_directory(
    directory: Path, *, device: str, dtype: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """A model's directory, loaded in evaluation mode. Raises ModelError, EngineError."""
    chosen = pick_device(device)
    model = load_model(directory, dtype=dtype, device=chosen, trust_remote_code=trust_remote_code)
    check_head(model)
    return Loaded(model, load_tokenizer(directory), directory, chosen)


def load_model(
    path: Path, *, dtype: torch.dtype | str, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model in a Hugging Face directory or a `.gguf` file.

    `dtype` is a torch dtype, its name, or `auto` for what is stored (fp32 for GGUF).
    Raises ModelError when weights are missing, damaged, pickled, or not those of the architecture.
    """
    if path.suffix == ".gguf":
        plain = torch.float32 if dtype == "auto" else as_dtype(dtype)
        return read_gguf_model(path, dtype=plain).to(device)  # type: ignore[arg-type]
    _check_code(path, trust_remote_code)
    weight_files(path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"{path} cannot be loaded: {one_line(error)}") from error
    _check_report(report, path)
    return model.to(device)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory or a `.gguf` file; never runs code from it.

    Raises ModelError.
    """
    return (
        read_gguf_tokenizer(path) if path.suffix == ".gguf" else text_tokenizer.load_tokenizer(path)
    )


def backbone_and_head(model: nn.Module) -> BackboneAndHead:
    """The parts with which logits_NV = softcap(hidden_ND @ weight_VD.T + bias_V).

    Cheap: no forward. Whether the formula holds for an architecture is `check_head`'s to say.
    Raises ModelError when the model has no plain linear output layer.
    """
    backbone = getattr(model, "base_model", None)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(backbone, nn.Module) or backbone is model or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no backbone with a linear output layer: "
            "only decoder-only language models can be trained"
        )
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return BackboneAndHead(backbone, head.weight, head.bias, softcap)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """One forward of two tokens: do the parts of `backbone_and_head` give the model's own logits?

    Some architectures scale or shift logits after the output layer; training one on logits without
    that would teach it something else, silently. Raises ModelError.
    """
    head = backbone_and_head(model)
    ids_BT = torch.tensor([[0, 1]], device=head.weight_VD.device)
    was_training = model.training
    model.eval()
    logits_NV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    hidden_ND = head.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state[0]
    model.train(was_training)
    ours_NV = head.logits(hidden_ND)
    if float((ours_NV - logits_NV).abs().max()) > HEAD_TOLERANCE * float(logits_NV.abs().max()):
        raise ModelError(
            f"{type(model).__name__} changes its logits after the output layer in a way that is "
            "not known here; take a model of a plain architecture (Llama, Qwen, Mistral, Gemma)"
        )


def save_student(loaded: Loaded, directory: Path) -> None:
    """Save a trained model in fp32, with its tokenizer files copied byte for byte.

    Copied, not written anew: a library's other rendering of the same tokenizer would have another
    digest, and the next step would take it for another vocabulary.
    """
    save_weights(loaded.model, directory, dtype="float32")
    copy_tokenizer(loaded.directory, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer files of a model's directory, byte for byte."""
    for pattern in TOKENIZER_PATTERNS:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, directory / file.name)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: torch.dtype | str,
) -> None:
    """Save a model and a tokenizer that lives in memory only, as one Hugging Face directory."""
    save_weights(model, directory, dtype=dtype)
    tokenizer.save_pretrained(directory)
    # How it happened to be opened is written too; it would make equal tokenizers differ.
    _edit_json(directory / "tokenizer_config.json", drop=("is_local", "local_files_only"))


def save_weights(model: PreTrainedModel, directory: Path, *, dtype: torch.dtype | str) -> None:
    """Save weights as safetensors in shards of 2 GB, cast to `dtype`, with config.json.

    `model` itself is left as it is. A tied output layer is stored once.
    """
    target = as_dtype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        # By address, so that a tied pair stays one tensor through the cast.
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to(target) if tensor.is_floating_point() else tensor
        state[name] = cast[key]
    model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes them private; results are for others to read
    name = str(target).removeprefix("torch.")
    _edit_json(directory / "config.json", set_values={"dtype": name})


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or its name (`float32`, `bfloat16`, `float16`)."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ModelError(f"no dtype {dtype!r}; there is float32, bfloat16, float16")
    return found


def _check_code(path: Path, trusted: bool) -> None:
    """Say it before transformers does, which would ask on the terminal or hint at its own flag."""
    if "auto_map" in read_config(path) and not trusted:
        raise ModelError(
            f"{path} brings its own Python code; read it, then set trust_remote_code = true "
            "and a revision in the recipe's model table"
        )


def _check_report(report: Mapping[str, Any], path: Path) -> None:
    for key, problem in (
        ("missing_keys", "lacks weights of its architecture"),
        ("unexpected_keys", "holds weights its architecture does not have"),
        ("mismatched_keys", "holds weights of other shapes than config.json says"),
    ):
        names = sorted(str(name) for name in report.get(key) or ())
        if names:
            raise ModelError(
                f"{path} {problem} ({len(names)}, such as {names[0]}); "
                "copy or download the model again, config.json and weights together"
            )


def _edit_json(
    path: Path, *, set_values: Mapping[str, Any] | None = None, drop: tuple[str, ...] = ()
) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **(set_values or {})}
    write_json(path, {key: value for key, value in content.items() if key not in drop})
