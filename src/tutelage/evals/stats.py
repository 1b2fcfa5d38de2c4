"""Intervals and tests for what an evaluation measures: how sure is a figure, and a difference.

Legend: N items (sequences, or prompts), S seeds, B bootstrap resamples. Owns the statistics only;
knows no model, no text, no file. Every random draw comes from the `seed` argument.

The item is always the sequence: tokens of one answer depend on one another, so a mean over tokens
is a ratio of sums over sequences, and whole sequences are resampled (a cluster bootstrap).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 2000
BLOCK_DRAWS = 1_000_000
"""Item draws held at once, in three arrays of 8 MB, however many items there are."""
KEPT_DRAWS = 4_000_000
"""Resamples x items up to which a draw is kept for the next figure over the same items: 8 MB."""
OUT_OF_BOUNDS = 1e300
"""Stands for an infinite ratio: quantiles between two infinities would be no number."""
NARROWED_SEEDS = 5
"""From here on the variance of seeds is known well enough to correct a bootstrap by it."""
EXACT_SEEDS = 14
"""Up to here all 2^S patterns of signs are tried: 16,384 of them."""
SIGN_PATTERNS = 10_000
"""Patterns drawn where there are more seeds."""

Values = npt.ArrayLike
Groups = Sequence[tuple[np.ndarray, np.ndarray]]
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that cover the truth with probability `level`."""

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int
    """Independent units behind it: items, or seeds."""


@dataclass(frozen=True)
class Difference:
    """The interval of `a - b` on the same items, and the two-sided p-value of no difference."""

    interval: Interval
    p_value: float


@dataclass(frozen=True)
class McNemar:
    """Two models, right or wrong on the same n items: the items on which only one is right."""

    only_a: int
    only_b: int
    n: int
    p_value: float


