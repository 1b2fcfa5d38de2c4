"""How far an exported GGUF is from the model that was evaluated.

Owns four measures. `weights_parity`: the file's weights, read back by transformers and computed in
float32, so only rounding and mapping show. `runtime_parity`: what the device's own kernels give
(they also round activations), so wrong metadata shows as well. `greedy_parity`: how long both write
the same answer. `tokenization_parity`: whether the runtime renders and splits a prompt into the ids
of training.
Gate on a KL, not on greedy text: at a near-tie one changed token changes all that follow.

Legend: T tokens of a sequence, V vocabulary, N positions. All KLs are forward:
forward_kl = E_model[log p_model - log p_exported], in nats a token.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from tutelage.core.errors import ExportError
from tutelage.export.runtime import EdgeRuntime, Messages

ROWS_AT_ONCE = 64  # 64 x 49,152 float32 logits are 12 MB; a long answer's would be gigabytes
Ids = Sequence[int]


@dataclass(frozen=True)
class DistributionParity:
    """Next-token distributions of the model against the file's, over `num_tokens` positions."""

    mean_forward_kl: float
    p99_forward_kl: float
    argmax_agreement: float
    num_tokens: int


@dataclass(frozen=True)
class TokenizationParity:
    """Share of prompts the runtime turns into the ids of training, and the first that differs."""

    agreement: float
    first_difference: str | None


@dataclass(frozen=True)
class RenderedPrompt:
    """A conversation that ends with the user, its mode, and its ids as in training."""

    messages: Messages
    ids: Ids
    thinking: bool = False


def weights_parity(model: Any, path: Path, sequences: Sequence[Ids]) -> DistributionParity:
    """Compare every position of `sequences` under `model` and under the weights in the GGUF.

    The file is read by transformers' own reader under `model`'s configuration, on the CPU in fp32.

    Raises:
        ExportError: transformers cannot read this architecture back (use `runtime_parity`).
    """
    exported = _reload(model, path)
    kls, matches = [], []
    with torch.inference_mode():
        for ids in sequences:
            ids_1T = torch.tensor([list(ids)], device=model.device)
            logits_TV = model(ids_1T).logits[0].cpu()
            other_TV = exported(ids_1T.cpu()).logits[0]
            for rows_NV, other_NV in zip(
                logits_TV.split(ROWS_AT_ONCE), other_TV.split(ROWS_AT_ONCE), strict=True
            ):
                kls.append(_forward_kl(rows_NV, other_NV))
                matches.append(rows_NV.argmax(-1) == other_NV.argmax(-1))
    return _summary(torch.cat(kls), torch.cat(matches))


def runtime_parity(
    model: Any, runtime: EdgeRuntime, sequences: Sequence[Ids], *, num_positions: int = 32
) -> DistributionParity:
    """Compare `num_positions` evenly spaced positions of `sequences` with the runtime's.

    A position costs about half a second with 49,152 ids: the runtime spells out the vocabulary.
    """
    total = sum(len(ids) for ids in sequences)
    chosen = set(np.linspace(0, total - 1, min(num_positions, total)).round().astype(int).tolist())
    kls, matches = [], []
    with torch.inference_mode():
        for ids, positions in _positions(sequences, chosen):
            logits_TV = model(torch.tensor([list(ids)], device=model.device)).logits[0].cpu()
            for position in positions:
                logits_1V = logits_TV[position : position + 1]
                logp_V = runtime.next_logp(ids[: position + 1], vocab_size=logits_1V.shape[-1])
                other_1V = torch.from_numpy(logp_V)[None]
                kls.append(_forward_kl(logits_1V, other_1V))
                matches.append(logits_1V.argmax(-1) == other_1V.argmax(-1))
    return _summary(torch.cat(kls), torch.cat(matches))


def greedy_parity(
    model: Any,
    runtime: EdgeRuntime,
    prompts: Sequence[Ids],
    *,
    max_tokens: int,
    stop_ids: tuple[int, ...],
) -> float:
    """Share of leading tokens that greedy answers have in common, averaged over prompts."""
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )  # fmt: skip
    shares = []
    for ids in prompts:
        prompt_1T = torch.tensor([list(ids)], device=model.device)
        mask_1T = torch.ones_like(prompt_1T)
        output_1T = model.generate(prompt_1T, attention_mask=mask_1T, generation_config=greedy)
        ours = output_1T[0, len(ids) :].tolist()
        theirs = runtime.complete(ids, max_tokens=max_tokens).token_ids
        shares.append(_num_leading(ours, theirs) / max(len(ours), len(theirs), 1))
    return float(np.mean(shares))


def tokenization_parity(
    runtime: EdgeRuntime, prompts: Sequence[RenderedPrompt]
) -> TokenizationParity:
    """Compare the runtime's rendering and splitting of each prompt with its ids in training."""
    first, num_same = None, 0
    for prompt in prompts:
        text = runtime.render(prompt.messages, thinking=prompt.thinking)
        ours, theirs = list(prompt.ids), list(runtime.tokenize(text))
        num_same += ours == theirs
        if first is None and ours != theirs:
            at = _num_leading(ours, theirs)
            first = (
                f"token {at}: ids {ours[at : at + 4]} in training, "
                f"{theirs[at : at + 4]} in the runtime, prompt {text!r}"
            )
    return TokenizationParity(num_same / max(len(prompts), 1), first)


def _num_leading(ours: Ids, theirs: Ids) -> int:
    """How many ids two sequences share from the start."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    )


def _reload(model: Any, path: Path) -> Any:
    if model.config.model_type.removesuffix("_text") not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ExportError(
            f"transformers cannot read a {model.config.model_type} GGUF back: use runtime_parity"
        )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars have no switch
        return type(model).from_pretrained(
            path.parent, gguf_file=path.name, config=model.config, dtype=torch.float32
        )


def _positions(sequences: Sequence[Ids], chosen: set[int]) -> Iterator[tuple[Ids, list[int]]]:
    """Sequences with those of their positions whose running number is in `chosen`."""
    start = 0
    for ids in sequences:
        if positions := [i for i in range(len(ids)) if start + i in chosen]:
            yield ids, positions
        start += len(ids)


def _forward_kl(logits_NV: Tensor, other_NV: Tensor) -> Tensor:
    logp_NV = logits_NV.double().log_softmax(-1)
    logq_NV = other_NV.double().log_softmax(-1)
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def _summary(kl_N: Tensor, match_N: Tensor) -> DistributionParity:
    return DistributionParity(
        mean_forward_kl=float(kl_N.mean()),
        p99_forward_kl=float(kl_N.quantile(0.99)),
        argmax_agreement=float(match_N.double().mean()),
        num_tokens=len(kl_N),
    )
