"""From a teacher's logits to sparse targets; knows nothing of files, models or losses.

Owns the estimators. Threshold sampling is the one to use; `fixed_sample` is pure sampling, a fixed
head with draws, and plain top-k, for comparison and for engines that can give no more.

Legend: N tokens, V vocabulary, B blocks of W consecutive ids, M head entries, T tail points, S
draws.

Every draw is an inverse of the cumulative tail in id order. A float32 running sum is only good to
3e-8, a third of a rare id's probability, and costs 55 us a token at V = 49,152, a float64 one 440.
So sums are taken in blocks of W ids (5 us); running sums over the B blocks, and inside the one
block that a point falls into, are float64. These small tensors and all indices live on the CPU,
whatever the device: some have no float64, and the result goes to numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tutelage.core.errors import EngineError, RecipeError
from tutelage.targets.schema import PURE, TOP_K, TokenTargets, concat_targets

BLOCK = 128
SLICE_LOGITS = 1 << 20
"""Logits a CPU works on at a time: 4 MB a buffer. 155 us a token at V = 49,152; 390 in one piece of
512 tokens, where each buffer is fresh memory."""


@dataclass(frozen=True)
class Threshold:
    """`threshold_sample` with its settings: what a scorer is given."""

    tau: float
    temperature: float = 1.0
    draws: int = 1
    """One offset a token drives the systematic sampling of its whole tail."""

    @property
    def name(self) -> str:
        """How the store's metadata names it."""
        return "threshold"

    def __call__(self, logits_NV: Tensor, labels_N: Tensor, uniforms_NS: Tensor) -> TokenTargets:
        """Targets of N tokens."""
        return threshold_sample(
            logits_NV, labels_N, tau=self.tau, offsets_N=uniforms_NS[:, 0],
            temperature=self.temperature,
        )  # fmt: skip


@dataclass(frozen=True)
class Fixed:
    """`fixed_sample` with its settings: a head of so many ids, and so many draws from the rest."""

    head: int
    draws: int
    temperature: float = 1.0
    tau: None = None

    @property
    def name(self) -> str:
        """How the store's metadata names it: `top-12`, `pure-12`, `head-6+6`."""
        if not self.draws:
            return f"{TOP_K}-{self.head}"
        return f"head-{self.head}+{self.draws}" if self.head else f"{PURE}-{self.draws}"

    def __call__(self, logits_NV: Tensor, labels_N: Tensor, uniforms_NS: Tensor) -> TokenTargets:
        """Targets of N tokens."""
        return fixed_sample(
            logits_NV, labels_N, head=self.head, uniforms_NS=uniforms_NS,
            temperature=self.temperature,
        )  # fmt: skip


def threshold_sample(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    tau: float,
    offsets_N: Tensor,
    temperature: float = 1.0,
) -> TokenTargets:
    """Every q >= tau exactly; any other id with probability q / tau, then for a mass of tau.

    With the tail (q < tau) laid end to end in id order, id i covers `[c_(i-1), c_i)`; those ids are
    kept that cover one of `(u + k) * tau, k = 0, 1, ...`, with u the token's offset. So P(kept) =
    q_i / tau, `E[q_hat] = q`, and the number of tail ids is within one of its mean (rest / tau).

    Args:
        logits_NV: any float type; read as float32.
        labels_N: the sampled ids, int64.
        tau: in (0, 1].
        offsets_N: u, uniform in [0, 1); drives all randomness of its token.
        temperature: divides the logits.

    Raises:
        RecipeError: tau or temperature out of range.
        EngineError: logits that are NaN or infinite, naming the row.

    Source: systematic sampling with probability proportional to size (Madow, 1949), as an
    estimator of the teacher in forward KL; arXiv 2503.16870 is the case without a head.
    """
    if not 0 < tau <= 1:
        raise RecipeError(f"tau is {tau}; a threshold on probabilities must be in (0, 1]")

    def estimate(rows: slice) -> TokenTargets:
        masses = _masses(logits_NV[rows], labels_N[rows], temperature, first_row=rows.start)
        head = _entries_from(masses, tau * masses.total_N)
        cum_NB = _tail_cumsum(masses, head)
        unit_N1 = (tau * masses.total_N)[:, None]
        most = int((cum_NB[:, -1:] / unit_N1).max()) + 1
        points_NP = (_exact(offsets_N[rows])[:, None] + torch.arange(most)) * unit_N1
        counts_N, tail_ids_T = _locate(masses.e_NBW, cum_NB, points_NP)
        return _targets(masses, head, counts_N, tail_ids_T, tau=tau)

    return _in_slices(logits_NV, estimate, tau=tau)