def wilson(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """The score interval of a share of independent items; honest also at 0 and 1.

    With z the normal quantile and s the share:
    `(s + z^2 / 2n -+ z sqrt(s (1 - s) / n + z^2 / 4n^2)) / (1 + z^2 / n)`.
    Raises ValueError unless 0 <= successes <= n and n > 0. Source: Wilson 1927, JASA 22.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no share")
    z, share = _z(level), successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n one bound is exact; in floats it would miss the estimate by 1e-18.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, level, "wilson", n)


def ratio_interval(
    sums_N: Values, counts_N: Values, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The interval of `sum(sums) / sum(counts)` when whole items are resampled together.

    For a figure a token: sums and token counts a sequence. For a mean over items: counts of 1.
    Bounds are expanded percentiles (see `_interval`). Measured coverage at 95 %, for 8, 24 and 64
    sequences: 94, 94, 95 of a normal mean; 91, 92, 95 of a KL that is skewed and tied to length
    (plain percentiles 85, 91, 93; BCa 85, 90, 92).
    Raises ValueError for fewer than two items, unequal lengths, values that are not finite, or
    counts that are not positive.
    """
    sums_N, counts_N = _checked(sums_N, counts_N)
    draws_B = _ratio_draws(sums_N, counts_N, rng=np.random.default_rng(seed), resamples=resamples)
    estimate = float(sums_N.sum() / counts_N.sum())
    return _interval(estimate, draws_B, n=len(sums_N), level=level, method="bootstrap")


def paired_difference(
    a_N: Values, b_N: Values, counts_N: Values | None = None, *,
    seed: int, resamples: int = RESAMPLES, level: float = LEVEL,
) -> Difference:  # fmt: skip
    """`sum(a - b) / sum(counts)` of two models on the same items, which are resampled as pairs.

    Without counts: the mean difference. The p-value inverts the interval: p < 1 - level just where
    the interval leaves 0 out, up to the one draw that is added so that p is never 0. Its floor is
    that draw's: 0.004 for 24 items and 2,000 resamples, so `holm` over ten comparisons and more
    needs more resamples. Raises ValueError as `ratio_interval` does.
    """
    if np.shape(a_N) != np.shape(b_N):
        raise ValueError(f"paired values differ in shape: {np.shape(a_N)} and {np.shape(b_N)}")
    a_N, b_N = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    sums_N, counts_N = _checked(a_N - b_N, np.ones_like(a_N) if counts_N is None else counts_N)
    draws_B = _ratio_draws(sums_N, counts_N, rng=np.random.default_rng(seed), resamples=resamples)
    estimate = float(sums_N.sum() / counts_N.sum())
    n = len(sums_N)
    interval = _interval(estimate, draws_B, n=n, level=level, method="paired bootstrap")
    return Difference(interval, _p_value(draws_B, n=n))


def hierarchical_interval(
    sums: Sequence[Values], counts: Sequence[Values], *, shared_items: bool,
    seed: int, resamples: int = RESAMPLES, level: float = LEVEL,
) -> Interval:  # fmt: skip
    """The mean over S seeds of each seed's ratio, when seeds and then their items are resampled.

    One array a seed. `shared_items`: item i is the same prompt in every seed, so one draw of items
    serves all drawn seeds. Drawn apart, its effect would average away: 79 % coverage instead of 95
    for 10 seeds. Otherwise each drawn seed draws its own items.

    Bounds are those of S units, and from 5 seeds on of the right variance (see `_narrowed`).
    Measured coverage at 95 %, 100 items, for 5 and 10 seeds: 91-95 and 94-95 where seeds differ by
    half an item's standard deviation; 93-99 and 93-98 where they hardly differ. Where seeds are all
    that varies, bounds are near the range of their means: 75-80 for 3 seeds, 87-91 for 5, 93-94
    for 10: take 10.
    Raises ValueError as `ratio_interval` does, for fewer than two seeds, and for shared items of
    unequal number.
    """
    if len(sums) < 2 or len(sums) != len(counts):
        raise ValueError(
            f"{len(sums)} seeds of sums, {len(counts)} of counts: equal and at least 2"
        )
    groups = _checked_groups(sums, counts, shared_items=shared_items)
    draws_B = _hierarchical_draws(groups, shared_items=shared_items, seed=seed, resamples=resamples)
    estimate = _mean_ratio(groups)
    draws_B = _narrowed(draws_B, estimate, [_pulls(*group) for group in groups], shared_items)
    return _interval(estimate, draws_B, n=len(groups), level=level, method="hierarchical bootstrap")


def hierarchical_difference(
    a: Sequence[Values], b: Sequence[Values], *, shared_items: bool,
    seed: int, resamples: int = RESAMPLES, level: float = LEVEL,
) -> Difference:  # fmt: skip
    """The mean over S seeds of the mean of `a - b` over items, pairs of the same seed and item.

    The interval is `hierarchical_interval`'s of the differences; the p-value is `sign_flip`'s of
    the seeds' means, so it is about other seeds on these items. The two need not agree: with few
    seeds the p-value has a floor that no interval has.
    Raises ValueError as `hierarchical_interval` does, and for pairs of unequal shape.
    """
    if [np.shape(values) for values in a] != [np.shape(values) for values in b]:
        raise ValueError("paired values differ in shape: every seed needs both on the same items")
    differences = [
        np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in zip(a, b, strict=True)
    ]
    interval = hierarchical_interval(
        differences, [np.ones(len(d)) for d in differences], shared_items=shared_items,
        seed=seed, resamples=resamples, level=level,
    )  # fmt: skip
    return Difference(interval, sign_flip([float(d.mean()) for d in differences], seed=seed))


def hierarchical_ratio(
    numerators: Sequence[Values], denominators: Sequence[Values], *, shared_items: bool,
    seed: int, resamples: int = RESAMPLES, level: float = LEVEL,
) -> Interval | None:  # fmt: skip
    """`mean(numerators) / mean(denominators)`, each a mean over seeds of means over items.

    One array of items a seed, as often in both; both are resampled by the same draws of seeds and
    items. One seed alone: its items are resampled. None where the ratio is not defined, because
    the interval of its denominator includes 0, or a bound is infinite. Raises ValueError as
    `hierarchical_interval` does.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} seeds above the line, {len(denominators)} below it")
    above, below = (
        _checked_groups(side, [np.ones(np.shape(v)) for v in side], shared_items=shared_items)
        for side in (numerators, denominators)
    )
    if [len(sums_N) for sums_N, _ in above] != [len(sums_N) for sums_N, _ in below]:
        raise ValueError("paired values differ in shape: every seed needs both on the same items")
    n = len(above) if len(above) > 1 else len(above[0][0])
    above_B, below_B = (
        _hierarchical_draws(groups, shared_items=shared_items, seed=seed, resamples=resamples)
        for groups in (above, below)
    )
    base = _mean_ratio(below)
    line_B = _narrowed(below_B, base, [sums_N for sums_N, _ in below], shared_items)
    line = _interval(base, line_B, n=n, level=level, method="")
    if line.low <= 0 <= line.high:
        return None
    # A draw on the other side of 0 can still be there, beyond the bounds; it is as far as can be.
    draws_B = np.copysign(OUT_OF_BOUNDS, above_B * base)
    np.divide(above_B, below_B, out=draws_B, where=below_B * base > 0)
    estimate = _mean_ratio(above) / base
    pulls = [(a_N - estimate * b_N) / base for (a_N, _), (b_N, _) in zip(above, below, strict=True)]
    draws_B = _narrowed(draws_B, estimate, pulls, shared_items)
    found = _interval(estimate, draws_B, n=n, level=level, method="hierarchical ratio of means")
    return found if max(-found.low, found.high) < OUT_OF_BOUNDS**0.5 else None


def sign_flip(differences_S: Values, *, seed: int = 0) -> float:
    """Two-sided p of no difference: in what share of sign patterns is the sum as far from 0?

    Under no difference each seed's difference is as likely turned round, whatever its size. Exact
    over all 2^S patterns up to EXACT_SEEDS, where p is never under 2 / 2^S: 0.06 for 5 seeds, 0.002
    for 10. Beyond, SIGN_PATTERNS random ones and the observed one are counted.
    Raises ValueError without a difference. Source: Fisher 1935, The Design of Experiments, 21.
    """
    values_S = np.asarray(differences_S, np.float64)
    if values_S.ndim != 1 or not len(values_S) or not np.isfinite(values_S).all():
        raise ValueError("a sign-flip test needs one finite difference a seed")
    exact = len(values_S) <= EXACT_SEEDS
    signs_PS = _all_signs(len(values_S)) if exact else _random_signs(len(values_S), seed)
    # Sums of the same size must count as such: their order of addition is worth 1e-16 each.
    least = abs(values_S.sum()) - 1e-12 * np.abs(values_S).sum()
    beyond = np.count_nonzero(np.abs(signs_PS @ values_S) >= least)
    return float(beyond / len(signs_PS)) if exact else (beyond + 1) / (len(signs_PS) + 1)


def mcnemar(right_a_N: Sequence[bool], right_b_N: Sequence[bool]) -> McNemar:
    """Exact two-sided McNemar test: of the items on which the models differ, half to each?

    `p = min(1, 2 * sum_{i <= min(only_a, only_b)} C(m, i) / 2^m)`, m = only_a + only_b.
    Raises ValueError for unequal lengths. Source: McNemar 1947, Psychometrika 12.
    """
    pairs = list(zip(right_a_N, right_b_N, strict=True))
    only_a = sum(bool(a) and not b for a, b in pairs)
    only_b = sum(bool(b) and not a for a, b in pairs)
    m = only_a + only_b
    tail = ways = 1  # C(m, 0); each next from the last, since 2,400 calls of comb took 0.8 s
    for i in range(min(only_a, only_b)):
        ways = ways * (m - i) // (i + 1)
        tail += ways
    return McNemar(only_a, only_b, len(pairs), min(1.0, 2 * tail / 2**m))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p-values, in the order given: the chance of any false finding stays below each.

    With p sorted and i from 0: `adjusted_i = max_{j <= i} min(1, (m - j) p_j)`.
    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def _ratio_draws(
    sums_N: np.ndarray, counts_N: np.ndarray, *, rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """The ratio in each of B resamples of N items; which items depends on `rng` and N only."""
    draws = []
    for rows in _blocks(resamples, len(sums_N)):
        picks_BN = rng.integers(len(sums_N), size=(rows, len(sums_N)))
        draws.append(sums_N[picks_BN].sum(1) / counts_N[picks_BN].sum(1))
    return np.concatenate(draws) if draws else np.empty(0)


def _hierarchical_draws(
    groups: Groups, *, shared_items: bool, seed: int, resamples: int
) -> np.ndarray:
    """The mean over S drawn seeds of their ratio on drawn items, in each of B resamples."""
    picks_BS = np.random.default_rng(seed).integers(len(groups), size=(resamples, len(groups)))
    return (_shared_draws if shared_items else _own_draws)(groups, picks_BS, seed=seed).mean(1)


def _narrowed(
    draws_B: np.ndarray, estimate: float, pulls: Sequence[np.ndarray], shared_items: bool
) -> np.ndarray:
    """Draws with the variance of what they estimate; never wider than they were.

    Drawing seeds and then items counts what is neither the seed's nor the item's up to three times,
    and that is most of what graded answers are: 2.0 times too wide for 10 seeds. `pulls` are the
    items' values around the estimate, V the variance of their mean over S seeds and N items:

    shared items: `V = (MS_seed + MS_item - MS_rest) / SN` of the two-way table, no less than with
    either of the first two alone; items of their own: `V =` variance of seed means `/ S`.
    Plain draws know (S - 1) / S of it, which `_interval` gives back.
    Source: Owen 2007, Annals of Applied Statistics 1 (doi 10.1214/07-AOAS122), section 4.
    """
    seeds = len(pulls)
    if seeds < NARROWED_SEEDS:
        return draws_B
    means_S = np.array([pull_N.mean() for pull_N in pulls])
    variance = means_S.var(ddof=1) / seeds
    if shared_items:
        table_SN = np.stack(pulls)
        means_N = table_SN.mean(0)
        rest_SN = table_SN - means_S[:, None] - means_N + means_S.mean()
        by_item = means_N.var(ddof=1) / len(means_N)
        rest = (rest_SN**2).sum() / ((seeds - 1) * (len(means_N) - 1)) / table_SN.size
        variance = max(variance, by_item, variance + by_item - rest)
    spread = float(np.abs(draws_B).max() < OUT_OF_BOUNDS and draws_B.std())
    wanted = math.sqrt(variance * (seeds - 1) / seeds)
    if not wanted < spread:
        return draws_B
    return estimate + (draws_B - estimate) * (wanted / spread)


def _pulls(sums_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """Each item's pull on its seed's ratio R, as if that were a mean of them.

    `R + (sum - R count) / mean(count)`
    """
    ratio = sums_N.sum() / counts_N.sum()
    return ratio + (sums_N - ratio * counts_N) / counts_N.mean()


def _shared_draws(groups: Groups, picks_BS: np.ndarray, *, seed: int) -> np.ndarray:
    """The ratio [B, S] of each drawn seed on the one draw of items of its resample."""
    resamples, n = len(picks_BS), len(groups[0][0])
    times_BN = _item_counts(n, resamples, seed, 0)
    sums_NS, counts_NS = (np.stack(side, 1) for side in zip(*groups, strict=True))
    ratios_BS = _times(times_BN, sums_NS) / _times(times_BN, counts_NS)
    return np.take_along_axis(ratios_BS, picks_BS, 1)


def _own_draws(groups: Groups, picks_BS: np.ndarray, *, seed: int) -> np.ndarray:
    """The ratio [B, S] of each drawn seed on a draw of its own items, new each time it is drawn."""
    ratios_BS = np.empty(picks_BS.shape)
    for index, (sums_N, counts_N) in enumerate(groups):
        drawn_BS = picks_BS == index
        times_MN = _item_counts(len(sums_N), int(drawn_BS.sum()), seed, index)
        ratios_M2 = _times(times_MN, np.stack([sums_N, counts_N], 1))
        ratios_BS[drawn_BS] = ratios_M2[:, 0] / ratios_M2[:, 1]
    return ratios_BS


def _item_counts(n: int, resamples: int, seed: int, stream: int) -> np.ndarray:
    """How often each of N items is in each of B resamples.

    A table of arms asks for the same draw hundreds of times: with it kept, a figure of 10 seeds and
    500 items takes 6 ms instead of 59.
    """
    draw = _kept_counts if resamples * n <= KEPT_DRAWS else _kept_counts.__wrapped__
    return draw(n, resamples, seed, stream)


@lru_cache(maxsize=16)
def _kept_counts(n: int, resamples: int, seed: int, stream: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 1, stream])  # apart from the stream that draws seeds
    counts_BN = np.empty((resamples, n), np.uint16)
    first = 0
    for rows in _blocks(resamples, n):
        places_BN = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts_BN[first : first + rows] = np.bincount(
            places_BN.ravel(), minlength=rows * n
        ).reshape(rows, n)
        first += rows
    counts_BN.setflags(write=False)
    return counts_BN


def _times(times_BN: np.ndarray, values_NS: np.ndarray) -> np.ndarray:
    """Their product in float64, block by block: whole, the draws would be four times as large."""
    product_BS = np.empty((len(times_BN), values_NS.shape[1]))
    first = 0
    for rows in _blocks(len(times_BN), times_BN.shape[1]):
        block = slice(first, first + rows)
        product_BS[block] = times_BN[block].astype(np.float64) @ values_NS
        first += rows
    return product_BS


@lru_cache(maxsize=4)
def _all_signs(seeds: int) -> np.ndarray:
    """All 2^S patterns of -1 and 1."""
    bits_PS = np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1
    return 2.0 * bits_PS - 1.0


def _random_signs(seeds: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 2])
    return 2.0 * rng.integers(2, size=(SIGN_PATTERNS, seeds)) - 1.0


def _mean_ratio(groups: Groups) -> float:
    return float(np.mean([sums_N.sum() / counts_N.sum() for sums_N, counts_N in groups]))


def _checked_groups(
    sums: Sequence[Values], counts: Sequence[Values], *, shared_items: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    groups = [_checked(s, c) for s, c in zip(sums, counts, strict=True)]
    if shared_items and len({len(sums_N) for sums_N, _ in groups}) > 1:
        raise ValueError("seeds share their items but hold unequal numbers of them")
    return groups


def _blocks(resamples: int, n: int) -> Iterator[int]:
    size = max(1, BLOCK_DRAWS // n)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _interval(
    estimate: float, draws_B: np.ndarray, *, n: int, level: float, method: str
) -> Interval:
    """Expanded percentile bounds: quantiles at the normal shares of -+ t * sqrt(n / (n - 1)).

    Plain percentiles of few items are too short twice over: a resample's variance is (n - 1) / n of
    the sample's, and they know no Student's t. Source: Hesterberg 2015,
    The American Statistician 69 (arXiv 1411.5279).
    """
    outside = _NORMAL.cdf(-_expand(_z(level), n))
    low, high = np.quantile(draws_B, [outside, 1 - outside])
    return Interval(estimate, float(low), float(high), level, method, n)


def _p_value(draws_B: np.ndarray, *, n: int) -> float:
    """Twice the tail beyond 0, taken back from the expanded scale of `_interval`."""
    beyond = min(np.count_nonzero(draws_B <= 0), np.count_nonzero(draws_B >= 0))
    tail = (beyond + 1) / (len(draws_B) + 1)
    return 1.0 if tail >= 0.5 else 2 * _NORMAL.cdf(-_shrink(-_NORMAL.inv_cdf(tail), n))


def _expand(z: float, n: int) -> float:
    """Student's t quantile of n - 1 degrees for a normal quantile z > 0, times sqrt(n / (n - 1)).

    In closed form, right to 0.5 % from 4 degrees on and wider below (Wallace 1959, Annals of
    Mathematical Statistics 30): it saves a dependency on scipy, and `_shrink` inverts it exactly.
    """
    v = n - 1
    scaled = z * (8 * v + 3) / (8 * v + 1)
    return math.sqrt(n * math.expm1(scaled * scaled / v))


def _shrink(expanded: float, n: int) -> float:
    v = n - 1
    return math.sqrt(v * math.log1p(expanded * expanded / n)) * (8 * v + 1) / (8 * v + 3)


def _z(level: float) -> float:
    return _NORMAL.inv_cdf((1 + level) / 2)


def _checked(sums_N: Values, counts_N: Values) -> tuple[np.ndarray, np.ndarray]:
    sums_N, counts_N = np.asarray(sums_N, np.float64), np.asarray(counts_N, np.float64)
    if sums_N.ndim != 1 or sums_N.shape != counts_N.shape:
        raise ValueError(f"sums {sums_N.shape} and counts {counts_N.shape}: one of each an item")
    if len(sums_N) < 2:
        raise ValueError("an interval needs at least 2 items: one alone does not say how it varies")
    if not (np.isfinite(sums_N).all() and np.isfinite(counts_N).all()):
        raise ValueError("sums and counts must be finite")
    if (counts_N <= 0).any():
        raise ValueError("counts must be positive: leave items of no tokens out")
    return sums_N, counts_N
