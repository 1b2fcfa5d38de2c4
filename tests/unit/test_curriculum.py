"""A plan gives every stage its mixture, every row its turn, and easy rows theirs first."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from handmade import MIXTURE_THEN_FAST
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.errors import RecipeError
from tutelage.recipe.base import Mode
from tutelage.recipe.training import CurriculumStage, Sft
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.train.curriculum import (
    BANDS,
    DEFAULT,
    PAPER,
    Pacing,
    Plan,
    available_share,
    interleave,
    mode_shares,
    plan_order,
)
from tutelage.train.curriculum_forecast import ANY_MODE, Text, forecast, sampled_texts
from tutelage.train.curriculum_summary import Part, example_shares, record, series, summary

NAN = float("nan")
MODES: tuple[Mode, ...] = get_args(Mode)
PAPER_TOML = """
[[curriculum]]
mix = { reasoning = 1 }
share = 0.75
[[curriculum]]
mix = { fast = 1 }
share = 0.25
"""
DEFAULT_TOML = f"""{MIXTURE_THEN_FAST}
replay = 0.2
ramp = 0.25
"""
PACINGS = get_args(Pacing)


@st.composite
def curricula(draw: st.DrawFn) -> tuple[CurriculumStage, ...]:
    parts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    weight = st.integers(0, 5).map(float)
    weights = st.dictionaries(st.sampled_from(MODES), weight, min_size=1)
    return tuple(
        CurriculumStage(
            mix=draw(weights.filter(_has_weight)),
            share=part / sum(parts),
            replay=draw(st.integers(0, 9)) / 10 if number else 0.0,
            ramp=draw(st.integers(0, 10)) / 10 if number else 0.0,
            order=draw(st.sampled_from(["random", "easy-first"])),
            pacing=draw(st.sampled_from(PACINGS)),
            start=draw(st.integers(1, 20)) / 20,
        )
        for number, part in enumerate(parts)
    )


def _has_weight(mix: dict[Mode, float]) -> bool:
    return sum(mix.values()) > 0


def rows_of(sizes: dict[str, int], *, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Modes in mixed order, and difficulties of which each seventh is unknown."""
    rng = np.random.default_rng(seed)
    modes = [mode for mode, size in sizes.items() for _ in range(size)]
    rng.shuffle(modes)
    difficulty = rng.random(len(modes)).round(1)
    difficulty[::7] = NAN
    return modes, difficulty


def plan_of(stages, modes: list[str], difficulty: np.ndarray, *, examples: int, seed=0) -> Plan:
    return plan_order(stages, modes_N=modes, difficulty_N=difficulty, examples=examples, seed=seed)


def easy_first(**options) -> tuple[CurriculumStage]:
    return (CurriculumStage(mix={"fast": 1}, share=1, order="easy-first", **options),)


@settings(max_examples=40, deadline=None)
@given(curricula(), st.integers(20, 400), st.integers(0, 3))
def test_any_curriculum_plans_every_example_the_same_way_again(
    stages: tuple[CurriculumStage, ...], examples: int, seed: int
) -> None:
    modes, difficulty = rows_of({"fast": 11, "reasoning": 23})
    plan = plan_of(stages, modes, difficulty, examples=examples, seed=seed)
    again = plan_of(stages, modes, difficulty, examples=examples, seed=seed)
    for got, same in zip(vars(plan).values(), vars(again).values(), strict=True):
        assert len(got) == examples
        np.testing.assert_array_equal(got, same)
    assert (np.diff(plan.stage_E) >= 0).all()
    for number, stage in enumerate(stages):
        assert abs((plan.stage_E == number).sum() - stage.share * examples) <= 1


