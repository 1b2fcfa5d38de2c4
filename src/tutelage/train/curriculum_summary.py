"""What a curriculum's plan comes to: by stage and mode, and over the course of training.

Counts row numbers that `curriculum.py` planned; knows no text, no batch and no torch. What is kept
of it, `curriculum.json`, is written here.

Legend: N rows, E examples in training order, W windows, S optimizer steps.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tutelage.train.curriculum import Plan, coded

WINDOWS = 40
"""Points of a series: a line a reader can follow, whatever the number of examples."""


@dataclass(frozen=True)
class Part:
    """What a plan takes of one mode in one stage."""

    stage: int
    """From 0."""
    mode: str
    examples: int
    rows: int
    """Different rows among the examples: what the stage covers."""
    tokens: int


@dataclass(frozen=True)
class Series:
    """The course of a plan, a value for each of W windows of examples."""

    end_W: np.ndarray
    """int64, the number of examples met by the window's end."""
    shares: dict[str, np.ndarray]
    """Mode to float64 [W], its share of the window's examples."""
    difficulty_W: np.ndarray
    """float64, the mean over the window's rows of known difficulty; NaN where there are none."""


def summary(plan: Plan, *, modes_N: Sequence[str], tokens_N: np.ndarray) -> list[Part]:
    """Examples, different rows and tokens by stage and mode, as met; parts of none are left out."""
    names, mode_N = coded(modes_N)
    mode_E = mode_N[plan.order_E]
    parts = []
    for stage in range(int(plan.stage_E.max(initial=-1)) + 1):
        for code, mode in enumerate(names):
            rows = plan.order_E[(plan.stage_E == stage) & (mode_E == code)]
            tokens = int(np.asarray(tokens_N)[rows].sum())
            parts.append(Part(stage, mode, len(rows), len(np.unique(rows)), tokens))
    return [part for part in parts if part.examples]


def series(plan: Plan, *, modes_N: Sequence[str], difficulty_N: np.ndarray, windows: int) -> Series:
    """Mode shares and mean difficulty in `windows` equal windows, or as many as there are examples.

    Raises ValueError for a plan of no example.
    """
    examples = len(plan.order_E)
    if not examples:
        raise ValueError("a plan of no example has no course")
    windows = min(windows, examples)
    edges = np.arange(windows + 1) * examples // windows
    names, mode_N = coded(modes_N)
    mode_E = mode_N[plan.order_E]
    difficulty_E = np.asarray(difficulty_N, np.float64)[plan.order_E]
    known_E = ~np.isnan(difficulty_E)
    known_W = np.add.reduceat(known_E.astype(np.int64), edges[:-1])
    totals_W = np.add.reduceat(np.where(known_E, difficulty_E, 0.0), edges[:-1])
    means_W = np.divide(totals_W, known_W, out=np.full(windows, np.nan), where=known_W > 0)
    shares = {
        mode: np.add.reduceat((mode_E == code).astype(np.float64), edges[:-1]) / np.diff(edges)
        for code, mode in enumerate(names)
    }
    return Series(edges[1:], shares, means_W)


def example_shares(parts: Sequence[Part]) -> dict[str, float]:
    """The modes' shares of all examples."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts[part.mode] += part.examples
    return {mode: counts[mode] / counts.total() for mode in sorted(counts)}


def record(parts: Sequence[Part], course: Series, *, examples_S: Sequence[int]) -> dict[str, Any]:
    """Both as JSON, stages from 1 as in `metrics.jsonl`; `examples_S` are each step's examples.

    A window's `step` is the optimizer step that met its last example; a difficulty nobody knows is
    null.
    """
    step_W = np.searchsorted(np.cumsum(examples_S), course.end_W) + 1
    return {
        "parts": [asdict(part) | {"stage": part.stage + 1} for part in parts],
        "series": {
            "examples": course.end_W.tolist(),
            "step": step_W.tolist(),
            "shares": {mode: share.round(6).tolist() for mode, share in course.shares.items()},
            "difficulty": [
                None if np.isnan(mean) else round(mean, 6) for mean in course.difficulty_W.tolist()
            ],
        },
    }
