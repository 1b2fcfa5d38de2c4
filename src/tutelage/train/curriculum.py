"""In which order training meets its examples: stages, their mixtures of modes, easy before hard.

Plans row numbers only; knows no text, no batch and no torch, so `tutelage plan` can use it. All is
decided by the arguments and the seed, before the first step. Errors name a stage as the recipe's
reader does, from 0: `curriculum.0.mix`.

Legend: N rows, E examples in training order (a row can be many examples), M the modes.
Sources: arXiv 2509.26497 (the paper's two stages), 1904.03626 (pacing).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutelage.core.errors import RecipeError
from tutelage.recipe.base import Mode
from tutelage.recipe.training import CurriculumStage

Pacing = Literal["linear", "root", "step"]

BANDS = 10
"""Equal parts of a mode's rows by difficulty: the grain of pacing, and what is shuffled within."""
STEP_AT = 0.5
"""Progress of a stage at which `step` pacing lets everything in."""
ROUNDING = 1e-6
"""What shares of bands may be off by the way they were computed."""


@dataclass(frozen=True)
class Plan:
    """What each training example is, in order."""

    order_E: np.ndarray
    """int64, the row."""
    stage_E: np.ndarray
    """int8, the stage's number from 0."""

    def first(self, count: int) -> "Plan":
        """Its first examples: what was met where training ends early."""
        return Plan(self.order_E[:count], self.stage_E[:count])


PAPER = (
    CurriculumStage(mix={"reasoning": 1}, share=0.75),
    CurriculumStage(mix={"fast": 1}, share=0.25),
)
"""The paper's strict order, at its three reasoning examples to one fast."""

DEFAULT = (
    CurriculumStage(mix={"reasoning": 3, "fast": 1}, share=0.8),
    CurriculumStage(mix={"fast": 1}, share=0.2, lr_scale=0.5, replay=0.2, ramp=0.25),
)
"""A mixture, then mostly fast. On chains of sums, ten seeds (`docs/lab.md`), it gives 48 % right in
fast mode and 94 % in reasoning mode; the mixture alone 45 and 95, the strict order 32 and 4: an
abrupt switch forgets, and it is replay that prevents it, not a lower rate. Rate and ramp are
not tuned."""


def plan_order(
    stages: Sequence[CurriculumStage],
    *,
    modes_N: Sequence[str],
    difficulty_N: np.ndarray,
    examples: int,
    seed: int,
) -> Plan:
    """Which row each of `examples` training examples is.

    Modes are spread evenly by their mixture (`interleave`). Inside a stage and mode, each pass goes
    through all rows that can be drawn before one comes again. In `random` order a pass is a
    shuffle. In `easy-first` it goes through `BANDS` bands from easy to hard, shuffled anew within
    each, as far as `available_share` lets it; a band that opens comes at once, then the pass goes
    on, so that no row repeats while one that can be drawn is unmet. Within a band (in `random`
    order: altogether) rows met least in earlier stages come first. NaN counts as the median of the
    mode's known difficulties.

    Raises RecipeError as `mode_shares`, and for a mode without rows, an easy-first stage over rows
    of no known difficulty, and a stage that comes to no example.
    """
    known, mode_N = coded(modes_N)
    rows_of = {mode: np.flatnonzero(mode_N == code) for code, mode in enumerate(known)}
    _check_rows(stages, rows_of, difficulty_N)
    edges = _edges(stages, examples)
    order_E = np.empty(examples, np.int64)
    uses_N = np.zeros(len(mode_N), np.int64)
    for number, stage in enumerate(stages):
        part = slice(edges[number], edges[number + 1])
        names, mix_EM = _mixture(stages, number, examples=part.stop - part.start)
        mode_E = interleave(mix_EM)
        for column, mode in enumerate(names):
            places = np.flatnonzero(mode_E == column)
            rows = rows_of[mode]
            rng = np.random.default_rng([seed, number, int.from_bytes(mode.encode(), "big")])
            progress = places / len(mode_E)
            chosen = _draw(stage, difficulty_N[rows], uses_N[rows], progress=progress, rng=rng)
            order_E[part.start + places] = rows[chosen]
        uses_N += np.bincount(order_E[part], minlength=len(uses_N))
    return Plan(order_E, np.repeat(np.arange(len(stages), dtype=np.int8), np.diff(edges)))


