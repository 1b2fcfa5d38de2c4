"""Packing and order: nothing lost, nothing twice, and every target where the model sees it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.train.batches import (
    Example,
    epoch_order,
    mixed_order,
    pack,
    plan_steps,
    position_budget,
)


def example(*ids: int, targets: tuple[int, ...]) -> Example:
    mask = np.zeros(len(ids), bool)
    mask[list(targets)] = True
    return Example(np.array(ids, np.int32), mask)


def test_a_packed_row_keeps_ids_restarts_positions_and_points_one_before_each_target() -> None:
    row = pack(
        [
            example(10, 11, 12, targets=(2,)),
            example(20, 21, targets=(1,)),
            example(30, 31, 32, 33, targets=(1, 3)),
        ],
        [7, 5, 6],
    )
    assert row.ids_T.tolist() == [10, 11, 12, 20, 21, 30, 31, 32, 33]
    assert row.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert row.labels_N.tolist() == [12, 21, 31, 33]
    assert row.source_N.tolist() == [1, 3, 5, 7]
    assert row.examples == (7, 5, 6)
    assert row.counts == (1, 1, 2)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=6))
def test_every_target_is_predicted_from_the_token_before_it_in_its_own_example(
    masks: list[list[bool]],
) -> None:
    examples = [
        Example(np.arange(len(m), dtype=np.int32) + 100 * i, np.array([False, *m[1:]]))
        for i, m in enumerate(masks)
    ]
    row = pack(examples, range(len(examples)))
    wanted = [int(i) for e in examples for i in e.ids_L[e.mask_L]]
    assert row.labels_N.tolist() == wanted
    assert row.ids_T[row.source_N].tolist() == [label - 1 for label in wanted]
    assert (row.positions_T[row.source_N] + 1 == row.labels_N % 100).all()
    assert sum(row.counts) == len(wanted)


def test_a_first_token_that_is_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="first token"):
        pack([example(1, 2, targets=(1,)), example(3, 4, targets=(0,))], [0, 1])


def test_an_order_follows_from_seed_and_epoch_alone() -> None:
    order = epoch_order(100, seed=3, epoch=1)
    assert sorted(order) == list(range(100))
    assert (order == epoch_order(100, seed=3, epoch=1)).all()
    for seed, epoch in ((3, 0), (3, 2), (1, 3), (4, 1)):
        assert (order != epoch_order(100, seed=seed, epoch=epoch)).any()


def test_the_order_is_pinned_so_that_old_results_can_be_made_again() -> None:
    # numpy may change its streams in a new version; then the training stages' versions must rise.
    assert epoch_order(8, seed=17, epoch=0).tolist() == [7, 6, 4, 2, 1, 5, 0, 3]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(8, 50), st.integers(1, 120), st.integers(0, 99),
)  # fmt: skip
def test_an_epoch_has_every_example_once_in_rows_that_fit_and_steps_that_are_full(
    lengths: list[int], pack_tokens: int, batch_tokens: int, seed: int
) -> None:
    order = epoch_order(len(lengths), seed=seed, epoch=0)
    steps = plan_steps(lengths, order, pack_tokens=pack_tokens, batch_tokens=batch_tokens)
    cut = [min(length, pack_tokens) for length in lengths]
    rows = [row for step in steps for row in step]
    assert list(itertools.chain.from_iterable(rows)) == order.tolist()
    assert all(rows)
    assert all(sum(cut[i] for i in row) <= pack_tokens for row in rows)
    for row, after in itertools.pairwise(rows):  # a row ends only where the next does not fit
        assert sum(cut[i] for i in row) + cut[after[0]] > pack_tokens
    sizes = [[sum(cut[i] for i in row) for row in step] for step in steps]
    for size in sizes[:-1]:
        assert sum(size) >= batch_tokens
    for size in sizes:
        assert sum(size[:-1]) < batch_tokens  # no row more than the step needed


def test_rows_and_steps_of_a_small_case() -> None:
    steps = plan_steps([3, 3, 3, 9, 1], np.arange(5), pack_tokens=6, batch_tokens=7)
    assert steps == [[[0, 1], [2]], [[3], [4]]]


def test_a_mixture_sees_the_first_source_once_and_the_others_in_their_share() -> None:
    order = mixed_order([80, 1000], [0.8, 0.2], seed=1, epoch=0)
    seen = Counter(int(i) for i in order)
    assert len(order) == 100
    assert all(seen[i] == 1 for i in range(80))
    replay = [i for i in seen if i >= 80]
    assert len(replay) == 20
    assert max(replay) < 1080


def test_a_short_source_is_repeated_evenly_to_keep_its_share() -> None:
    order = mixed_order([60, 7], [3.0, 1.0], seed=1, epoch=0)
    seen = Counter(int(i) for i in order)
    assert len(order) == 80
    assert {seen[i] for i in range(60, 67)} == {2, 3}  # 20 = 2 * 7 + 6


def test_a_mixture_is_mixed_and_another_epoch_draws_other_replay() -> None:
    first = mixed_order([100, 1000], [0.5, 0.5], seed=1, epoch=0)
    second = mixed_order([100, 1000], [0.5, 0.5], seed=1, epoch=1)
    assert (first == mixed_order([100, 1000], [0.5, 0.5], seed=1, epoch=0)).all()
    assert 30 < (first[:100] < 100).sum() < 70  # 4 standard deviations of a hypergeometric draw
    assert {i for i in first if i >= 100} != {i for i in second if i >= 100}


def test_the_position_budget_keeps_the_first_tokens_of_an_answer() -> None:
    assert position_budget(10) == 10
    assert position_budget(10, first_tokens=2) == 2
    assert [position_budget(length, first_share=0.3) for length in (10, 3, 1, 0)] == [3, 1, 1, 0]
    assert position_budget(10, first_tokens=2, first_share=0.3) == 2
    assert position_budget(3, first_tokens=2, first_share=0.3) == 1
    assert position_budget(30, first_share=0.1) == 3


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=60),
    st.integers(8, 50), st.integers(1, 25), st.integers(0, 99),
)  # fmt: skip
def test_steps_counted_in_examples_have_every_example_once_and_equally_many(
    lengths: list[int], pack_tokens: int, batch_examples: int, seed: int
) -> None:
    order = epoch_order(len(lengths), seed=seed, epoch=0)
    steps = plan_steps(
        lengths, order, pack_tokens=pack_tokens, batch_tokens=1, batch_examples=batch_examples
    )
    flat = [list(itertools.chain.from_iterable(step)) for step in steps]
    assert list(itertools.chain.from_iterable(flat)) == order.tolist()
    assert {len(step) for step in flat[:-1]} <= {batch_examples}
    assert 1 <= len(flat[-1]) <= batch_examples
    cut = [min(length, pack_tokens) for length in lengths]
    for step in steps:
        sizes = [sum(cut[i] for i in row) for row in step]
        assert all(0 < size <= pack_tokens for size in sizes)
        for size, after in zip(sizes, step[1:], strict=False):  # ends where the next does not fit
            assert size + cut[after[0]] > pack_tokens


def test_a_row_never_holds_examples_of_two_steps() -> None:
    steps = plan_steps(
        [1, 1, 1, 9, 1], np.arange(5), pack_tokens=9, batch_tokens=7, batch_examples=2
    )
    assert steps == [[[0, 1]], [[2], [3]], [[4]]]


def test_two_lengths_of_answers_take_equally_many_steps_when_counted_in_examples() -> None:
    order = epoch_order(40, seed=1, epoch=0)
    short, long = (
        plan_steps([length] * 40, order, pack_tokens=64, batch_tokens=64, batch_examples=8)
        for length in (3, 50)
    )
    assert len(short) == len(long) == 5
    for one, other in zip(short, long, strict=True):
        assert sorted(itertools.chain(*one)) == sorted(itertools.chain(*other))
