"""codeout: our interpreter prints what Python prints; the output must be exact."""

import subprocess
import sys
from typing import Any

import pytest

from tutelage.tasks import TASKS, Item
from tutelage.tasks.codeout import (
    Assign,
    Expression,
    For,
    If,
    Print,
    Statement,
    run,
    source,
    verify,
)

LARGE = {"lines": [11, 14], "loops": [1, 2], "ifs": [1, 2], "operands": [0, 9]}


def items(count: int, **config: Any) -> list[Item]:
    task = TASKS["codeout"]
    return list(task.items(task.configure(config), seed=0, count=count))


EXAMPLE: tuple[Statement, ...] = (
    Assign("a", Expression(2)),
    For(2, (Assign("a", Expression("a", "*", 3)),)),
    If("a", ">", 9, (Print(Expression("a", "-", 1)),)),
    If("a", "==", 9, (Print(Expression("a")),)),
    Print(Expression("a", "+", "a")),
)


def test_a_program_as_text_as_output_and_as_trace() -> None:
    assert source(EXAMPLE) == [
        "a=2", "for i in range(2):", " a=a*3", "if a>9:", " print(a-1)", "if a==9:", " print(a)",
        "print(a+a)",
    ]  # fmt: skip
    done = run(EXAMPLE)
    assert done.output == (17, 36)
    assert done.trace == (
        "a=2", "i=0", "a=6", "i=1", "a=18", "yes", "print 17", "no", "print 36",
    )  # fmt: skip
    assert done.largest == 18


@pytest.mark.parametrize("config", [{}, LARGE])
def test_python_prints_the_same(config: dict[str, Any]) -> None:
    found = items(150, **config)
    # In a process of its own, as a user would run them; the texts are of our own making.
    whole = "\nprint('end')\n".join(item.prompt for item in found)
    printed = subprocess.run(
        [sys.executable, "-I", "-c", whole], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed.strip("\n").split("\nend\n") == [item.answer for item in found]


def test_sizes_stay_in_their_ranges() -> None:
    for item in items(200, **LARGE):
        lines = item.prompt.split("\n")
        assert 11 <= len(lines) <= 14
        assert 1 <= sum(line.startswith("for") for line in lines) <= 2
        assert 1 <= sum(line.startswith("if") for line in lines) <= 2


def test_no_value_is_larger_than_told() -> None:
    for item in items(300, largest=30, operands=[0, 9]):
        values = [line.split("=")[1] for line in item.thinking.split("\n") if "=" in line]
        assert max(abs(int(value)) for value in values) <= 30


def test_the_chain_ends_with_the_last_output() -> None:
    for item in items(100):
        printed = [
            line.removeprefix("print ")
            for line in item.thinking.split("\n")
            if line.startswith("print")
        ]
        assert "\n".join(printed) == item.answer
        assert item.thinking.endswith(f"print {printed[-1]}")


def test_one_line_more_or_less_or_off_by_one_is_wrong() -> None:
    for item in items(300, **LARGE):
        lines = item.answer.split("\n")
        for place, line in enumerate(lines):
            for near in ([str(int(line) + 1)], [str(int(line) - 1)], [], [line, line], [line, ""]):
                wrong = "\n".join([*lines[:place], *near, *lines[place + 1 :]])
                if wrong.strip() != item.answer:
                    assert not verify(wrong, item.meta)[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("17\n36", "2 lines as printed"),
        ("17\n36\n", "2 lines as printed"),
        ("17", "1 lines, not 2"),
        ("17\n36\n36", "3 lines, not 2"),
        ("17\n37", "line 2: '37' is not '36'"),
        ("17 36", "line 1: '17 36' is not '17'"),
        ("17\n\n36", "line 2: '' is not '36'"),
        ("17\n036", "line 2: '036' is not '36'"),
    ],
)
def test_a_verdict_says_why(answer: str, reason: str) -> None:
    meta = {"output": [17, 36]}
    assert verify(answer, meta) == (reason.endswith("as printed"), reason)


def test_a_variable_without_a_value_is_an_error_of_ours() -> None:
    with pytest.raises(KeyError):
        run((Print(Expression("b")),))
