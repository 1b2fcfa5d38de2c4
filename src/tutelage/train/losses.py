"""Every loss, as pure functions of small tensors; knows nothing of models, chunks or devices.

Legend: N tokens, K stored ids a token, C classes (K, or K + 1 with one for the rest), V vocabulary.
q is the teacher, p the student, P and m the student's and the teacher's mass inside the head.

A sparse loss needs only what the student gives at the K stored ids and to the rest. With
G = dL/dlogp_NK and g = dL/dlog_rest_N, autograd on those small tensors is enough, since

    dL/dz_j = G_j - p_j * sum(G) + g * (p_j * [j not stored] / (1 - sum p_stored) - p_j).

All losses are nats a token, unreduced: the caller sums them and divides once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tutelage.core.errors import DataError, RecipeError
from tutelage.train.spec import LossSpec, Term, Treatment

ADVANTAGE_CLIP = 10.0
"""Bound of the policy gradient's advantage, in nats (arXiv 2604.13010)."""
REST_FLOOR = 1e-7
"""The teacher's rest 1 - m is not known below this: float32 sums of q round there."""
LOG_REST_FLOOR = -1e4
"""No student gives less to the rest; keeps a head that covers all V finite."""
MASKED = -1e30
"""A log-probability that adds nothing; finite, so that 0 * MASKED is 0 and not NaN."""


@dataclass(frozen=True)
class SparseTarget:
    """What is stored of the teacher for N tokens, padded to K ids; ids of a row are distinct.

    A row holds the head (q exact) and the tail sample (each id stands for a mass of tau, its q_NK)
    in any order. A row without a target has no valid id and zeros elsewhere.
    """

    ids_NK: Tensor
    """int64; padding holds any id of the vocabulary."""
    q_NK: Tensor
    """Teacher probability in the head, weight tau in the tail sample."""
    head_mask_NK: Tensor
    """bool; False = tail sample or padding."""
    valid_NK: Tensor
    """bool; False = padding."""
    label_ids_N: Tensor
    """int64; the token that follows: sampled by the student, or the next of the teacher's text."""
    label_logq_N: Tensor
    """Teacher log-probability of that token."""
    teacher_entropy_N: Tensor
    """Entropy of the full teacher distribution, nats."""
    temperature: float = 1.0
    """Temperature at which q, label_logq and the entropy were taken."""
    teacher_text_N: Tensor | None = None
    """bool; True = a row of text the teacher wrote. None = rollout rows only."""

    @classmethod
    def labels_only(cls, label_ids_N: Tensor) -> "SparseTarget":
        """Targets of SFT: K = 0."""
        ids_NK = label_ids_N.new_zeros(len(label_ids_N), 0)
        none_NK, zeros_N = ids_NK.bool(), torch.zeros_like(label_ids_N, dtype=torch.float32)
        return cls(ids_NK, ids_NK.float(), none_NK, none_NK, label_ids_N, zeros_N, zeros_N)

    def rows(self, start: int, stop: int) -> "SparseTarget":
        """Tokens start to stop, as views."""
        fields = {k: v[start:stop] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **fields)


@dataclass(frozen=True)
class StudentView:
    """All a loss sees of the student, with gradient."""

    logp_NK: Tensor
    """Log-probability at the stored ids, at the spec's temperature; junk where not valid."""
    log_rest_N: Tensor
    """Log of the mass of all other ids; exact also where that mass is tiny."""
    label_logp_N: Tensor
    """Log-probability of the label, at temperature 1."""


@dataclass(frozen=True)
class TokenLosses:
    """Nats a token: the objective, and its two parts before lam."""

    total_N: Tensor
    ce_N: Tensor
    kd_N: Tensor


@dataclass(frozen=True)
class Classes:
    """Student and teacher over C outcomes; where the mask is False both hold 0 and do not count."""

    logq_NC: Tensor
    logp_NC: Tensor
    mask_NC: Tensor


def prepare(target: SparseTarget, spec: LossSpec, *, vocab_size: int) -> SparseTarget:
    """The target as the spec needs it, or RecipeError / DataError if it cannot be exact.

    A target taken at temperature T serves a spec at T as it is. Another temperature needs
    `q^(T0/T) / sum_V q^(T0/T)`, and the sum runs over ids a sparse target does not hold: only a
    dense one (K = V) is re-tempered, exactly; for a sparse one score again at T.

    A row that lists an id twice (pure sampling can) would count that id's p twice: DataError.
    """
    _check_distinct(target)
    is_dense = target.ids_NK.shape[1] == vocab_size
    if any(t.treatment == "dense" for t in spec.terms) and not is_dense:
        raise DataError(
            f"treatment dense needs all {vocab_size} ids of a token and the target holds"
            f" {target.ids_NK.shape[1]}; use bucket or unbiased"
        )
    if (spec.ce_on == "teacher") != (target.teacher_text_N is not None):
        raise DataError(
            f"ce_on is {spec.ce_on} and the batch has {'no ' if spec.ce_on == 'teacher' else ''}"
            "rows of the teacher's text; these two go together"
        )
    if not spec.terms or spec.temperature == target.temperature:
        return target
    if not is_dense:
        raise RecipeError(
            f"temperature is {spec.temperature} and the targets were stored at"
            f" {target.temperature}: a sparse target cannot be re-tempered exactly; score again at"
            f" {spec.temperature}, or set temperature = {target.temperature}"
        )
    logq_NK = _log(target.q_NK) * (target.temperature / spec.temperature)
    logq_NK = torch.log_softmax(logq_NK, -1)
    entropy_N = -(logq_NK.exp() * logq_NK).sum(-1)
    return replace(
        target, q_NK=logq_NK.exp(), teacher_entropy_N=entropy_N, temperature=spec.temperature
    )


