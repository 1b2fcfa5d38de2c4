"""Difficulty in [0, 1] from passes or from likelihoods, and the preference for a part of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tutelage.core.errors import DataError
from tutelage.data.difficulty import (
    difficulty_bands,
    difficulty_from_nll,
    difficulty_from_passes,
    instruction_following_difficulty,
    prefer,
    preference_weights,
)

NAN = float("nan")
NLLS = arrays(np.float64, st.integers(1, 30), elements=st.integers(1, 9).map(lambda k: k / 4))


def test_difficulty_is_the_share_of_answers_turned_down_and_unknown_without_any() -> None:
    got = difficulty_from_passes([0, 1, 4, 0], [4, 4, 4, 0])
    np.testing.assert_array_equal(got, [1.0, 0.75, 0.0, NAN])


@pytest.mark.parametrize(("passes", "samples"), [([5], [4]), ([-1], [4]), ([1, 2], [4])])
def test_passes_that_cannot_be_are_refused(passes: list[int], samples: list[int]) -> None:
    with pytest.raises(ValueError, match="passes"):
        difficulty_from_passes(passes, samples)


def test_ifd_is_what_is_left_of_the_answers_nll_once_the_prompt_is_known() -> None:
    got = instruction_following_difficulty([0.5, 3.0, 1.0, NAN], [2.0, 2.0, 0.0, 1.0])
    np.testing.assert_array_equal(got, [0.25, 1.5, NAN, NAN])


def test_rows_rank_by_ifd_then_by_nll_and_equal_ones_share() -> None:
    # IFD 0.5, 0.25, 0.5, 1, 0.5; of the three halves the first and last are equal in NLL too.
    got = difficulty_from_nll([1.0, 1.0, 2.0, 1.0, 1.0], [2.0, 4.0, 4.0, 1.0, 2.0])
    np.testing.assert_allclose(got, [0.375, 0.0, 0.75, 1.0, 0.375])


def test_a_single_row_is_in_the_middle_and_unknown_rows_take_no_rank() -> None:
    np.testing.assert_array_equal(difficulty_from_nll([1.0], [2.0]), [0.5])
    got = difficulty_from_nll([1.0, NAN, 3.0, 1.0], [2.0, 2.0, 3.0, 0.0])
    np.testing.assert_array_equal(got, [0.0, NAN, 1.0, NAN])
    assert len(difficulty_from_nll([], [])) == 0


@given(NLLS, st.randoms(use_true_random=False))
def test_ranks_keep_order_and_do_not_depend_on_the_rows_places(nll: np.ndarray, rng) -> None:
    got = difficulty_from_nll(nll, np.ones(len(nll)))
    assert ((got >= 0) & (got <= 1)).all()
    np.testing.assert_allclose(got.mean(), 0.5)
    np.testing.assert_array_equal(
        np.sign(nll[:, None] - nll[None, :]), np.sign(got[:, None] - got[None, :])
    )
    places = list(range(len(nll)))
    rng.shuffle(places)
    np.testing.assert_array_equal(difficulty_from_nll(nll[places], np.ones(len(nll))), got[places])


def test_likelihoods_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        difficulty_from_nll([-1.0], [1.0])
    with pytest.raises(ValueError, match="without"):
        difficulty_from_nll([1.0, 2.0], [1.0])


def test_bands_hold_their_lower_edge_whatever_the_floats_say() -> None:
    difficulty = difficulty_from_passes([10, 9, 7, 2, 1, 0], [10] * 6)
    assert difficulty[1] < 0.1
    names = difficulty_bands(np.append(difficulty, NAN), count=10)
    assert names == [
        "0.00-0.10", "0.10-0.20", "0.30-0.40", "0.80-0.90", "0.90-1.00", "0.90-1.00", "unknown",
    ]  # fmt: skip


def test_weights_are_gaussian_and_the_unknown_weigh_the_mean() -> None:
    got = preference_weights(np.array([0.5, 0.7, 0.1, NAN]), centre=0.5, width=0.2)
    known = [1.0, np.exp(-0.5), np.exp(-2.0)]
    np.testing.assert_allclose(got, [*known, np.mean(known)])
    np.testing.assert_array_equal(
        preference_weights(np.array([NAN, NAN]), centre=0.5, width=0.1), 1
    )


def test_the_draw_follows_the_preference() -> None:
    difficulty = np.array([0.0, 0.5, 1.0, NAN])
    weights = preference_weights(difficulty, centre=0.5, width=0.5)
    rows = [
        int(prefer(difficulty, count=1, centre=0.5, width=0.5, seed=seed)[0])
        for seed in range(4000)
    ]
    # 5 standard deviations of 4,000 draws.
    np.testing.assert_allclose(
        np.bincount(rows, minlength=4) / 4000, weights / weights.sum(), atol=0.04
    )


@given(
    arrays(np.float64, 12, elements=st.one_of(st.floats(0, 1), st.just(NAN))),
    st.integers(0, 12),
    st.integers(0, 9),
)
def test_a_preference_is_distinct_ascending_complete_and_the_same_again(
    difficulty: np.ndarray, count: int, seed: int
) -> None:
    # So narrow that most Gaussian weights would be 0 in floats, and yet every row can be drawn.
    rows = prefer(difficulty, count=count, centre=0.5, width=0.001, seed=seed)
    assert len(rows) == count
    assert (np.diff(rows) > 0).all()
    again = prefer(difficulty, count=count, centre=0.5, width=0.001, seed=seed)
    np.testing.assert_array_equal(rows, again)


def test_more_rows_than_there_are_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match="preference: 3 rows asked for, 2 with a weight"):
        prefer(np.array([0.1, 0.2]), count=3, centre=0.5, width=0.2, seed=0)