def fixed_sample(
    logits_NV: Tensor,
    labels_N: Tensor,
    *,
    head: int,
    uniforms_NS: Tensor,
    temperature: float = 1.0,
) -> TokenTargets:
    """The `head` largest q exactly, and S independent draws from the rest, which share its mass.

    `head=0` is pure sampling (arXiv 2503.16870), S = 0 plain top-k: biased, the rest is dropped.
    Arguments and errors are those of `threshold_sample`; `uniforms_NS` is uniform in [0, 1).
    """
    if not 0 <= head <= logits_NV.shape[1]:
        raise RecipeError(f"a head of {head} ids from a vocabulary of {logits_NV.shape[1]}")

    def estimate(rows: slice) -> TokenTargets:
        masses = _masses(logits_NV[rows], labels_N[rows], temperature, first_row=rows.start)
        entries = _largest(masses, head, logits_NV.shape[1])
        cum_NB = _tail_cumsum(masses, entries)
        points_NS = _exact(uniforms_NS[rows]).sort(-1).values * cum_NB[:, -1:]
        counts_N, tail_ids_T = _locate(masses.e_NBW, cum_NB, points_NS)
        return _targets(masses, entries, counts_N, tail_ids_T, tau=None)

    return _in_slices(logits_NV, estimate, tau=None)


def _in_slices(
    logits_NV: Tensor, estimate: Callable[[slice], TokenTargets], *, tau: float | None
) -> TokenTargets:
    """Rows do not depend on each other: a CPU takes as many at a time as its cache holds."""
    N, V = logits_NV.shape
    step = max(1, SLICE_LOGITS // V) if logits_NV.is_cpu else max(1, N)
    parts = [estimate(slice(start, start + step)) for start in range(0, N, step)]
    return concat_targets(parts or [TokenTargets.blank(0, tau)])


@dataclass(frozen=True)
class _Masses:
    """`e = exp(z - max z)` in blocks; the last block is padded with zeros."""

    e_NBW: Tensor
    sums_NB: Tensor
    total_N: Tensor
    """float64, on the CPU, as are the next two; q = e / total"""
    label_logp_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True)
class _Entries:
    """Head entries in token order, by falling q within a token; on the CPU."""

    token_M: Tensor
    id_M: Tensor
    logq_M: Tensor


