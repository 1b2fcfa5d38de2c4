"""Graders: gold is right, nothing is wrong, near-misses are wrong, and no answer stops a run."""

import json
import signal
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.errors import DataError, RecipeError
from tutelage.evals import grading_worker
from tutelage.evals.graders import GRADERS, Verdict, grade, grader_for
from tutelage.evals.grading_worker import Worker

needs_math = pytest.mark.skipif(
    not grading_worker.importlib.util.find_spec("math_verify"), reason="needs the extra tasks"
)


def right(name: str, answer: str, gold: str, **row: Any) -> bool:
    return grade(name, answer, gold, row=row).correct


def task_rows(task: str, *, size: int = 2, **config: Any) -> list[dict[str, Any]]:
    """Rows as the data stage stores them: the entry, by way of JSON."""
    gym = pytest.importorskip("reasoning_gym")
    dataset = gym.create_dataset(task, seed=5, size=size, **config)
    return [
        {
            "id": f"{task}[{number}]",
            "task": task,
            "answer": item["answer"],
            "meta": json.dumps({"reasoning_gym": {"config": config, "entry": item}}, default=str),
        }
        for number, item in enumerate(dataset)
    ]


# --- the door ---------------------------------------------------------------------------------


def test_an_unknown_grader_is_told_with_the_nearest_known_name() -> None:
    with pytest.raises(RecipeError, match=r"no grader 'numerik'; did you mean 'numeric'\?"):
        grade("numerik", "1", "1", row={})
    with pytest.raises(RecipeError, match=r"no grader 'zzz'; known: exact, numeric, .*auto"):
        grade("zzz", "1", "1", row={})


@pytest.mark.parametrize("gold", [None, "", " \n"])
def test_a_row_without_a_gold_answer_names_itself_and_the_column(gold: str | None) -> None:
    with pytest.raises(DataError, match=r"row 'x:7' has no gold answer .* column `answer`"):
        grade("exact", "1", gold, row={"id": "x:7"})


@pytest.mark.parametrize("name", GRADERS)
@pytest.mark.parametrize("answer", ["", "  \n\t"])
def test_an_empty_answer_is_wrong_whatever_the_grader(name: str, answer: str) -> None:
    verdict = grade(name, answer, "72", row={})
    assert (verdict.correct, verdict.reason) == (False, "empty answer")


def test_a_grader_that_raises_is_a_wrong_answer_that_says_so() -> None:
    verdict = grade("numeric", "72", "seventy-two", row={})
    assert not verdict.correct
    assert verdict.reason == (
        "grader raised ValueError: the gold answer 'seventy-two' has no number"
    )


@pytest.mark.parametrize(
    ("gold", "name"),
    [
        ("72", "numeric"), ("-7.5", "numeric"), ("$1,234", "numeric"), ("1/2", "numeric"),
        ("She sells 9.\n#### 18", "numeric"), ("七十二", "exact"),
        ("B", "choice"), ("(C)", "choice"), ("D.", "choice"), ("E", "exact"),
        (r"\sqrt{2}", "math"), ("x^2+1", "math"), ("2x + 3", "math"), ("(3, 5)", "math"),
        ("Paris", "exact"), ("C++", "exact"), ("3:45", "exact"), ("2024-01-05", "exact"),
        ("1 0\n0 1", "exact"), ("", "exact"),
    ],
)  # fmt: skip
def test_auto_picks_the_grader_by_the_form_of_the_gold_answer(gold: str, name: str) -> None:
    assert grader_for({"answer": gold}) == name


def test_auto_picks_the_own_scorer_only_where_the_row_carries_its_entry() -> None:
    meta = json.dumps({"reasoning_gym": {"entry": {}}})
    assert grader_for({"answer": "72", "task": "chain_sum", "meta": meta}) == "reasoning-gym"
    assert grader_for({"answer": "72", "task": "chain_sum", "meta": None}) == "numeric"
    assert grader_for({"answer": "72", "task": None, "meta": meta}) == "numeric"
    assert grader_for({"answer": "72", "task": "x", "meta": '{"reasoning_gym'}) == "numeric"


# --- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["Paris", " paris.\n", "**PARIS**", "“Ｐａｒｉｓ”", "paris!"])
def test_exact_forgives_case_width_and_outer_punctuation(answer: str) -> None:
    assert right("exact", answer, "Paris")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("It is Paris", "Paris"), ("-5", "5"), (".5", "5"), ("C++", "C"), ("?", "!"), ("[1]", "1")],
)
def test_exact_wants_the_whole_answer_and_keeps_signs(answer: str, gold: str) -> None:
    assert not right("exact", answer, gold)


