"""Code: which program an answer gives, what a row tests, and one pool for a whole run's answers.

Programs here are ours, so they run without walls; hostile ones are in the end-to-end tests.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.errors import DataError, EngineError, RecipeError
from tutelage.evals import code_answers, grading
from tutelage.evals.code_answers import code_tests, program_in, verdict_of
from tutelage.evals.graders import can_grade, grade, grader_for
from tutelage.evals.grading import Given, Grading
from tutelage.evals.grading_text import Verdict
from tutelage.evals.sandbox import Limits, Sandbox, SandboxVerdict

LIMITS = Limits(wall_seconds=10.0, cpu_seconds=2, memory_mb=256)
STUB = '''import math


def half(x: float) -> float:
    """Half of it."""
    return x / 2


def area(r: float) -> float:
    """Half of pi times the square of r."""
'''
BODY = "    square = r ** 2\n    return half(math.pi * square)\n"
WHOLE = f"def area(r):\n{BODY}"
CHECK = (
    "METADATA = {}\n\n\ndef check(candidate):\n"
    "    assert abs(candidate(2) - 6.283185) < 1e-5\n    assert candidate(0) == 0\n"
)


def row(meta: dict[str, Any], prompt: str = "Write it.", **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt, "thinking": None}]
    return {
        "id": "r:1", "messages": messages, "answer": None, "task": None, "language": "en",
        "meta": json.dumps(meta), **columns,
    }  # fmt: skip


def area_row(**columns: Any) -> dict[str, Any]:
    meta = {"test": CHECK, "entry_point": "area", "canonical_solution": BODY}
    return row(meta, STUB, **columns)


def sum_row(**meta: Any) -> dict[str, Any]:
    listed = ["assert add([1, 2]) == 3", "assert add([]) == 0"]
    gold = "def add(xs): \r\n\treturn sum(xs)"
    return row({"test_list": listed, "test_setup_code": "", "code": gold, **meta})


@pytest.fixture(scope="module")
def pool() -> Iterator[Grading]:
    with Grading("none", workers=2, limits=LIMITS) as made:
        yield made


# --- what a row tests -----------------------------------------------------------------------------


def test_humaneval_s_form_is_read_with_its_prompt_as_the_stub() -> None:
    found = code_tests(area_row())
    assert found is not None
    assert (found.tests, found.entry_point, found.stub, found.gold) == (CHECK, "area", STUB, BODY)


def test_a_stub_is_found_in_meta_and_inside_an_instruction_too() -> None:
    told = f"Complete this:\n```python\n{STUB}```\nNo explanations."
    meta = {"test": CHECK, "entry_point": "area"}
    for one in (row(meta, told), row({**meta, "prompt": STUB})):
        found = code_tests(one)
        assert found is not None
        assert found.stub == STUB


def test_an_instruction_that_is_no_code_is_no_stub() -> None:
    found = code_tests(row({"test": CHECK, "entry_point": "area"}, "Write area(r)."))
    assert found is not None
    assert found.stub == ""


def test_mbpp_s_form_puts_imports_and_setup_in_front_of_the_tests() -> None:
    meta = {"test_imports": ["import math"], "test_setup_code": "a = [1]\r\nb = a"}
    found = code_tests(sum_row(**meta))
    assert found is not None
    assert found.tests.splitlines() == [
        "import math", "a = [1]", "b = a", "assert add([1, 2]) == 3", "assert add([]) == 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("test", "name"),
    [
        ("assert add([1]) == 1", "add"),
        ("assert set(shared((1,), (2,))) == set()", "shared"),
        ("assert math.isclose(root(4), 2)", "root"),
        ("assert chain([Pair(1, 2)], 1) == 1", "chain"),
        ("assert sum(1, 2) == 3", "sum"),
        ("assert 1 ==", None),
        ("assert x", None),
    ],
)
def test_the_entry_point_of_mbpp_is_the_first_function_called_that_python_lacks(
    test: str, name: str | None
) -> None:
    found = code_tests(row({"test_list": [test]}))
    assert found is not None
    assert found.entry_point == name


@pytest.mark.parametrize(
    "meta",
    [
        {}, {"test": CHECK}, {"entry_point": "f"}, {"test": " ", "entry_point": "f"},
        {"test_list": []}, {"test_list": "assert f()"}, {"test_list": ["assert f()", None]},
        {"test_list": [" "]}, {"testimony": "x"}, {"test": 1, "entry_point": 2},
    ],
)  # fmt: skip
def test_a_row_without_whole_tests_has_none(meta: dict[str, Any]) -> None:
    one = row(meta, answer="72")
    assert code_tests(one) is None
    assert grader_for(one) == "numeric"
    assert not can_grade("code", one, "72")


@pytest.mark.parametrize("meta", [None, "", "[]", "{", '"test_list"', "[" * 5000 + '"test_list"'])
def test_meta_that_is_no_object_has_no_tests(meta: str | None) -> None:
    assert code_tests({"meta": meta}) is None
    assert grader_for({"meta": meta, "answer": "72"}) == "numeric"


def test_auto_grades_rows_with_tests_as_code_and_needs_no_gold_for_it() -> None:
    assert grader_for(area_row()) == grader_for(sum_row()) == "code"
    assert can_grade("auto", sum_row(), None)
    assert not can_grade("exact", sum_row(), None)


# --- which program an answer gives ----------------------------------------------------------------

FORMS = {
    "a completion": BODY,
    "a completion whose first line lost its indentation": BODY.strip(),
    "a completion without any indentation": "square = r ** 2\nreturn half(math.pi * square)",
    "a completion in a fence": f"```python\n{BODY}```",
    "a completion that runs on": f"{BODY}\n\ndef other(x):\n    return input()\n\nprint(other(1))",
    "a completion that writes the function again": f"{BODY}\n\ndef area(r):\n    return 0\n",
    "a completion with prose behind it": f"{BODY}\nThis computes the area.",
    "a completion cut off behind it": f"{BODY}\n\ndef other(x):\n    y = (1,",
    "bare code": WHOLE,
    "bare code between prose": f"Here is it\n{WHOLE}\nIt works, since it's right.",
    "bare code behind globals": f"Sure!\nTWO = 2\n{WHOLE.replace('2', 'TWO')}",
    "a fence": f"Sure!\n\n```python\n{WHOLE}```\n\nHope it helps!",
    "a fence without a label": f"```\n{WHOLE}```",
    "a fence of tildes": f"~~~py\n{WHOLE}~~~",
    "a fence in a list": "1. So:\n\n   ```Python\n"
    + "".join(f"   {line}\n" for line in WHOLE.splitlines())
    + "   ```\n",
    "a fence never closed": f"```python\n{WHOLE}",
    "a fence never closed, cut off": f"```python\n{WHOLE}\n\nprint(area(",
    "a fence that the prompt opened": f"{WHOLE}```\nThis is the solution.",
    "the last of several": f"```\ndef area(r): return 1\n```\nBetter:\n```\n{WHOLE}\n```",
    "one that an example follows": f"```python\n{WHOLE}```\n```python\nprint(area(input()))\n```",
    "one that a shell session follows": f"```python\n{WHOLE}```\n```bash\npip install x\n```",
    "one with a future import": f"```python\nfrom __future__ import annotations\n{WHOLE}```",
    "windows lines": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
    "a lambda": "area = lambda r: half(math.pi * r ** 2)",
    "marks of few-shot examples": f"[BEGIN]\n{WHOLE}[DONE]\nYou are an expert",
    "two examples of them": f"[BEGIN]\ndef x(): 1\n[DONE]\n[BEGIN]\n{WHOLE}\n[DONE]",
    "escapes that Python warns of": f"import re\nDIGIT = re.compile('\\d')\n{WHOLE}",
    "the prompt repeated": STUB + BODY,
}
WRONG = {
    "prose": "I do not know.",
    "a stub": "```python\ndef area(r):\n    ...\n```",
    "another function": "def volume(r):\n    return 6.283185",
    "a near miss": WHOLE.replace("** 2", "** 3"),
    "a syntax error in a closed fence": f"```python\n{WHOLE}\n)\n```",
    "a solution in another language": f"```javascript\n{WHOLE}```",
    "nothing in a fence": "```python\n```",
    "half a function": "def area(r):\n    square = r ** 2\n    return half(",
    "a body of comments": "    # half of it",
    "a NUL": f"{WHOLE}\0",
    "half a character": f"{WHOLE}\nx = '\ud800'",
}


def test_a_program_is_found_in_every_form_of_an_answer(pool: Grading) -> None:
    one = area_row()
    verdicts = pool.grade_all("code", [Given(answer, None, one) for answer in FORMS.values()])
    wrong = {form: v.reason for form, v in zip(FORMS, verdicts, strict=True) if not v.correct}
    assert not wrong


def test_no_near_miss_passes(pool: Grading) -> None:
    one = area_row()
    verdicts = pool.grade_all("code", [Given(answer, None, one) for answer in WRONG.values()])
    assert not [form for form, v in zip(WRONG, verdicts, strict=True) if v.correct]


def test_helpers_and_imports_of_the_prompt_stand_in_front_of_a_whole_function() -> None:
    program = program_in(WHOLE, entry_point="area", stub=STUB)
    assert program.startswith("import math\n")
    assert program.endswith(WHOLE)


def test_a_completion_ends_where_its_function_ends() -> None:
    program = program_in(FORMS["a completion that runs on"], entry_point="area", stub=STUB)
    assert program == STUB + BODY


def test_where_no_program_is_found_the_text_itself_is_run_and_says_why(pool: Grading) -> None:
    verdict = pool.grade("code", "I'm not sure.", None, row=sum_row())
    assert verdict.reason.startswith("raised: SyntaxError")


def test_tests_without_an_entry_point_take_any_program(pool: Grading) -> None:
    one = row({"test_list": ["assert x == 3"]})
    assert pool.grade("code", "So:\nx = 3\nThat is it.", None, row=one).correct
    assert not pool.grade("code", "x = 4", None, row=one).correct


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["```", "```python\n", "\n", "def area(r):", "    ", "return 1", "(", '"""', "\\", "x",
             "[BEGIN]", "[DONE]", "@", "~~~", "\t", "if x:", "'", "\0", "\ud800", "f'{"]
        ),
        max_size=14,
    ).map("".join)
)  # fmt: skip
def test_no_text_raises_and_each_gives_a_text(answer: str) -> None:
    for stub in ("", STUB):
        assert isinstance(program_in(answer, entry_point="area", stub=stub), str)


