"""What every lab task is: problems drawn from a seed, split by parameters, judged exactly.

Owns the settings all tasks share, how items are drawn, folded and kept apart, and the order of
random numbers. Knows no task and no model.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from tutelage.core.errors import DataError
from tutelage.recipe.base import PositiveInt, Table

LAB_KEY = "lab_task"
"""Where a row's meta keeps {"name", "meta"}: all that its verifier needs."""
MOST_DRAWS = 100_000
"""Draws in a row without a new prompt after which a space counts as used up. One prompt left of
gridwalk's 2,352 would be missed with a probability of exp(-42)."""


class TaskConfig(Table):
    """The settings all tasks share."""

    fold: tuple[tuple[int, ...], PositiveInt] | None = None
    """[k, n] or [[k, ...], n]: only problems whose hash modulo n is (among) k, so that sets with
    other k share none. What the hash is of, each task says; no other setting moves a problem."""
    reasoning: bool = False
    """Answers carry a chain between the think markers."""
    prompts_only: bool = False
    """Rows end with the question; the gold answer is still there for a verifier."""
    copies: PositiveInt = 1
    """Rows each prompt gets, one behind the other, each with a gold answer drawn anew."""

    @field_validator("fold", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], int):
            return ((value[0],), value[1])
        return value

    @field_validator("fold")
    @classmethod
    def _below_n(cls, value: tuple[tuple[int, ...], int] | None) -> Any:
        if value is not None and not (value[0] and all(0 <= k < value[1] for k in value[0])):
            raise ValueError("[k, n] or [[k, ...], n] with every k from 0 to n - 1")
        return value


Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
"""[lowest, highest], both included."""


def rising(value: Range) -> Range:
    """The range. Raises ValueError where its ends are the wrong way round."""
    if value[0] > value[1]:
        raise ValueError("the lower end of a range comes first")
    return value


@dataclass(frozen=True)
class Problem:
    """What is asked, before it is solved."""

    key: str
    """What `fold` hashes: the same for all ways to write the problem down."""
    prompt: str
    content: Any
    """The task's own form of it."""


@dataclass(frozen=True)
class Item:
    """A problem with one gold solution."""

    prompt: str
    thinking: str
    """The chain that leads to the answer; only rows of `reasoning = true` get it."""
    response: str
    """What a right answer looks like, to be learned from."""
    answer: str
    """What a verifier takes as gold."""
    language: str
    """"" where the text is of no language."""
    meta: dict[str, Any]
    """JSON: what `verify` needs."""


@dataclass(frozen=True)
class LabTask:
    """A task by its functions. `version` rises when the same settings and seed give other items."""

    name: str
    version: int
    config_type: type[TaskConfig]
    draw: Callable[[np.random.Generator, Any], Problem]
    """A problem, without regard to `fold`."""
    solve: Callable[[np.random.Generator, Problem, Any], Item]
    verify: Callable[[str, Mapping[str, Any]], tuple[bool, str]]
    """Whether an answer without its chain is right given an item's meta, and why in a few words."""

    def configure(self, settings: Mapping[str, Any]) -> TaskConfig:
        """The typed settings. Raises DataError with the first fault and the nearest key."""
        try:
            return self.config_type.model_validate(dict(settings))
        except ValidationError as error:
            reason = _explain(error, self.config_type)
            raise DataError(f"task:{self.name} cannot be made: {reason}") from None

    def make(self, rng: np.random.Generator, config: TaskConfig) -> Item:
        """One item inside the fold. Raises DataError where the fold seems to be empty."""
        for _ in range(MOST_DRAWS):
            problem = self.draw(rng, config)
            if in_fold(problem.key, config.fold):
                return self.solve(rng, problem, config)
        raise DataError(f"task:{self.name} found no problem in fold {config.fold}: widen it")

    def items(self, config: TaskConfig, *, seed: int, count: int) -> Iterator[Item]:
        """`count` items, no prompt more than `copies` times, the same for the same arguments.

        Which problems come, and in which order, hangs on the seed and on what is asked alone: two
        data sets that differ in how they are answered or spelled have the same ones, row by row.
        Raises DataError when there are not so many prompts.
        """
        drawing, solving = (np.random.default_rng([seed, stream]) for stream in range(2))
        seen: set[str] = set()
        given = fruitless = 0
        while given < count:
            problem = self.draw(drawing, config)
            fruitless += 1
            if in_fold(problem.key, config.fold) and problem.prompt not in seen:
                fruitless = 0
                seen.add(problem.prompt)
                for _ in range(min(config.copies, count - given)):
                    given += 1
                    yield self.solve(solving, problem, config)
            if fruitless > MOST_DRAWS:
                raise DataError(
                    f"task:{self.name} has only {len(seen)} different prompts with this config, "
                    f"not {-(-count // config.copies)}: lower limit, raise copies, or widen it"
                )


def in_fold(key: str, fold: tuple[tuple[int, ...], int] | None) -> bool:
    """Whether sha256(key), its first 8 bytes as a number, modulo n is among the fold's k."""
    if fold is None:
        return True
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % fold[1] in fold[0]


def between(rng: np.random.Generator, ends: Range) -> int:
    """A number of the range, each as likely."""
    return int(rng.integers(ends[0], ends[1] + 1))


def _explain(error: ValidationError, config: type[TaskConfig]) -> str:
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where, list(config.model_fields), n=1, cutoff=0.5)
        known = ", ".join(sorted(config.model_fields))
        return f"{where}: unknown key; " + (f"did you mean {close[0]!r}?" if close else known)
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {fault['input']!r}" if where else message
