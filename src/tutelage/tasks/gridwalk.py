"""Task `gridwalk`: walk from one cell of a grid to another, by U, D, L and R.

"31>56" asks for a way from column 3, row 1 to column 5, row 6, counted from 0 at the upper left;
"RRDDDDD" is one, and so is "DRDRDDD": most pairs have many shortest ways. A step in the wrong
direction can be repaired at the cost of two moves. "31>56#3242" has walls at (3, 2) and (4, 2).
"""

from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from tutelage.core.errors import DataError
from tutelage.recipe.base import Share
from tutelage.tasks.base import Item, LabTask, Problem, Range, TaskConfig, rising

Cell = tuple[int, int]
"""Column, row."""
STEPS: Mapping[str, Cell] = {"U": (0, -1), "D": (0, 1), "L": (-1, 0), "R": (1, 0)}
MOST_MAZES = 1000
"""Draws of walls until start and goal are joined."""


class GridwalkConfig(TaskConfig):
    """`fold` hashes size, start and goal, not the walls."""

    size: Annotated[int, Field(ge=2, le=10)] = 7
    """Cells a side; a coordinate is one digit."""
    distance: Range = (1, 18)
    """Least and most |dx| + |dy| of start and goal: without walls, the moves of a shortest way."""
    walls: Annotated[int, Field(ge=0)] = 0
    """Cells that cannot be entered."""
    slack: Annotated[int, Field(ge=0)] = 4
    """Moves beyond the shortest way that still count as right; 4 forgives two wrong moves."""
    order: Literal["random", "rows-first", "columns-first"] = "random"
    """Of the gold way: any shortest one, each as likely; or the one that changes its row (by U, D)
    or its column (by L, R) wherever it can."""

    detours: Share = 0.0
    """Share of gold ways with one wrong move in them, made good at once where no shorter way leads
    on: a teacher that learns from these knows what to do where a student went wrong."""

    @field_validator("distance")
    @classmethod
    def _from_one(cls, value: Range) -> Range:
        if value[1] < 1:
            raise ValueError("start and goal are different cells: a distance is at least 1")
        return rising(value)

    @model_validator(mode="after")
    def _fits(self) -> "GridwalkConfig":
        if self.distance[0] > 2 * (self.size - 1):
            raise ValueError(f"distance: the farthest cells are {2 * (self.size - 1)} apart")
        if self.walls > self.size**2 // 3:
            raise ValueError(f"walls: at most a third of the cells, {self.size**2 // 3}")
        return self


def draw(rng: np.random.Generator, config: GridwalkConfig) -> Problem:
    """Start and goal, each ordered pair in the range of distances as likely, and walls."""
    pairs = _pairs(config.size, config.distance)
    for _ in range(MOST_MAZES):
        start, goal = pairs[int(rng.integers(len(pairs)))]
        walls = _walls(rng, config, start, goal)
        if not walls or start in distances(goal, size=config.size, walls=walls):
            break
    else:
        raise DataError("task:gridwalk finds no way through so many walls: lower walls")
    asked = f"{_text(start)}>{_text(goal)}"
    prompt = asked + ("#" + "".join(map(_text, walls)) if walls else "")
    return Problem(f"gridwalk {config.size} {asked}", prompt, (start, goal, walls))


def solve(rng: np.random.Generator, problem: Problem, config: GridwalkConfig) -> Item:
    """A shortest way, and as the chain the cell after each move."""
    start, goal, walls = problem.content
    away = distances(goal, size=config.size, walls=walls)
    moves = _shortest(rng, start, away, config.order)
    if config.detours and rng.random() < config.detours:
        moves = _with_detour(rng, start, moves, away, config.order)
    cells, here = [], start
    for move in moves:
        here = _after(here, move)
        cells.append(_text(here))
    meta = {
        "size": config.size, "start": list(start), "goal": list(goal),
        "walls": [list(cell) for cell in walls], "shortest": away[start], "slack": config.slack,
    }  # fmt: skip
    return Item(problem.prompt, " ".join(cells), moves, moves, "", meta)


