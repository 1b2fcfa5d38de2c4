"""Low-rank adapters (LoRA, arXiv 2106.09685; over a quantised base QLoRA, arXiv 2305.14314).

A model in training is the same `PreTrainedModel` with PEFT's layers inside, so that the loop, the
fused head and the engines see nothing new. A result is a whole model with the adapter merged in,
which every later step reads like any other, and beside it the adapter by itself in PEFT's layout.
"""

import difflib
import importlib
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ModelError, RecipeError
from tutelage.core.fingerprint import fingerprint
from tutelage.core.hashes import remembered_sha256
from tutelage.models.device import pick_device
from tutelage.models.inspect import ADAPTER_FILES, adapter_files, weight_files
from tutelage.models.load import Loaded, as_dtype, load_for_training, save_student
from tutelage.recipe.training import Lora, Training

ADAPTER = "adapter"
QUANTIZER = "bitsandbytes"
CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX = "base_model.model."
"""PEFT's own wrapper puts it before every name it stores."""
BASE = "sha256:"
"""Begins what `base_model_name_or_path` says of a base that is known by its weights."""
UNDERSTOOD = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora", "layers_to_transform", "layers_pattern",
}  # fmt: skip
"""Settings of a stored adapter that are taken over."""
WITHOUT_EFFECT = {
    "lora_dropout", "inference_mode", "base_model_name_or_path", "revision", "peft_version",
    "auto_mapping", "task_type", "peft_type", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Settings that say how it was trained or where; any other one must be PEFT's default."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""`init_lora_weights` that leave the base as it was; others (pissa, olora, ...) change it."""


def load_trainee(artifact: Artifact, config: Training, work: WorkDir) -> Loaded:
    """The model to train: all of its weights, or with `config.lora` new adapters in a frozen one.

    Seeds torch's generators from the recipe, from which the adapters' start and dropout are drawn.
    Raises ModelError, EngineError; RecipeError where a target is no layer of the model.
    """
    lora = config.lora
    if lora is None:
        return load_for_training(artifact, device=work.device)
    peft = _peft()
    if lora.quantize != "none" and work.team.size > 1 and work.team.sharding == "fsdp":
        raise RecipeError("lora.quantize: quantised weights have no shards; set sharding = 'ddp'")
    device = pick_device(work.device)
    # In host memory first: a base that is too large for the device may fit once it is quantised.
    loaded = load_for_training(artifact, device="cpu")
    targets = _targets(loaded.model, lora)
    if lora.quantize != "none":
        _quantize(loaded.model, lora.quantize, as_dtype(config.precision))
    loaded.model.to(device)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, loaded.model)
    return replace(loaded, device=device)


def save_trainee(loaded: Loaded, config: Training, work: WorkDir) -> dict[str, int]:
    """Write `model/`, whole, and of adapters also `adapter/`; returns their size for the summary.

    Adapters are merged into the model in memory too. Over a quantised base the result is the base
    as it was read in training, not as it was before: what was trained is what is saved.
    """
    if not work.team.leads:
        return {}
    if not work.team.leads:
        return {}
    sizes = {}
    if config.lora:
        trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
        sizes = {"trained_parameters": trained}
        memo = work.scratch(ADAPTER) / "hashes.json"
        _save(loaded, work.path / ADAPTER, base=base_fingerprint(loaded.directory, memo=memo))
        merge(loaded.model)
    save_student(loaded, work.path / "model")
    return sizes


def apply(loaded: Loaded, directory: Path, *, base: str) -> None:
    """Merge a stored adapter of PEFT into the model; `base` is the `base_fingerprint` of its files.

    Raises ModelError where `directory` holds no plain LoRA, or one for another base.
    """
    peft = _peft()
    adapter_files(directory)
    stored = _read_config(directory)
    made_for = str(stored.get("base_model_name_or_path"))
    if made_for.startswith(BASE) and made_for != base:
        raise ModelError(
            f"{directory} is an adapter for another base: its weights are {_short(made_for)}, "
            f"those of {loaded.directory} are {_short(base)}; give the model it was trained on"
        )
    given, known = _read_weights(directory), _linears(loaded.model)
    values = {name: value for name, value in stored.items() if name in UNDERSTOOD}
    try:
        with warnings.catch_warnings(action="ignore"):  # of tied layers, which are refused below
            peft.inject_adapter_in_model(peft.LoraConfig(**values), loaded.model)
    except (ValueError, TypeError) as error:
        line = " ".join(str(error).split())
        raise ModelError(f"{directory} does not fit {loaded.directory}: {line}") from None
    for name, _ in _adapted(loaded.model):
        if name not in known:
            raise ModelError(f"{directory} adapts {name}: only linear layers before the output can")
    wanted = peft.get_peft_model_state_dict(loaded.model, save_embedding_layers=False)
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    found = {name: tuple(value.shape) for name, value in given.items()}
    if different := sorted(set(shapes.items()) ^ set(found.items())):
        name = different[0][0]
        raise ModelError(
            f"{directory} does not fit {loaded.directory}: {name} is {found.get(name, 'missing')}, "
            f"the model has {shapes.get(name, 'no such layer')}; it is for another base"
        )
    peft.set_peft_model_state_dict(loaded.model, given)
    merge(loaded.model)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Put each adapter into its layer's weight, in place: W + scaling * B @ A, in fp32.

    Quantised layers become plain ones. Leaves an ordinary model without a trace of PEFT.
    """
    for name, layer in _adapted(model):
        base = layer.get_base_layer()
        weight = _plain_weight(base)
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).to(weight)
        model.set_submodule(name, _linear(weight, base.bias))
    for name, layer in _linears(model).items():
        if type(layer).__module__.startswith(QUANTIZER):  # not a target
            model.set_submodule(name, _linear(_plain_weight(layer), layer.bias))
    del model.peft_config  # type: ignore[union-attr]


def base_fingerprint(directory: Path, *, memo: Path) -> str:
    """What an adapter says of its base: the weights' files by name and sha256, wherever they are.

    A file is not read again while it stays as remembered in the JSON file `memo`.
    """
    digests = remembered_sha256(weight_files(directory), memo)
    return BASE + fingerprint({file.name: digest for file, digest in digests.items()})


def _targets(model: PreTrainedModel, lora: Lora) -> list[str]:
    """Last parts of the names of the layers to adapt. Raises RecipeError with the known ones."""
    known = sorted({name.rpartition(".")[2] for name in _linears(model)})
    if lora.targets == "all-linear":
        return known
    for name in lora.targets:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RecipeError(
                f"lora.targets: the model has no linear layer {name!r} before its output; {hint}"
                f"known: {', '.join(known)}"
            )
    return sorted(set(lora.targets))


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers by their full names, without the output layer.

    That one stays frozen: the fused head reads its weight, and where it is tied it is the embedding
    as well.
    """
    head = model.get_output_embeddings()
    return {
        name: layer for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }  # fmt: skip


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer)]


