"""The output layer and the loss in one step, over chunks of tokens; never holds [N, V].

Legend: N tokens, C tokens of a chunk, D hidden size, V vocabulary, K stored ids a token.
Owns the passes over a chunk's logits and the gradients of hidden states and head; what a loss is
belongs to `losses`, which sees K numbers a token and hands back their gradient.

A chunk's buffer goes through four lives in place: logits, exp(logits) of the ids outside the stored
ones, gradient on the logits, and the next chunk's logits. Gradients are made in the forward pass,
where the buffer is warm; backward only scales them. Plain PyTorch on any device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.train.chunk_softmax import (
    Softmax,
    entropy_of,
    softmax_in_place,
    spread_in_place,
    top1_agreement,
)
from tutelage.train.losses import (
    SparseTarget,
    StudentView,
    TokenLosses,
    prepare,
    token_losses,
    unbiased_forward_kl,
)
from tutelage.train.spec import LossSpec

CHUNK_BYTES = 256 * 2**20
"""Bytes of all [C, V] buffers alive together. Every chunk reads the whole head and rewrites its
whole gradient, so small ones cost time: on two cores at D 1024, V 151,936 a step of 1,024 tokens
took 7.3 s in chunks of 128 tokens, 6.8 s of 220, 6.5 s of 441 (this bound) and 6.5 s in one."""


@dataclass(frozen=True)
class TokenMetrics:
    """Detached figures a token [N], float32 (float64 for float64 input)."""

    total_N: Tensor
    """The objective, before weights."""
    ce_N: Tensor
    """Negative log-probability of the label, nats."""
    kd_N: Tensor
    """The mixture of divergences, before lam."""
    forward_kl_N: Tensor
    """Forward KL by the sparse estimate, whatever the loss; unbiased for stored targets."""
    top1_agree_N: Tensor
    """1 where the student's most likely id is the teacher's, else 0."""
    top1_known_N: Tensor
    """1 where the target has a head, so that the teacher's most likely id is known, else 0."""
    entropy_N: Tensor | None
    """Entropy of the student, nats, at the spec's temperature; None unless asked for."""


@dataclass(frozen=True)
class FusedOutput:
    """The summed loss, with gradient to hidden states, weight and bias, and detached metrics."""

    loss_sum: Tensor
    metrics: TokenMetrics


def fused_loss(
    hidden_ND: Tensor, weight_VD: Tensor, target: SparseTarget, spec: LossSpec, *,
    weights_N: Tensor | None = None, bias_V: Tensor | None = None, softcap: float | None = None,
    chunk_tokens: int | None = None, entropy: bool = False,
) -> FusedOutput:  # fmt: skip
    """`sum_n weights_n * token_losses(logits)_n` for logits = hidden @ weight.T (+ bias, soft-cap).

    Without gradient mode, or where nothing asks for a gradient, only the loss is computed. Products
    run in the dtype of the hidden states, or of autocast where it is on; log-sum-exp, losses and
    the head's accumulated gradient in float32 at least. Backward works once.

    softcap s: logits become `s * tanh(logits / s)`. weights_N: None = all 1; a token of weight 0
    adds nothing. chunk_tokens: None = what fits into CHUNK_BYTES.

    Raises RecipeError or DataError where spec and target do not fit (see `prepare`).
    """
    target = prepare(target, spec, vocab_size=weight_VD.shape[0])
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    inputs = (hidden_ND, weight_VD, bias_V)
    wanted = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs
    )
    work_dtype = torch.promote_types(dtype or hidden_ND.dtype, torch.float32)
    if weights_N is None:
        weights_N = torch.ones(len(hidden_ND), dtype=work_dtype, device=hidden_ND.device)
    job = _Job(
        target, spec, weights_N.detach().to(work_dtype), softcap, chunk_tokens, entropy,
        dtype or hidden_ND.dtype, work_dtype, wanted,
    )  # fmt: skip
    if any(wanted):
        loss_sum, *columns = _FusedHead.apply(*inputs, job)  # type: ignore[misc]
    else:
        loss_sum, columns, _ = _sweep(*inputs, job)
    return FusedOutput(loss_sum, TokenMetrics(*columns, *([] if entropy else [None])))


