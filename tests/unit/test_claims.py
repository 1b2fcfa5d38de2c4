"""Arms and claims: what is paired with what, what a verdict needs, levels and coverage measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest

from tutelage.core.errors import DataError, RecipeError
from tutelage.evals.claims import (
    Answers,
    Condition,
    Resampling,
    arm_figures,
    compare,
    decide,
    seeds_needed,
    verdict,
)
from tutelage.evals.stats import (
    EXACT_SEEDS,
    Interval,
    hierarchical_difference,
    hierarchical_ratio,
    sign_flip,
)
from tutelage.recipe.evaluation import Claim

GREEDY = Condition("maze", "fast", 0.0)
HOW = Resampling(resamples=400, seed=0)


def claim(**more: Any) -> Claim:
    return Claim(**{"text": "on beats off", "better": "on", "than": "off", **more})


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 0.95, "", 10)


def answers(
    correct: Sequence[Sequence[float]], *, tokens: float | Sequence[Sequence[float]] = 10.0,
    cut: float = 0.0, thinking: float = 0.0, keys: Sequence[Sequence[str]] | None = None,
) -> Answers:  # fmt: skip
    correct_SN = [np.asarray(row, np.float64) for row in correct]
    rows = tokens if isinstance(tokens, Sequence) else [np.full(len(c), tokens) for c in correct_SN]
    return Answers(
        keys or [[f"item-{i}" for i in range(len(row))] for row in correct_SN],
        correct_SN, [np.asarray(row, np.float64) for row in rows],
        [np.full(len(row), cut) for row in correct_SN],
        [np.full(len(row), thinking) for row in correct_SN],
    )  # fmt: skip


def graded(rate: float, *, seeds: int = 10, items: int = 60, seed: int = 0) -> Answers:
    """Right with this probability, on items that some seeds find as hard as others do."""
    rng = np.random.default_rng([seed, round(1000 * rate)])
    hard_N = np.random.default_rng(seed).normal(0, 0.15, items)
    right_SN = rng.random((seeds, items)) < np.clip(rate + hard_N, 0, 1)
    return answers(right_SN.astype(float).tolist())


def coverage(simulate: Callable[[np.random.Generator, int], bool], datasets: int) -> float:
    return sum(simulate(np.random.default_rng([42, i]), i) for i in range(datasets)) / datasets


# --- the sign-flip test --------------------------------------------------------------------------


def test_the_sign_flip_test_tries_every_pattern() -> None:
    values = np.array([0.3, -0.1, 0.2, 0.4, 0.15])
    patterns = [np.dot(signs, values) for signs in product((-1, 1), repeat=5)]
    expected = sum(abs(p) >= abs(values.sum()) - 1e-12 for p in patterns) / 2**5
    assert sign_flip(values) == expected


@pytest.mark.parametrize("seeds", [1, 2, 5, 10, EXACT_SEEDS])
def test_seeds_that_all_agree_reach_the_floor(seeds: int) -> None:
    values = np.random.default_rng(seeds).uniform(0.1, 0.2, seeds)
    assert sign_flip(values) == 2 / 2**seeds == sign_flip(-values)


def test_equal_differences_do_not_lose_patterns_to_rounding() -> None:
    # 0.1 added in another order gives another last digit: 4 of 6 signs one way is C(6, 4) and more.
    assert sign_flip([0.1, 0.1, 0.1, 0.1, 0.1, -0.1]) == 2 * (1 + 6) / 2**6


def test_no_difference_in_any_seed_has_p_one() -> None:
    assert sign_flip([0.0] * 10) == 1.0
    assert sign_flip([0.0] * (EXACT_SEEDS + 1)) == 1.0


def test_many_seeds_are_drawn_close_to_the_exact_test() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, EXACT_SEEDS + 2)
    signs = 1 - 2 * (np.arange(2**16)[:, None] >> np.arange(16) & 1)
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)
    assert sign_flip(values, seed=3) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_the_sign_flip_test_holds_its_level() -> None:
    """Differences as skewed as -1 or 9 at the ends, yet symmetric between arms: 5 % of 2,000."""

    def found(rng: np.random.Generator, i: int) -> bool:
        a, b = rng.exponential(size=8) ** 2, rng.exponential(size=8) ** 2
        return sign_flip(a - b) <= 0.05

    assert 0.03 < coverage(found, 2000) <= 0.065


# --- differences and ratios over seeds and items -------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_differences_are_covered(shared: bool) -> None:
    """True difference 0.4; it varies with the seed, the item, and the answer itself."""

    def covered(rng: np.random.Generator, i: int) -> bool:
        hard = rng.normal(size=(1 if shared else 6, 50))
        gain = 0.4 + rng.normal(0, 0.4, (1 if shared else 6, 50)) + rng.normal(0, 0.15, (6, 1))
        a = hard + gain + rng.normal(0, 0.3, (6, 50))
        b = hard + rng.normal(0, 0.3, (6, 50))
        found = hierarchical_difference(
            list(a), list(b), shared_items=shared, seed=i, resamples=300
        ).interval
        return found.low <= 0.4 <= found.high

    assert coverage(covered, 200) > 0.92


@pytest.mark.parametrize("shared", [True, False])
def test_noise_of_single_answers_is_not_counted_twice(shared: bool) -> None:
    """Where only answers vary, the interval of 10 seeds was 2.0 times the normal one; now 1.3."""
    rng = np.random.default_rng(0)
    widths = []
    for seed in range(40):
        a, b = rng.normal(size=(2, 10, 50))
        found = hierarchical_difference(
            list(a), list(b), shared_items=shared, seed=seed, resamples=300
        ).interval
        widths.append(found.high - found.low)
    normal = 2 * 1.96 * math.sqrt(2 / 500)
    assert normal < np.mean(widths) < 1.4 * normal


def test_ratios_of_gains_are_covered() -> None:
    """An offline gain of 0.3 of an online gain of 0.4: 75 %."""

    def covered(rng: np.random.Generator, i: int) -> bool:
        hard = rng.normal(0, 0.2, 80)
        above, below = (
            gain + hard + rng.normal(0, 0.05, (8, 1)) + rng.normal(0, 0.3, (8, 80))
            for gain in (0.3, 0.4)
        )
        found = hierarchical_ratio(
            list(above), list(below), shared_items=True, seed=i, resamples=300
        )
        return found is not None and found.low <= 0.75 <= found.high

    assert coverage(covered, 150) > 0.92


def test_a_ratio_is_one_of_means_and_not_a_mean_of_ratios() -> None:
    found = hierarchical_ratio([[1, 1], [3, 3]], [[1, 1], [1, 1]], shared_items=True, seed=0)
    assert found is not None
    assert found.estimate == 2.0
    of_means = hierarchical_ratio([[1, 1], [9, 9]], [[1, 1], [3, 3]], shared_items=True, seed=0)
    assert of_means is not None
    assert of_means.estimate == 10 / 4  # the mean of ratios is 2


def test_a_share_of_the_same_thing_is_one_without_doubt() -> None:
    gains = list(np.random.default_rng(0).normal(1, 0.2, (5, 30)))
    found = hierarchical_ratio(gains, gains, shared_items=True, seed=0)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_a_ratio_over_what_may_be_nothing_is_not_defined() -> None:
    rng = np.random.default_rng(0)
    above, below = list(rng.normal(1, 1, (5, 30))), list(rng.normal(0.01, 1, (5, 30)))
    assert hierarchical_ratio(above, below, shared_items=True, seed=0) is None


def test_the_same_draws_serve_shared_and_kept_items(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = graded(0.8).correct, graded(0.6).correct
    kept = hierarchical_difference(a, b, shared_items=True, seed=3, resamples=200)
    monkeypatch.setattr("tutelage.evals.stats.KEPT_DRAWS", 0)
    monkeypatch.setattr("tutelage.evals.stats.BLOCK_DRAWS", 1000)
    again = hierarchical_difference(a, b, shared_items=True, seed=3, resamples=200)
    assert again.interval.low == pytest.approx(kept.interval.low, abs=1e-12)
    assert again.interval.high == pytest.approx(kept.interval.high, abs=1e-12)


@pytest.mark.parametrize(
    "fault",
    [
        lambda: sign_flip([]),
        lambda: sign_flip([math.nan]),
        lambda: hierarchical_difference([[1, 2], [1, 2]], [[1, 2]], shared_items=True, seed=0),
        lambda: hierarchical_difference(
            [[1, 2], [1, 2]], [[1, 2], [1, 2, 3]], shared_items=True, seed=0
        ),
        lambda: hierarchical_ratio([[1, 2]], [[1, 2], [1, 2]], shared_items=True, seed=0),
        lambda: hierarchical_ratio([[1, 2]], [[1, 2, 3]], shared_items=True, seed=0),
    ],
)
def test_what_is_not_paired_raises(fault: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        fault()


# --- figures of an arm ---------------------------------------------------------------------------


def test_an_arm_is_told_by_its_means() -> None:
    arm = answers(
        [[1, 0, 1, 1], [1, 1, 0, 0]], tokens=[[5, 7, 9, 11], [4, 4, 4, 4]], cut=0.25, thinking=0.5
    )
    found = arm_figures(arm, HOW)
    assert found.seed_means == (0.75, 0.5)
    assert found.accuracy.estimate == 0.625
    assert found.tokens.estimate == 6.0
    assert found.truncated_share.estimate == 0.25
    assert found.thinking_share.estimate == 0.5


def test_tokens_of_wrong_answers_are_spent_too() -> None:
    arm = answers([[1, 1, 1, 0] * 10] * 3, tokens=[[10, 10, 10, 90] * 10] * 3)
    found = arm_figures(arm, HOW).tokens_per_correct
    assert found is not None
    assert found.estimate == 120 / 3


def test_an_arm_that_is_never_right_has_no_tokens_per_correct_answer() -> None:
    assert arm_figures(answers([[0, 0, 0]] * 4), HOW).tokens_per_correct is None


def test_an_arm_that_is_always_right_is_not_certain_of_it() -> None:
    found = arm_figures(answers([[1] * 20] * 4), HOW).accuracy
    assert (found.low, found.high) == pytest.approx((0.8389, 1.0), abs=6e-5)  # Wilson, 20 of 20


def test_cells_with_other_items_do_not_share_them() -> None:
    keys = [["a", "b"], ["a", "c"]]
    assert not answers([[1, 0], [1, 0]], keys=keys).shared_items
    assert answers([[1, 0], [1, 0]]).shared_items


# --- two arms ------------------------------------------------------------------------------------


def test_two_arms_are_paired_by_seed() -> None:
    right = range(5, 45, 4)  # of 50: the seeds differ by far more than the arms
    off = answers([[1.0] * n + [0.0] * (50 - n) for n in right])
    on = answers([[1.0] * (n + 2) + [0.0] * (48 - n) for n in right])
    found = compare(on, off, "accuracy", HOW)
    assert found.difference.p_value == 2 / 2**10
    assert found.test == "sign-flip"
    assert found.seed_differences == pytest.approx([0.04] * 10)


def test_exchanging_the_arms_turns_the_difference_round() -> None:
    on, off = graded(0.8), graded(0.7)
    there, back = (compare(*pair, "accuracy", HOW) for pair in ((on, off), (off, on)))
    assert there.difference.interval.low == pytest.approx(-back.difference.interval.high)
    assert there.difference.p_value == back.difference.p_value


def test_one_seed_falls_back_on_mcnemar_over_its_items() -> None:
    on, off = answers([[1] * 8 + [0] * 4]), answers([[0] * 8 + [1] + [0] * 3])
    found = compare(on, off, "accuracy", HOW)
    assert found.test == "McNemar"
    assert found.difference.p_value == pytest.approx(20 / 512)  # 8 against 1
    assert found.difference.interval.n == 12


def test_one_seed_of_several_samples_falls_back_on_the_bootstrap() -> None:
    on, off = answers([[0.5, 1, 1, 0.25]]), answers([[0.5, 0, 1, 0]])
    assert compare(on, off, "accuracy", HOW).test == "paired bootstrap"


def test_arms_on_other_items_are_refused() -> None:
    with pytest.raises(DataError, match="different items"):
        compare(
            answers([[1, 0]] * 2), answers([[1, 0]] * 2, keys=[["a", "b"]] * 2), "accuracy", HOW
        )


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [(0.01, 0.05, 0.01, "holds"), (0.01, 0.05, 0.06, "not seen"), (-0.01, 0.05, 0.01, "not seen"),
     (-0.05, -0.01, 0.01, "reversed"), (-0.05, -0.01, 0.5, "reversed"), (0, 0, 1, "not seen")],
)  # fmt: skip
def test_better_holds_by_interval_and_by_p(
    low: float, high: float, p: float, expected: str
) -> None:
    assert verdict(claim(), interval(low, high), p) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-9, -2, "holds"), (2, 9, "reversed"), (-2, 9, "not seen")],
)
def test_fewer_tokens_are_better(low: float, high: float, expected: str) -> None:
    assert verdict(claim(measure="tokens"), interval(low, high), 0.001) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.01, 0.02, "holds"), (-0.02, 0.021, "not seen"), (0.021, 0.04, "reversed"),
     (-0.04, -0.021, "reversed"), (-0.5, 0.5, "not seen")],
)  # fmt: skip
def test_equal_is_shown_by_an_interval_within_the_margin(
    low: float, high: float, expected: str
) -> None:
    assert verdict(claim(expect="equal", margin=0.02), interval(low, high), 1.0) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.02, "higher"), (-0.02, -0.01, "lower"), (-0.01, 0.02, "no difference seen")],
)
def test_an_open_question_is_answered_by_its_interval(
    low: float, high: float, expected: str
) -> None:
    assert verdict(claim(expect="open"), interval(low, high), None) == expected


def table(**arms: Answers) -> Mapping[Condition, Mapping[str, Answers]]:
    return {GREEDY: arms}


def test_a_true_gain_holds_and_its_reverse_is_reversed() -> None:
    arms = table(on=graded(0.8), off=graded(0.6))
    there, back = decide([claim(), claim(better="off", than="on")], arms, HOW)
    assert (there.verdict, there.seeds_with_sign) == ("holds", 10)
    assert (back.verdict, back.seeds_with_sign) == ("reversed", 0)


def test_holm_counts_every_claim_that_expects_something_and_no_open_one() -> None:
    arms = table(on=graded(0.8), off=graded(0.6))
    found = decide([claim(), claim(expect="equal"), claim(expect="open")], arms, HOW)
    assert [decision.p_holm for decision in found] == [2 * 2 / 2**10, 2 * 2 / 2**10, None]


def test_five_seeds_cannot_hold_however_large_the_gain() -> None:
    found = decide([claim()], table(on=graded(0.95, seeds=5), off=graded(0.3, seeds=5)), HOW)[0]
    assert found.comparison.difference.interval.low > 0.3
    assert (found.p_holm, found.verdict) == (2 / 2**5, "not seen")


@pytest.mark.parametrize("tests", [1, 2, 3, 5, 12])
def test_seeds_needed_are_the_fewest_that_can_hold(tests: int) -> None:
    seeds = seeds_needed(tests)
    assert tests * 2 / 2**seeds < 0.05 <= tests * 2 / 2 ** (seeds - 1)


def test_the_share_of_a_gain_is_that_of_the_means() -> None:
    base, half, whole = ([[1.0] * n + [0.0] * (40 - n)] * 8 for n in (10, 20, 30))
    arms = table(off=answers(base), on=answers(half), online=answers(whole))
    found = decide([claim(share_of="online")], arms, HOW)[0].share
    assert found is not None
    assert found.estimate == pytest.approx(0.5)


def test_the_share_of_what_did_not_gain_is_not_defined() -> None:
    arms = table(off=graded(0.6), on=graded(0.8), online=graded(0.601), worse=graded(0.3))
    found = decide([claim(share_of="online"), claim(share_of="worse"), claim()], arms, HOW)
    assert [(d.share, d.share_undefined) for d in found] == [
        (None, True), (None, True), (None, False)
    ]  # fmt: skip


def test_a_claim_of_shorter_answers_may_ask_for_a_share_too() -> None:
    rng = np.random.default_rng(0)
    right = [[1.0] * 30] * 8
    arms = table(**{
        name: answers(right, tokens=list(rng.normal(length, 1, (8, 30))))
        for name, length in (("off", 100.0), ("on", 80.0), ("online", 60.0))
    })  # fmt: skip
    found = decide([claim(measure="tokens", share_of="online")], arms, HOW)[0]
    assert found.verdict == "holds"
    assert found.share is not None
    assert found.share.estimate == pytest.approx(0.5, abs=0.02)


def test_a_claim_about_nothing_that_was_graded_says_what_was() -> None:
    arms = table(on=graded(0.8), off=graded(0.6))
    with pytest.raises(RecipeError, match="reasoning mode.*known: maze, fast mode"):
        decide([claim(mode="reasoning")], arms, HOW)
    with pytest.raises(RecipeError, match="'online' was not evaluated"):
        decide([claim(better="online")], arms, HOW)
    several = {GREEDY: arms[GREEDY], Condition("sums", "fast", 0.0): arms[GREEDY]}
    with pytest.raises(RecipeError, match="say which test, of maze, sums"):
        decide([claim()], several, HOW)
