"""Arms of an ablation: their figures, differences between two of them, and verdicts on claims.

Legend: S seeds (repetitions of the whole experiment), N items. Owns the statistics over graded
answers, as arrays a seed; knows no file, no model and no page.

Two arms are always compared in the same seed and on the same item. With one seed an interval can
only resample items: it then says how sure the figure of *that* training is, not of the method.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import numpy as np

from tutelage.core.errors import DataError, RecipeError
from tutelage.evals.stats import (
    Difference,
    Interval,
    hierarchical_difference,
    hierarchical_interval,
    hierarchical_ratio,
    holm,
    mcnemar,
    paired_difference,
    ratio_interval,
    wilson,
)
from tutelage.recipe.evaluation import Claim

ALPHA = 0.05
HOLDS, REVERSED, NOT_SEEN = "holds", "reversed", "not seen"
HIGHER, LOWER, NO_DIFFERENCE = "higher", "lower", "no difference seen"

Measure = Literal["accuracy", "tokens"]
Table = Mapping["Condition", Mapping[str, "Answers"]]
"""Condition -> arm -> its answers."""


@dataclass(frozen=True, order=True)
class Condition:
    """What was asked and how it was answered."""

    test: str
    mode: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.test}, {self.mode} mode, temperature {self.temperature:g}"


@dataclass(frozen=True)
class Answers:
    """One arm's answers in one condition, a mean over samples for each item of each seed.

    An item's key stands for its prompt too: seeds share items where their keys are equal.
    """

    items: Sequence[Sequence[str]]
    correct: Sequence[np.ndarray]
    tokens: Sequence[np.ndarray]
    cut: Sequence[np.ndarray]
    """Share of the item's answers that were cut off."""
    thinking: Sequence[np.ndarray]
    """Share of the item's answers that hold a chain."""

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.items)

    @property
    def shared_items(self) -> bool:
        """Whether every seed asks the same items."""
        return all(list(items) == list(self.items[0]) for items in self.items)


@dataclass(frozen=True)
class Resampling:
    """How many resamples stand behind an interval, and from which seed they are drawn."""

    resamples: int
    seed: int


@dataclass(frozen=True)
class ArmFigures:
    """What the table says of an arm in a condition."""

    accuracy: Interval
    seed_means: tuple[float, ...]
    tokens: Interval
    truncated_share: Interval
    thinking_share: Interval
    tokens_per_correct: Interval | None
    """Tokens of all answers over correct answers; None where too few are correct to say."""


@dataclass(frozen=True)
class Comparison:
    """Arm a minus arm b, paired by seed and item."""

    difference: Difference
    seed_differences: tuple[float, ...]
    test: str
    """What the p-value is of: sign-flip over seeds, or with one seed McNemar or paired bootstrap
    over items."""


@dataclass(frozen=True)
class Decision:
    """A claim, what was measured about it, and the verdict."""

    claim: Claim
    condition: Condition
    comparison: Comparison
    p_holm: float | None
    """None for a claim that expects nothing: it is not in the family that Holm corrects."""
    seeds_with_sign: int
    """Seeds whose own difference has the claimed sign; without one, the sign of the mean."""
    share: Interval | None
    """Of `share_of`'s gain over `than`, what `better` wins."""
    share_undefined: bool
    """A share was asked for, but `share_of` did not gain beyond doubt."""
    verdict: str


def arm_figures(answers: Answers, how: Resampling) -> ArmFigures:
    """The figures of one arm, each with its interval over seeds and items."""
    return ArmFigures(
        accuracy=_share(answers, answers.correct, how),
        seed_means=tuple(float(values_N.mean()) for values_N in answers.correct),
        tokens=_mean(answers, answers.tokens, how),
        truncated_share=_share(answers, answers.cut, how),
        thinking_share=_share(answers, answers.thinking, how),
        tokens_per_correct=hierarchical_ratio(
            answers.tokens, answers.correct, shared_items=answers.shared_items,
            seed=how.seed, resamples=how.resamples,
        ),
    )  # fmt: skip


def compare(a: Answers, b: Answers, measure: Measure, how: Resampling) -> Comparison:
    """`a - b` on the same items of the same seeds.

    p-value: the sign-flip test over seeds. With one seed: McNemar's where every item is simply
    right or wrong, otherwise the paired bootstrap's. Raises DataError where items differ.
    """
    if [list(items) for items in a.items] != [list(items) for items in b.items]:
        raise DataError("two arms were asked different items in the same cell: they are not paired")
    left, right = getattr(a, _FIELD[measure]), getattr(b, _FIELD[measure])
    means = tuple(float((x - y).mean()) for x, y in zip(left, right, strict=True))
    if a.seeds > 1:
        found = hierarchical_difference(
            left, right, shared_items=a.shared_items, seed=how.seed, resamples=how.resamples
        )
        return Comparison(found, means, "sign-flip")
    found = paired_difference(left[0], right[0], seed=how.seed, resamples=how.resamples)
    if measure == "accuracy" and np.isin([left[0], right[0]], (0, 1)).all():
        p_value = mcnemar(left[0] == 1, right[0] == 1).p_value
        return Comparison(Difference(found.interval, p_value), means, "McNemar")
    return Comparison(found, means, "paired bootstrap")


