"""Task `codeout`: what does a tiny Python program print?

Programs are drawn as trees of four kinds of statements and interpreted by `run`; no text of theirs
is ever executed. What Python prints for them is the same. The chain traces the program: each
assignment and turn of a loop as "b=8", each condition as "yes" or "no", each output as "print 8".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from tutelage.core.errors import DataError
from tutelage.tasks.base import Item, LabTask, Problem, Range, TaskConfig, between, rising

NAMES = "abc"
COUNTER = "i"
OPERATIONS = "+-*"
COMPARISONS = ("<", ">", "==")
PRINT_SHARE = 0.2  # of the single lines; so that outputs of several lines are met too
MOST_PROGRAMS = 10_000
"""Draws until one keeps to `largest`."""

Operand = int | str
"""A number, or the name of a variable."""


@dataclass(frozen=True)
class Expression:
    """`left`, or `left operation right`."""

    left: Operand
    operation: str = ""
    right: Operand = 0

    def __str__(self) -> str:
        return f"{self.left}{self.operation}{self.right}" if self.operation else str(self.left)


@dataclass(frozen=True)
class Assign:
    """name=value"""

    name: str
    value: Expression


@dataclass(frozen=True)
class Print:
    """print(value)"""

    value: Expression


@dataclass(frozen=True)
class If:
    """if left comparison right: body"""

    left: Operand
    comparison: str
    right: Operand
    body: "tuple[Statement, ...]"


@dataclass(frozen=True)
class For:
    """for i in range(times): body"""

    times: int
    body: "tuple[Statement, ...]"


Statement = Assign | Print | If | For


class CodeoutConfig(TaskConfig):
    """`fold` hashes the program's text."""

    lines: Range = (6, 8)
    """Lines of the program, the last print included; a loop or condition has two."""
    loops: Range = (0, 1)
    ifs: Range = (0, 1)
    repeats: Range = (2, 3)
    """Turns of a loop."""
    operands: Range = (1, 9)
    """The numbers written in the program."""
    largest: Annotated[int, Field(ge=1)] = 999
    """No variable is ever farther from 0."""

    @field_validator("lines", "loops", "ifs", "repeats", "operands")
    @classmethod
    def _rising(cls, value: Range) -> Range:
        return rising(value)

    @model_validator(mode="after")
    def _fits(self) -> "CodeoutConfig":
        least = 2 + 2 * (self.loops[1] + self.ifs[1])
        if self.lines[0] < least:
            raise ValueError(
                f"lines: {self.loops[1]} loops and {self.ifs[1]} ifs between the first line and "
                f"the last need {least} at least"
            )
        if self.operands[1] > self.largest:
            raise ValueError(f"operands: they may not be larger than largest, {self.largest}")
        return self


def draw(rng: np.random.Generator, config: CodeoutConfig) -> Problem:
    """A program whose variables stay within `largest`."""
    for _ in range(MOST_PROGRAMS):
        program = _program(rng, config)
        if run(program).largest <= config.largest:
            text = "\n".join(source(program))
            return Problem(f"codeout {text}", text, program)
    raise DataError("task:codeout finds no program that stays so small: raise largest")


def solve(rng: np.random.Generator, problem: Problem, config: CodeoutConfig) -> Item:
    """The output, and as the chain the trace."""
    done = run(problem.content)
    output = "\n".join(map(str, done.output))
    trace = "\n".join(done.trace)
    return Item(problem.prompt, trace, output, output, "", {"output": list(done.output)})


def verify(answer: str, meta: Mapping[str, Any]) -> tuple[bool, str]:
    """The output line by line, and nothing but it; space around the whole is no matter."""
    given, wanted = answer.strip().split("\n"), [str(value) for value in meta["output"]]
    for line, (ours, right) in enumerate(zip(given, wanted, strict=False), 1):
        if ours != right:
            return False, f"line {line}: {ours[:40]!r} is not {right!r}"
    if len(given) != len(wanted):
        return False, f"{len(given)} lines, not {len(wanted)}"
    return True, f"{len(wanted)} lines as printed"


@dataclass(frozen=True)
class Done:
    """What a program did; `largest` is the greatest distance of a value from 0."""

    output: tuple[int, ...]
    trace: tuple[str, ...]
    largest: int