# --- numeric ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "72", "72.", "72.0", "=72", "$72", "72 apples", "72kg", "72 m²",
        "So 5 + 67 = 72", "#### 72", "First 3.\n#### 72 ", r"\boxed{72}", r"\boxed{72\text{ kg}}",
        "The answer is 72. I checked it 3 times.", "The final answer is: **72**.", "**Answer:** 72",
        "Answer: 12 x 6 = 72", "not 70 but 72", "the answer is not 70 but 72",
        "72 on the 3rd day", "<answer>72</answer>", "<answer> 72 kg</answer>", "৭২",
        "7.2e1", r"7.2 \times 10^{1}", "144/2", r"\frac{144}{2}", "71 2/2", "７２",
        "七十二", "答案是七十二元", "答案：72元。", "答えは72です。一つ", "Die Antwort ist 72.",
    ],
)  # fmt: skip
def test_numeric_reads_72_in_the_ways_it_is_written(answer: str) -> None:
    assert grade("numeric", answer, "9 times 8.\n#### 72", row={}).correct


@pytest.mark.parametrize(
    "answer",
    [
        "720", "7.2", "-72", "−72", "负72", "7", "2", "not 72 but 73", "72, or rather 73", "72^2",
        "72π", r"\boxed{\sqrt{72}}", r"\boxed{72\sqrt{2}}", "x_72", "CO72", "72/0", "7 2", "1/72",
        "the answer is 73, and 72 is wrong", "no number here", "七十三", "72e3", "1e999999",
    ],
)  # fmt: skip
def test_numeric_refuses_what_is_only_near_72(answer: str) -> None:
    assert not right("numeric", answer, "72")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/2", "0.5"), (r"-\frac12", "-0.5"), ("3½", "3.5"), ("0.333333", "1/3"),
        ("1,234,567", "1234567"), (r"1{,}234", "1234"), (r"12\,000", "12000"), ("-$5", "-5"),
        ("$-5", "-5"), ("两万五千", "25000"), ("一亿二千万", "120000000"), ("二〇二四", "2024"),
        ("一百零五", "105"), ("三点五", "3.5"), ("二分之一", "0.5"), ("1.5万", "15000"),
        ("5 million", "5000000"), ("5 million", "5"), ("10 -3", "3"), ("5-3", "3"),
    ],
)  # fmt: skip
def test_numeric_knows_one_value_in_two_forms(answer: str, gold: str) -> None:
    assert right("numeric", answer, gold)


def test_percent_is_a_hundredth_and_also_the_bare_number_but_not_both_at_once() -> None:
    assert right("numeric", "50%", "0.5")
    assert right("numeric", "50%", "50")
    assert right("numeric", "百分之五十", "0.5")
    assert right("numeric", "0.5", "50%")
    assert not right("numeric", "50%", "5000%")
    assert not right("numeric", "50%", "5000")
    assert not right("numeric", "50%", "5")


def test_a_decimal_comma_is_read_where_the_language_writes_one() -> None:
    assert right("numeric", "Das sind 1.234,50 Euro", "1234.5", language="de")
    assert right("numeric", "3,5", "3.5", language="fr-FR")
    assert right("numeric", "10 000", "10000", language="es")
    assert right("numeric", "1.234", "1234", language="de")
    assert right("numeric", "18.50", "18.5", language="de")
    assert not right("numeric", "1.234", "1234", language="en")
    assert not right("numeric", "3,5", "3.5")


def test_whole_numbers_are_compared_exactly_however_large() -> None:
    assert not right("numeric", "70000001", "70000000")
    assert not right("numeric", f"{10**40 + 1}", f"{10**40}")
    assert right("numeric", "0.30000000000000004", "0.3")


@given(st.integers(-(10**12), 10**12), st.integers(1, 9))
def test_a_whole_number_is_right_in_every_frame_and_its_neighbours_are_not(
    number: int, off: int
) -> None:
    for frame in ("{}", "#### {}", "The answer is {}.", "so x = {}", r"\boxed{{{}}}", "答案是{}。"):
        assert right("numeric", frame.format(number), str(number))
        assert right("numeric", frame.format(f"{number:,}"), f"1 + 1\n#### {number}")
        assert not right("numeric", frame.format(number + off), str(number))


# --- choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "B", "b", "(B)", "B.", "**B**", "B. Paris", "B) Paris", "answer: B", "Answer: (b).", "Ｂ",
        "The answer is B, because A is wrong", "答案是B", "答案：（B）", "选B。", r"\boxed{B}",
        r"\boxed{\text{B}}", "I would take B", "A dog barks, so B", "答案不是A，是B", "not A but B",
        "The answer is option B", "The answer is not A but B",
    ],
)  # fmt: skip
@pytest.mark.parametrize("gold", ["B", "(B)", "B. Paris"])
def test_choice_finds_the_letter_b(answer: str, gold: str) -> None:
    assert right("choice", answer, gold)