@pytest.mark.parametrize("part", ["(", "-", "a.", "f(", "@a\n", "```\n", "not ", "if 1:\n "])
def test_a_long_answer_costs_no_crash(part: str) -> None:
    assert program_in(WHOLE + part * 5000, entry_point="area")


# --- the door -------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [area_row(), sum_row()])
def test_gold_is_right_empty_and_another_s_gold_are_wrong(pool: Grading, one: Any) -> None:
    other = sum_row() if one["meta"] == area_row()["meta"] else area_row()
    found, others = code_tests(one), code_tests(other)
    assert found
    assert others
    assert found.gold
    assert others.gold
    answers = [found.gold, f"```python\n{found.gold}\n```", "", " \n", others.gold]
    verdicts = pool.grade_all("auto", [Given(answer, None, one) for answer in answers])
    assert [v.correct for v in verdicts] == [True, True, False, False, False]
    assert [v.reason for v in verdicts[:3]] == ["passed", "passed", "empty answer"]


def test_kinds_are_graded_together_and_verdicts_keep_the_order(pool: Grading) -> None:
    good = "def add(xs): return sum(xs)"
    verdicts = pool.grade_all(
        "auto",
        [
            Given("72", "72", row({}, answer="72")),
            Given(good, None, sum_row()),
            Given("71", "72", row({}, answer="72")),
            Given("def add(xs): return 3", None, sum_row()),
            Given("B", "B", row({}, answer="B")),
        ],
    )
    assert [v.correct for v in verdicts] == [True, True, False, False, True]
    assert verdicts[3].reason == "failed: AssertionError in line 2: assert add([]) == 0"


