"""Which rows to keep so that groups come out as equal as their sizes allow.

Owns the quotas and the one weighted draw of the data stages; knows no row, only keys and weights.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tutelage.core.errors import DataError

Key = tuple[str, ...]


def balanced(
    keys: Sequence[Key], *, count: int, seed: int, weights_N: np.ndarray | None = None
) -> np.ndarray:
    """The ascending indices of `count` rows with groups (equal keys) as equal as they can be.

    A group, such as (source, language, difficulty band), gets its quota of `water_fill`; inside it
    rows are drawn without replacement as `weighted_draw` does, uniformly without `weights_N`. The
    draw of a row depends on the seed and its own number: what another group holds changes nothing.
    Raises DataError for more rows than there are, or than weigh anything in a group.
    """
    quotas = water_fill(Counter(keys), count=count)
    weights_N = np.ones(len(keys)) if weights_N is None else weights_N
    arrivals_N = _arrivals(weights_N, seed=seed)
    members: dict[Key, list[int]] = {key: [] for key in quotas}
    for index, key in enumerate(keys):
        members[key].append(index)
    taken = [
        _first(np.array(members[key], np.int64), arrivals_N, count=quota, what=f"group {key}")
        for key, quota in quotas.items()
    ]
    return np.sort(np.concatenate(taken)) if taken else np.empty(0, np.int64)


def water_fill(sizes: Counter[Key], *, count: int) -> dict[Key, int]:
    """Quotas that sum to `count`: `min(size, level)`, and one more for as many as are left over.

    Groups under the water level give all they have; the others differ by one at most, and the
    larger have it, or the later of equals by their keys. Raises DataError when all groups together
    are too small.
    """
    if count > sizes.total():
        raise DataError(f"balance: {count} rows asked for, {sizes.total()} there: lower the count")
    quotas: dict[Key, int] = {}
    left = count
    # Smallest first, so that what a small group cannot give falls to the larger ones after it.
    by_size = sorted(sizes, key=lambda key: (sizes[key], key))
    for place, key in enumerate(by_size):
        quotas[key] = min(sizes[key], left // (len(by_size) - place))
        left -= quotas[key]
    return {key: quotas[key] for key in sorted(quotas)}


def weighted_draw(weights_N: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """The ascending indices of `count` rows drawn one by one, each by its weight among those left.

    By Gumbel top-k: the `count` largest of `log w + g`, g standard Gumbel, are such a draw. A row
    of weight 0 is never drawn. Raises DataError when fewer rows weigh anything; ValueError for a
    weight that is negative or not finite. Source: arXiv 1903.06059.
    """
    arrivals_N = _arrivals(weights_N, seed=seed)
    rows = np.arange(len(arrivals_N))
    return np.sort(_first(rows, arrivals_N, count=count, what="preference"))


def _arrivals(weights_N: np.ndarray, *, seed: int) -> np.ndarray:
    """`-(log w + g)`: who comes first in the draw; infinite for weight 0."""
    weights_N = np.asarray(weights_N, np.float64)
    if not np.isfinite(weights_N).all() or (weights_N < 0).any():
        raise ValueError("weights must be finite and not negative")
    gumbel_N = np.random.default_rng(seed).gumbel(size=len(weights_N))
    logs_N = np.full(len(weights_N), -np.inf)
    np.log(weights_N, out=logs_N, where=weights_N > 0)
    return -(logs_N + gumbel_N)


def _first(rows: np.ndarray, arrivals_N: np.ndarray, *, count: int, what: str) -> np.ndarray:
    """The `count` of `rows` that arrive first."""
    drawable = rows[np.isfinite(arrivals_N[rows])]
    if count > len(drawable):
        raise DataError(
            f"{what}: {count} rows asked for, {len(drawable)} with a weight: lower the count"
        )
    return drawable[np.argsort(arrivals_N[drawable], kind="stable")[:count]]