@pytest.mark.parametrize(
    "answer",
    ["A", "C", "A or B", "B、C", "answer: A or B", "Paris", "A dog", "Bob", "B2", "不是B", "ABCD"],
)
def test_choice_takes_no_other_letter_and_no_hedge_for_b(answer: str) -> None:
    assert not right("choice", answer, "B")


# --- math -------------------------------------------------------------------------------------


@needs_math
@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        (r"\frac{2}{4}", r"\frac12", True), (r"So it is $\frac{2}{4}$.", r"\frac{1}{2}", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True), ("1 + x^2", "x^2+1", True),
        (r"$2\sqrt{3}$", r"\sqrt{12}", True), (r"2\sqrt{3}", r"$\sqrt{12}$", True),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        ("720", "72", False), ("-72", "72", False), ("7.2", "72", False), ("5!", "5", False),
        ("not 72 but 73", "72", False), (r"2\sqrt{3}", "2", False), ("x^2+2", "x^2+1", False),
        ("I do not know", r"\frac12", False), ("}{", "x^2", False), ("\ud800\x00", "x^2", False),
    ],
)  # fmt: skip
def test_math_knows_equal_formulas(answer: str, gold: str, correct: bool) -> None:
    assert grade("math", answer, gold, row={}).correct is correct


@needs_math
def test_a_formula_without_end_is_wrong_in_time_in_any_thread_and_the_next_is_graded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker("math", cpu_seconds=0.7)
    verdicts = []

    def ask() -> None:
        verdicts.append(worker.ask({"gold": "x^2", "answer": "$9^{9^{9^{9}}}$"}))
        verdicts.append(worker.ask({"gold": "x^2", "answer": "$x x$"}))
        assert worker._process is not None
        worker._process.send_signal(signal.SIGSTOP)  # takes no CPU time, and does not answer
        monkeypatch.setattr(grading_worker, "WALL_SECONDS", 0.1)
        verdicts.append(worker.ask({"gold": "x^2", "answer": "$x^2$"}))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    worker.close()
    assert verdicts == [
        Verdict(False, "grader took too long"),
        Verdict(True, "x*x = x**2"),
        Verdict(False, "grader died (-9)"),
    ]


def test_a_missing_library_stops_the_run_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading_worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'math-verify: pip install "tutelage\[tasks\]"'):
        grade("math", "1", "x^2", row={})


# --- reasoning-gym ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    ["chain_sum", "gsm_symbolic", "countdown", "number_sorting", "n_queens", "rearc"],
)
def test_a_task_s_gold_is_right_bare_or_marked_and_anothers_gold_is_wrong(task: str) -> None:
    rows = task_rows(task)
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        gold = row["answer"]
        assert grader_for(row) == "reasoning-gym"
        assert grade("auto", gold, gold, row=row).correct
        assert grade("auto", f"Let me see.\nThe answer is: {gold}", gold, row=row).correct
        assert not grade("auto", other["answer"], gold, row=row).correct
        assert not grade("auto", "I do not know", gold, row=row).correct


def test_a_task_is_scored_with_the_settings_it_was_made_with() -> None:
    row = task_rows("puzzle24", size=1)[0]
    kept = json.loads(row["meta"])
    kept["reasoning_gym"]["config"] = {"max_value": 1}
    other = {**row, "meta": json.dumps(kept)}
    assert grade("auto", row["answer"], row["answer"], row=row).correct
    assert not grade("auto", row["answer"], row["answer"], row=other).correct


def test_what_scorers_let_pass_is_wrong_here() -> None:
    row = task_rows("gsm_symbolic", size=1)[0]
    gold = row["answer"]
    for near in (f"-{gold}", f"{gold} 1", f"{gold}0", f"{gold}.1"):
        assert not grade("auto", near, gold, row=row).correct
    row = task_rows("number_sorting", size=1)[0]
    numbers = json.loads(row["answer"].replace("'", '"'))
    near = json.dumps([*numbers[:-1], str(float(numbers[-1]) + 0.5)])
    assert not grade("auto", near, row["answer"], row=row).correct
    row = task_rows("puzzle24", size=1)[0]
    assert not grade("auto", "4 + 4 + 8 + 8", row["answer"], row=row).correct


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("binary_matrix", "__import__('os').system('touch {}')"),
        ("n_queens", "[x for x in open('{}', 'w')]"),
        ("countdown", "__import__('os').system('touch {}')"),
        ("simple_integration", "exp(__import__('os').system('touch {}'))"),
    ],
)
def test_an_answer_that_is_a_program_is_never_evaluated(
    task: str, answer: str, tmp_path: Any
) -> None:
    row = task_rows(task, size=1)[0]
    trace = tmp_path / "ran"
    verdict = grade("auto", answer.format(trace), row["answer"], row=row)
    assert not verdict.correct
    assert "not evaluated" in verdict.reason
    assert not trace.exists()