def view_of_logits(logits_NV: Tensor, target: SparseTarget, spec: LossSpec) -> StudentView:
    """The view from whole logits, by autograd: the reference, and for small vocabularies."""
    scaled_NV = logits_NV / spec.temperature
    logp_NV = torch.log_softmax(scaled_NV, -1)
    stored_NV = torch.zeros_like(logits_NV).scatter_add(
        1, target.ids_NK, target.valid_NK.to(logits_NV.dtype)
    )
    rest_N = torch.logsumexp(logp_NV.masked_fill(stored_NV > 0, MASKED), -1)
    label_N1 = target.label_ids_N[:, None]
    label_logp_N = torch.log_softmax(logits_NV, -1).gather(1, label_N1)[:, 0]
    return StudentView(logp_NV.gather(1, target.ids_NK), rest_N, label_logp_N)


def token_losses(view: StudentView, target: SparseTarget, spec: LossSpec) -> TokenLosses:
    """`(1 - lam) * CE + lam * KD` for each token (arXiv 2509.26497); `target` is prepared."""
    ce_N = -view.label_logp_N
    kd_N = torch.zeros_like(ce_N)
    for term in spec.terms:
        kd_N = kd_N + term.share * spec.temperature**2 * term_loss(term, view, target)
    if target.teacher_text_N is None:
        return TokenLosses((1 - spec.lam) * ce_N + spec.lam * kd_N, ce_N, kd_N)
    kd_N = kd_N.masked_fill(target.teacher_text_N, 0.0)
    text_N = target.teacher_text_N.to(ce_N.dtype)
    return TokenLosses((1 - spec.lam) * ce_N * text_N + spec.lam * kd_N, ce_N, kd_N)


def term_loss(term: Term, view: StudentView, target: SparseTarget) -> Tensor:
    """One divergence under its treatment, nats a token [N]."""
    if term.divergence == "policy_gradient":
        return policy_gradient(view.label_logp_N, target.label_logq_N)
    if term.treatment == "unbiased":
        return unbiased_forward_kl(view.logp_NK, target)
    classes = _CLASSES[term.treatment](view, target)
    if term.divergence == "jsd":
        return jsd(classes, beta=term.beta)
    if term.divergence == "skew":
        return skew(classes, alpha=term.alpha)
    return forward_kl(classes) if term.divergence == "forward_kl" else reverse_kl(classes)


def forward_kl(classes: Classes) -> Tensor:
    """`sum q (log q - log p)` [N]. Over all V, dL/dz = p - q."""
    logq_NC, logp_NC = classes.logq_NC, classes.logp_NC
    return _sum(classes, logq_NC.exp() * (logq_NC - logp_NC))


def reverse_kl(classes: Classes) -> Tensor:
    """`sum p (log p - log q)` [N]. Over all V, dL/dz = p (log p - log q - L)."""
    logq_NC, logp_NC = classes.logq_NC, classes.logp_NC
    return _sum(classes, logp_NC.exp() * (logp_NC - logq_NC))


def jsd(classes: Classes, *, beta: float) -> Tensor:
    """`beta KL(q || r) + (1 - beta) KL(p || r)`, r = beta q + (1 - beta) p [N].

    Over all V, dL/dz = (1 - beta) p (log(p / r) - KL(p || r)). Source: arXiv 2306.13649.
    """
    logq_NC, logp_NC = classes.logq_NC, classes.logp_NC
    logr_NC = torch.logaddexp(logq_NC + math.log(beta), logp_NC + math.log1p(-beta))
    of_teacher_NC = logq_NC.exp() * (logq_NC - logr_NC)
    of_student_NC = logp_NC.exp() * (logp_NC - logr_NC)
    return _sum(classes, beta * of_teacher_NC + (1 - beta) * of_student_NC)


def skew(classes: Classes, *, alpha: float) -> Tensor:
    """`KL(q || r)`, r = alpha q + (1 - alpha) p [N]: forward KL that stays finite where p is 0.

    Over all V, dL/dz = (1 - alpha) p (sum(q p / r) - q / r). Source: arXiv 2402.03898.
    """
    logq_NC, logp_NC = classes.logq_NC, classes.logp_NC
    logr_NC = torch.logaddexp(logq_NC + math.log(alpha), logp_NC + math.log1p(-alpha))
    return _sum(classes, logq_NC.exp() * (logq_NC - logr_NC))