def test_a_row_without_tests_names_itself_and_the_columns(pool: Grading) -> None:
    for door in (pool.grade, grade):
        with pytest.raises(DataError, match=r"row 'r:1' has no tests .* `test` and `entry_point`"):
            door("code", "x = 1", "72", row=row({}))


def test_a_fault_in_reading_an_answer_is_a_wrong_answer_that_says_so(
    pool: Grading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(answer: str, *, entry_point: str | None, stub: str = "") -> str:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(code_answers, "program_in", broken)
    verdict = pool.grade("code", "x", None, row=sum_row())
    assert verdict == Verdict(False, "grader raised ZeroDivisionError: by nothing")


def test_a_reason_is_one_plain_line_whatever_the_program_raised(pool: Grading) -> None:
    program = "def add(xs): raise ValueError('\\x1b[31m\\ud800' + 'x' * 900)"
    reason = pool.grade("code", program, None, row=sum_row()).reason
    assert reason.startswith("failed: ValueError: ?[31m?xxx")
    assert reason.isprintable()
    assert len(reason) <= code_answers.REASON_WIDTH
    assert verdict_of(SandboxVerdict(True, "passed", "", 0.1)) == Verdict(True, "passed")


# --- one pool for a run ---------------------------------------------------------------------------


class Counted(Sandbox):
    """A pool that only counts how often one is started and ended."""

    started = ended = 0

    def __enter__(self) -> Any:
        Counted.started += 1
        return self

    def __exit__(self, *error: Any) -> None:
        Counted.ended += 1

    def map(self, jobs: Any) -> Iterator[SandboxVerdict]:
        return (SandboxVerdict(True, "passed", "", 0.0) for _ in jobs)


def test_one_pool_serves_a_run_and_none_starts_without_a_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grading, "SANDBOXES", {"bubblewrap": Counted})
    Counted.started = Counted.ended = 0
    with Grading() as pool:
        assert pool.grade("numeric", "72", "72", row={}).correct
        assert not pool.grade("code", " ", None, row=sum_row()).correct
        assert (Counted.started, Counted.ended) == (0, 0)
        for _ in range(3):
            assert pool.grade("code", "x", None, row=sum_row()).correct
    assert (Counted.started, Counted.ended) == (1, 1)


def test_where_nothing_may_run_programs_it_says_so_before_any_answer_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with Grading() as pool:
        pool.check("auto", [row({}, answer="72")])
        with pytest.raises(EngineError, match=r"bwrap.* not found; install bubblewrap"):
            pool.check("auto", [row({}, answer="72"), sum_row()])


def test_an_unknown_sandbox_or_grader_is_told_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no sandbox 'docker'; known: bubblewrap, none"):
        Grading("docker")
    with Grading("none") as pool, pytest.raises(RecipeError, match=r"no grader 'cod'.*'code'"):
        pool.check("cod", [sum_row()])


def test_each_row_is_asked_whether_its_own_gold_passes(pool: Grading) -> None:
    rows = [
        area_row(), sum_row(), sum_row(code="def add(xs): return 3"), sum_row(code=None),
        row({}, answer="72"),
    ]  # fmt: skip
    faults = pool.gold_faults("auto", rows)
    assert [bool(fault) for fault in faults] == [False, False, True, False, False]
    assert "assert add([]) == 0" in faults[2]
    assert "has no number" in pool.gold_faults("numeric", [row({}, answer="Paris")])[0]