def run(program: Sequence[Statement]) -> Done:
    """Interpret a program. Raises KeyError for a variable without a value."""
    values: dict[str, int] = {}
    output: list[int] = []
    trace: list[str] = []
    sizes = [0]

    def value(operand: Operand) -> int:
        return operand if isinstance(operand, int) else values[operand]

    def assign(name: str, new: int) -> None:
        values[name] = new
        sizes.append(abs(new))
        trace.append(f"{name}={new}")

    def walk(statements: Sequence[Statement]) -> None:
        for statement in statements:
            match statement:
                case Assign(name, expression):
                    assign(name, _evaluated(expression, value))
                case Print(expression):
                    output.append(_evaluated(expression, value))
                    trace.append(f"print {output[-1]}")
                case If(left, comparison, right, body):
                    ours, other = value(left), value(right)
                    true = {"<": ours < other, ">": ours > other, "==": ours == other}[comparison]
                    trace.append("yes" if true else "no")
                    walk(body if true else ())
                case For(times, body):
                    for turn in range(times):
                        assign(COUNTER, turn)
                        walk(body)

    walk(program)
    return Done(tuple(output), tuple(trace), max(sizes))


def source(program: Sequence[Statement], indent: str = "") -> list[str]:
    """The lines of a program as Python text."""
    lines: list[str] = []
    for statement in program:
        match statement:
            case Assign(name, expression):
                lines.append(f"{indent}{name}={expression}")
            case Print(expression):
                lines.append(f"{indent}print({expression})")
            case If(left, comparison, right, body):
                lines += [f"{indent}if {left}{comparison}{right}:", *source(body, indent + " ")]
            case For(times, body):
                lines.append(f"{indent}for {COUNTER} in range({times}):")
                lines += source(body, indent + " ")
    return lines


def _evaluated(expression: Expression, value: Any) -> int:
    left, right = value(expression.left), value(expression.right)
    if not expression.operation:
        return left
    return {"+": left + right, "-": left - right, "*": left * right}[expression.operation]


def _program(rng: np.random.Generator, config: CodeoutConfig) -> tuple[Statement, ...]:
    loops, ifs = between(rng, config.loops), between(rng, config.ifs)
    singles = between(rng, config.lines) - 2 - 2 * (loops + ifs)
    kinds = ["for"] * loops + ["if"] * ifs + ["single"] * singles
    known = [NAMES[0]]
    program: list[Statement] = [Assign(NAMES[0], Expression(between(rng, config.operands)))]
    for index in rng.permutation(len(kinds)):
        program.append(_statement(rng, config, kinds[int(index)], known))
        match program[-1]:
            case Assign(name, _) if name not in known:
                known.append(name)
    return (*program, Print(Expression(_assigned_last(program))))


def _assigned_last(program: Sequence[Statement]) -> str:
    """So that most lines count: of a variable drawn at random, the first line is often the end."""
    statements = [inner for outer in program for inner in getattr(outer, "body", (outer,))]
    return [inner.name for inner in statements if isinstance(inner, Assign)][-1]


def _statement(
    rng: np.random.Generator, config: CodeoutConfig, kind: Literal["for", "if", "single"] | str,
    known: Sequence[str],
) -> Statement:  # fmt: skip
    if kind == "for":
        body = _single(rng, config, known, new=False, readable=(*known, COUNTER))
        return For(between(rng, config.repeats), (body,))
    if kind == "if":
        left = _pick(rng, known)
        right = _operand(rng, config, [name for name in known if name != left])
        return If(left, _pick(rng, COMPARISONS), right, (_single(rng, config, known, new=False),))
    return _single(rng, config, known, new=len(known) < len(NAMES))


def _single(
    rng: np.random.Generator, config: CodeoutConfig, known: Sequence[str],
    *, new: bool, readable: Sequence[str] = (),
) -> Assign | Print:  # fmt: skip
    """A print, or an assignment: to a known variable, or with `new` perhaps to the next one."""
    expression = Expression(
        _pick(rng, readable or known), _pick(rng, OPERATIONS), _operand(rng, config, readable)
    )
    if rng.random() < PRINT_SHARE:
        return Print(expression)
    targets = NAMES[: len(known) + 1] if new else known
    return Assign(_pick(rng, targets), expression)


def _operand(rng: np.random.Generator, config: CodeoutConfig, names: Sequence[str]) -> Operand:
    """A number, or in half of the cases with names one of them."""
    if names and rng.random() < 0.5:
        return _pick(rng, names)
    return between(rng, config.operands)


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


CODEOUT = LabTask("codeout", 1, CodeoutConfig, draw, solve, verify)