def mode_shares(stages: Sequence[CurriculumStage]) -> list[dict[str, float]]:
    """Each stage's shares of the modes in its examples, ramp and replay included; no row is needed.

    A ramp over the share r of a stage that grows from the mixture a to b: b + (a - b) r / 2.
    Raises RecipeError for a mix without weight, and for a first stage with replay or ramp.
    """
    shares = []
    for number, stage in enumerate(stages):
        before = _settled(stages, number - 1) if stage.ramp else {}
        after, of_before = _settled(stages, number), stage.ramp / 2
        mean = {
            mode: (1 - of_before) * after.get(mode, 0.0) + of_before * before.get(mode, 0.0)
            for mode in sorted({**before, **after})
        }
        shares.append({mode: share for mode, share in mean.items() if share})
    return shares


def available_share(progress: np.ndarray, *, pacing: Pacing, start: float) -> np.ndarray:
    """The share of a mode's easiest rows that can be drawn, at a stage's progress t in [0, 1].

    With s = start: `linear` s + (1 - s) t; `root` sqrt(s^2 + (1 - s^2) t), which lets rows in ever
    more slowly, as there are more to learn; `step` s before t = STEP_AT, then 1. It never falls,
    and is 1 at t = 1.
    Sources: arXiv 1904.03626 (step), 1903.09848 (linear, root).
    """
    if pacing == "linear":
        return start + (1 - start) * progress
    if pacing == "root":
        return np.sqrt(start**2 + (1 - start**2) * progress)
    return np.where(progress < STEP_AT, start, 1.0)


def interleave(mix_EM: np.ndarray) -> np.ndarray:
    """The mode's column at each place, so that counts follow the mixture [E, M] everywhere.

    The i-th example of a mode is due where its summed share passes i + 1/2; all are sorted by when
    they are due. Until any place a mode's count is within M / 2 + 1 of its summed share, where
    independent draws would be off by the square root of the count.
    """
    summed_EM = np.cumsum(mix_EM, axis=0)
    examples, num_modes = mix_EM.shape
    if not examples:
        return np.empty(0, np.int64)
    counts = _apportion(mix_EM.sum(axis=0))
    places = np.arange(1, examples + 1)
    due = [
        np.interp(np.arange(counts[mode]) + 0.5, summed_EM[:, mode], places)
        for mode in range(num_modes)
    ]
    columns = np.repeat(np.arange(num_modes), counts)
    return columns[np.argsort(np.concatenate(due), kind="stable")]