def verify(answer: str, meta: Mapping[str, Any]) -> tuple[bool, str]:
    """Ends on the goal, never off the grid or on a wall, at most `slack` moves too long."""
    moves = answer.strip()
    here, goal = tuple(meta["start"]), tuple(meta["goal"])
    walls = {tuple(cell) for cell in meta["walls"]}
    most = meta["shortest"] + meta["slack"]
    for number, move in enumerate(moves, 1):
        if move not in STEPS:
            return False, f"{move!r} is no move"
        if number > most:
            return False, f"more than {most} moves"
        here = _after(here, move)
        if not _inside(here, meta["size"]):
            return False, f"move {number} leaves the grid"
        if here in walls:
            return False, f"move {number} runs into a wall"
    if here != goal:
        return False, f"ends at {_text(here)}, not {_text(goal)}"
    return True, f"there in {len(moves)}, shortest {meta['shortest']}"


def distances(goal: Cell, *, size: int, walls: tuple[Cell, ...] = ()) -> dict[Cell, int]:
    """Moves of a shortest way to the goal, from each cell that has one."""
    found, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for move in STEPS:
            beside = _after(cell, move)
            if _inside(beside, size) and beside not in found and beside not in walls:
                found[beside] = found[cell] + 1
                queue.append(beside)
    return found


def _shortest(rng: np.random.Generator, start: Cell, away: Mapping[Cell, int], order: str) -> str:
    ways = _ways(away)
    moves, here = "", start
    while away[here]:
        nearer = [move for move in STEPS if away.get(_after(here, move)) == away[here] - 1]
        if order == "random":
            # In proportion to the ways that go on from there, so that each way is as likely.
            counts = [ways[_after(here, move)] for move in nearer]
            ticket = int(rng.integers(sum(counts)))
            move = nearer[int(np.searchsorted(np.cumsum(counts), ticket, side="right"))]
        else:
            wanted = "UD" if order == "rows-first" else "LR"
            move = next((move for move in nearer if move in wanted), nearer[0])
        moves += move
        here = _after(here, move)
    return moves


def _with_detour(
    rng: np.random.Generator, start: Cell, moves: str, away: Mapping[Cell, int], order: str
) -> str:
    """The way up to some move, a move that leads away from the goal, and a shortest way on."""
    keep = int(rng.integers(len(moves)))
    here = start
    for move in moves[:keep]:
        here = _after(here, move)
    wrong = [move for move in STEPS if away.get(_after(here, move), 0) == away[here] + 1]
    if not wrong:  # no such move stays on the grid
        return moves
    move = wrong[int(rng.integers(len(wrong)))]
    return moves[:keep] + move + _shortest(rng, _after(here, move), away, order)


def _ways(away: Mapping[Cell, int]) -> dict[Cell, int]:
    """How many shortest ways lead from each cell to the goal."""
    ways: dict[Cell, int] = {}
    for cell, moves in away.items():  # nearest first, as `distances` finds them
        around = [_after(cell, move) for move in STEPS]
        ways[cell] = (
            sum(ways[other] for other in around if away.get(other) == moves - 1) if moves else 1
        )
    return ways


@lru_cache(maxsize=64)
def _pairs(size: int, distance: Range) -> tuple[tuple[Cell, Cell], ...]:
    cells = [(x, y) for x in range(size) for y in range(size)]
    low, high = max(distance[0], 1), distance[1]
    return tuple(
        (start, goal)
        for start in cells
        for goal in cells
        if low <= abs(start[0] - goal[0]) + abs(start[1] - goal[1]) <= high
    )


def _walls(
    rng: np.random.Generator, config: GridwalkConfig, start: Cell, goal: Cell
) -> tuple[Cell, ...]:
    if not config.walls:
        return ()
    size = config.size
    free = [(x, y) for x in range(size) for y in range(size) if (x, y) not in (start, goal)]
    chosen = rng.choice(len(free), size=config.walls, replace=False)
    return tuple(sorted(free[int(index)] for index in chosen))


def _after(cell: Any, move: str) -> Cell:
    dx, dy = STEPS[move]
    return cell[0] + dx, cell[1] + dy


def _inside(cell: Cell, size: int) -> bool:
    return 0 <= cell[0] < size and 0 <= cell[1] < size


def _text(cell: Any) -> str:
    return f"{cell[0]}{cell[1]}"


GRIDWALK = LabTask("gridwalk", 1, GridwalkConfig, draw, solve, verify)