@settings(max_examples=40, deadline=None)
@given(curricula(), st.integers(20, 400))
def test_in_random_order_no_row_of_a_stage_is_two_turns_ahead_of_another(
    stages: tuple[CurriculumStage, ...], examples: int
) -> None:
    modes, difficulty = rows_of({"fast": 11, "reasoning": 23})
    plan = plan_of(stages, modes, difficulty, examples=examples)
    for number, stage in enumerate(stages):
        if stage.order == "easy-first":
            continue
        turns = np.bincount(plan.order_E[plan.stage_E == number], minlength=len(modes))
        for mode in set(modes):
            of_mode = turns[[name == mode for name in modes]]
            assert of_mode.max() - of_mode.min() <= 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from(PACINGS), st.floats(0.01, 1),
    st.integers(0, 9),
)  # fmt: skip
def test_easy_first_draws_only_what_is_open_and_repeats_only_when_all_of_it_was_met(
    n: int, examples: int, pacing: Pacing, start: float, seed: int
) -> None:
    # Difficulties of their own, so that the bands are known: rows 0, 1, 2 ... from easy to hard.
    difficulty = np.arange(n) / n
    plan = plan_of(
        easy_first(pacing=pacing, start=start), ["fast"] * n, difficulty,
        examples=examples, seed=seed,
    )  # fmt: skip
    shares = available_share(np.arange(examples) / examples, pacing=pacing, start=start)
    met: set[int] = set()
    for row, share in zip(plan.order_E.tolist(), shares, strict=True):
        # Whole bands are open: the share, rounded up to a band, and by that to a row.
        opened = np.ceil(np.ceil(share * BANDS - 1e-6) * n / BANDS - 1e-9)
        assert row < opened
        assert row not in met or len(met) == opened
        met.add(row)


def test_an_easy_first_epoch_climbs_by_bands_and_is_shuffled_within_them_each_time() -> None:
    n = 100
    stages = easy_first(pacing="step", start=1.0)
    modes, difficulty = ["fast"] * n, np.arange(n)[::-1] / n
    epochs = plan_of(stages, modes, difficulty, examples=3 * n).order_E.reshape(3, n)
    for epoch in epochs:
        bands = (difficulty[epoch] * BANDS + 1e-9).astype(int)
        np.testing.assert_array_equal(bands, np.arange(n) // BANDS)
    assert (epochs[0] != epochs[1]).mean() > 0.8
    assert (epochs[1] != epochs[2]).mean() > 0.8


def test_pacing_begins_anew_in_every_stage() -> None:
    step = CurriculumStage(mix={"fast": 1}, share=0.5, order="easy-first", pacing="step")
    plan = plan_of((step, step), ["fast"] * 10, np.arange(10.0), examples=80)
    for half in plan.order_E.reshape(2, 40):
        assert set(half[:20].tolist()) == {0, 1}
        assert set(half[20:].tolist()) == set(range(10))


def test_one_epoch_of_easy_first_meets_every_row_once_whatever_the_start() -> None:
    for pacing in ("linear", "root"):
        plan = plan_of(easy_first(pacing=pacing), ["fast"] * 200, np.arange(200.0), examples=200)
        assert sorted(plan.order_E.tolist()) == list(range(200))


def test_unknown_difficulty_counts_as_the_median() -> None:
    difficulty = np.array([0.1] * 45 + [NAN] * 10 + [0.5] + [0.9] * 45)
    plan = plan_of(easy_first(pacing="step", start=1.0), ["fast"] * 101, difficulty, examples=101)
    places = np.flatnonzero((plan.order_E >= 45) & (plan.order_E < 55))
    assert 40 <= places.min() < places.max() <= 60


def test_a_later_stage_begins_with_the_rows_that_earlier_ones_did_not_reach() -> None:
    stages = tuple(CurriculumStage(mix={"fast": 1}, share=0.5) for _ in range(2))
    plan = plan_of(stages, ["fast"] * 100, np.full(100, NAN), examples=100)
    assert sorted(plan.order_E.tolist()) == list(range(100))


@pytest.mark.parametrize("pacing", PACINGS)
@given(start=st.floats(0.01, 1))
def test_pacing_begins_at_its_start_never_falls_and_ends_with_all(
    pacing: Pacing, start: float
) -> None:
    shares = available_share(np.linspace(0, 1, 101), pacing=pacing, start=start)
    assert shares[0] == pytest.approx(start)
    assert (np.diff(shares) >= 0).all()
    assert shares[-1] == pytest.approx(1)
    assert (shares <= 1 + 1e-12).all()


def test_pacing_functions_have_their_closed_forms() -> None:
    half = np.array([0.5])
    assert available_share(half, pacing="linear", start=0.2) == pytest.approx(0.6)
    assert available_share(half, pacing="root", start=0.2) == pytest.approx(np.sqrt(0.52))
    assert available_share(half - 1e-9, pacing="step", start=0.2) == 0.2
    assert available_share(half, pacing="step", start=0.2) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 5), st.integers(0, 99))
