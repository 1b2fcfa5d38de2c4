"""Intervals and tests: known values, closed forms, and coverage by simulation."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from tutelage.evals.stats import (
    _expand,
    _shrink,
    hierarchical_interval,
    holm,
    mcnemar,
    paired_difference,
    ratio_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)  # fmt: skip
def test_wilson_gives_the_published_bounds(successes: int, n: int, low: float, high: float) -> None:
    interval = wilson(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-5)
    assert interval.low <= interval.estimate == successes / n <= interval.high


def test_wilson_covers_a_rare_event_by_exact_enumeration() -> None:
    n, p = 50, 0.06
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n).low <= p <= wilson(k, n).high
    )
    assert 0.93 < covered < 0.98


def test_a_higher_level_is_wider() -> None:
    values = np.random.default_rng(0).normal(size=30)
    narrow, wide = (
        ratio_interval(values, np.ones(30), seed=0, level=level) for level in (0.8, 0.99)
    )
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    assert wilson(3, 9, level=0.99).high > wilson(3, 9, level=0.8).high


@pytest.mark.parametrize(("df", "t"), [(4, 2.7764), (23, 2.0687), (63, 1.9983), (999, 1.9623)])
def test_quantiles_are_expanded_by_student_and_by_the_small_sample(df: int, t: float) -> None:
    n = df + 1
    assert _expand(1.959964, n) == pytest.approx(t * math.sqrt(n / df), rel=5e-3)
    assert _shrink(_expand(1.7, n), n) == pytest.approx(1.7)


def test_a_ratio_weighs_tokens_and_not_sequences() -> None:
    assert ratio_interval([1.0, 90.0], [1, 9], seed=0).estimate == pytest.approx(9.1)


def test_bounds_depend_on_the_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=40)
    first, again, other = (ratio_interval(values, np.ones(40), seed=s) for s in (5, 5, 6))
    assert first == again
    assert first.low != other.low
    assert (first.method, first.n, first.level) == ("bootstrap", 40, 0.95)


def test_memory_blocks_change_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=40)
    whole = ratio_interval(values, np.ones(40), seed=5)
    monkeypatch.setattr("tutelage.evals.stats.BLOCK_DRAWS", 1000)
    assert ratio_interval(values, np.ones(40), seed=5) == whole


def test_a_share_of_one_stays_inside_its_range() -> None:
    interval = ratio_interval([5, 7, 9], [5, 7, 9], seed=0)
    assert (interval.low, interval.high) == (1.0, 1.0)


def coverage(simulate: Callable[[np.random.Generator, int], bool], datasets: int) -> float:
    """Share of simulated data sets on which `simulate` says that the truth was covered."""
    return sum(simulate(np.random.default_rng([42, i]), i) for i in range(datasets)) / datasets


def test_tokens_of_one_answer_are_not_taken_for_independent() -> None:
    """True mean 1: half the variance is between answers; token by token it covers 26 %."""

    def covered(rng: np.random.Generator, i: int) -> bool:
        counts = rng.integers(20, 100, size=24)
        means = rng.normal(1, 1, size=24)
        sums = [rng.normal(mean, 1, size=n).sum() for mean, n in zip(means, counts, strict=True)]
        interval = ratio_interval(sums, counts, seed=i, resamples=400)
        return interval.low <= 1 <= interval.high

    assert 0.91 < coverage(covered, 400) < 0.985


def test_skewed_divergences_are_covered() -> None:
    """Gamma means of shape 1 (skew 2), 24 answers: measured 93 % over many runs."""

    def covered(rng: np.random.Generator, i: int) -> bool:
        counts = rng.integers(20, 100, size=24)
        interval = ratio_interval(rng.gamma(1, 1, size=24) * counts, counts, seed=i, resamples=400)
        return interval.low <= 1 <= interval.high

    assert 0.88 < coverage(covered, 400) < 0.98


def test_equal_models_are_told_apart_as_rarely_as_promised() -> None:
    def significant(rng: np.random.Generator, i: int) -> bool:
        item = rng.normal(0, 3, size=24)
        a, b = item + rng.normal(size=24), item + rng.normal(size=24)
        return paired_difference(a, b, seed=i, resamples=400).p_value < 0.05

    assert 0.02 < coverage(significant, 400) < 0.09


def test_the_p_value_agrees_with_the_interval() -> None:
    for i in range(60):
        rng = np.random.default_rng([3, i])
        result = paired_difference(rng.normal(0.45, 1, 24), np.zeros(24), seed=i, resamples=999)
        outside = result.interval.low > 0 or result.interval.high < 0
        if not 0.045 < result.p_value < 0.055:  # one draw is added to the tail
            assert (result.p_value < 0.05) == outside


def test_pairs_take_the_items_own_difficulty_out() -> None:
    rng = np.random.default_rng(0)
    item = rng.normal(0, 5, size=60)
    a, b = item + rng.normal(0.5, 0.5, size=60), item + rng.normal(0, 0.5, size=60)
    result = paired_difference(a, b, seed=1)
    apart = ratio_interval(a, np.ones(60), seed=1)
    assert result.interval.estimate == pytest.approx(a.mean() - b.mean())
    assert result.p_value < 0.002
    assert result.interval.high - result.interval.low < 0.2 * (apart.high - apart.low)


def test_exchanging_the_models_turns_the_difference_round() -> None:
    rng = np.random.default_rng(0)
    a, b, counts = rng.normal(9, 5, 20), rng.normal(8, 5, 20), rng.integers(1, 50, 20)
    there, back = (paired_difference(*pair, counts, seed=1) for pair in ((a, b), (b, a)))
    assert there.interval.estimate == pytest.approx((a - b).sum() / counts.sum())
    assert there.interval.low == pytest.approx(-back.interval.high)
    assert there.p_value == back.p_value


def test_models_that_never_differ_have_p_one() -> None:
    result = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], seed=0)
    assert (result.p_value, result.interval.low, result.interval.high) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("shared", [True, False])
def test_seeds_and_items_are_covered_together(shared: bool) -> None:
    def covered(rng: np.random.Generator, i: int) -> bool:
        items = rng.normal(0, 1, size=(1 if shared else 5, 60))
        seeds = rng.normal(0, 0.3, size=(5, 1))
        values = 1 + items + seeds + rng.normal(0, 0.5, size=(5, 60))
        interval = hierarchical_interval(
            list(values), [np.ones(60)] * 5, shared_items=shared, seed=i, resamples=300
        )
        return interval.low <= 1 <= interval.high

    assert coverage(covered, 150) > 0.92


def test_shared_items_do_not_average_away_over_seeds() -> None:
    rng = np.random.default_rng(0)
    values = list(rng.normal(size=60) + rng.normal(0, 0.01, size=(10, 60)))
    together, apart = (
        hierarchical_interval(values, [np.ones(60)] * 10, shared_items=shared, seed=0)
        for shared in (True, False)
    )
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_seeds_count_alike_however_many_items_they_have() -> None:
    interval = hierarchical_interval(
        [[1, 1], [3, 3, 3, 3]], [[1, 1], [1, 1, 1, 1]], shared_items=False, seed=0
    )
    assert (interval.estimate, interval.n) == (2.0, 2)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(1, 8, 20 / 512), (8, 1, 20 / 512), (0, 5, 2 / 32), (3, 3, 1), (0, 0, 1)],
)  # fmt: skip
def test_mcnemar_is_the_binomial_of_the_items_that_differ(
    only_a: int, only_b: int, p: float
) -> None:
    a = [True] * only_a + [False] * only_b + [True, False, True]
    b = [False] * only_a + [True] * only_b + [True, False, True]
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b, result.n) == (only_a, only_b, only_a + only_b + 3)
    assert result.p_value == pytest.approx(p)


def test_mcnemar_holds_for_thousands_of_items() -> None:
    normal = math.erfc((2600 - 2400 - 1) / math.sqrt(5000) / math.sqrt(2))
    result = mcnemar([True] * 2600 + [False] * 2400, [False] * 2600 + [True] * 2400)
    assert result.p_value == pytest.approx(normal, rel=0.02)


def test_holm_follows_the_worked_example() -> None:
    # 4 x 0.005; 3 x 0.01; 2 x 0.03; 1 x 0.04 is less than the one before it, so 0.06 too.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()


def test_what_cannot_be_estimated_raises() -> None:
    for fault in (
        lambda: wilson(0, 0),
        lambda: wilson(3, 2),
        lambda: ratio_interval([1.0], [1], seed=0),
        lambda: ratio_interval([1.0, math.nan], [1, 1], seed=0),
        lambda: ratio_interval([1.0, 1.0], [1, 0], seed=0),
        lambda: ratio_interval([1.0, 1.0], [1, 1, 1], seed=0),
        lambda: paired_difference([1.0, 1.0], [1.0], seed=0),
        lambda: mcnemar([True], [True, False]),
        lambda: hierarchical_interval([[1, 2]], [[1, 1]], shared_items=True, seed=0),
        lambda: hierarchical_interval(
            [[1, 2], [1, 2, 3]], [[1, 1], [1, 1, 1]], shared_items=True, seed=0
        ),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            fault()


def test_figures_and_texts_need_no_torch() -> None:
    code = (
        "import sys, tutelage.evals.stats, tutelage.evals.textmatch\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