def test_a_gold_that_is_a_program_is_not_evaluated_either_whatever_the_row_calls_it() -> None:
    row = task_rows("number_sorting", size=1)[0]
    kept = json.loads(row["meta"])
    kept["reasoning_gym"]["entry"]["answer"] = "[int('1')]"
    kept["reasoning_gym"]["entry"]["metadata"]["gold"] = "[]"
    verdict = grade("auto", "[1]", "[1]", row={**row, "meta": json.dumps(kept)})
    assert (verdict.correct, "not evaluated" in verdict.reason) == (False, True)


@pytest.mark.parametrize("answer", ["1" * 5000 + "$", "(" * 5000, "x" + " " * 5000 + "_"])
def test_a_long_answer_is_refused_at_once(answer: str) -> None:
    row = task_rows("polynomial_multiplication", size=1)[0]
    assert "took too long" not in grade("auto", answer, row["answer"], row=row).reason


@pytest.mark.parametrize("task", ["codeio", "game_of_life_halting"])
def test_a_task_whose_scorer_cannot_be_trusted_is_refused_with_the_reason(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    entry = {"question": "", "answer": "True", "metadata": {}}
    row = {"task": task, "meta": json.dumps({"reasoning_gym": {"entry": entry}})}
    verdict = grade("reasoning-gym", "True", "True", row=row)
    assert not verdict.correct
    assert f"task '{task}' is refused: it" in verdict.reason


def test_a_row_without_its_entry_says_what_it_lacks() -> None:
    pytest.importorskip("reasoning_gym")
    verdict = grade("reasoning-gym", "1", "1", row={"task": "chain_sum", "meta": None})
    assert not verdict.correct
    assert "meta['reasoning_gym']" in verdict.reason


# --- no input raises --------------------------------------------------------------------------

JUNK = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="0123456789.,-−/%$ eE^×10万亿百分之点负#\\{}()\n=ABCDx½²", max_size=40),
    st.lists(
        st.sampled_from(
            ["answer is", "答案是", "####", "\\boxed{", "}", "72", "-", "1/0", "B", "$"]
        ),
        max_size=8,
    ).map(" ".join),
)
GOLDS = JUNK.filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(JUNK, GOLDS, st.sampled_from(["exact", "numeric", "choice"]), st.sampled_from(["de", None]))
def test_no_text_raises_out_of_the_graders_here(
    answer: str, gold: str, name: str, language: str | None
) -> None:
    verdict = grade(name, answer, gold, row={"language": language})
    assert isinstance(verdict.correct, bool)
    assert verdict.reason


@needs_math
@settings(max_examples=40, deadline=None)
@given(JUNK, GOLDS)
def test_no_text_raises_out_of_math(answer: str, gold: str) -> None:
    assert grade("math", answer, gold, row={}).reason


@settings(max_examples=60, deadline=None)
@given(
    JUNK,
    st.sampled_from(["chain_sum", "countdown", "n_queens", "no_such_task", "codeio"]),
    st.one_of(st.none(), st.text(max_size=20), st.just('{"reasoning_gym": {"entry": {}}}')),
)
def test_no_answer_task_or_meta_raises_out_of_a_task_s_scorer(
    answer: str, task: str, meta: str | None
) -> None:
    pytest.importorskip("reasoning_gym")
    verdict = grade("reasoning-gym", answer, "72", row={"task": task, "meta": meta})
    assert not verdict.correct


@given(st.fixed_dictionaries({"answer": st.none() | JUNK, "task": st.none() | st.text(max_size=5),
                              "meta": st.none() | st.text(max_size=20)}))  # fmt: skip
def test_any_row_has_a_grader_that_exists(row: dict[str, Any]) -> None:
    assert grader_for(row) in GRADERS


def test_the_result_of_an_equation_is_the_answer() -> None:
    """Short right answers must not lose to wordy ones: "6 + 2 = 8" has no letter in it."""
    gym = pytest.importorskip("reasoning_gym")
    item = gym.create_dataset("chain_sum", seed=0, size=1)[0]
    row = {
        "task": "chain_sum",
        "meta": json.dumps({"reasoning_gym": {"config": {}, "entry": item}}, default=str),
    }
    gold = item["answer"]
    assert grade("reasoning-gym", f"{gold} + 0 = {gold}", gold, row=row).correct
    assert not grade("reasoning-gym", f"{gold} + 1 = {int(gold) + 1}", gold, row=row).correct
