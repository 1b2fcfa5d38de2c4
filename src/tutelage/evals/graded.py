"""What is counted of graded answers (`records.VERDICTS`): shares, lengths and costs with intervals.

The unit is the item: several samples of one depend on each other, so whole items are resampled.
With one sample an item a share is a count of independent trials, and has a Wilson interval; so has
a share of 0 or 1, of which resampling would say that it is certain. Pure: rows in, plain data out.

A figure is `{"estimate", "low", "high", "n"}`, n items. A bound, or all three, is None where it is
not defined: one item does not say how items vary.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.evals.grading_text import RAISED
from tutelage.evals.stats import (
    RESAMPLES,
    Interval,
    holm,
    mcnemar,
    paired_difference,
    ratio_interval,
    wilson,
)

Row = Mapping[str, Any]
Figure = dict[str, Any]
CONDITION = ("test", "mode", "temperature")
FEWEST_TOKENS = 1e-9
"""For an item of no token at all: its weight in a ratio must be positive and must not count."""
DIGITS = 6


@dataclass(frozen=True)
class Settings:
    """How to count: k of pass@k, and the bootstrap's seed and number of resamples."""

    pass_at: Sequence[int] = ()
    seed: int = 0
    resamples: int = RESAMPLES


def metrics(
    rows: Sequence[Row], *, pass_at: Sequence[int] = (), seed: int, resamples: int = RESAMPLES
) -> dict[str, Figure]:
    """The figures of one model under one condition (test, mode, temperature).

    `accuracy`; `pass@k` for the k that no item has fewer samples than; `answer_tokens`, the mean,
    chain included; `truncated_share`; `empty_share`; `raised_share` (the grader raised: a fault of
    the grader or the row, counted as wrong); in fast mode `fast_thinking_share` (answers with a
    chain they should not have); `tokens_per_correct`, all tokens by correct answers, not defined
    without a correct answer and without tokens. Where the interval of correct answers a token
    reaches 0 it has no upper bound.

    Raises ValueError for no rows, or rows of several models or conditions.
    """
    items = _by_item(rows)
    share, mean = _counting(items, seed=seed, resamples=resamples)
    found = {"accuracy": share(lambda row: row["correct"])}
    fewest = min(len(samples) for samples in items.values())
    for k in sorted({k for k in pass_at if k <= fewest}):
        found[f"pass@{k}"] = _share([[_pass_at(item, k)] for item in items.values()], mean)
    found["answer_tokens"] = mean([_mean(item, "tokens") for item in items.values()])
    found["truncated_share"] = share(lambda row: row["finish_reason"] == "length")
    found["empty_share"] = share(lambda row: not row["answer"].strip())
    found["raised_share"] = share(lambda row: row["reason"].startswith(RAISED))
    if rows[0]["mode"] == "fast":
        found["fast_thinking_share"] = share(lambda row: bool((row["thinking"] or "").strip()))
    found["tokens_per_correct"] = _tokens_per_correct(items, seed=seed, resamples=resamples)
    return found


def compare(
    rows_a: Sequence[Row], rows_b: Sequence[Row], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, Figure]:
    """What model a has over model b (a - b) on the same items: `accuracy` and `answer_tokens`.

    Each with the two-sided `p` of no difference and its `test`. With one sample an item accuracy's
    is McNemar's exact test, on the items that `only_a` and `only_b` got right; its interval is the
    paired bootstrap's all the same, so at the border the two may disagree.

    Raises ValueError where the items differ, or as `metrics` does.
    """
    a, b = _by_item(rows_a), _by_item(rows_b)
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())[0]
        raise ValueError(f"two models on different items, for example {odd!r}: nothing to pair")
    found = {}
    for metric, column in (("accuracy", "correct"), ("answer_tokens", "tokens")):
        pair = [[_mean(items[name], column) for name in a] for items in (a, b)]
        found[metric] = _difference(*pair, seed=seed, resamples=resamples)
    if all(len(samples) == 1 for items in (a, b) for samples in items.values()):
        right = [[items[name][0]["correct"] >= 1 for name in a] for items in (a, b)]
        test = mcnemar(*right)
        found["accuracy"] |= {
            "p": _rounded(test.p_value), "test": "mcnemar", "only_a": test.only_a,
            "only_b": test.only_b,
        }  # fmt: skip
    return found


def tables(parts: Sequence[Sequence[Row]], settings: Settings) -> list[dict[str, Any]]:
    """A table for each condition, from the rows of each model (one part a model, in order).

    `{"test", "mode", "temperature", "models": [{"metrics"}], "differences"}`: each model against
    the one before it. `p_holm` is corrected for all comparisons of its table.

    Raises ValueError where a model lacks a condition, or as `metrics` and `compare` do.
    """
    grouped = [_by_condition(part) for part in parts]
    if any(one.keys() != grouped[0].keys() for one in grouped):
        raise ValueError("the models were not asked under the same conditions")
    options = {"seed": settings.seed, "resamples": settings.resamples}
    found = []
    for condition in grouped[0] if grouped else ():
        rows = [one[condition] for one in grouped]
        found.append(
            {
                **dict(zip(CONDITION, condition, strict=True)),
                "models": [
                    {"metrics": metrics(each, pass_at=settings.pass_at, **options)} for each in rows
                ],
                "differences": corrected(
                    _named(later[0]["model"], before[0]["model"], compare(later, before, **options))
                    for before, later in itertools.pairwise(rows)
                ),
            }
        )
    return found