def _plain_weight(layer: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float()


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    outputs, inputs = weight_OI.shape
    made = nn.Linear(inputs, outputs, bias=bias_O is not None, device="meta")
    made.weight = nn.Parameter(weight_OI)
    if bias_O is not None:
        made.bias = nn.Parameter(bias_O.detach())
    return made


def _quantize(model: PreTrainedModel, kind: str, compute: torch.dtype) -> None:
    """Put bitsandbytes' layers in place of the linear ones; they quantise as they are moved."""
    try:
        library = importlib.import_module(QUANTIZER)
    except ImportError:
        raise ModelError(
            f"lora.quantize = {kind!r} needs bitsandbytes: pip install 'tutelage[qlora]'"
        ) from None
    layers: Any = library.nn
    for name, layer in _linears(model).items():
        has_bias, weight = layer.bias is not None, layer.weight.data
        if kind == "nf4":
            made = layers.Linear4bit(
                layer.in_features, layer.out_features, bias=has_bias, compute_dtype=compute,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            made.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
            made.weight.module = made
            # Else a look in evaluation mode packs the weights anew on some CPUs, with bf16 scales.
            made.support_avx512bf16_for_cpu = False
        else:
            made = layers.Linear8bitLt(
                layer.in_features, layer.out_features, bias=has_bias, has_fp16_weights=False,
                device="meta",
            )  # fmt: skip
            made.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        if has_bias:
            made.bias = layer.bias
        model.set_submodule(name, made)


def _save(loaded: Loaded, directory: Path, *, base: str) -> None:
    """The adapter in PEFT's layout; `PeftModel.from_pretrained(base model, directory)` reads it."""
    import peft

    directory.mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(loaded.model, save_embedding_layers=False)
    save_file(
        {PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()},
        directory / WEIGHTS, metadata={"format": "pt"},
    )  # fmt: skip
    (directory / WEIGHTS).chmod(0o644)  # safetensors makes it private
    settings: Any = loaded.model.peft_config["default"]  # type: ignore[index]
    stored = {**settings.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in stored.items()}
    text = json.dumps(plain, indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def _read_config(directory: Path) -> Mapping[str, Any]:
    """`adapter_config.json` of a plain LoRA, all of whose settings are understood here."""
    import peft

    try:
        stored = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{directory}: {CONFIG} is not JSON ({error}); save it again") from None
    if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
        raise ModelError(f"{directory} holds no LoRA ({CONFIG}: peft_type); only LoRA is merged")
    defaults = peft.LoraConfig().to_dict()
    for name, value in stored.items():
        if name == "init_lora_weights":
            plain = value in PLAIN_STARTS
        else:
            plain = name in UNDERSTOOD | WITHOUT_EFFECT or value in (defaults.get(name), None)
        if not plain:
            raise ModelError(
                f"{directory}: {name} = {value!r} in {CONFIG} is more than plain LoRA; merge it "
                "with PEFT and give the whole model as source"
            )
    return stored


def _read_weights(directory: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(directory / WEIGHTS)
    except SafetensorError:
        raise ModelError(f"{directory}: {WEIGHTS} is damaged; save the adapter again") from None
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _peft() -> Any:
    # PEFT imports it where it is there: it warns of kernels it does not find, and in int8 of every
    # cast, in each layer and step.
    logging.getLogger(QUANTIZER).setLevel(logging.ERROR)
    try:
        return importlib.import_module("peft")
    except ImportError:
        raise ModelError("adapters need PEFT: pip install 'tutelage[lora]'") from None


def _short(digest: str) -> str:
    return digest.removeprefix(BASE)[:12]