def coded(modes_N: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The modes there are, in order of name, and each row's number among them."""
    names = sorted(set(modes_N))
    codes = {mode: code for code, mode in enumerate(names)}
    return names, np.array([codes[mode] for mode in modes_N], np.int64)


def _check_rows(
    stages: Sequence[CurriculumStage],
    rows_of: Mapping[str, np.ndarray],
    difficulty_N: np.ndarray,
) -> None:
    for number, shares in enumerate(mode_shares(stages)):
        for mode in shares:
            if mode not in rows_of:
                raise RecipeError(
                    f"curriculum.{number}.mix: no row of data has the mode {mode!r}, only "
                    f"{', '.join(rows_of)}; add a step with such rows, or leave the mode out"
                )
            easy_first = stages[number].order == "easy-first"
            if easy_first and np.isnan(difficulty_N[rows_of[mode]]).all():
                raise RecipeError(
                    f"curriculum.{number}.order: easy-first, but no {mode} row of data has a "
                    "difficulty; put a difficulty step before, or set order = random"
                )


def _edges(stages: Sequence[CurriculumStage], examples: int) -> np.ndarray:
    """Where stages begin and end: S + 1 example numbers."""
    ends = np.rint(np.cumsum([stage.share for stage in stages]) * examples).astype(np.int64)
    ends[-1] = examples
    edges = np.concatenate([[0], ends])
    if empty := np.flatnonzero(np.diff(edges) == 0).tolist():
        raise RecipeError(
            f"curriculum.{empty[0]}.share: {stages[empty[0]].share:g} of {examples} examples is "
            "not one; raise it, or epochs"
        )
    return edges


def _mixture(
    stages: Sequence[CurriculumStage], number: int, *, examples: int
) -> tuple[list[str], np.ndarray]:
    """The modes stage `number` draws from, and their shares at each of its examples [E, M]."""
    before = _settled(stages, number - 1) if stages[number].ramp else {}
    after = _settled(stages, number)
    names = sorted(mode for mode in {**before, **after} if before.get(mode) or after.get(mode))
    target_M = np.array([after.get(mode, 0.0) for mode in names])
    if not before:
        return names, np.tile(target_M, (examples, 1))
    from_M = np.array([before.get(mode, 0.0) for mode in names])
    progress_E = (np.arange(examples) + 0.5) / (examples * stages[number].ramp)
    weight_E1 = np.minimum(progress_E, 1.0)[:, None]
    return names, from_M + (target_M - from_M) * weight_E1


def _settled(stages: Sequence[CurriculumStage], number: int) -> dict[str, float]:
    """Mode shares of stage `number` once its ramp is over: its own mix, and its replay."""
    stage = stages[number]
    shares = {mode: (1 - stage.replay) * share for mode, share in _shares(stage.mix).items()}
    earlier = sum(past.share for past in stages[:number])
    for past in stages[:number] if stage.replay else ():
        for mode, share in _shares(past.mix).items():
            shares[mode] = shares.get(mode, 0.0) + stage.replay * past.share / earlier * share
    return shares


def _shares(mix: Mapping[Mode, float]) -> dict[str, float]:
    total = sum(mix.values())
    return {str(mode): weight / total for mode, weight in mix.items()}


def _apportion(shares_M: np.ndarray) -> np.ndarray:
    """Whole counts that sum to the rounded total, each within 1: largest remainder, then first."""
    counts = np.floor(shares_M).astype(np.int64)
    missing = int(np.rint(shares_M.sum())) - int(counts.sum())
    counts[np.argsort(counts - shares_M, kind="stable")[:missing]] += 1
    return counts


def _draw(
    stage: CurriculumStage,
    difficulty_n: np.ndarray,
    uses_n: np.ndarray,
    *,
    progress: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Rows (of the n of one mode) for each place of a stage, of which `progress` is behind it."""
    n, num_draws = len(difficulty_n), len(progress)
    if stage.order == "random":
        band_n, limits = np.zeros(n, np.int64), np.full(num_draws, n)
    else:
        band_n = _bands(difficulty_n, rng)
        shares = available_share(progress, pacing=stage.pacing, start=stage.start)
        # Whole bands, so that a shuffle within one never draws a row before it is let in.
        opened = np.ceil(shares * BANDS - ROUNDING).astype(np.int64)
        limits = -(-opened * n // BANDS)
    drawn = [np.empty(0, np.int64)]
    queue, open_rows = drawn[0], 0
    for limit, left in zip(*np.unique(limits, return_counts=True), strict=True):
        opening = np.lexsort((rng.random(n), uses_n, band_n))[open_rows:limit]
        queue, open_rows = np.concatenate([opening, queue]), limit
        while left:
            if not len(queue):
                queue = np.lexsort((rng.random(n), uses_n, band_n))[:limit]
            drawn.append(queue[:left])
            queue = queue[left:]
            left -= len(drawn[-1])
    return np.concatenate(drawn)


def _bands(difficulty_n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The band of each row by its rank in difficulty, 0 the easiest; ties are broken by lot."""
    known_n = np.where(np.isnan(difficulty_n), np.nanmedian(difficulty_n), difficulty_n)
    ranks_n = np.empty(len(known_n), np.int64)
    ranks_n[np.lexsort((rng.random(len(known_n)), known_n))] = np.arange(len(known_n))
    return ranks_n * BANDS // len(known_n)
