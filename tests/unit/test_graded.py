"""What is counted of graded answers: closed forms, what is resampled, and what is undefined."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.evals import graded
from tutelage.evals.graded import compare, corrected, metrics, pass_at_k, tables
from tutelage.evals.graders import grade
from tutelage.evals.stats import holm, mcnemar, paired_difference, ratio_interval, wilson

Row = dict[str, Any]


def answer(item: int, correct: float = 1.0, sample: int = 0, **columns: Any) -> Row:
    return {
        "model": "m" * 64, "test": "t", "item": f"q{item}", "language": None, "mode": "fast",
        "temperature": 0.0, "sample": sample, "prompt": "?", "thinking": None, "answer": "72",
        "gold": "72", "correct": correct, "reason": "72 = 72", "tokens": 10,
        "finish_reason": "stop", **columns,
    }  # fmt: skip


def sampled(*corrects: tuple[float, ...], **columns: Any) -> list[Row]:
    """Items by the verdicts on their samples."""
    return [
        answer(item, correct, sample, **columns)
        for item, samples in enumerate(corrects)
        for sample, correct in enumerate(samples)
    ]


def shown(interval: Any) -> dict[str, Any]:
    bounds = {name: round(getattr(interval, name), 6) for name in ("estimate", "low", "high")}
    return {**bounds, "n": interval.n}


def count(rows: list[Row], **options: Any) -> dict[str, dict[str, Any]]:
    return metrics(rows, seed=3, resamples=400, **options)


# --- accuracy and pass@k --------------------------------------------------------------------------


def test_one_sample_an_item_has_a_wilson_interval() -> None:
    rows = [answer(i, float(i < 7)) for i in range(20)]
    assert count(rows)["accuracy"] == shown(wilson(7, 20))


def test_several_samples_are_resampled_by_the_item() -> None:
    means = [1.0, 0.5, 0.0, 0.5]
    rows = sampled((1, 1), (1, 0), (0, 0), (0, 1))
    expected = ratio_interval(means, [1] * 4, seed=3, resamples=400)
    assert count(rows)["accuracy"] == shown(expected)


def test_four_copies_of_an_answer_are_no_four_answers() -> None:
    once = [answer(i, float(i % 2)) for i in range(30)]
    often = [{**row, "sample": sample} for row in once for sample in range(4)]
    narrow, wide = (count(rows)["accuracy"] for rows in (once, often))
    assert narrow["n"] == wide["n"] == 30
    assert wide["high"] - wide["low"] > 0.9 * (narrow["high"] - narrow["low"])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_all_or_none_is_not_certain_however_many_samples(value: float) -> None:
    found = count(sampled(*[(value,) * 4] * 10), pass_at=[2])
    expected = shown(wilson(round(10 * value), 10))
    assert found["accuracy"] == found["pass@2"] == expected


def test_a_measure_between_right_and_wrong_is_resampled() -> None:
    rows = [answer(i, value) for i, value in enumerate((0.25, 0.5, 1.0, 0.75))]
    assert count(rows)["accuracy"]["estimate"] == 0.625
    assert count([answer(i, 0.5) for i in range(4)])["accuracy"]["low"] == 0.5


def test_pass_at_k_is_the_mean_of_its_estimator_over_items() -> None:
    found = count(sampled((1, 0, 0), (0, 0, 0), (1, 1, 0)), pass_at=[1, 2, 3])
    assert found["pass@1"]["estimate"] == found["accuracy"]["estimate"] == round(1 / 3, 6)
    assert found["pass@2"]["estimate"] == round((2 / 3 + 0 + 1) / 3, 6)
    assert found["pass@3"]["estimate"] == round(2 / 3, 6)


def test_a_k_beyond_the_samples_of_any_item_is_left_out() -> None:
    found = count([*sampled((1, 0, 1), (0, 1, 1)), answer(2)], pass_at=[1, 2, 5])
    assert [name for name in found if name.startswith("pass@")] == ["pass@1"]


@given(st.integers(1, 8), st.data())
def test_pass_at_k_counts_the_draws_of_k_that_hold_a_right_one(n: int, data: Any) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_a_pass_at_k_that_cannot_be_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"no pass@{k} of {n} samples"):
        pass_at_k(n, c, k)


# --- lengths, shares, costs -----------------------------------------------------------------------


def test_each_share_counts_its_own_fault() -> None:
    rows = [
        answer(0, finish_reason="length"),
        answer(1, 0.0, answer=" \n", reason="empty answer"),
        answer(2, 0.0, reason="grader raised ValueError: no number"),
        answer(3, thinking="Let me see."),
        answer(4, thinking=" "),
        answer(5, finish_reason="choice", tokens=0),
    ]
    found = count(rows)
    one = shown(wilson(1, 6))
    for name in ("truncated_share", "empty_share", "raised_share", "fast_thinking_share"):
        assert found[name] == one, name


def test_a_grader_that_raises_is_counted_as_raised_by_the_reason_it_gives() -> None:
    verdict = grade("numeric", "72", "seventy-two", row={})
    rows = [answer(i, float(verdict.correct), reason=verdict.reason) for i in range(4)]
    assert count(rows)["raised_share"]["estimate"] == 1
    assert count(rows)["accuracy"]["estimate"] == 0


def test_thinking_is_no_fault_in_reasoning_mode() -> None:
    assert "fast_thinking_share" not in count(
        [answer(0, mode="reasoning"), answer(1, mode="reasoning")]
    )


def test_answer_tokens_are_the_mean_over_answers() -> None:
    rows = [answer(i, tokens=tokens) for i, tokens in enumerate((2, 4, 6, 12))]
    expected = ratio_interval([2, 4, 6, 12], [1] * 4, seed=3, resamples=400)
    assert count(rows)["answer_tokens"] == shown(expected)


def test_tokens_of_wrong_answers_are_paid_for_by_the_right_ones() -> None:
    rows = [answer(i, float(i % 2), tokens=10 + i) for i in range(20)]
    found = count(rows)["tokens_per_correct"]
    assert found["estimate"] == sum(range(10, 30)) / 10
    inverse = ratio_interval(
        [i % 2 for i in range(20)], [10 + i for i in range(20)], seed=3, resamples=400
    )
    assert found["low"] == round(1 / inverse.high, 6)
    assert found["high"] == round(1 / inverse.low, 6)
    assert found["low"] < found["estimate"] < found["high"]


def test_tokens_per_correct_has_no_upper_bound_where_no_correct_answer_is_possible_too() -> None:
    found = count([answer(i, float(i == 0)) for i in range(8)])["tokens_per_correct"]
    assert found["estimate"] == 80
    assert found["low"] is not None
    assert found["high"] is None


@pytest.mark.parametrize("columns", [{"correct": 0.0}, {"tokens": 0, "finish_reason": "choice"}])
def test_without_a_right_answer_or_a_token_there_is_no_cost_of_one(columns: Row) -> None:
    found = count([{**answer(i), **columns} for i in range(5)])["tokens_per_correct"]
    assert found == {"estimate": None, "low": None, "high": None, "n": 5}


def test_an_answer_of_no_token_leaves_the_cost_of_the_others_alone() -> None:
    rows = [answer(0, 0.0, tokens=0), *[answer(i, float(i % 2)) for i in range(1, 9)]]
    assert count(rows)["tokens_per_correct"]["estimate"] == 20


def test_one_item_has_figures_and_no_bounds_but_for_counts() -> None:
    found = count([answer(0, tokens=7)])
    assert found["answer_tokens"] == {"estimate": 7, "low": None, "high": None, "n": 1}
    assert found["tokens_per_correct"] == {"estimate": 7, "low": None, "high": None, "n": 1}
    assert found["accuracy"] == shown(wilson(1, 1))
    assert count(sampled((1, 0)))["accuracy"] == {
        "estimate": 0.5,
        "low": None,
        "high": None,
        "n": 1,
    }


def test_rows_that_do_not_belong_together_are_refused() -> None:
    for other in ({"model": "x"}, {"test": "u"}, {"mode": "reasoning"}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match="several models or conditions"):
            count([answer(0), {**answer(1), **other}])
    with pytest.raises(ValueError, match="no graded answers"):
        count([])


# --- two models -----------------------------------------------------------------------------------


def test_two_models_with_one_sample_are_compared_by_mcnemar_and_paired_resampling() -> None:
    right_a, right_b = [i < 14 for i in range(20)], [4 <= i < 12 for i in range(20)]
    a = [answer(i, float(right), tokens=5 + i) for i, right in enumerate(right_a)]
    b = [answer(i, float(right), tokens=5) for i, right in enumerate(right_b)]
    found = compare(a, list(reversed(b)), seed=3, resamples=400)
    test = mcnemar(right_a, right_b)
    interval = paired_difference(right_a, right_b, seed=3, resamples=400).interval
    assert found["accuracy"] == {
        **shown(interval), "p": round(test.p_value, 6), "test": "mcnemar", "only_a": 6, "only_b": 0,
    }  # fmt: skip
    assert found["answer_tokens"]["estimate"] == 9.5
    assert found["answer_tokens"]["test"] == "paired bootstrap"


def test_several_samples_are_compared_by_the_item() -> None:
    a, b = sampled((1, 1), (1, 0), (1, 1)), sampled((0, 1), (0, 0), (1, 0))
    found = compare(a, b, seed=3, resamples=400)["accuracy"]
    expected = paired_difference([1, 0.5, 1], [0.5, 0, 0.5], seed=3, resamples=400)
    assert found == {
        **shown(expected.interval), "p": round(expected.p_value, 6), "test": "paired bootstrap",
    }  # fmt: skip


def test_a_model_does_not_differ_from_itself() -> None:
    rows = [answer(i, float(i % 3 == 0)) for i in range(12)]
    found = compare(rows, rows, seed=3, resamples=400)
    assert (found["accuracy"]["estimate"], found["accuracy"]["p"]) == (0, 1)
    assert (found["answer_tokens"]["estimate"], found["answer_tokens"]["p"]) == (0, 1)


def test_different_items_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="for example 'q1'"):
        compare([answer(0)], [answer(0), answer(1)], seed=3)


def test_one_item_has_a_difference_and_no_test_of_its_length() -> None:
    found = compare([answer(0, tokens=9)], [answer(0, 0.0)], seed=3)
    assert found["answer_tokens"] == {
        "estimate": -1, "low": None, "high": None, "n": 1, "p": None, "test": "none",
    }  # fmt: skip
    assert found["accuracy"]["p"] == 1


# --- a table --------------------------------------------------------------------------------------


def models(*accuracies: float, **columns: Any) -> list[list[Row]]:
    return [
        [answer(i, float(i < 40 * share), model=f"model-{m}", tokens=5 + m, **columns)
         for i in range(40)]
        for m, share in enumerate(accuracies)
    ]  # fmt: skip


def test_a_table_has_every_model_and_each_against_the_one_before_it() -> None:
    parts = models(0.2, 0.5, 0.5)
    found = tables(parts, graded.Settings(seed=3, resamples=400))
    assert len(found) == 1
    table = found[0]
    assert (table["test"], table["mode"], table["temperature"]) == ("t", "fast", 0.0)
    assert [entry["metrics"] for entry in table["models"]] == [count(part) for part in parts]
    assert [(row["metric"], row["model"], row["against"]) for row in table["differences"]] == [
        ("accuracy", "model-1", "model-0"), ("answer_tokens", "model-1", "model-0"),
        ("accuracy", "model-2", "model-1"), ("answer_tokens", "model-2", "model-1"),
    ]  # fmt: skip
    assert [row["estimate"] for row in table["differences"]] == [0.3, 1, 0, 1]


def test_p_values_are_corrected_for_all_comparisons_of_a_table() -> None:
    rows = tables(models(0.2, 0.5, 0.6, 0.6), graded.Settings(resamples=400))[0]["differences"]
    expected = holm([row["p"] for row in rows])
    assert [row["p_holm"] for row in rows] == [round(p, 6) for p in expected]
    assert len(rows) == 6
    assert rows[0]["p"] < rows[0]["p_holm"]


def test_what_has_no_p_value_is_not_counted_as_a_comparison() -> None:
    tested, untested = {"p": 0.01}, {"p": None}
    found = corrected([[tested, untested], [{"p": 0.02}]])
    assert [row["p_holm"] for row in found] == [0.02, None, 0.02]
    assert tested == {"p": 0.01}


def test_conditions_have_tables_of_their_own_in_the_order_of_the_rows() -> None:
    parts = [
        [*greedy, *warm]
        for greedy, warm in zip(models(0.5, 0.6), models(0.3, 0.4, temperature=1.0), strict=True)
    ]
    found = tables(parts, graded.Settings(resamples=200))
    assert [table["temperature"] for table in found] == [0.0, 1.0]
    assert found[1]["models"][0]["metrics"]["accuracy"]["estimate"] == 0.3


def test_one_model_has_no_differences_and_none_no_tables() -> None:
    assert tables(models(0.5), graded.Settings())[0]["differences"] == []
    assert tables([], graded.Settings()) == []


def test_models_asked_under_different_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="under the same conditions"):
        tables([models(0.5)[0], models(0.5, temperature=1.0)[0]], graded.Settings())


SAMPLES = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=3)


@given(st.lists(SAMPLES, min_size=1, max_size=6), st.integers(0, 50))
def test_every_figure_lies_between_its_bounds_and_is_a_number(
    corrects: list[list[float]], tokens: int
) -> None:
    rows = sampled(*map(tuple, corrects), tokens=tokens)
    for name, figure in metrics(rows, pass_at=[1, 2], seed=1, resamples=200).items():
        known = [figure[key] for key in ("low", "estimate", "high") if figure[key] is not None]
        assert all(math.isfinite(value) for value in known), name
        assert known == sorted(known), name
        assert figure["n"] == len(corrects)
