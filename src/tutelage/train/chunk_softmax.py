"""Softmax of a chunk's logits and its gradient, in one buffer; knows no losses and no head.

Legend: C tokens of a chunk, V vocabulary, K stored ids a token, R rows of a block.
The stored ids are taken out of the buffer and kept apart as small tensors; what stays is the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tutelage.train.losses import MASKED, SparseTarget, StudentView

ENTROPY_BYTES = 4 * 2**20
"""Bytes of the block of rows in which the entropy is taken. Within a cache it adds 30 us to a token
of 2.4 ms (V 49,152, one core), in blocks of 64 MiB 130 us; smaller ones win nothing."""


@dataclass(frozen=True)
class Softmax:
    """What a pass knows of a chunk beside its buffer of `exp(z - max)` outside the stored ids."""

    ids_CK: Tensor
    valid_CK: Tensor
    z_CK: Tensor
    """Logits at the stored ids; MASKED where not valid."""
    rest_max_C: Tensor
    rest_sum_C: Tensor
    """Row sums of the buffer."""
    log_norm_C: Tensor
    log_rest_C: Tensor
    rest_entropy_C: Tensor | None
    """Entropy within the ids outside the stored ones."""


def softmax_in_place(z_CV: Tensor, ids_CK: Tensor, valid_CK: Tensor, *, entropy: bool) -> Softmax:
    """Turn logits into `exp(z - max)` outside the stored ids and 0 at them.

    Taking the stored ids out first gives log(1 - P) from the logits outside, to full precision also
    where P rounds to 1, and costs no pass of its own.
    """
    has_ids = ids_CK.shape[1] > 0
    if has_ids:
        # Padding repeats a valid id of its row, so that it writes one value twice and never another
        # id's; a row without any valid id writes back what stands there.
        ids_CK = torch.where(valid_CK, ids_CK, _one_valid(ids_CK, valid_CK))
    z_CK = z_CV.gather(1, ids_CK)
    if has_ids:
        z_CV.scatter_(1, ids_CK, torch.where(valid_CK.any(-1, keepdim=True), MASKED, z_CK))
    z_CK = z_CK.masked_fill(~valid_CK, MASKED)
    rest_max_C = z_CV.amax(-1)
    z_CV.sub_(rest_max_C[:, None])
    z_exp_sum_C = _exp_and_product_in_place(z_CV) if entropy else None
    rest_sum_C = (z_CV if entropy else z_CV.exp_()).sum(-1)
    rest_entropy_C = None if z_exp_sum_C is None else rest_sum_C.log() - z_exp_sum_C / rest_sum_C
    log_rest_C = rest_max_C + rest_sum_C.log()
    log_norm_C = torch.logaddexp(log_rest_C, torch.logsumexp(z_CK, -1))
    return Softmax(
        ids_CK, valid_CK, z_CK, rest_max_C, rest_sum_C, log_norm_C, log_rest_C - log_norm_C,
        rest_entropy_C,
    )  # fmt: skip


def _exp_and_product_in_place(z_CV: Tensor) -> Tensor:
    """Turn z into exp(z), in blocks of rows that stay in cache; returns `sum z exp(z)` [C]."""
    size = max(1, ENTROPY_BYTES // (z_CV.shape[1] * z_CV.itemsize))
    exp_RV = torch.empty_like(z_CV[:size])
    sums_C = z_CV.new_empty(len(z_CV))
    for start in range(0, len(z_CV), size):
        z_RV = z_CV[start : start + size]
        block_RV = torch.exp(z_RV, out=exp_RV[: len(z_RV)])
        sums_C[start : start + size] = z_RV.mul_(block_RV).sum(-1)
        z_RV.copy_(block_RV)
    return sums_C


def spread_in_place(
    buffer_CV: Tensor, soft: Softmax, g_logp_CK: Tensor, g_rest_C: Tensor, g_other_C: Tensor
) -> None:
    """dL/dz from G and g, save the label's own entry; G sums over the stored ids and the label.

    Outside the stored ids p_j = (1 - P) r_j with r_j = exp(z - max) / its sum, and the gradient is
    `r_j * (g P - (1 - P) sum(G))`: no division by 1 - P, so nothing grows as P nears 1.
    """
    total_C = g_logp_CK.sum(-1) + g_other_C
    inside_C, outside_C = -torch.expm1(soft.log_rest_C), soft.log_rest_C.exp()
    buffer_CV.mul_(((g_rest_C * inside_C - total_C * outside_C) / soft.rest_sum_C)[:, None])
    if g_logp_CK.shape[1]:
        p_CK = (soft.z_CK - soft.log_norm_C[:, None]).exp()
        g_z_CK = g_logp_CK - p_CK * (total_C + g_rest_C)[:, None]
        is_empty_C1 = ~soft.valid_CK.any(-1, keepdim=True)
        repeated_C1 = torch.where(
            is_empty_C1, buffer_CV.gather(1, soft.ids_CK[:, :1]), _one_valid(g_z_CK, soft.valid_CK)
        )
        buffer_CV.scatter_(1, soft.ids_CK, torch.where(soft.valid_CK, g_z_CK, repeated_C1))


def _one_valid(values_CK: Tensor, valid_CK: Tensor) -> Tensor:
    """The value of one valid entry of each row (of any, where none is) [C, 1]."""
    return values_CK.gather(1, valid_CK.int().argmax(-1, keepdim=True))


def top1_agreement(soft: Softmax, target: SparseTarget) -> list[Tensor]:
    """Whether the student's top id is the teacher's, and whether the latter is known."""
    dtype = soft.z_CK.dtype
    if not soft.z_CK.shape[1]:
        none_C = torch.zeros_like(soft.rest_max_C)
        return [none_C, none_C]
    head_CK = target.head_mask_NK & target.valid_NK
    top_C1 = target.q_NK.masked_fill(~head_CK, -1.0).argmax(-1, keepdim=True)
    known_C = head_CK.any(-1)
    top_z_C = soft.z_CK.gather(1, top_C1)[:, 0]
    agree_C = (top_z_C >= soft.rest_max_C) & (top_z_C >= soft.z_CK.amax(-1)) & known_C
    return [agree_C.to(dtype), known_C.to(dtype)]


def entropy_of(view: StudentView, soft: Softmax) -> Tensor:
    """`-sum p log p` over V: the stored ids one by one, the rest as a block and within it."""
    stored_C = -(view.logp_NK.exp() * view.logp_NK).sum(-1)
    assert soft.rest_entropy_C is not None
    return stored_C + soft.log_rest_C.exp() * (soft.rest_entropy_C - soft.log_rest_C)