def corrected(comparisons: Iterable[Sequence[Figure]]) -> list[Figure]:
    """All comparisons of one table in a row, each with `p_holm`: its `p` corrected for them all."""
    flat = [one for several in comparisons for one in several]
    known = [one for one in flat if one["p"] is not None]
    adjusted = dict(zip(map(id, known), holm([one["p"] for one in known]), strict=True))
    return [
        {**one, "p_holm": _rounded(adjusted[id(one)]) if id(one) in adjusted else None}
        for one in flat
    ]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k answers is right, from n samples of which c are: unbiased.

    `1 - C(n - c, k) / C(n, k)`. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    Source: arXiv 2107.03374, equation 1.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"no pass@{k} of {samples} samples with {correct} correct")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


# --- grouping -------------------------------------------------------------------------------------


def _by_item(rows: Sequence[Row]) -> dict[str, list[Row]]:
    if not rows:
        raise ValueError("no graded answers to count")
    if len({tuple(row[name] for name in ("model", *CONDITION)) for row in rows}) > 1:
        raise ValueError("graded answers of several models or conditions: count each by itself")
    items: dict[str, list[Row]] = {}
    for row in rows:
        items.setdefault(row["item"], []).append(row)
    return items


def _by_condition(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in CONDITION), []).append(row)
    return found


def _named(model: str, against: str, compared: Mapping[str, Figure]) -> list[Figure]:
    return [
        {"metric": metric, "model": model, "against": against, **figure}
        for metric, figure in compared.items()
    ]


# --- counting -------------------------------------------------------------------------------------

Mean = Callable[[Sequence[float]], Figure]


def _counting(
    items: Mapping[str, Sequence[Row]], *, seed: int, resamples: int
) -> tuple[Callable[[Callable[[Row], float]], Figure], Mean]:
    """A function for the share of answers of which something is true, and one for means."""

    def mean(values_N: Sequence[float]) -> Figure:
        if len(values_N) < 2:
            return _alone(values_N[0])
        ones_N = np.ones(len(values_N))
        return _shown(ratio_interval(values_N, ones_N, seed=seed, resamples=resamples))

    def share(of: Callable[[Row], float]) -> Figure:
        return _share([[float(of(row)) for row in item] for item in items.values()], mean)

    return share, mean


def _share(values: Sequence[Sequence[float]], mean: Mean) -> Figure:
    """The mean over items of the mean over an item's samples, all in [0, 1]."""
    means_N = [sum(item) / len(item) for item in values]
    same = len({value for item in values for value in item}) == 1
    single = all(len(item) == 1 for item in values)
    if (single or same) and all(value in (0.0, 1.0) for value in means_N):
        return _shown(wilson(round(sum(means_N)), len(means_N)))
    return mean(means_N)


def _pass_at(item: Sequence[Row], k: int) -> float:
    return pass_at_k(len(item), sum(row["correct"] >= 1 for row in item), k)


def _tokens_per_correct(items: Mapping[str, Sequence[Row]], *, seed: int, resamples: int) -> Figure:
    """The inverse of correct answers a token: that one stays defined in every resample."""
    correct_N = np.array([_mean(item, "correct") for item in items.values()])
    tokens_N = np.array([_mean(item, "tokens") for item in items.values()])
    if not correct_N.sum() or not tokens_N.sum():
        return {"estimate": None, "low": None, "high": None, "n": len(items)}
    if len(items) < 2:
        return _alone(tokens_N[0] / correct_N[0])
    a_token = ratio_interval(
        correct_N, np.maximum(tokens_N, FEWEST_TOKENS), seed=seed, resamples=resamples
    )
    return {
        "estimate": _rounded(tokens_N.sum() / correct_N.sum()),
        "low": _rounded(1 / a_token.high),
        "high": _rounded(1 / a_token.low) if a_token.low > 0 else None,
        "n": a_token.n,
    }


def _difference(a_N: Sequence[float], b_N: Sequence[float], *, seed: int, resamples: int) -> Figure:
    if len(a_N) < 2:
        return {**_alone(a_N[0] - b_N[0]), "p": None, "test": "none"}
    found = paired_difference(a_N, b_N, seed=seed, resamples=resamples)
    return {
        **_shown(found.interval), "p": _rounded(found.p_value), "test": "paired bootstrap",
    }  # fmt: skip


def _mean(item: Sequence[Row], column: str) -> float:
    return sum(row[column] for row in item) / len(item)


def _alone(value: float) -> Figure:
    return {"estimate": _rounded(value), "low": None, "high": None, "n": 1}


def _shown(interval: Interval) -> Figure:
    return {
        "estimate": _rounded(interval.estimate),
        "low": _rounded(interval.low),
        "high": _rounded(interval.high),
        "n": interval.n,
    }


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