def decide(claims: Sequence[Claim], table: Table, how: Resampling) -> list[Decision]:
    """A verdict for each claim; p-values are corrected over all claims that expect something.

    Raises RecipeError for a claim about a condition or an arm that was not evaluated.
    """
    conditions = [condition_of(claim, table) for claim in claims]
    compared = [
        compare(
            _answers(claim, claim.better, condition, table),
            _answers(claim, claim.than, condition, table), claim.measure, how,
        )
        for claim, condition in zip(claims, conditions, strict=True)
    ]  # fmt: skip
    tested = [index for index, claim in enumerate(claims) if claim.expect != "open"]
    adjusted = holm([compared[index].difference.p_value for index in tested])
    p_holm = dict(zip(tested, adjusted, strict=True))
    return [
        _decision(claim, conditions[index], compared[index], p_holm.get(index), table, how)
        for index, claim in enumerate(claims)
    ]


def condition_of(claim: Claim, conditions: Iterable[Condition]) -> Condition:
    """The condition a claim is about; its test may be left out where there is only one."""
    conditions = list(conditions)
    tests = sorted({condition.test for condition in conditions})
    if not claim.test and len(tests) > 1:
        raise RecipeError(f"claim {claim.text!r}: say which test, of {', '.join(tests)}")
    wanted = Condition(claim.test or tests[0], claim.mode, claim.temperature)
    if wanted not in conditions:
        known = "; ".join(str(condition) for condition in sorted(conditions))
        raise RecipeError(f"claim {claim.text!r}: nothing was graded at {wanted}; known: {known}")
    return wanted


def verdict(claim: Claim, interval: Interval, p_holm: float | None) -> str:
    """What the numbers say of the claim.

    better: *holds* when the interval lies beyond 0 on the claimed side and the corrected p is under
    0.05, *reversed* when it lies beyond 0 on the other. equal: *holds* when it lies within
    +-margin, *reversed* when it lies wholly outside. Otherwise *not seen*, which is no proof of the
    contrary. open: *higher*, *lower* or *no difference seen*, by the interval alone.
    """
    low, high = interval.low, interval.high
    if claim.expect == "equal":
        if -claim.margin <= low and high <= claim.margin:
            return HOLDS
        return REVERSED if low > claim.margin or high < -claim.margin else NOT_SEEN
    if claim.expect == "open":
        return HIGHER if low > 0 else LOWER if high < 0 else NO_DIFFERENCE
    if direction(claim.measure) < 0:
        low, high = -high, -low
    if low > 0 and p_holm is not None and p_holm < ALPHA:
        return HOLDS
    return REVERSED if high < 0 else NOT_SEEN


def direction(measure: Measure) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if measure == "tokens" else 1


def seeds_needed(tests: int) -> int:
    """The fewest seeds with which a claim can still hold after correction over so many tests.

    The sign-flip p is at least 2 / 2^S, and Holm multiplies the smallest by their number:
    `tests * 2 / 2^S < 0.05`.
    """
    least = ceil(log2(2 * max(tests, 1) / ALPHA))
    return least if max(tests, 1) * 2 / 2**least < ALPHA else least + 1


_FIELD: Mapping[Measure, str] = {"accuracy": "correct", "tokens": "tokens"}


def _decision(
    claim: Claim, condition: Condition, comparison: Comparison, p_holm: float | None, table: Table,
    how: Resampling,
) -> Decision:  # fmt: skip
    interval = comparison.difference.interval
    sign = direction(claim.measure) if claim.expect == "better" else np.sign(interval.estimate)
    share = _share_of_gain(claim, condition, table, how) if claim.share_of else None
    return Decision(
        claim, condition, comparison, p_holm,
        seeds_with_sign=sum(bool(value * sign > 0) for value in comparison.seed_differences),
        share=share, share_undefined=bool(claim.share_of) and share is None,
        verdict=verdict(claim, interval, p_holm),
    )  # fmt: skip


def _share_of_gain(
    claim: Claim, condition: Condition, table: Table, how: Resampling
) -> Interval | None:
    """`(better - than) / (share_of - than)` of means; None unless `share_of` surely gained."""
    better, than, most = (
        _answers(claim, name, condition, table)
        for name in (claim.better, claim.than, claim.share_of)
    )
    field = _FIELD[claim.measure]
    base = getattr(than, field)
    above, below = (
        [x - y for x, y in zip(getattr(arm, field), base, strict=True)] for arm in (better, most)
    )
    if np.mean([gain_N.mean() for gain_N in below]) * direction(claim.measure) <= 0:
        return None
    return hierarchical_ratio(
        above, below, shared_items=than.shared_items, seed=how.seed, resamples=how.resamples
    )


def _answers(claim: Claim, name: str, condition: Condition, table: Table) -> Answers:
    if name not in table[condition]:
        raise RecipeError(
            f"claim {claim.text!r}: {name!r} was not evaluated at {condition}; "
            "add it to the models of that evaluate step"
        )
    return table[condition][name]


def _mean(answers: Answers, values: Sequence[np.ndarray], how: Resampling) -> Interval:
    ones = [np.ones(len(values_N)) for values_N in values]
    if len(values) == 1:
        return ratio_interval(values[0], ones[0], seed=how.seed, resamples=how.resamples)
    return hierarchical_interval(
        values, ones, shared_items=answers.shared_items, seed=how.seed, resamples=how.resamples
    )


def _share(answers: Answers, values: Sequence[np.ndarray], how: Resampling) -> Interval:
    """Their mean. All 0 or all 1 leave nothing to resample: then Wilson's, of one seed's items."""
    for extreme in (0, 1):
        if all((values_N == extreme).all() for values_N in values):
            n = min(map(len, values))
            return wilson(extreme * n, n)
    return _mean(answers, values, how)
