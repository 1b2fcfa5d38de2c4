"""Groups come out as equal as their sizes allow, and the draw inside them follows the weights."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.core.errors import DataError
from tutelage.data.balance import balanced, water_fill, weighted_draw

KEYS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy")), max_size=60)


def count_of(data: st.DataObject, keys: list[tuple[str, ...]]) -> int:
    return data.draw(st.integers(0, len(keys)))


@given(KEYS, st.data())
def test_quotas_fill_like_water(keys: list[tuple[str, ...]], data: st.DataObject) -> None:
    sizes = Counter(keys)
    quotas = water_fill(sizes, count=(count := count_of(data, keys)))
    assert sum(quotas.values()) == count
    assert all(0 <= quotas[key] <= sizes[key] for key in sizes)
    # Whoever has rows left is at the level: nobody has more than one above it.
    highest = max(quotas.values(), default=0)
    assert all(quotas[key] >= highest - 1 for key in sizes if quotas[key] < sizes[key])


@given(KEYS, st.data(), st.integers(0, 5))
def test_the_rows_chosen_match_the_quotas_ascend_and_come_again(
    keys: list[tuple[str, ...]], data: st.DataObject, seed: int
) -> None:
    count = count_of(data, keys)
    rows = balanced(keys, count=count, seed=seed)
    assert (np.diff(rows) > 0).all()
    assert Counter(keys[row] for row in rows) == Counter(water_fill(Counter(keys), count=count))
    np.testing.assert_array_equal(rows, balanced(keys, count=count, seed=seed))


def test_a_small_group_gives_all_and_the_large_ones_share_the_rest() -> None:
    sizes = Counter({("small",): 2, ("large",): 50, ("larger",): 90})
    assert water_fill(sizes, count=21) == {("small",): 2, ("large",): 9, ("larger",): 10}


def test_another_seed_draws_other_rows_of_a_group() -> None:
    keys = [("a",)] * 100
    draws = {tuple(balanced(keys, count=10, seed=seed)) for seed in range(5)}
    assert len(draws) == 5


def test_every_row_of_a_group_is_drawn_as_often() -> None:
    keys = [("a",)] * 6 + [("b",)] * 2
    counts = np.zeros(8)
    for seed in range(2000):
        counts[balanced(keys, count=4, seed=seed)] += 1
    # 5 standard deviations of 2,000 draws at 1/3.
    np.testing.assert_allclose(counts[:6] / 2000, 1 / 3, atol=0.053)
    assert (counts[6:] == 2000).all()


def test_what_another_group_holds_does_not_change_a_groups_draw() -> None:
    keys = [("a",)] * 20 + [("b",)] * 20
    other = [("a",)] * 20 + [("b",)] * 10 + [("c",)] * 10
    chosen = balanced(keys, count=10, seed=1)
    again = balanced(other, count=15, seed=1)
    assert chosen[chosen < 20].tolist() == again[again < 20].tolist()


def test_weights_decide_within_a_group_and_never_between_groups() -> None:
    keys = [("a",)] * 10 + [("b",)] * 10
    weights = np.array([1.0] * 5 + [0.0] * 5 + [1e9] * 10)
    rows = balanced(keys, count=8, seed=0, weights_N=weights)
    assert (rows < 5).sum() == 4
    assert (rows >= 10).sum() == 4


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_the_first_of_a_weighted_draw_follows_the_weights(scale: float) -> None:
    weights = np.array([1.0, 2.0, 5.0]) * scale
    firsts = [int(weighted_draw(weights, count=1, seed=seed)[0]) for seed in range(4000)]
    shares = np.bincount(firsts, minlength=3) / 4000
    # 5 standard deviations of 4,000 draws.
    np.testing.assert_allclose(shares, [0.125, 0.25, 0.625], atol=0.04)


def test_inclusion_in_a_draw_of_two_is_that_of_drawing_one_by_one() -> None:
    p = np.array([0.125, 0.25, 0.625])
    included = np.zeros(3)
    for seed in range(4000):
        included[weighted_draw(p, count=2, seed=seed)] += 1
    second = [sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]
    np.testing.assert_allclose(included / 4000, p + second, atol=0.04)


def test_too_many_rows_and_too_few_weights_are_errors_that_say_how_many() -> None:
    with pytest.raises(DataError, match="3 rows asked for, 2 there"):
        balanced([("a",), ("b",)], count=3, seed=0)
    with pytest.raises(DataError, match=r"group \('a',\): 2 rows asked for, 1 with a weight"):
        balanced([("a",), ("a",)], count=2, seed=0, weights_N=np.array([0.0, 1.0]))
    with pytest.raises(DataError, match="2 rows asked for, 1 with a weight"):
        weighted_draw(np.array([0.0, 1.0]), count=2, seed=0)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_weight_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        weighted_draw(np.array([1.0, bad]), count=1, seed=0)
