"""modchain: values by closed form, the same problems in three spellings, chains that shorten."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.tasks import TASKS, Item
from tutelage.tasks.modchain import chain, number, verify


def items(count: int, **config: Any) -> list[Item]:
    task = TASKS["modchain"]
    return list(task.items(task.configure(config), seed=0, count=count))


@given(
    st.integers(0, 22),
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(1, 22)), min_size=1, max_size=6),
)
def test_reducing_at_each_step_or_once_gives_the_same(
    first: int, steps: list[tuple[str, int]]
) -> None:
    whole = first
    for operation, operand in steps:
        whole = {"+": whole + operand, "-": whole - operand, "*": whole * operand}[operation]
    assert chain(first, steps, modulus=23)[-1] == whole % 23


def test_a_chain_goes_from_left_to_right() -> None:
    assert chain(12, [("+", 5), ("*", 3), ("-", 6)], modulus=23) == [17, 5, 22]


def test_answer_and_chain_of_each_form() -> None:
    values, final, chained = (
        items(50, **config) for config in ({}, {"fast": "final"}, {"reasoning": True})
    )
    for one, last, shown in zip(values, final, chained, strict=True):
        assert one.prompt == last.prompt == shown.prompt
        assert one.response.split() == [str(value) for value in one.meta["values"]]
        assert last.response == shown.response == one.answer == one.response.split()[-1]


def test_each_step_of_a_chain_is_true_and_starts_where_the_last_ended() -> None:
    for item in items(200, reasoning=True):
        before = re.match(r"\d+", item.prompt)
        assert before
        reached = before[0]
        for step in item.thinking.split(" "):
            left, operation, right, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
            assert left == reached
            assert chain(int(left), [(operation, int(right))], modulus=23) == [int(result)]
            reached = result
        assert reached == item.answer


@pytest.mark.parametrize("hidden", [0, 1, 3, 9])
def test_a_shortened_chain_lacks_its_first_steps_and_nothing_else(hidden: int) -> None:
    whole = items(50, steps=[3, 4], reasoning=True)
    cut = items(50, steps=[3, 4], reasoning=True, show_from=hidden)
    for one, short in zip(whole, cut, strict=True):
        assert short.thinking.split() == one.thinking.split()[hidden:]
        assert (short.prompt, short.response) == (one.prompt, one.response)


def test_lengths_and_operands_stay_in_their_ranges() -> None:
    for item in items(200, steps=[3, 5], operands=[4, 6], operations="-"):
        operands = re.findall(r"-(\d+)", item.prompt)
        assert 3 <= len(operands) <= 5
        assert set(operands) <= {"4", "5", "6"}


def test_two_languages_ask_the_same_problems_in_the_same_order_and_fold() -> None:
    symbols, english, chinese = (
        items(200, language=language, fold=[1, 3]) for language in ("", "en", "zh")
    )
    ids = [[item.meta["id"] for item in found] for found in (symbols, english, chinese)]
    assert ids[0] == ids[1] == ids[2]
    assert {item.language for item in chinese} == {"zh"}


def test_spellings_by_example() -> None:
    task = TASKS["modchain"]
    spelled = {}
    for language in ("", "en", "zh"):
        config = task.configure({"language": language, "reasoning": True})
        problem = task.draw(_Fixed(), config)  # type: ignore[arg-type]
        item = task.solve(_Fixed(), problem, config)  # type: ignore[arg-type]
        spelled[language] = (item.prompt, item.thinking, item.response)
    assert spelled[""] == ("2+2+2", "2+2=4 4+2=6", "6")
    assert spelled["en"] == ("2 plus 2 plus 2", "2 plus 2 is 4, 4 plus 2 is 6", "6")
    assert spelled["zh"] == ("二加二加二", "二加二得四，四加二得六", "六")


class _Fixed:
    """Stands in for a generator: the first choice, or 2 where a range begins lower."""

    def integers(self, low: int, high: int | None = None) -> int:
        if high is None:
            return 0 if low == 3 else 2
        return 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "零"), (7, "七"), (10, "十"), (12, "十二"), (20, "二十"), (34, "三十四"), (99, "九十九")],
)
def test_chinese_numerals(value: int, text: str) -> None:
    assert number(value, "zh") == text


def test_no_two_chinese_numerals_are_alike() -> None:
    assert len({number(value, "zh") for value in range(100)}) == 100


def test_any_value_off_by_one_is_wrong() -> None:
    for item in items(300):
        values = item.meta["values"]
        for place in range(len(values)):
            for by in (-1, 1):
                near = [*values[:place], values[place] + by, *values[place + 1 :]]
                assert not verify(" ".join(map(str, near)), item.meta)[0]
        assert not verify(str(values[-1] + 1), item.meta)[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("17 5 22", "ends in 22"),
        ("22", "ends in 22"),
        ("5 22", "2 values, not 3 or 1"),
        ("17 5 22 22", "4 values, not 3 or 1"),
        ("17 6 22", "6 is not 5"),
        ("-1", "-1 is not 22"),
        ("022", "022 is not 22"),
        ("二十二", "二十二 is not 22"),
    ],
)
def test_a_verdict_says_why(answer: str, reason: str) -> None:
    meta = {"values": [17, 5, 22], "language": "", "modulus": 23}
    assert verify(answer, meta) == (reason.startswith("ends"), reason)
