"""Losses against closed forms, in float64. N tokens, K stored ids, V vocabulary, R draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tutelage.core.errors import DataError, RecipeError
from tutelage.targets.batch import pad_targets
from tutelage.targets.estimator import threshold_sample
from tutelage.targets.schema import TokenTargets
from tutelage.train.losses import (
    SparseTarget,
    TokenLosses,
    prepare,
    token_losses,
    view_of_logits,
)
from tutelage.train.spec import CROSS_ENTROPY, DEFAULT_TREATMENT, LossSpec, Term

N, V, HEAD = 12, 40, 6
BETA, ALPHA = 0.3, 0.2
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew")
DRAWS, TAU = 4000, 0.03


def some_logits(seed: int, *, rows: int = N, vocab: int = V) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, vocab, dtype=torch.float64, generator=generator)


def entropy_of(q: Tensor) -> Tensor:
    return -(q * q.log()).sum(-1)


def target_of(teacher_NV: Tensor, *, head: int, temperature: float = 1.0) -> SparseTarget:
    """The `head` most likely ids, exact; all V of them in falling order makes it dense."""
    q_NV = (teacher_NV / temperature).softmax(-1)
    q_NK, ids_NK = q_NV.topk(head, -1)
    every_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    labels_N = torch.arange(len(teacher_NV)) % teacher_NV.shape[1]
    label_logq_N = q_NV.log().gather(1, labels_N[:, None])[:, 0]
    return SparseTarget(
        ids_NK, q_NK, every_NK, every_NK, labels_N, label_logq_N, entropy_of(q_NV), temperature
    )


def only(divergence: str, treatment: str) -> LossSpec:
    term = Term(divergence, treatment, beta=BETA, alpha=ALPHA)  # type: ignore[arg-type]
    return LossSpec((term,), lam=1.0, ce_on="none")


def losses_of(student_NV: Tensor, target: SparseTarget, spec: LossSpec) -> TokenLosses:
    target = prepare(target, spec, vocab_size=student_NV.shape[1])
    return token_losses(view_of_logits(student_NV, target, spec), target, spec)


def loss_and_gradient(
    student_NV: Tensor, target: SparseTarget, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    leaf_NV = student_NV.clone().requires_grad_()
    loss_N = losses_of(leaf_NV, target, spec).total_N
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0]


def closed_form(divergence: str, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Value [N] and gradient on the logits [N, C] over a whole distribution."""
    if divergence == "forward_kl":
        return (q * (q.log() - p.log())).sum(-1), p - q
    if divergence == "reverse_kl":
        loss = (p * (p.log() - q.log())).sum(-1)
        return loss, p * (p.log() - q.log() - loss[:, None])
    if divergence == "jsd":
        r = BETA * q + (1 - BETA) * p
        of_student = (p * (p / r).log()).sum(-1)
        loss = BETA * (q * (q / r).log()).sum(-1) + (1 - BETA) * of_student
        return loss, (1 - BETA) * p * ((p / r).log() - of_student[:, None])
    r = ALPHA * q + (1 - ALPHA) * p
    gradient = (1 - ALPHA) * p * ((q * p / r).sum(-1, keepdim=True) - q / r)
    return (q * (q / r).log()).sum(-1), gradient


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_dense_is_the_closed_form_with_its_gradient(divergence: str) -> None:
    student_NV, teacher_NV = some_logits(1), some_logits(2)
    target = target_of(teacher_NV, head=V)
    loss_N, gradient_NV = loss_and_gradient(student_NV, target, only(divergence, "dense"))
    want_N, want_NV = closed_form(divergence, teacher_NV.softmax(-1), student_NV.softmax(-1))
    torch.testing.assert_close(loss_N, want_N, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_NV, want_NV, atol=1e-12, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bucket_is_the_dense_loss_of_the_collapsed_distributions(divergence: str) -> None:
    student_NV, teacher_NV = some_logits(1), some_logits(2)
    target = target_of(teacher_NV, head=HEAD)
    loss_N, gradient_NV = loss_and_gradient(student_NV, target, only(divergence, "bucket"))

    p_NV, q_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)

    def collapsed(distribution_NV: Tensor) -> Tensor:
        head_NK = distribution_NV.gather(1, target.ids_NK)
        return torch.cat([head_NK, 1 - head_NK.sum(-1, keepdim=True)], -1)

    want_N, by_class_NC = closed_form(divergence, collapsed(q_NV), collapsed(p_NV))
    # Outside the head the gradient of the rest's class is shared in proportion to p.
    rest_N1 = by_class_NC[:, -1:] / (1 - p_NV.gather(1, target.ids_NK).sum(-1, keepdim=True))
    want_NV = (p_NV * rest_N1).scatter(1, target.ids_NK, by_class_NC[:, :-1])
    torch.testing.assert_close(loss_N, want_N, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_NV, want_NV, atol=1e-12, rtol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bucket_is_below_the_loss_over_the_whole_vocabulary(divergence: str) -> None:
    student_NV, teacher_NV = some_logits(1), some_logits(2)
    bucket_N = losses_of(
        student_NV, target_of(teacher_NV, head=HEAD), only(divergence, "bucket")
    ).total_N
    dense_N, _ = closed_form(divergence, teacher_NV.softmax(-1), student_NV.softmax(-1))
    assert (bucket_N < dense_N).all()
    assert (bucket_N > 0).all()


@pytest.mark.parametrize("gap", [5.0, 40.0, 200.0])
def test_bucket_keeps_its_digits_where_the_head_holds_all_of_the_student(gap: float) -> None:
    teacher_NV = some_logits(2)
    target = target_of(teacher_NV, head=HEAD)
    student_NV = torch.zeros(N, V, dtype=torch.float32).scatter(1, target.ids_NK, gap)
    loss_N, gradient_NV = loss_and_gradient(student_NV, target, only("forward_kl", "bucket"))
    mass_N = target.q_NK.sum(-1)
    log_norm = np.logaddexp(np.log(HEAD) + gap, np.log(V - HEAD))
    want_N = (target.q_NK * (target.q_NK.log() - (gap - log_norm))).sum(-1) + (1 - mass_N) * (
        (1 - mass_N).log() - (np.log(V - HEAD) - log_norm)
    )
    torch.testing.assert_close(loss_N.double(), want_N, atol=1e-5, rtol=1e-5)
    inside = HEAD * np.exp(gap - log_norm)
    share_N = (mass_N - inside) / (V - HEAD)  # (m - P) p_j / (1 - P), with p_j equal outside
    outside_NV = gradient_NV.scatter(1, target.ids_NK, 0.0).double()
    torch.testing.assert_close(outside_NV.sum(-1) / (V - HEAD), share_N, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("treatment", ["bucket", "dense"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_is_left_alone(divergence: str, treatment: str) -> None:
    logits_NV = some_logits(3)
    target = target_of(logits_NV, head=V if treatment == "dense" else HEAD)
    loss_N, gradient_NV = loss_and_gradient(logits_NV, target, only(divergence, treatment))
    assert loss_N.abs().max() < 1e-6
    assert gradient_NV.abs().max() < 1e-6


def predicted_push(divergence: str, treatment: str, mass_N: Tensor) -> Tensor:
    """L1 norm of the gradient on a student equal to its teacher (method.md, section 2)."""
    truncated_N = 2 * mass_N * (1 - mass_N)
    return {
        ("forward_kl", "truncated"): truncated_N,
        ("reverse_kl", "truncated"): truncated_N,
        ("skew", "truncated"): (1 - ALPHA) * truncated_N,
        ("forward_kl", "renormalised"): 2 * (1 - mass_N),
        ("reverse_kl", "renormalised"): truncated_N * (1 + mass_N.log()).abs(),
    }[divergence, treatment]


@pytest.mark.parametrize(
    ("divergence", "treatment"),
    [(d, "truncated") for d in ("forward_kl", "reverse_kl", "skew")]
    + [(d, "renormalised") for d in ("forward_kl", "reverse_kl")],
)
def test_peers_treatments_push_a_perfect_student_as_far_as_predicted(
    divergence: str, treatment: str
) -> None:
    logits_NV = some_logits(3)
    target = target_of(logits_NV, head=HEAD)
    _, gradient_NV = loss_and_gradient(logits_NV, target, only(divergence, treatment))
    want_N = predicted_push(divergence, treatment, target.q_NK.sum(-1))
    assert want_N.max() > 0.1
    torch.testing.assert_close(gradient_NV.abs().sum(-1), want_N, atol=1e-12, rtol=0)


@pytest.mark.parametrize("divergence", ["jsd", "skew"])
def test_mixtures_against_a_renormalised_teacher_push_a_perfect_student(divergence: str) -> None:
    logits_NV = some_logits(3)
    target = target_of(logits_NV, head=HEAD)
    _, gradient_NV = loss_and_gradient(logits_NV, target, only(divergence, "renormalised"))
    assert gradient_NV.abs().sum(-1).max() > 0.01


def threshold_draws(q_V: np.ndarray, *, tau: float, offsets_R: np.ndarray) -> SparseTarget:
    """One target for every offset, all from the same teacher: the reference sampler."""
    tail_V = q_V < tau
    cumulative_V = np.cumsum(np.where(tail_V, q_V / tau, 0.0))
    hits_RV = np.floor(cumulative_V[None] + 1 - offsets_R[:, None])
    hits_RV = np.diff(hits_RV, axis=1, prepend=np.floor(1 - offsets_R[:, None])) > 0
    stored_RV = hits_RV | ~tail_V
    order_RV = np.argsort(~stored_RV, axis=1, kind="stable")
    ids_RK = order_RV[:, : stored_RV.sum(1).max()]
    valid_RK = np.take_along_axis(stored_RV, ids_RK, 1)
    head_RK = valid_RK & ~tail_V[ids_RK]
    weights_RK = np.where(head_RK, q_V[ids_RK], tau) * valid_RK
    rows = len(offsets_R)
    return SparseTarget(
        torch.from_numpy(ids_RK), torch.from_numpy(weights_RK), torch.from_numpy(head_RK),
        torch.from_numpy(valid_RK), torch.zeros(rows, dtype=torch.int64),
        torch.full((rows,), float(np.log(q_V[0]))),
        torch.full((rows,), float(-(q_V * np.log(q_V)).sum()), dtype=torch.float64),
    )  # fmt: skip


def scaled(target: SparseTarget, head: float, tail: float) -> SparseTarget:
    factor_RK = torch.where(target.head_mask_NK, head, tail)
    return SparseTarget(**{**vars(target), "q_NK": target.q_NK * factor_RK})


def is_unbiased(samples_RC: Tensor, exact_C: Tensor) -> bool:
    """Every mean within four standard errors of what it should be."""
    error_C = samples_RC.std(0) / len(samples_RC) ** 0.5
    return bool(((samples_RC.mean(0) - exact_C).abs() <= 4 * error_C + 1e-12).all())


@pytest.fixture(scope="module")
def draws() -> tuple[np.ndarray, SparseTarget]:
    # Half the usual spread: every id is drawn often enough for its standard error to be known.
    q_V = (some_logits(4, rows=1) / 2).softmax(-1)[0].numpy()
    assert (q_V.min() / TAU) * DRAWS > 30
    offsets_R = np.random.default_rng(5).random(DRAWS)
    return q_V, threshold_draws(q_V, tau=TAU, offsets_R=offsets_R)


@pytest.mark.parametrize("is_equal", [False, True])
def test_sampled_gradients_average_to_the_one_of_the_whole_vocabulary(
    draws: tuple[np.ndarray, SparseTarget], is_equal: bool
) -> None:
    q_V, target = draws
    student_V = torch.from_numpy(np.log(q_V)) if is_equal else some_logits(6, rows=1)[0]
    loss_R, gradient_RV = loss_and_gradient(
        student_V.expand(DRAWS, V), target, only("forward_kl", "unbiased")
    )
    q, p = torch.from_numpy(q_V)[None], student_V.softmax(-1)[None]
    want_1, want_1V = closed_form("forward_kl", q, p)
    assert is_unbiased(gradient_RV, want_1V[0])
    assert is_unbiased(loss_R[:, None], want_1)
    assert gradient_RV.std(0).max() > 1e-3  # it is a sample, not the exact target


@pytest.mark.parametrize(("head", "tail"), [(1.02, 1.02), (1.0, 1.02)])
def test_a_planted_bias_of_two_per_cent_is_caught(
    draws: tuple[np.ndarray, SparseTarget], head: float, tail: float
) -> None:
    q_V, target = draws
    student_V = some_logits(6, rows=1)[0]
    _, gradient_RV = loss_and_gradient(
        student_V.expand(DRAWS, V), scaled(target, head, tail), only("forward_kl", "unbiased")
    )
    assert not is_unbiased(gradient_RV, student_V.softmax(-1) - torch.from_numpy(q_V))


def from_store(targets: TokenTargets, labels_N: Tensor) -> SparseTarget:
    """Ragged targets of the store, padded."""
    padded = {name: torch.from_numpy(array) for name, array in vars(pad_targets([targets])).items()}
    return SparseTarget(label_ids_N=labels_N, **padded)  # type: ignore[arg-type]


def test_targets_of_the_real_estimator_average_to_the_whole_vocabulary() -> None:
    teacher_V, student_V = some_logits(4, rows=1)[0] / 2, some_logits(6, rows=1)[0]
    labels_N = torch.zeros(DRAWS, dtype=torch.int64)
    stored = threshold_sample(
        teacher_V.expand(DRAWS, V), labels_N, tau=TAU,
        offsets_N=torch.from_numpy(np.random.default_rng(7).random(DRAWS)),
    )  # fmt: skip
    spec = only("forward_kl", "unbiased")
    target = from_store(stored, labels_N)
    loss_R, gradient_RV = loss_and_gradient(student_V.expand(DRAWS, V), target, spec)
    q, p = teacher_V.softmax(-1)[None], student_V.softmax(-1)[None]
    want_1, want_1V = closed_form("forward_kl", q, p)
    # float32 in the store: q is off by 1e-7, beside standard errors of 1e-6 and more
    assert is_unbiased(gradient_RV, want_1V[0])
    assert is_unbiased(loss_R[:, None], want_1)


def test_the_sampled_target_is_never_normalised(draws: tuple[np.ndarray, SparseTarget]) -> None:
    _, target = draws
    student_V = some_logits(6, rows=1)[0]
    _, gradient_RV = loss_and_gradient(
        student_V.expand(DRAWS, V), target, only("forward_kl", "unbiased")
    )
    q_hat_RV = torch.zeros(DRAWS, V, dtype=torch.float64).scatter_add(1, target.ids_NK, target.q_NK)
    sums_R1 = q_hat_RV.sum(-1, keepdim=True)
    assert (sums_R1 - 1).abs().max() > 0.1 * TAU
    torch.testing.assert_close(
        gradient_RV, student_V.softmax(-1) * sums_R1 - q_hat_RV, atol=1e-12, rtol=0
    )


def test_bucket_puts_the_tail_sample_back_into_the_rest() -> None:
    teacher_NV, student_NV = some_logits(2), some_logits(1)
    long = target_of(teacher_NV, head=HEAD + 4)
    head_NK = (torch.arange(HEAD + 4) < HEAD).expand(N, -1)
    with_tail = SparseTarget(**{**vars(long), "head_mask_NK": head_NK})
    spec = only("reverse_kl", "bucket")
    got = loss_and_gradient(student_NV, with_tail, spec)
    want = loss_and_gradient(student_NV, target_of(teacher_NV, head=HEAD), spec)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_policy_gradient_is_the_clipped_advantage_times_the_score() -> None:
    student_NV, teacher_NV = some_logits(1), some_logits(2)
    teacher_NV[0, 0] -= 60.0  # label of token 0: an advantage far below -10
    target = target_of(teacher_NV, head=HEAD)
    spec = only("policy_gradient", "sampled")
    _, gradient_NV = loss_and_gradient(student_NV, target, spec)
    logp_NV = student_NV.log_softmax(-1)
    advantage_N = target.label_logq_N - logp_NV.gather(1, target.label_ids_N[:, None])[:, 0]
    assert advantage_N[0] < -10
    onehot_NV = torch.nn.functional.one_hot(target.label_ids_N, V)
    want_NV = advantage_N.clamp(-10, 10)[:, None] * (logp_NV.exp() - onehot_NV)
    torch.testing.assert_close(gradient_NV, want_NV, atol=1e-12, rtol=0)


def test_policy_gradient_averages_to_reverse_kl_over_the_students_own_samples() -> None:
    student_V, teacher_V = some_logits(1, rows=1)[0], some_logits(2, rows=1)[0]
    target = target_of(teacher_V.expand(V, V), head=HEAD)  # row i has label i: every outcome
    _, gradient_VV = loss_and_gradient(
        student_V.expand(V, V), target, only("policy_gradient", "sampled")
    )
    p_V, q_V = student_V.softmax(-1), teacher_V.softmax(-1)
    _, want_1V = closed_form("reverse_kl", q_V[None], p_V[None])
    torch.testing.assert_close(p_V @ gradient_VV, want_1V[0], atol=1e-12, rtol=0)


def test_the_objective_weighs_cross_entropy_and_a_mixture() -> None:
    student_NV, target = some_logits(1), target_of(some_logits(2), head=HEAD)
    terms = (Term("forward_kl", "bucket", share=0.75), Term("reverse_kl", "bucket", share=0.25))
    got = losses_of(student_NV, target, LossSpec(terms, lam=0.8))
    forward_N = losses_of(student_NV, target, only("forward_kl", "bucket")).total_N
    reverse_N = losses_of(student_NV, target, only("reverse_kl", "bucket")).total_N
    ce_N = torch.nn.functional.cross_entropy(student_NV, target.label_ids_N, reduction="none")
    torch.testing.assert_close(got.ce_N, ce_N)
    torch.testing.assert_close(got.kd_N, 0.75 * forward_N + 0.25 * reverse_N)
    torch.testing.assert_close(got.total_N, 0.2 * ce_N + 0.8 * got.kd_N)


def test_rows_of_the_teachers_text_carry_cross_entropy_and_rollouts_carry_kd() -> None:
    student_NV, target = some_logits(1), target_of(some_logits(2), head=HEAD)
    text_N = torch.arange(N) % 3 == 0
    marked = SparseTarget(**{**vars(target), "teacher_text_N": text_N})
    spec = LossSpec((Term("forward_kl", "bucket"),), lam=0.8, ce_on="teacher")
    got = losses_of(student_NV, marked, spec)
    both = losses_of(student_NV, target, LossSpec((Term("forward_kl", "bucket"),), lam=0.8))
    torch.testing.assert_close(got.total_N[text_N], 0.2 * both.ce_N[text_N])
    torch.testing.assert_close(got.total_N[~text_N], 0.8 * both.kd_N[~text_N])


@pytest.mark.parametrize("ce_on", ["teacher", "rollout"])
def test_ce_on_and_the_rows_of_the_batch_must_agree(ce_on: str) -> None:
    target = target_of(some_logits(2), head=HEAD)
    if ce_on == "rollout":
        no_rows_N = torch.zeros(N, dtype=torch.bool)
        target = SparseTarget(**{**vars(target), "teacher_text_N": no_rows_N})
    with pytest.raises(DataError, match="teacher's text"):
        prepare(target, LossSpec(ce_on=ce_on), vocab_size=V)  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_dense_target_is_retempered_exactly(divergence: str) -> None:
    student_NV, teacher_NV = some_logits(1), some_logits(2)
    spec = LossSpec(
        (Term(divergence, "dense", beta=BETA, alpha=ALPHA),),  # type: ignore[arg-type]
        lam=1.0, ce_on="none", temperature=2.5,
    )  # fmt: skip
    loss_N, gradient_NV = loss_and_gradient(student_NV, target_of(teacher_NV, head=V), spec)
    p_NV, q_NV = (student_NV / 2.5).softmax(-1), (teacher_NV / 2.5).softmax(-1)
    want_N, want_NV = closed_form(divergence, q_NV, p_NV)
    torch.testing.assert_close(loss_N, 2.5**2 * want_N, atol=1e-10, rtol=0)
    torch.testing.assert_close(gradient_NV, 2.5 * want_NV, atol=1e-10, rtol=0)


def test_a_sparse_target_serves_only_the_temperature_it_was_taken_at() -> None:
    student_NV, teacher_NV = some_logits(1), some_logits(2)
    spec = LossSpec((Term("forward_kl", "bucket"),), lam=0.9, temperature=2.0)
    with pytest.raises(RecipeError, match="cannot be re-tempered exactly"):
        losses_of(student_NV, target_of(teacher_NV, head=HEAD), spec)
    got = losses_of(student_NV, target_of(teacher_NV, head=HEAD, temperature=2.0), spec)
    cooled = only("forward_kl", "bucket")
    want = losses_of(student_NV / 2, target_of(teacher_NV / 2, head=HEAD), cooled)
    torch.testing.assert_close(got.kd_N, 4 * want.kd_N)
    ce_N = torch.nn.functional.cross_entropy(
        student_NV, target_of(teacher_NV, head=1).label_ids_N, reduction="none"
    )
    torch.testing.assert_close(got.ce_N, ce_N)  # the label's temperature stays 1


def test_a_row_that_lists_an_id_twice_is_refused() -> None:
    target = target_of(some_logits(2), head=HEAD)
    ids_NK = target.ids_NK.clone()
    ids_NK[5, 3] = ids_NK[5, 1]
    with pytest.raises(DataError, match=r"row 5 .* lists an id twice"):
        prepare(SparseTarget(**{**vars(target), "ids_NK": ids_NK}), LossSpec(), vocab_size=V)
    padding_NK = target.valid_NK & (torch.arange(HEAD) != 3)
    padded = SparseTarget(**{**vars(target), "ids_NK": ids_NK, "valid_NK": padding_NK})
    assert prepare(padded, LossSpec(), vocab_size=V) is padded


def test_dense_refuses_a_target_that_is_not() -> None:
    target = target_of(some_logits(2), head=HEAD)
    with pytest.raises(DataError, match="needs all 40 ids"):
        prepare(target, only("forward_kl", "dense"), vocab_size=V)


@pytest.mark.parametrize("spec", [only("forward_kl", "bucket"), only("reverse_kl", "renormalised")])
def test_a_row_without_a_target_adds_no_kd(spec: LossSpec) -> None:
    target = target_of(some_logits(2), head=HEAD)
    nothing_NK = torch.zeros_like(target.valid_NK)
    zeros_NK = torch.zeros_like(target.q_NK)
    empty = SparseTarget(
        **{**vars(target), "valid_NK": nothing_NK, "head_mask_NK": nothing_NK, "q_NK": zeros_NK}
    )
    loss_N, gradient_NV = loss_and_gradient(some_logits(1), empty, spec)
    assert loss_N.abs().max() < 1e-12
    assert gradient_NV.abs().max() < 1e-12


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "reverse from a sample": (lambda: Term("reverse_kl", "unbiased"), "not linear in q"),
    "jsd from a sample": (lambda: Term("jsd", "unbiased"), "not linear in q"),
    "skew from a sample": (lambda: Term("skew", "unbiased"), "not linear in q"),
    "policy gradient of a bucket": (lambda: Term("policy_gradient", "bucket"), "go together"),
    "kl of the sampled token": (lambda: Term("forward_kl", "sampled"), "go together"),
    "unknown divergence": (lambda: Term("kl", "bucket"), "unknown"),  # type: ignore[arg-type]
    "unknown treatment": (lambda: Term("jsd", "topk"), "unknown"),  # type: ignore[arg-type]
    "beta of one": (lambda: Term("jsd", "bucket", beta=1.0), "beta is 1.0"),
    "alpha of zero": (lambda: Term("skew", "bucket", alpha=0.0), "alpha is 0.0"),
    "share above one": (lambda: Term("jsd", "bucket", share=1.5), "share is 1.5"),
    "lam above one": (lambda: LossSpec(lam=1.1), "lam is 1.1"),
    "no label but lam below one": (lambda: LossSpec(ce_on="none"), "set lam = 1"),
    "unknown label": (lambda: LossSpec(ce_on="student"), "ce_on is"),  # type: ignore[arg-type]
    "no divergence": (lambda: LossSpec(()), "no divergence"),
    "shares that do not sum": (
        lambda: LossSpec((Term("forward_kl", "unbiased", share=0.75),)),
        "sum 1",
    ),
    "temperature of zero": (lambda: LossSpec(temperature=0.0), "temperature is 0.0"),
    "hot policy gradient": (
        lambda: LossSpec((Term("policy_gradient", "sampled"),), temperature=2.0),
        "sampled at 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_cannot_be_is_refused_with_the_reason(name: str) -> None:
    build, reason = BAD[name]
    with pytest.raises(RecipeError, match=reason):
        build()


def test_every_divergence_has_a_default_treatment_that_is_allowed() -> None:
    specs = [LossSpec((Term(d, t),)) for d, t in DEFAULT_TREATMENT.items()]
    assert len(specs) == 5
    assert CROSS_ENTROPY.lam == 0
