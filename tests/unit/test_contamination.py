"""Evaluation text in rows: what is found, what is not, and what the match says."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.data.contamination import MAX_ITEMS, Index
from tutelage.text.words import normalise

VOCABULARY = [f"{first}{last}" for first in "bdfgklmnprstvz" for last in ("a", "el", "ino", "ush")]
CHINESE = "小明有五个苹果,他给了妹妹两个,又从市场买了七个。请问小明现在一共有多少个苹果?"
JAPANESE = (
    "太郎はりんごを五つ持っています。妹に二つあげて、市場で七つ買いました。今いくつありますか。"
)


def _texts(*, count: int, seed: int, num_words: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=num_words)) for _ in range(count)]


ITEMS = _texts(count=40, seed=0)
OTHERS = _texts(count=200, seed=1)


def test_planted_items_are_found_and_unrelated_text_is_not() -> None:
    index = Index.build(ITEMS)
    planted = [
        f"{other}: {item.upper()}? {other}" for item, other in zip(ITEMS, OTHERS, strict=False)
    ]
    assert [match and match.item for match in index.find_all(planted)] == list(range(40))
    assert index.find_all(OTHERS) == [None] * 200


def test_a_match_tells_the_item_its_share_and_the_text_in_common() -> None:
    words = ITEMS[7].split()
    match = Index.build(ITEMS).find("Intro. " + ", ".join(words[5:20]).title() + " and so on")
    assert match is not None
    assert match.item == 7
    assert match.share == 3 / 18  # 15 words hold 3 of the 18 n-grams of 30 words
    assert match.text == " ".join(words[5:20])


def test_twelve_words_in_common_are_not_enough() -> None:
    index = Index.build(ITEMS)
    assert index.find(" ".join(ITEMS[0].split()[:12])) is None
    assert index.find(" ".join(ITEMS[0].split()[:13])) is not None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 39), st.integers(0, 17), st.text(max_size=20), st.text(max_size=20))
def test_thirteen_words_are_found_between_any_two_texts(
    item: int, at: int, left: str, right: str
) -> None:
    shown = " ".join(ITEMS[item].split()[at : at + 13])
    match = Index.build(ITEMS).find(f"{left} {shown} {right}")
    assert match is not None
    assert match.item == item
    assert normalise(shown) in match.text


@pytest.mark.parametrize("item", [CHINESE, JAPANESE])
def test_chinese_and_japanese_are_found_by_characters(item: str) -> None:
    index = Index.build([CHINESE, JAPANESE])
    match = index.find("例題:" + item[:34].replace(",", " ") + "……")
    assert match is not None
    assert match.item == [CHINESE, JAPANESE].index(item)
    assert index.find(item[:20] + "小明喜欢唱歌") is None


def test_an_item_of_eight_to_twelve_words_is_found_inside_a_row() -> None:
    item = "Name nine rivers that flow through two countries"
    index = Index.build([*ITEMS, item])
    match = index.find(f"Please answer: {item.lower()}, in order.")
    assert match is not None
    assert (match.item, match.share) == (40, 1.0)
    assert match.text == normalise(item)


def test_a_shorter_item_is_found_only_as_the_whole_row() -> None:
    index = Index.build(["What is 3 + 4?"])
    assert index.find("what is 3+4") is not None
    assert index.find("Tell me: what is 3 + 4, and why?") is None


def test_instructions_that_many_items_share_do_not_count() -> None:
    instruction = "Choose the best answer from the four options below and give its letter alone now"
    index = Index.build([f"{instruction}. {text}" for text in ITEMS[: MAX_ITEMS + 1]])
    assert index.find(f"{instruction} {OTHERS[0]}") is None
    assert index.find(ITEMS[3]) is not None
    few = Index.build([f"{instruction}. {text}" for text in ITEMS[:MAX_ITEMS]])
    assert few.find(f"{instruction} {OTHERS[0]}") is not None


def test_an_item_repeated_often_is_no_instruction() -> None:
    index = Index.build([ITEMS[0]] * (MAX_ITEMS + 5) + [ITEMS[1]])
    match = index.find(ITEMS[0])
    assert match is not None
    assert match.item == 0
    assert index.num_grams_I.tolist() == [18] + [0] * (MAX_ITEMS + 4) + [18]


def test_of_two_items_the_one_with_the_larger_share_is_named() -> None:
    long, short = ITEMS[0], ITEMS[1]
    row = " ".join(long.split()[:16]) + " then " + short
    match = Index.build([long, short]).find(row)
    assert match is not None
    assert (match.item, match.share) == (1, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*ITEMS, *OTHERS, "", "…", CHINESE]), max_size=12))
def test_a_match_does_not_depend_on_the_other_texts(texts: list[str]) -> None:
    index = Index.build(ITEMS)
    assert index.find_all(texts) == [index.find(text) for text in texts]


def test_an_item_deep_in_a_very_long_row_is_found() -> None:
    filler = " ".join(_texts(count=400, seed=2, num_words=100))
    match = Index.build(ITEMS).find(f"{filler} {ITEMS[5]} {filler}")
    assert match is not None
    assert match.item == 5


def test_empty_texts_and_an_empty_index_match_nothing() -> None:
    assert Index.build(["", "!?"]).find_all(["", "!?", "a"]) == [None, None, None]
    assert Index.build([]).find(ITEMS[0]) is None
    assert Index.build(ITEMS).find_all([]) == []