def policy_gradient(label_logp_N: Tensor, label_logq_N: Tensor) -> Tensor:
    """`-A log p(y)`, A = clip(log q(y) - log p(y), -10, 10) held constant [N].

    A surrogate: its value is no divergence. dL/dz = A (p - onehot(y)), the gradient of the reverse
    KL in the mean only while y is a fresh sample of the student. Source: arXiv 2604.13010.
    """
    advantage_N = (label_logq_N - label_logp_N.detach()).clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
    return -advantage_N * label_logp_N


def unbiased_forward_kl(logp_NK: Tensor, target: SparseTarget) -> Tensor:
    """`-sum q_hat log p - H(q)` over head and tail sample [N]; the mean is the forward KL over V.

    dL/dz = p * sum(q_hat) - q_hat, linear in q_hat, so E[q_hat] = q makes it unbiased. q_hat is
    never normalised: its sum is 1 within tau, and dividing by it would bring a bias back. A single
    row may come out negative. Threshold sampling includes id i with min(1, q_i / tau), weight
    q_i / that; without a head it is arXiv 2503.16870.
    """
    logp_NK = logp_NK.masked_fill(~target.valid_NK, 0.0)
    return -(_q(target, logp_NK) * logp_NK).sum(-1) - target.teacher_entropy_N


def in_head(view: StudentView, target: SparseTarget) -> Classes:
    """Treatments `dense` (the head is all V: exact) and `truncated` (drop the rest: biased).

    Truncated is what the top-k term of arXiv 2509.26497 says literally: not a divergence, least at
    P = 1, p = q / m. A student equal to its teacher gets a gradient of L1 norm `2 P (1 - P)` on
    the logits, forward and reverse alike; skew 1 - alpha times that; jsd none, but it is blind to
    where the rest goes.
    """
    head_NK = target.head_mask_NK & target.valid_NK
    logq_NK = _log(_q(target, view.logp_NK))
    return Classes(
        logq_NK.masked_fill(~head_NK, 0.0), view.logp_NK.masked_fill(~head_NK, 0.0), head_NK
    )


def renormalised(view: StudentView, target: SparseTarget) -> Classes:
    """Treatment `renormalised`: the teacher divided by m, the rest dropped: biased.

    A student equal to its teacher gets a gradient of L1 norm `2 (1 - P)` in forward KL, and
    `2 P (1 - P) (1 + log P)` (absolute) in reverse: it learns to be over-confident.
    """
    classes = in_head(view, target)
    mass_N1 = _head_mass(classes)[:, None]
    return replace(classes, logq_NC=classes.logq_NC - _log(mass_N1) * classes.mask_NC)


def bucket(view: StudentView, target: SparseTarget) -> Classes:
    """Treatment `bucket`: one more class holds all that is outside the head, on both sides.

    A lower bound of the divergence over V, zero with zero gradient when student equals teacher.
    Forward KL: dL/dz is p_j - q_j in the head and p_j (m - P) / (1 - P) outside. The student's
    log(1 - P) comes from the log-sum-exp of the logits outside, so it keeps its digits near
    P = 1, where log1p(-P) has none. The tail sample is not used: its ids belong to the rest.
    """
    classes = in_head(view, target)
    tail_NK = target.valid_NK & ~target.head_mask_NK
    log_tail_N = torch.logsumexp(view.logp_NK.masked_fill(~tail_NK, MASKED), -1)
    log_rest_N = torch.logaddexp(view.log_rest_N, log_tail_N).clamp_min(LOG_REST_FLOOR)
    rest_q_N = (1 - _head_mass(classes)).clamp_min(REST_FLOOR)
    return Classes(
        torch.cat([classes.logq_NC, rest_q_N.log()[:, None]], -1),
        torch.cat([classes.logp_NC, log_rest_N[:, None]], -1),
        torch.cat([classes.mask_NC, torch.ones_like(log_rest_N, dtype=torch.bool)[:, None]], -1),
    )


_CLASSES: Mapping[Treatment, Callable[[StudentView, SparseTarget], Classes]] = {
    "dense": in_head,
    "truncated": in_head,
    "renormalised": renormalised,
    "bucket": bucket,
}


def _check_distinct(target: SparseTarget) -> None:
    ids_NK = target.ids_NK.masked_fill(~target.valid_NK, -1).sort(-1).values
    twice_N = ((ids_NK[:, 1:] == ids_NK[:, :-1]) & (ids_NK[:, 1:] >= 0)).any(-1)
    if twice_N.any():
        raise DataError(
            f"row {int(twice_N.nonzero()[0])} of a batch of targets lists an id twice; merge them"
            " and sum their q"
        )


def _q(target: SparseTarget, like: Tensor) -> Tensor:
    return target.q_NK.to(like.dtype).masked_fill(~target.valid_NK, 0.0)


def _log(q: Tensor) -> Tensor:
    return q.clamp_min(torch.finfo(q.dtype).tiny).log()


def _head_mass(classes: Classes) -> Tensor:
    return (classes.logq_NC.exp() * classes.mask_NC).sum(-1)


def _sum(classes: Classes, terms_NC: Tensor) -> Tensor:
    return terms_NC.masked_fill(~classes.mask_NC, 0.0).sum(-1)
