"""Task `modchain`: a chain of sums, differences and products modulo a prime, from left to right.

"12+5*3" is (12 + 5) * 3, and modulo 23 the values are 17 and 5. The fast answer is "17 5" (every
value, without what made it) or "5"; the chain shows each step: "12+5=17 17*3=5", and then "5". The
same problem in words: "12 plus 5 times 3", or 十二加五乘三 with the answer 十七 五.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from tutelage.tasks.base import Item, LabTask, Problem, Range, TaskConfig, between, rising

Language = Literal["", "en", "zh"]
WORDS: Mapping[str, Mapping[str, str]] = {
    "": {"+": "+", "-": "-", "*": "*", "=": "=", "next": " "},
    "en": {"+": " plus ", "-": " minus ", "*": " times ", "=": " is ", "next": ", "},
    "zh": {"+": "加", "-": "减", "*": "乘", "=": "得", "next": "，"},
}
DIGITS = "零一二三四五六七八九"
LARGEST_MODULUS = 100  # Chinese numerals are written up to 99


class ModchainConfig(TaskConfig):
    """`fold` hashes modulus and problem, in symbols whatever the language."""

    modulus: Annotated[int, Field(ge=2, le=LARGEST_MODULUS)] = 23
    steps: Range = (2, 4)
    """Fewest and most operations."""
    operands: Range = (1, 9)
    """Range of d in `v0 op d op d ...`; v0 is any value below the modulus."""
    operations: Annotated[str, Field(pattern=r"^[-+*]+$")] = "+-*"
    fast: Literal["values", "final"] = "values"
    """The answer without a chain: the value after each operation, or only the last. Behind a chain
    it is the last alone."""
    show_from: Annotated[int, Field(ge=0)] = 0
    """So many of the first steps are left out of the chain, in the manner of arXiv 2405.14838; at
    or above the number of steps nothing is left of it."""
    language: Language = ""
    """Symbols and digits; English words and digits; or Chinese words and numerals."""

    @field_validator("steps", "operands")
    @classmethod
    def _rising(cls, value: Range) -> Range:
        return rising(value)

    @model_validator(mode="after")
    def _fits(self) -> "ModchainConfig":
        if self.steps[0] < 1:
            raise ValueError("steps: a chain has at least one")
        if self.show_from and not self.reasoning:
            raise ValueError("show_from cuts a chain: set reasoning = true")
        if self.operands[1] >= self.modulus:
            raise ValueError(f"operands: they stay below the modulus, {self.modulus}")
        return self


def draw(rng: np.random.Generator, config: ModchainConfig) -> Problem:
    """Length, first value, operations and operands, each uniform in its range."""
    first, operations = int(rng.integers(config.modulus)), config.operations
    steps = [
        (operations[int(rng.integers(len(operations)))], between(rng, config.operands))
        for _ in range(between(rng, config.steps))
    ]
    key = f"modchain {config.modulus} {_asked(first, steps, '')}"
    return Problem(key, _asked(first, steps, config.language), (first, steps))


def solve(rng: np.random.Generator, problem: Problem, config: ModchainConfig) -> Item:
    """The values, and as the chain each step with its operands."""
    first, steps = problem.content
    language = config.language
    values = chain(first, steps, modulus=config.modulus)
    words, texts = WORDS[language], [number(value, language) for value in (first, *values)]
    shown = [
        f"{before}{words[operation]}{number(operand, language)}{words['=']}{after}"
        for before, (operation, operand), after in zip(texts, steps, texts[1:], strict=False)
    ]
    thinking = words["next"].join(shown[config.show_from :])
    every = config.fast == "values" and not config.reasoning
    response = " ".join(texts[1:]) if every else texts[-1]
    meta = {"values": values, "modulus": config.modulus, "language": language, "id": problem.key}
    return Item(problem.prompt, thinking, response, texts[-1], language, meta)


def verify(answer: str, meta: Mapping[str, Any]) -> tuple[bool, str]:
    """The last value alone, or the value after each operation; spelled as asked for, nothing else.

    One wrong value on the way makes the answer wrong.
    """
    given = answer.split()
    wanted = [number(value, meta["language"]) for value in meta["values"]]
    if given in (wanted, wanted[-1:]):
        return True, f"ends in {wanted[-1]}"
    if len(given) not in (1, len(wanted)):
        return False, f"{len(given)} values, not {len(wanted)} or 1"
    pairs = zip(given, wanted[-len(given) :], strict=True)
    ours, right = next((ours, right) for ours, right in pairs if ours != right)
    return False, f"{ours[:20]} is not {right}"


def chain(first: int, steps: Sequence[tuple[str, int]], *, modulus: int) -> list[int]:
    """The value after each operation, modulo `modulus`, from left to right."""
    values, value = [], first
    for operation, operand in steps:
        change = {"+": value + operand, "-": value - operand, "*": value * operand}
        value = change[operation] % modulus
        values.append(value)
    return values


def number(value: int, language: str) -> str:
    """A number from 0 to 99: in digits, or 十二, 二十, 三十四 in Chinese."""
    if language != "zh":
        return str(value)
    tens, ones = divmod(value, 10)
    if not tens:
        return DIGITS[ones]
    return (DIGITS[tens] if tens > 1 else "") + "十" + (DIGITS[ones] if ones else "")


def _asked(first: int, steps: Sequence[tuple[str, int]], language: str) -> str:
    words = WORDS[language]
    rest = (words[operation] + number(operand, language) for operation, operand in steps)
    return number(first, language) + "".join(rest)


MODCHAIN = LabTask("modchain", 1, ModchainConfig, draw, solve, verify)
