"""Graders by name: is an answer right, given the gold answer? One door, which never raises for a
bad answer.

Owns the names, the choice of a grader for a row, and what counts as wrong before any grader looks.
How each one judges is in `grading_text`, `grading_numeric` and `grading_worker`. A chain of thought
is no part of the answer a grader is given. Where many answers are programs, `grading.Grading` is
the door: it keeps sandboxes ready.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from tutelage.core.errors import DataError, RecipeError, TutelageError
from tutelage.evals.code_answers import by_code, has_tests
from tutelage.evals.grading_numeric import is_number, numeric
from tutelage.evals.grading_task import by_lab_task
from tutelage.evals.grading_text import LETTERS, RAISED, Verdict, choice, exact
from tutelage.evals.grading_worker import ENTRY_KEY, by_math_verify, by_reasoning_gym
from tutelage.tasks import LAB_KEY

__all__ = [
    "AUTO", "CODE", "EMPTY", "GRADERS", "Grader", "Verdict", "can_grade", "grade", "grader_for",
    "raised", "resolved",
]  # fmt: skip

AUTO = "auto"
"""The name that stands for `grader_for(row)`."""
CODE = "code"
EMPTY = "empty answer"
"""A verdict's reason where no grader was asked."""


class Grader(Protocol):
    """Judges a stripped, non-empty answer; may raise, which `grade` counts as wrong."""

    def __call__(self, answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict: ...


GRADERS: Mapping[str, Grader] = {
    "exact": exact,
    "numeric": numeric,
    "math": by_math_verify,
    "choice": choice,
    CODE: by_code,
    "task": by_lab_task,
    "reasoning-gym": by_reasoning_gym,
}

GSM8K = re.compile(r"####\s*(?P<number>.+?)\s*\Z")
FORMULA = re.compile(r"\\[A-Za-z]+|\$.+\$|\^|[√π∞≤≥∪∩]", re.DOTALL)
ALGEBRA = re.compile(r"(?:\d|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[-+*/=<>|()\[\],.\s])+", re.ASCII)
"""Digits, letters that stand alone, operators and brackets."""


def grade(name: str, answer: str, gold: str | None, *, row: Mapping[str, Any]) -> Verdict:
    """The verdict of the grader `name` ("auto": `grader_for(row)`) on an answer without its chain.

    An empty answer is wrong, and so is one on which the grader raises; the reason says so.

    Raises RecipeError for an unknown name, DataError for a row without a gold answer (tests, for
    "code") or a grader whose library is not installed, EngineError where a grader's own process
    does not start.
    """
    name = resolved(name, row)
    if name != CODE and not can_grade(name, row, gold):
        raise DataError(
            f"row {row.get('id')!r} has no gold answer to grade by: map the column `answer`"
        )
    if not answer.strip():
        return Verdict(False, EMPTY)
    try:
        return GRADERS[name](answer, gold or "", row=row)
    except TutelageError:
        raise
    except Exception as error:  # an answer nobody thought of must cost one point, not the run
        return raised(error)


def raised(error: Exception) -> Verdict:
    """What an answer is worth on which a grader raised: nothing, and it is said."""
    return Verdict(False, f"{RAISED} {type(error).__name__}: {error}"[:200])


def resolved(name: str, row: Mapping[str, Any]) -> str:
    """The grader's own name, for "auto" the one that suits the row. RecipeError if unknown."""
    if name == AUTO:
        return grader_for(row)
    if name not in GRADERS:
        close = difflib.get_close_matches(name, GRADERS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(GRADERS)}, {AUTO}"
        raise RecipeError(f"there is no grader {name!r}; {hint}")
    return name


def can_grade(name: str, row: Mapping[str, Any], gold: str | None) -> bool:
    """Whether there is something to grade by: for "code" the row's tests, else a gold answer."""
    if resolved(name, row) == CODE:
        return has_tests(row)
    return gold is not None and bool(gold.strip())


def grader_for(row: Mapping[str, Any]) -> str:
    """The grader that suits a row's task and the form of its gold answer `row["answer"]`.

    A row of one of our lab tasks: "task". A row with a task and its reasoning-gym entry in meta:
    "reasoning-gym". A row with tests for a program: "code". A number, or GSM8K's form
    "... #### 72": "numeric". One letter A to D: "choice". LaTeX or algebra: "math". Anything else:
    "exact".
    """
    if row.get("task") and _has(LAB_KEY, row.get("meta")):
        return "task"
    if row.get("task") and _has(ENTRY_KEY, row.get("meta")):
        return "reasoning-gym"
    if has_tests(row):
        return CODE
    gold = (row.get("answer") or "").strip()
    end = GSM8K.search(gold)
    if is_number(end["number"] if end else gold):
        return "numeric"
    if re.fullmatch(rf"\(?[{LETTERS}]\)?\.?", gold):
        return "choice"
    if FORMULA.search(gold):
        return "math"
    if ALGEBRA.fullmatch(gold) and re.search(r"[A-Za-z]|,", gold) and re.search(r"[\d=]", gold):
        return "math"
    return "exact"


def _has(key: str, meta: Any) -> bool:
    if not isinstance(meta, str) or key not in meta:
        return False
    try:
        return key in json.loads(meta)
    except (ValueError, TypeError, RecursionError):
        return False
