"""Grading many answers, with one pool of sandboxes for all the programs among them.

Owns the pool, which starts at the first program, and the choice between walls and none. What is
right is the graders' affair; what a program may do, the sandbox's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from tutelage.core.errors import RecipeError, TutelageError
from tutelage.evals.code_answers import code_tests, job_for, verdict_of
from tutelage.evals.graders import CODE, grade, raised, resolved
from tutelage.evals.grading_text import Verdict
from tutelage.evals.sandbox import Job, Limits, Sandbox, Unsafe

SANDBOXES = {"bubblewrap": Sandbox, "none": Unsafe}
"""`[runtime] sandbox`: behind walls, or as the user with all that is the user's (`Unsafe`)."""


@dataclass(frozen=True)
class Given:
    """One answer without its chain, what it should be, and the row it belongs to."""

    answer: str
    gold: str | None
    row: Mapping[str, Any]


class Grading:
    """Grades answers, programs among them `workers` at a time. A context manager.

    With "bubblewrap" a program where that is missing raises EngineError, which says what to do; no
    other grader needs it. `sandbox` is `[runtime] sandbox`. Raises RecipeError for another name.
    """

    def __init__(
        self, sandbox: str = "bubblewrap", *, workers: int = 1, limits: Limits | None = None
    ) -> None:
        if sandbox not in SANDBOXES:
            raise RecipeError(f"no sandbox {sandbox!r}; known: {', '.join(SANDBOXES)}")
        self.sandbox, self.workers, self.limits = sandbox, workers, limits or Limits()
        self._pool: Sandbox | Unsafe | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pool, self._pool = self._pool, None
        if pool:
            pool.__exit__(*error)

    def grade(self, name: str, answer: str, gold: str | None, *, row: Mapping[str, Any]) -> Verdict:
        """The verdict on one answer; see `graders.grade`."""
        return self.grade_all(name, [Given(answer, gold, row)])[0]

    def grade_all(self, name: str, given: Sequence[Given]) -> list[Verdict]:
        """The verdict on each, in order, by the grader `name` or, for "auto", each row's own.

        Programs run at the same time. Raises as `graders.grade` does.
        """
        first = [self._at_once(name, one) for one in given]
        jobs = [one for one in first if isinstance(one, Job)]
        judged = self.started().map(jobs) if jobs else iter(())
        return [verdict_of(next(judged)) if isinstance(one, Job) else one for one in first]

    def check(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise now, before any answer is paid for, what grading these rows would raise first.

        RecipeError for an unknown name, EngineError where programs will come and nothing may run
        them.
        """
        if any(resolved(name, row) == CODE for row in rows):
            self.started()

    def gold_faults(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """For each row why the grader turns its own gold answer down, or "".

        A grader that does not suit the gold answers ("numeric" for text) would call every answer
        wrong. Rows with tests but no solution of their own cannot be asked; theirs is "".
        """
        golds = [_gold(name, row) for row in rows]
        asked = [i for i, gold in enumerate(golds) if gold is not None]
        given = [Given(golds[i] or "", rows[i]["answer"], rows[i]) for i in asked]
        faults = [""] * len(rows)
        for i, verdict in zip(asked, self.grade_all(name, given), strict=True):
            faults[i] = "" if verdict.correct else verdict.reason
        return faults

    def _at_once(self, name: str, one: Given) -> Verdict | Job:
        """The verdict, or for a program what the pool shall run."""
        if resolved(name, one.row) != CODE or not one.answer.strip():
            return grade(name, one.answer, one.gold, row=one.row)
        try:
            return job_for(one.answer, one.row)
        except TutelageError:
            raise
        except Exception as error:  # as in `graders.grade`
            return raised(error)

    def started(self) -> Sandbox | Unsafe:
        """The pool, entered: for a task that brings programs of its own. Raises as `check`."""
        pool = self._pool or SANDBOXES[self.sandbox](self.limits, self.workers).__enter__()
        self._pool = pool
        return pool


def _gold(name: str, row: Mapping[str, Any]) -> str | None:
    """What the row itself holds for right, as an answer; None where it only has tests."""
    if resolved(name, row) != CODE:
        return row["answer"]
    found = code_tests(row)
    return found.gold if found else None
