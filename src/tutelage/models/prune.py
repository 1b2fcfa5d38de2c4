"""Depth pruning: which layers change their input least, and the model without them.

Source: ShortGPT, arXiv 2403.03853. Shapes: B sequences, T tokens, D hidden width.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.core.errors import ModelError

PER_LAYER_SETTINGS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Lists in a configuration with one entry a layer; they are cut along with the layers."""


@dataclass(frozen=True)
class Pruned:
    """A shallower model and how it was chosen."""

    model: PreTrainedModel
    keep: tuple[int, ...]
    """The original numbers of its layers."""
    influence: tuple[float, ...]
    """Of every original layer; empty when the layers were named, not measured."""


def prune_least_influential(model: PreTrainedModel, drop: int, batches: Iterable[Tensor]) -> Pruned:
    """Remove the `drop` layers of least block influence on `batches`; see `block_influence`."""
    check_drop(drop, len(layers_of(model)))
    scores = block_influence(model, batches)
    keep = keep_from_influence(scores, drop)
    return Pruned(prune_layers(model, keep), keep, scores)


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Iterable[Tensor]) -> tuple[float, ...]:
    """Block influence of each layer: BI_l = 1 - mean over tokens of cos(input_l, output_l).

    `batches` are token ids [B, T] without padding. Between 0 (the layer does nothing) and 2.
    Cosines are taken in fp32 and summed in fp64, so the order of batches hardly matters.
    Raises ModelError when there is no token, or a hidden state is not finite.
    Source: arXiv 2403.03853, equation 1.
    """
    layers = layers_of(model)
    sums = [0.0] * len(layers)
    count = 0

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            before_BTD = args[0] if args else kwargs["hidden_states"]
            after_BTD = output[0] if isinstance(output, tuple) else output
            cosine_BT = nn.functional.cosine_similarity(
                before_BTD.float(), after_BTD.float(), dim=-1
            )
            sums[index] += float(cosine_BT.double().sum())

        return hook

    was_training = model.training
    model.eval()
    handles = [
        layer.register_forward_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        for ids_BT in batches:
            model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=1)
            count += ids_BT.numel()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if count == 0:
        raise ModelError("no calibration tokens to measure block influence on")
    scores = tuple(1.0 - total / count for total in sums)
    if not all(map(math.isfinite, scores)):
        raise ModelError("hidden states are not finite: the weights are damaged or overflow")
    return scores


def keep_from_influence(scores: Sequence[float], drop: int) -> tuple[int, ...]:
    """The layers left, in order, when the `drop` of least influence go; of equal ones the deeper.

    Raises ModelError when no layer would be left.
    """
    check_drop(drop, len(scores))
    order = sorted(range(len(scores)), key=lambda layer: (scores[layer], -layer))
    return tuple(sorted(order[drop:]))


def prune_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A model of only the layers `keep` (numbers from 0, rising); its weights are `model`'s own.

    Nothing is copied but structure and configuration, and `model` stays as it is; training either
    one changes both. Raises ModelError when `keep` is empty, out of range, repeated or unsorted.
    """
    layers = layers_of(model)
    check_keep(keep, len(layers))
    # Deep copy with every weight already "copied" to itself: all else becomes the new model's own.
    tensors = [*model.parameters(), *model.buffers()]
    pruned = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    kept = nn.ModuleList(layers_of(pruned)[index] for index in keep)
    for number, layer in enumerate(kept):
        for module in layer.modules():  # the key-value cache is addressed by this number
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    pruned.base_model.layers = kept
    config = pruned.config
    for name in PER_LAYER_SETTINGS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in keep])
    config.num_hidden_layers = len(keep)
    return pruned


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's layers. Raises ModelError when it does not keep them as Llama-like models do."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.num_hidden_layers:
        raise ModelError(
            f"{type(model).__name__} does not keep its layers as Llama-like models do "
            "(model.layers); remove drop_layers and keep_layers"
        )
    return layers


def check_drop(drop: int, layers: int) -> None:
    """Raise ModelError unless `drop` of so many layers leaves at least one."""
    if not 0 <= drop < layers:
        raise ModelError(
            f"drop_layers = {drop} of a model with {layers} layers; "
            f"choose between 0 and {layers - 1}"
        )


def check_keep(keep: Sequence[int], layers: int) -> None:
    """Raise ModelError unless `keep` are rising, distinct numbers of a model's layers."""
    if not keep:
        raise ModelError("keep_layers is empty: a model needs at least one layer")
    if outside := [index for index in keep if not 0 <= index < layers]:
        raise ModelError(
            f"keep_layers names layer {outside[0]}, but the model's {layers} layers are "
            f"0 to {layers - 1}"
        )
    if len(set(keep)) != len(keep):
        twice = next(index for index in keep if list(keep).count(index) > 1)
        raise ModelError(f"keep_layers names layer {twice} twice; name each layer once")
    if list(keep) != sorted(keep):
        raise ModelError("keep_layers is not in rising order; layers cannot be rearranged")