def tokens_that_fit(row_bytes: int) -> int:
    """Tokens of a chunk, when one takes `row_bytes` over all its buffers; at least one."""
    return max(1, CHUNK_BYTES // row_bytes)


@dataclass(frozen=True)
class _Job:
    """Everything of a call that is no differentiable input."""

    target: SparseTarget
    spec: LossSpec
    weights_N: Tensor
    softcap: float | None
    chunk_tokens: int | None
    entropy: bool
    dtype: torch.dtype
    work_dtype: torch.dtype
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class _Buffers:
    """The [C, V] buffers of a chunk; those it has no use for are None."""

    work_CV: Tensor
    """Logits of KD, then their exp, then the gradient; float32 at least."""
    product_CV: Tensor | None
    """Where the products run in another dtype than work_CV's."""
    slope_CV: Tensor | None
    """d logits / d raw logits under a soft-cap."""
    unit_CV: Tensor | None
    """Logits at temperature 1, for the cross-entropy, where KD has another."""

    def first(self, tokens: int) -> "_Buffers":
        """The same buffers for a last, smaller chunk."""
        return _Buffers(*(None if b is None else b[:tokens] for b in vars(self).values()))  # type: ignore[arg-type]


class _FusedHead(torch.autograd.Function):
    """Gradients in forward, scaling in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job
    ) -> tuple[Tensor, ...]:
        loss_sum, columns, ctx.grads = _sweep(hidden_ND, weight_VD, bias_V, job)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V)]
        ctx.mark_non_differentiable(*columns)
        return loss_sum, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("fused_loss was already walked backward; its gradients are used up")
        grads = [
            None if grad is None else grad.mul_(grad_sum.to(grad.dtype)).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        ctx.grads = None
        return *grads, None


def _sweep(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job
) -> tuple[Tensor, list[Tensor], tuple[Tensor | None, ...]]:
    """All chunks: summed loss, columns of TokenMetrics, gradients of hidden, weight and bias."""
    hidden_ND, weight_VD = hidden_ND.detach().to(job.dtype), weight_VD.detach().to(job.dtype)
    bias_V = None if bias_V is None else bias_V.detach().to(job.dtype)
    grads = tuple(
        torch.zeros_like(tensor, dtype=job.work_dtype) if wanted and tensor is not None else None
        for tensor, wanted in zip((hidden_ND, weight_VD, bias_V), job.wanted, strict=True)
    )
    total = len(hidden_ND)
    columns = [job.weights_N.new_zeros(total) for _ in range(7 if job.entropy else 6)]
    buffers = _buffers(total, weight_VD, job)
    size = len(buffers.work_CV)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, total, size):
            stop = min(start + size, total)
            chunk, hidden_CD = buffers.first(stop - start), hidden_ND[start:stop]
            _logits(hidden_CD, weight_VD, bias_V, chunk, job)
            rows = _losses_and_gradient(chunk, job, start, stop)
            for column, row in zip(columns, rows, strict=True):
                column[start:stop] = row
            if any(job.wanted):
                _accumulate(hidden_CD, weight_VD, chunk, grads, slice(start, stop))
    loss_sum = (columns[0] * job.weights_N).sum()
    return loss_sum, columns, grads


def _buffers(total: int, weight_VD: Tensor, job: _Job) -> _Buffers:
    """As few [C, V] buffers as the job can do with, and as many tokens as CHUNK_BYTES allows."""
    needed = {
        "work_CV": job.work_dtype,
        "product_CV": job.dtype if job.dtype != job.work_dtype else None,
        "slope_CV": job.work_dtype if job.softcap is not None and any(job.wanted) else None,
        "unit_CV": job.work_dtype if job.spec.temperature != 1 else None,
    }
    vocab = weight_VD.shape[0]
    row_bytes = vocab * sum(dtype.itemsize for dtype in needed.values() if dtype is not None)
    size = max(1, min(total, job.chunk_tokens or tokens_that_fit(row_bytes)))
    return _Buffers(
        **{
            name: None if dtype is None else weight_VD.new_empty(size, vocab, dtype=dtype)
            for name, dtype in needed.items()
        }  # type: ignore[arg-type]
    )


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk: _Buffers, job: _Job
) -> None:
    """Fill work_CV (and unit_CV, slope_CV) from this chunk's logits."""
    work_CV = chunk.work_CV
    product_CV = work_CV if chunk.product_CV is None else chunk.product_CV
    if bias_V is None:
        torch.mm(hidden_CD, weight_VD.T, out=product_CV)
    else:
        torch.addmm(bias_V, hidden_CD, weight_VD.T, out=product_CV)
    if product_CV is not work_CV:
        work_CV.copy_(product_CV)
    if job.softcap is not None:
        work_CV.div_(job.softcap).tanh_()
        if chunk.slope_CV is not None:
            torch.square(work_CV, out=chunk.slope_CV).neg_().add_(1)
        work_CV.mul_(job.softcap)
    if chunk.unit_CV is not None:
        chunk.unit_CV.copy_(work_CV)
        work_CV.div_(job.spec.temperature)


def _losses_and_gradient(chunk: _Buffers, job: _Job, start: int, stop: int) -> list[Tensor]:
    """Columns of TokenMetrics for these rows; work_CV turns from logits into their gradient."""
    target, weights_C = job.target.rows(start, stop), job.weights_N[start:stop]
    label_C1 = target.label_ids_N[:, None]
    unit_CV = chunk.work_CV if chunk.unit_CV is None else chunk.unit_CV
    label_z_C = unit_CV.gather(1, label_C1)[:, 0]
    soft = softmax_in_place(chunk.work_CV, target.ids_NK, target.valid_NK, entropy=job.entropy)
    unit = soft
    if chunk.unit_CV is not None:
        none_CK = target.valid_NK[:, :0]
        unit = softmax_in_place(unit_CV, target.ids_NK[:, :0], none_CK, entropy=False)
    view = StudentView(
        soft.z_CK - soft.log_norm_C[:, None], soft.log_rest_C, label_z_C - unit.log_norm_C
    )
    losses, grads = _small_gradients(view, target, weights_C, job)
    if grads is not None:
        _gradient_in_place(chunk, job.spec, soft, unit, grads, label_C1)
    columns = [losses.total_N, losses.ce_N, losses.kd_N, unbiased_forward_kl(view.logp_NK, target)]
    columns += top1_agreement(soft, target)
    if soft.rest_entropy_C is not None:
        columns.append(entropy_of(view, soft))
    return columns


def _small_gradients(
    view: StudentView, target: SparseTarget, weights_C: Tensor, job: _Job
) -> tuple[TokenLosses, StudentView | None]:
    """Losses, and the weighted sum's gradient by the view (as a view), by autograd on [C, K]."""
    if not any(job.wanted):
        return token_losses(view, target, job.spec), None
    leaves = [tensor.requires_grad_() for tensor in vars(view).values()]
    with torch.enable_grad():
        losses = token_losses(view, target, job.spec)
        loss_sum = (losses.total_N * weights_C).sum()
    grads = torch.autograd.grad(loss_sum, leaves, allow_unused=True, materialize_grads=True)
    return TokenLosses(*(tensor.detach() for tensor in vars(losses).values())), StudentView(*grads)


def _gradient_in_place(
    chunk: _Buffers, spec: LossSpec, soft: Softmax, unit: Softmax, grads: StudentView,
    label_C1: Tensor,
) -> None:  # fmt: skip
    """work_CV from exp(z - max) to the gradient on the raw logits (before soft-cap)."""
    work_CV, g_label_C = chunk.work_CV, grads.label_logp_N
    if chunk.unit_CV is None:
        spread_in_place(work_CV, soft, grads.logp_NK, grads.log_rest_N, g_label_C)
        work_CV.scatter_add_(1, label_C1, g_label_C[:, None])
    else:
        t = spec.temperature
        none_C = torch.zeros_like(g_label_C)
        spread_in_place(work_CV, soft, grads.logp_NK / t, grads.log_rest_N / t, none_C)
        spread_in_place(chunk.unit_CV, unit, grads.logp_NK[:, :0], none_C, g_label_C)
        chunk.unit_CV.scatter_add_(1, label_C1, g_label_C[:, None])
        work_CV.add_(chunk.unit_CV)
    if chunk.slope_CV is not None:
        work_CV.mul_(chunk.slope_CV)


def _accumulate(
    hidden_CD: Tensor, weight_VD: Tensor, chunk: _Buffers, grads: tuple[Tensor | None, ...],
    rows: slice,
) -> None:  # fmt: skip
    """Add a chunk's share to the gradients of hidden states, weight and bias."""
    g_hidden_ND, g_weight_VD, g_bias_V = grads
    g_z_CV = chunk.work_CV
    if g_bias_V is not None:
        g_bias_V.add_(g_z_CV.sum(0))
    if chunk.product_CV is not None:
        g_z_CV = chunk.product_CV.copy_(g_z_CV)
    if g_hidden_ND is not None:
        g_hidden_ND[rows] = g_z_CV @ weight_VD
    if g_weight_VD is not None:
        if chunk.product_CV is None:
            g_weight_VD.addmm_(g_z_CV.T, hidden_CD)
        else:
            g_weight_VD.add_(g_z_CV.T @ hidden_CD)