def test_mode_counts_follow_a_moving_mixture_everywhere(
    examples: int, num_modes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.dirichlet(np.full(num_modes, 0.3), size=2)
    mix = before + (after - before) * np.linspace(0, 1, examples)[:, None]
    columns = interleave(mix)
    assert len(columns) == examples
    off = np.eye(num_modes)[columns].cumsum(0) - mix.cumsum(0)
    assert (np.abs(off) <= num_modes / 2 + 1).all()


def test_three_to_one_is_three_to_one_in_every_window_of_four() -> None:
    columns = interleave(np.tile([0.25, 0.75], (400, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(columns, 4)
    assert (windows.sum(1) == 3).all()


def test_the_papers_order_is_strict_and_the_default_replays_and_ramps() -> None:
    modes, difficulty = rows_of({"fast": 500, "reasoning": 500})
    tokens = np.full(1000, 2)
    paper = plan_of(PAPER, modes, difficulty, examples=400)
    assert summary(paper, modes_N=modes, tokens_N=tokens) == [
        Part(0, "reasoning", 300, 300, 600), Part(1, "fast", 100, 100, 200),
    ]  # fmt: skip
    default = plan_of(DEFAULT, modes, difficulty, examples=1000)
    shares = series(default, modes_N=modes, difficulty_N=difficulty, windows=20).shares
    # 0.8 + 0.2 * 1 / 4 of the last stage's examples are fast, after a quarter of it on the way.
    np.testing.assert_allclose(shares["fast"][:16], 0.25, atol=0.021)
    np.testing.assert_allclose(shares["fast"][16], 0.55, atol=0.021)
    np.testing.assert_allclose(shares["fast"][17:], 0.85, atol=0.021)


@pytest.mark.parametrize(("text", "stages"), [(PAPER_TOML, PAPER), (DEFAULT_TOML, DEFAULT)])
def test_the_papers_order_and_the_default_can_be_written_in_a_recipe(
    text: str, stages: tuple[CurriculumStage, ...]
) -> None:
    step = {"stage": "sft", "model": "m", "data": "d", "seed": 0}
    assert Sft.model_validate(step | tomllib.loads(text)).curriculum == stages


def test_replay_follows_all_earlier_mixes_by_their_shares() -> None:
    stages = (
        CurriculumStage(mix={"reasoning": 1}, share=0.3),
        CurriculumStage(mix={"reasoning": 1, "fast": 1}, share=0.1),
        CurriculumStage(mix={"fast": 1}, share=0.6, replay=0.4),
    )
    modes, difficulty = rows_of({"fast": 30, "reasoning": 30})
    plan = plan_of(stages, modes, difficulty, examples=1000)
    last = [part for part in summary(plan, modes_N=modes, tokens_N=np.ones(60)) if part.stage == 2]
    # 0.4 of 600 are replayed: three parts of the first stage, one of the second, half of it fast.
    assert {part.mode: part.examples for part in last} == {"fast": 390, "reasoning": 210}


@settings(max_examples=40, deadline=None)
@given(curricula())
def test_shares_told_before_are_those_of_the_plan(stages: tuple[CurriculumStage, ...]) -> None:
    modes, difficulty = rows_of({"fast": 11, "reasoning": 23})
    plan = plan_of(stages, modes, difficulty, examples=2000)
    parts = summary(plan, modes_N=modes, tokens_N=np.ones(34))
    for number, shares in enumerate(mode_shares(stages)):
        assert sum(shares.values()) == pytest.approx(1)
        counts = {part.mode: part.examples for part in parts if part.stage == number}
        for mode, share in shares.items():
            assert abs(counts.get(mode, 0) - share * (plan.stage_E == number).sum()) <= 1.5


def test_a_summary_counts_repeats_as_examples_and_tokens_but_not_as_rows() -> None:
    plan = Plan(np.array([0, 0, 1, 2, 2]), np.array([0, 0, 0, 1, 1], np.int8))
    parts = summary(plan, modes_N=["fast", "reasoning", "fast"], tokens_N=np.array([5, 7, 11]))
    assert parts == [
        Part(0, "fast", 2, 1, 10), Part(0, "reasoning", 1, 1, 7), Part(1, "fast", 2, 1, 22),
    ]  # fmt: skip
    assert example_shares(parts) == {"fast": 0.8, "reasoning": 0.2}


def test_a_series_averages_known_difficulties_and_leaves_a_gap_where_there_are_none() -> None:
    plan = Plan(np.array([0, 1, 2, 2, 0]), np.zeros(5, np.int8))
    course = series(
        plan, modes_N=["fast", "reasoning", "fast"],
        difficulty_N=np.array([0.2, 0.6, NAN]), windows=2,
    )  # fmt: skip
    assert course.end_W.tolist() == [2, 5]
    np.testing.assert_allclose(course.shares["fast"], [0.5, 1.0])
    np.testing.assert_allclose(course.difficulty_W, [0.4, 0.2])
    gap = series(plan, modes_N=["fast"] * 3, difficulty_N=np.full(3, NAN), windows=9)
    assert len(gap.end_W) == 5
    assert np.isnan(gap.difficulty_W).all()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (DEFAULT, r"^curriculum\.0\.mix: no row of data has the mode 'reasoning', only fast; "),
        (PAPER[::-1], r"^curriculum\.1\.mix: no row of data has the mode 'reasoning', only fast; "),
        (easy_first(), r"^curriculum\.0\.order: easy-first, but no fast row .* a difficulty;"),
        (
            (
                CurriculumStage(mix={"fast": 1}, share=0.99),
                CurriculumStage(mix={"fast": 1}, share=0.01),
            ),
            r"^curriculum\.1\.share: 0\.01 of 10 examples is not one; raise it, or epochs",
        ),
    ],
)
def test_a_curriculum_the_data_cannot_follow_says_why(
    stages: tuple[CurriculumStage, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(stages, ["fast"] * 3, np.full(3, NAN), examples=10)


def test_a_record_says_in_which_step_each_window_ends_and_leaves_unknown_difficulty_open() -> None:
    plan = Plan(np.array([0, 1, 0, 1, 1]), np.array([0, 0, 0, 1, 1], np.int8))
    modes, difficulty = ["fast", "reasoning"], np.array([NAN, 0.25])
    parts = summary(plan, modes_N=modes, tokens_N=np.array([3, 4]))
    course = series(plan, modes_N=modes, difficulty_N=difficulty, windows=5)
    kept = record(parts, course, examples_S=[2, 1, 2])
    assert [part["stage"] for part in kept["parts"]] == [1, 1, 2]
    assert kept["series"] == {
        "examples": [1, 2, 3, 4, 5],
        "step": [1, 1, 2, 3, 3],
        "shares": {"fast": [1, 0, 1, 0, 0], "reasoning": [0, 1, 0, 1, 1]},
        "difficulty": [None, 0.25, None, 0.25, 0.25],
    }


def test_a_forecast_costs_each_example_its_modes_mean() -> None:
    texts = {"reasoning": Text(30, 6000), "fast": Text(70, 700)}
    parts = forecast(DEFAULT, texts, epochs=2)
    told = [(part.stage, part.mode, part.examples, part.tokens) for part in parts]
    # 160 examples at 3 : 1, then 40 of which 0.875 * 0.85 + 0.125 * 0.25 are fast.
    assert told == [
        (1, "fast", 40, 400), (1, "reasoning", 120, 24000), (2, "fast", 31, 310),
        (2, "reasoning", 9, 1800),
    ]  # fmt: skip


def test_a_forecast_takes_unknown_modes_for_any_and_says_where_there_is_no_row() -> None:
    assert [part.tokens for part in forecast(PAPER, {ANY_MODE: Text(4, 40)}, epochs=1)] == [30, 10]
    assert [part.tokens for part in forecast(PAPER, {"fast": Text(4, 40)}, epochs=1)] == [None, 10]


def test_texts_are_counted_by_mode_over_content_and_chain(tmp_path: Path) -> None:
    def row(number: int, thinking: str | None) -> dict:
        answer = {"role": "assistant", "content": "b" * 8, "thinking": thinking}
        return {
            "id": str(number), "source": "s", "complete": True,
            "mode": "reasoning" if thinking else "fast",
            "messages": [{"role": "user", "content": "é" * 4, "thinking": None}, answer],
        }  # fmt: skip

    rows = [row(0, None), row(1, "c" * 16), row(2, None)]
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        write_rows(path, rows, CONVERSATIONS)
    assert sampled_texts(paths) == {"fast": Text(4, 16), "reasoning": Text(2, 16)}
    assert sampled_texts([]) == {}


def test_planning_needs_no_torch() -> None:
    check = "import sys, tutelage.train.curriculum_forecast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
