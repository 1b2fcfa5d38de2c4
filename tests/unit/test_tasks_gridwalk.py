"""gridwalk: shortest ways, each as likely; right is what is a way and not too long."""

from collections import Counter
from math import comb
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.tasks import TASKS, Item
from tutelage.tasks.gridwalk import STEPS, distances, verify

OPPOSITE = {"U": "D", "D": "U", "L": "R", "R": "L"}


def items(count: int, **config: Any) -> list[Item]:
    task = TASKS["gridwalk"]
    return list(task.items(task.configure(config), seed=0, count=count))


def walked(item: Item) -> list[tuple[int, int]]:
    here, cells = tuple(item.meta["start"]), []
    for move in item.response:
        here = (here[0] + STEPS[move][0], here[1] + STEPS[move][1])
        cells.append(here)
    return cells


def cell(text: str) -> tuple[int, int]:
    return int(text[0]), int(text[1])


def meta(start: str, goal: str, *, walls: tuple[str, ...] = ()) -> dict[str, Any]:
    blocked = tuple(map(cell, walls))
    shortest = distances(cell(goal), size=7, walls=blocked)[cell(start)]
    return {
        "size": 7, "start": list(cell(start)), "goal": list(cell(goal)), "slack": 4,
        "walls": [list(wall) for wall in blocked], "shortest": shortest,
    }  # fmt: skip


def test_a_prompt_is_five_characters_and_names_start_and_goal() -> None:
    for item in items(50):
        (x, y), (u, v) = item.meta["start"], item.meta["goal"]
        assert item.prompt == f"{x}{y}>{u}{v}"


def test_gold_is_as_long_as_the_manhattan_distance_without_walls() -> None:
    for item in items(300):
        (x, y), (u, v) = item.meta["start"], item.meta["goal"]
        assert len(item.response) == item.meta["shortest"] == abs(x - u) + abs(y - v)


def test_the_chain_is_the_cell_after_each_move_and_ends_on_the_goal() -> None:
    for item in items(300, walls=6):
        assert item.thinking == " ".join(f"{x}{y}" for x, y in walked(item))
        assert list(walked(item)[-1]) == item.meta["goal"]


@pytest.mark.parametrize("span", [(1, 2), (5, 8), (12, 12)])
def test_distances_stay_in_their_range(span: tuple[int, int]) -> None:
    found = {item.meta["shortest"] for item in items(4, distance=span, copies=1)}
    assert min(found) >= span[0]
    assert max(found) <= span[1]


def test_every_shortest_way_is_as_likely() -> None:
    # 3 right and 2 down: C(5, 2) = 10 ways; 4,000 draws, standard error of a count 19
    found = items(4000, size=4, distance=[5, 5], fold=None, copies=4000)
    item = found[0]
    (x, y), (u, v) = item.meta["start"], item.meta["goal"]
    counts = Counter(one.response for one in found)
    assert len(counts) == comb(5, min(abs(x - u), abs(y - v))) == 10
    assert all(abs(count - 400) < 5 * 19 for count in counts.values())


def test_the_two_styles_change_row_or_column_first() -> None:
    for order, first in (("rows-first", "UD"), ("columns-first", "LR")):
        for item in items(200, order=order):
            kinds = [move in first for move in item.response]
            assert kinds == sorted(kinds, reverse=True)


def test_teachers_of_two_styles_are_asked_the_same() -> None:
    assert [i.prompt for i in items(99)] == [i.prompt for i in items(99, order="rows-first")]


def test_a_pair_keeps_its_fold_whatever_else_is_set() -> None:
    test = {item.prompt for item in items(150, fold=[0, 5], distance=[3, 12])}
    rest = [[1, 2, 3, 4], 5]
    train = {item.prompt[:5] for item in items(1500, fold=rest)}
    walled = {item.prompt[:5] for item in items(1500, fold=rest, walls=4, slack=0)}
    assert not test & (train | walled)


@pytest.mark.parametrize("walls", [0, 7])
def test_one_move_less_or_another_is_wrong_and_a_detour_is_right_up_to_the_slack(
    walls: int,
) -> None:
    for item in items(300, walls=walls, slack=2):
        moves = item.response
        there_and_back = moves[-1] and OPPOSITE[moves[-1]] + moves[-1]
        assert not verify(moves[:-1], item.meta)[0]
        assert not verify(moves[1:], item.meta)[0]
        assert not verify(moves + OPPOSITE[moves[-1]], item.meta)[0]
        assert not verify(moves[:-1] + OPPOSITE[moves[-1]], item.meta)[0]
        assert verify(moves + there_and_back, item.meta)[0]
        assert not verify(moves + 2 * there_and_back, item.meta)[0]


@pytest.mark.parametrize(
    ("moves", "reason"),
    [
        ("RR", "there in 2, shortest 2"),
        ("RLRR", "there in 4, shortest 2"),
        ("LRRR", "move 1 leaves the grid"),
        ("URDR", "move 1 leaves the grid"),
        ("R", "ends at 10, not 20"),
        ("RRR", "ends at 30, not 20"),
        ("RLRLRLRR", "more than 6 moves"),
        ("R R", "' ' is no move"),
        ("rr", "'r' is no move"),
        ("RR.", "'.' is no move"),
    ],
)
def test_a_verdict_says_why(moves: str, reason: str) -> None:
    assert verify(moves, meta("00", "20")) == (reason.startswith("there"), reason)


def test_a_wall_must_be_gone_around() -> None:
    asked = meta("00", "20", walls=("10",))
    assert asked["shortest"] == 4
    assert verify("RR", asked) == (False, "move 1 runs into a wall")
    assert verify("DRRU", asked)[0]


@settings(max_examples=200, deadline=None)
@given(st.text("UDLR", max_size=14), st.integers(0, 6), st.integers(0, 6))
def test_the_verdict_is_that_of_a_walk_on_foot(moves: str, x: int, y: int) -> None:
    steps, here, inside = [STEPS[move] for move in moves], (3, 3), True
    for dx, dy in steps:
        here = (here[0] + dx, here[1] + dy)
        inside = inside and max(map(abs, (here[0] - 3, here[1] - 3))) <= 3
    if (x, y) == (3, 3):
        return
    right = inside and here == (x, y) and len(moves) <= abs(x - 3) + abs(y - 3) + 4
    assert verify(moves, meta("33", f"{x}{y}"))[0] == right


def test_a_way_with_a_detour_is_two_moves_longer_and_still_right() -> None:
    made = items(400, detours=0.5, copies=4)
    longer = [len(item.response) - item.meta["shortest"] for item in made]
    assert set(longer) == {0, 2}
    assert 0.4 < longer.count(2) / len(longer) < 0.6
    assert all(verify(item.response, item.meta)[0] for item in made)


def test_detours_change_no_problem() -> None:
    assert [item.prompt for item in items(50)] == [item.prompt for item in items(50, detours=1.0)]