def _masses(logits_NV: Tensor, labels_N: Tensor, temperature: float, *, first_row: int) -> _Masses:
    """Five passes over the logits, and the check that they are finite for nothing.

    `H = log Z - sum(e * d) / Z` with `d = z - max z`: a NaN or an infinity anywhere in a row makes
    `e * d` NaN there, and so the row's entropy.
    """
    if temperature <= 0:
        raise RecipeError(f"temperature of the teacher is {temperature}; it must be above 0")
    z_NV = logits_NV.float() if temperature == 1.0 else logits_NV.float() / temperature
    N, V = z_NV.shape
    d_NP = z_NV.new_empty(N, -(-V // BLOCK) * BLOCK)
    torch.sub(z_NV, z_NV.amax(-1, keepdim=True), out=d_NP[:, :V])
    d_NP[:, V:] = 0
    label_d_N = _exact(d_NP.gather(-1, labels_N[:, None])[:, 0])
    e_NP = d_NP.exp()
    e_NP[:, V:] = 0
    e_NBW = e_NP.view(N, -1, BLOCK)
    sums_NB = e_NBW.sum(-1)
    total_N = _exact(sums_NB).sum(-1)
    moment_N = _exact(d_NP.mul_(e_NP).view(N, -1, BLOCK).sum(-1)).sum(-1)
    entropy_N = total_N.log() - moment_N / total_N
    _check_finite(entropy_N, first_row)
    return _Masses(e_NBW, sums_NB, total_N, label_d_N - total_N.log(), entropy_N.clamp(min=0))


def _entries_from(masses: _Masses, floor_N: Tensor) -> _Entries:
    """Entries with `e >= floor`: only blocks whose largest entry is one are looked into.

    Comparing and listing all V costs as much as the softmax; a maximum a block a tenth of it.
    """
    floor_N = floor_N.to(masses.e_NBW)
    token_H, block_H = (masses.e_NBW.amax(-1) >= floor_N[:, None]).nonzero(as_tuple=True)
    entry_M, within_M = (masses.e_NBW[token_H, block_H] >= floor_N[token_H, None]).nonzero(
        as_tuple=True
    )
    token_M = token_H[entry_M].cpu()
    id_M = (block_H[entry_M] * BLOCK + within_M).cpu()
    logq_M = _logq(masses, token_M, id_M)
    falling = logq_M.argsort(stable=True, descending=True)  # ties stay in id order
    order = falling[token_M[falling].argsort(stable=True)]
    return _Entries(token_M[order], id_M[order], logq_M[order])


def _largest(masses: _Masses, head: int, vocab_size: int) -> _Entries:
    """The `head` largest entries of each token."""
    id_M = masses.e_NBW.flatten(1)[:, :vocab_size].topk(head, -1).indices.flatten().cpu()
    token_M = torch.arange(len(masses.total_N)).repeat_interleave(head)
    return _Entries(token_M, id_M, _logq(masses, token_M, id_M))


def _logq(masses: _Masses, token_M: Tensor, id_M: Tensor) -> Tensor:
    e_M = _exact(masses.e_NBW[token_M, id_M // BLOCK, id_M % BLOCK])
    # An id of a fixed head may have underflowed; a head entry's log stays finite.
    return (e_M.clamp(min=torch.finfo(torch.float32).tiny) / masses.total_N[token_M]).log()


def _tail_cumsum(masses: _Masses, head: _Entries) -> Tensor:
    """Running sum over blocks, float64, of what is left once the head is struck out (in place)."""
    block_M = head.id_M // BLOCK
    masses.e_NBW[head.token_M, block_M, head.id_M % BLOCK] = 0
    # Summed anew: subtracting a head of 0.99 from its block would leave noise of 1e-7 in the tail.
    masses.sums_NB[head.token_M, block_M] = masses.e_NBW[head.token_M, block_M].sum(-1)
    return _exact(masses.sums_NB).cumsum(-1)


def _exact(x: Tensor) -> Tensor:
    return x.cpu().double()


def _locate(e_NBW: Tensor, cum_NB: Tensor, points_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Counts a token and ids whose stretch of the running tail holds a point; never one of no mass.

    `points_NP` rises within a token; points past the token's tail hold nothing.
    """
    token_T, place_T = (points_NP < cum_NB[:, -1:]).nonzero(as_tuple=True)
    blocks_NP = torch.searchsorted(cum_NB, points_NP, right=True)
    point_T, block_T = points_NP[token_T, place_T], blocks_NP[token_T, place_T]
    ends_NB = F.pad(cum_NB, (1, 0))
    start_T, end_T = ends_NB[token_T, block_T], ends_NB[token_T, block_T + 1]
    within_TW = _exact(e_NBW[token_T, block_T]).cumsum(-1)
    size_T = within_TW[:, -1]
    # A block's float32 sum and its float64 running sum differ by 1e-7 of it, so the point is
    # carried over as a share of the block, and kept below its end.
    local_T = (point_T - start_T) / (end_T - start_T) * size_T
    local_T = torch.minimum(local_T, torch.nextafter(size_T, torch.zeros_like(size_T)))
    counts_N = token_T.bincount(minlength=len(points_NP))
    return counts_N, block_T * BLOCK + (within_TW <= local_T[:, None]).sum(-1)


def _targets(
    masses: _Masses, head: _Entries, tail_counts_N: Tensor, tail_ids_T: Tensor, *, tau: float | None
) -> TokenTargets:
    def out(x: Tensor, dtype: torch.dtype) -> np.ndarray:
        return x.to(dtype).numpy()

    return TokenTargets(
        head_counts_N=out(head.token_M.bincount(minlength=len(tail_counts_N)), torch.int32),
        head_ids_M=out(head.id_M, torch.int32),
        head_logq_M=out(head.logq_M, torch.float32),
        tail_counts_N=out(tail_counts_N, torch.int32),
        tail_ids_T=out(tail_ids_T, torch.int32),
        label_logp_N=out(masses.label_logp_N, torch.float32),
        entropy_N=out(masses.entropy_N, torch.float32),
        tau=tau,
    )


def _check_finite(entropy_N: Tensor, first_row: int) -> None:
    bad = (~torch.isfinite(entropy_N)).nonzero()
    if len(bad):
        raise EngineError(
            f"teacher logits hold NaN or infinity in row {first_row + int(bad[0])}; "
            "check the teacher's weights and dtype"
        )
