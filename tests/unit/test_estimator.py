"""Sparse targets from logits: exact heads, unbiased tails, and what the loss is given of them."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage.core.errors import EngineError, RecipeError
from tutelage.targets.batch import pad_targets
from tutelage.targets.calibrate import HEAD_BYTES, TAIL_BYTES, TOKEN_BYTES, tau_for_budget
from tutelage.targets.estimator import fixed_sample, threshold_sample
from tutelage.targets.schema import TokenTargets, concat_targets

REAL_VOCAB = 49152  # SmolLM2's


def _logits(tokens: int, vocab: int, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def _sample(logits_NV: Tensor, *, tau: float, seed: int = 1, **options: float) -> TokenTargets:
    generator = torch.Generator().manual_seed(seed)
    N = len(logits_NV)
    return threshold_sample(
        logits_NV, torch.zeros(N, dtype=torch.long), tau=tau,
        offsets_N=torch.rand(N, generator=generator), **options,
    )  # fmt: skip


def _dense(targets: TokenTargets, vocab: int) -> np.ndarray:
    """q_hat over the whole vocabulary, [N, V], from its definition."""
    q_hat_NV = np.zeros((len(targets), vocab))
    token_M = np.repeat(np.arange(len(targets)), targets.head_counts_N)
    token_T = np.repeat(np.arange(len(targets)), targets.tail_counts_N)
    q_hat_NV[token_M, targets.head_ids_M] = np.exp(targets.head_logq_M)
    np.add.at(q_hat_NV, (token_T, targets.tail_ids_T), targets.tail_unit_N()[token_T])
    return q_hat_NV


def _same(a: TokenTargets, b: TokenTargets) -> bool:
    return a.tau == b.tau and all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "tau"
    )


def test_the_head_is_every_id_from_tau_up_by_falling_probability() -> None:
    q_V = torch.tensor([0.02, 0.3, 0.05, 0.5, 0.03, 0.1])
    targets = _sample(q_V.log()[None], tau=0.05 - 1e-6)
    assert targets.head_ids_M.tolist() == [3, 1, 5, 2]
    np.testing.assert_allclose(np.exp(targets.head_logq_M), [0.5, 0.3, 0.1, 0.05], rtol=1e-6)


def test_equal_probabilities_stand_in_id_order() -> None:
    assert _sample(torch.zeros(1, 4), tau=0.25).head_ids_M.tolist() == [0, 1, 2, 3]


def test_tail_ids_are_those_that_a_comb_of_tau_meets() -> None:
    """Tail of ids 0, 2, 3: stretches [0, .02), [.02, .06), [.06, .1); comb at .015, .065."""
    q_V = torch.tensor([0.02, 0.9, 0.04, 0.04])
    targets = threshold_sample(
        q_V.log()[None], torch.tensor([1]), tau=0.05, offsets_N=torch.tensor([0.3])
    )
    assert targets.tail_ids_T.tolist() == [0, 3]
    np.testing.assert_allclose(targets.tail_unit_N(), 0.05)


@pytest.mark.parametrize("vocab", [3, 127, 128, 129, 700])
def test_the_mean_over_all_offsets_is_the_teacher_also_at_the_last_id(vocab: int) -> None:
    """K equally spaced offsets comb the tail at tau / K: each mean is within tau / K of q_i."""
    K, tau = 1000, 0.05
    logits_V = _logits(1, vocab, seed=vocab)[0]
    logits_V[-1] = logits_V.logsumexp(0) - 4  # the last id is worth finding: about 0.02
    offsets_N = (torch.arange(K).double() + 0.5) / K
    targets = threshold_sample(
        logits_V.expand(K, vocab), torch.zeros(K, dtype=torch.long), tau=tau, offsets_N=offsets_N
    )
    q_V = logits_V.double().softmax(0).numpy()
    error_V = np.abs(_dense(targets, vocab).mean(0) - q_V)
    assert q_V[-1] < tau
    assert error_V.max() <= tau / K + 1e-6
    assert error_V[q_V >= tau].max(initial=0) < 1e-6


def test_tail_ids_at_a_real_vocabulary_are_those_of_float64_arithmetic() -> None:
    tau, N = 0.03, 24
    logits_NV = _logits(N, REAL_VOCAB, scale=3.0)
    offsets_N = torch.rand(N, generator=torch.Generator().manual_seed(2))
    targets = threshold_sample(
        logits_NV, torch.zeros(N, dtype=torch.long), tau=tau, offsets_N=offsets_N
    )
    q_NV = logits_NV.double().softmax(-1).numpy()
    wanted = []
    for q_V, u in zip(q_NV, offsets_N.tolist(), strict=True):
        running_V = np.cumsum(np.where(q_V < tau, q_V, 0))
        points = np.arange(u * tau, running_V[-1], tau)
        wanted += np.searchsorted(running_V, points, side="right").tolist()
    assert len(targets.tail_ids_T) == len(wanted)
    assert np.mean(targets.tail_ids_T != wanted) <= 0.003  # float32 logits, not float64 ones


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    vocab=st.integers(1, 300), tau=st.floats(1e-3, 1.0), scale=st.floats(0.0, 60.0),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_target_has_distinct_ids_and_a_count_within_one_of_its_mean(
    vocab: int, tau: float, scale: float, seed: int
) -> None:
    logits_NV = _logits(3, vocab, seed=seed, scale=scale)
    targets = _sample(logits_NV, tau=tau, seed=seed)
    q_NV = logits_NV.double().softmax(-1).numpy()
    padded = pad_targets([targets])
    for n, q_V in enumerate(q_NV):
        ids = padded.ids_NK[n, padded.valid_NK[n]]
        assert len(set(ids.tolist())) == len(ids)
        assert set(ids.tolist()) <= set(range(vocab))
        tail_mean = q_V[q_V < tau * (1 - 1e-5)].sum() / tau
        assert abs(targets.tail_counts_N[n] - tail_mean) < 1 + 1e-3
        assert padded.q_NK[n].sum() == pytest.approx(1, abs=tau * (1 + 1e-3))


def test_label_and_entropy_are_the_teachers_whether_or_not_the_label_is_in_the_head() -> None:
    logits_NV = _logits(6, 400)
    labels_N = torch.cat([logits_NV[:3].argmax(-1), logits_NV[3:].argmin(-1)])
    targets = threshold_sample(logits_NV, labels_N, tau=0.02, offsets_N=torch.zeros(6))
    logq_NV = logits_NV.double().log_softmax(-1)
    wanted_N = logq_NV.gather(1, labels_N[:, None])[:, 0]
    np.testing.assert_allclose(targets.label_logp_N, wanted_N, atol=1e-5)
    np.testing.assert_allclose(targets.entropy_N, -(logq_NV.exp() * logq_NV).sum(-1), atol=1e-5)


def test_a_certain_teacher_has_one_id_no_tail_and_no_entropy() -> None:
    logits_NV = torch.full((1, 5), -300.0)
    logits_NV[0, 2] = 300.0
    targets = threshold_sample(
        logits_NV, torch.tensor([0]), tau=0.01, offsets_N=torch.tensor([0.0])
    )
    assert (targets.head_ids_M.tolist(), targets.tail_ids_T.tolist()) == ([2], [])
    assert targets.entropy_N.tolist() == [0.0]
    assert targets.label_logp_N.tolist() == [-600.0]


def test_a_token_has_the_same_target_alone_and_in_any_chunk() -> None:
    N = 50  # more than one slice of a CPU
    logits_NV = _logits(N, REAL_VOCAB)
    labels_N, offsets_N = torch.arange(N), torch.rand(N)
    whole = threshold_sample(logits_NV, labels_N, tau=0.01, offsets_N=offsets_N)
    for chunk in (1, 7):
        parts = [
            threshold_sample(
                logits_NV[i : i + chunk], labels_N[i : i + chunk], tau=0.01,
                offsets_N=offsets_N[i : i + chunk],
            )
            for i in range(0, N, chunk)
        ]  # fmt: skip
        assert _same(concat_targets(parts), whole)


def test_no_token_gives_the_empty_target() -> None:
    assert _same(_sample(torch.zeros(0, 10), tau=0.5), TokenTargets.blank(0, 0.5))


def test_temperature_divides_the_logits() -> None:
    logits_NV = _logits(4, 300)
    assert _same(_sample(logits_NV, tau=0.02, temperature=0.5), _sample(logits_NV / 0.5, tau=0.02))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_their_row(bad: float) -> None:
    logits_NV = _logits(45, REAL_VOCAB)  # row 43 is in the third slice
    logits_NV[43, 17] = bad
    with pytest.raises(EngineError, match="row 43"):
        _sample(logits_NV, tau=0.1)
    with pytest.raises(EngineError, match="row 43"):
        fixed_sample(
            logits_NV, torch.zeros(45, dtype=torch.long), head=1, uniforms_NS=torch.rand(45, 2)
        )


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.5, float("nan")])
def test_a_tau_that_is_no_probability_is_refused(tau: float) -> None:
    with pytest.raises(RecipeError, match="tau"):
        _sample(torch.zeros(1, 3), tau=tau)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match="temperature"):
        _sample(torch.zeros(1, 3), tau=0.1, temperature=0.0)


@pytest.mark.parametrize("head", [0, 3])
def test_draws_have_the_teacher_as_their_mean_with_and_without_a_head(head: int) -> None:
    """S = 4,000 stratified uniforms: each id of the rest is hit within one draw of its share."""
    S, vocab = 4000, 300
    logits_V = _logits(1, vocab)[0]
    uniforms_1S = ((torch.arange(S) + 0.5) / S)[None]
    targets = fixed_sample(logits_V[None], torch.tensor([0]), head=head, uniforms_NS=uniforms_1S)
    q_V = logits_V.double().softmax(0).numpy()
    q_hat_V = _dense(targets, vocab)[0]
    assert targets.head_ids_M.tolist() == np.argsort(-q_V)[:head].tolist()
    assert np.abs(q_hat_V - q_V).max() <= 1 / S + 1e-6
    assert q_hat_V.sum() == pytest.approx(1, abs=1e-4)


def test_a_plain_top_k_keeps_its_log_probabilities_and_drops_the_rest() -> None:
    logits_NV = _logits(5, 300)
    targets = fixed_sample(
        logits_NV, torch.zeros(5, dtype=torch.long), head=10, uniforms_NS=torch.zeros(5, 0)
    )
    wanted = logits_NV.double().log_softmax(-1).topk(10)
    np.testing.assert_array_equal(targets.head_ids_M, wanted.indices.flatten())
    np.testing.assert_allclose(targets.head_logq_M, wanted.values.flatten(), atol=1e-5)
    assert not targets.tail_counts_N.any()


def test_a_head_of_the_whole_vocabulary_stays_inside_it_where_q_underflows() -> None:
    logits_NV = torch.tensor([[0.0, -500.0, -400.0]])
    targets = fixed_sample(logits_NV, torch.tensor([0]), head=3, uniforms_NS=torch.rand(1, 2))
    assert sorted(targets.head_ids_M.tolist()) == [0, 1, 2]
    assert np.isfinite(targets.head_logq_M).all()
    assert targets.tail_counts_N.tolist() == [0]
    with pytest.raises(RecipeError, match="vocabulary of 3"):
        fixed_sample(logits_NV, torch.tensor([0]), head=4, uniforms_NS=torch.rand(1, 2))


def test_the_gradient_of_a_head_weight_is_nearer_the_dense_one_than_pure_sampling() -> None:
    """The point of it all: at fewer ids than 12 draws, less than 0.35 of their error."""
    N, vocab, D = 256, 2000, 16
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(N, vocab, generator=generator) * 5
    hidden_ND = torch.randn(N, D, generator=generator)
    q_NV = logits_NV.softmax(-1)
    labels_N = torch.zeros(N, dtype=torch.long)
    threshold = _sample(logits_NV, tau=0.04)
    draws = fixed_sample(
        logits_NV, labels_N, head=0, uniforms_NS=torch.rand(N, 12, generator=generator)
    )

    def error(targets: TokenTargets) -> float:
        q_hat_NV = torch.from_numpy(_dense(targets, vocab)).float()
        return float(((q_hat_NV - q_NV).T @ hidden_ND).norm())

    ids = threshold.head_counts_N.mean() + threshold.tail_counts_N.mean()
    assert ids < 12
    assert error(threshold) < 0.35 * error(draws)


def _some_targets() -> TokenTargets:
    def ints(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    return TokenTargets(
        head_counts_N=ints(2, 0, 1), head_ids_M=ints(7, 3, 5),
        head_logq_M=np.log(np.array([0.5, 0.25, 0.75], np.float32)),
        tail_counts_N=ints(1, 0, 2), tail_ids_T=ints(9, 1, 4),
        label_logp_N=np.array([-1, -2, -3], np.float32),
        entropy_N=np.array([1, 2, 3], np.float32), tau=0.125,
    )  # fmt: skip


def test_padding_puts_the_head_first_then_the_tail_at_tau() -> None:
    padded = pad_targets([_some_targets()])
    assert padded.ids_NK.tolist() == [[7, 3, 9], [0, 0, 0], [5, 1, 4]]
    assert padded.ids_NK.dtype == np.int64
    np.testing.assert_allclose(padded.q_NK, [[0.5, 0.25, 0.125], [0] * 3, [0.75, 0.125, 0.125]])
    assert padded.q_NK.dtype == np.float32
    assert padded.valid_NK.tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert padded.head_mask_NK.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
    assert padded.label_logq_N.tolist() == [-1, -2, -3]
    assert padded.teacher_entropy_N.tolist() == [1, 2, 3]


def test_padding_joins_responses_and_takes_their_first_tokens() -> None:
    whole = _some_targets()
    padded = pad_targets([whole.first(1), whole.first(0), whole])
    assert padded.ids_NK.tolist() == [[7, 3, 9], [7, 3, 9], [0, 0, 0], [5, 1, 4]]
    assert pad_targets([whole.first(0)]).ids_NK.shape == (0, 0)


def test_an_id_drawn_several_times_is_one_id_with_their_mass() -> None:
    ids = np.array([4, 4, 6, 6], np.int32)  # 6 ends one token and begins the next
    drawn = replace(
        _some_targets().first(2), head_counts_N=np.zeros(2, np.int32),
        head_ids_M=ids[:0], head_logq_M=np.zeros(0, np.float32),
        tail_counts_N=np.array([3, 1], np.int32), tail_ids_T=ids, tau=None,
    )  # fmt: skip
    padded = pad_targets([drawn])
    assert padded.ids_NK.tolist() == [[4, 6], [6, 0]]
    np.testing.assert_allclose(padded.q_NK, [[2 / 3, 1 / 3], [1, 0]], rtol=1e-6)


def test_targets_of_different_tau_are_not_joined() -> None:
    with pytest.raises(AssertionError, match="tau"):
        concat_targets([TokenTargets.blank(0, 0.1), TokenTargets.blank(0, 0.2)])


@pytest.mark.parametrize(("unit", "budget"), [("ids", 8.0), ("bytes", 20.0)])
def test_the_tau_that_is_found_spends_the_budget(unit: str, budget: float) -> None:
    logits_NV = _logits(64, 2000, scale=3.0)
    tau = tau_for_budget(logits_NV, budget=budget, unit=unit)  # type: ignore[arg-type]
    targets = _sample(logits_NV, tau=tau)
    head, tail = targets.head_counts_N.mean(), targets.tail_counts_N.mean()
    spent = head + tail if unit == "ids" else TOKEN_BYTES + HEAD_BYTES * head + TAIL_BYTES * tail
    assert spent == pytest.approx(
        budget, rel=0.03
    )  # of 64 tokens; the expectation meets it exactly


def test_a_larger_budget_gives_a_smaller_tau_and_a_flatter_teacher_a_larger_one() -> None:
    logits_NV = _logits(16, 500, scale=3.0)
    taus = [tau_for_budget(logits_NV, budget=b, unit="ids") for b in (2, 4, 8, 16, 32)]
    assert taus == sorted(taus, reverse=True)
    assert tau_for_budget(logits_NV, budget=8, unit="ids", temperature=2.0) > taus[2]


def test_a_budget_below_one_id_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the least, 1\.0"):
        tau_for_budget(_logits(4, 100), budget=0.5, unit="ids")
