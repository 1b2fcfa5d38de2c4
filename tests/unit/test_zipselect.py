"""ZIP selection takes what repeats least, in an order that depends on the texts alone."""

import lzma
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.errors import DataError
from tutelage.data.zipselect import LEVEL, RAW_DEFLATE, zip_select

TEXTS = st.lists(st.text(alphabet="ab \U0001f600é", max_size=30), max_size=30)
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "ei", "o", "u", "ir")]


def ratio(texts: list[str]) -> float:
    """By LZMA, whose dictionary of 8 MB sees what deflate's 32 KB cannot."""
    joined = "\n".join(texts).encode()
    return len(joined) / len(lzma.compress(joined))


def sentence(rng: random.Random) -> str:
    words = ("".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20))
    return " ".join(words)


def planted(*, unique: int, repeats: int, templates: int) -> list[str]:
    """Sentences of their own, and sentences of a few templates that differ by one number."""
    rng = random.Random(0)
    sources = [sentence(rng) for _ in range(templates)]
    texts = [sentence(rng) for _ in range(unique)]
    texts += [f"{rng.randint(100, 999)} {rng.choice(sources)}" for _ in range(repeats)]
    rng.shuffle(texts)
    return texts


def test_planted_redundancy_is_left_out_where_a_random_choice_takes_it() -> None:
    texts = planted(unique=500, repeats=1000, templates=10)
    taken = [texts[index] for index in zip_select(texts, count=300)]
    chance = random.Random(1).sample(texts, 300)
    assert ratio(taken) < 0.6 * ratio(chance)
    # A template's first sentence is as new as any other; each further one repeats it.
    assert sum(text[0].isdigit() for text in taken) <= 10


def test_a_repeat_out_of_the_window_is_not_taken_once_it_was_seen_near_its_twin() -> None:
    texts = planted(unique=700, repeats=0, templates=0)
    assert len("\n".join(texts[:600])) > 2 * 32768
    doubled = texts + texts
    taken = zip_select(doubled, count=600, pool=1400, shortlist=1400, batch=50)
    assert len({doubled[index] for index in taken}) == 600


def test_each_text_taken_from_a_whole_pool_raises_the_ratio_least_to_a_byte() -> None:
    texts = planted(unique=15, repeats=15, templates=3)
    taken = zip_select(texts, count=6, pool=30, shortlist=30, batch=1)
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW_DEFLATE)
    size = cost = 0
    for step, index in enumerate(taken):
        left = [other for other in range(30) if other not in taken[:step]]
        sizes = {other: len(texts[other].encode()) + 1 for other in left}
        costs = {}
        for other in left:
            probe = stream.copy()
            costs[other] = len(probe.compress(f"{texts[other]}\n".encode())) + len(probe.flush())
        ratios = {other: (size + sizes[other]) / (cost + costs[other]) for other in left}
        # Kept costs are the lowest seen, and a cost can rise by a byte in a hundred again.
        assert ratios[index] <= 1.01 * min(ratios.values())
        size, cost = size + sizes[index], cost + costs[index]
        stream.compress(f"{texts[index]}\n".encode())
        stream.flush(zlib.Z_SYNC_FLUSH)


@settings(max_examples=30, deadline=None)
@given(TEXTS, st.data())
def test_a_selection_is_distinct_complete_and_the_same_again(
    texts: list[str], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, len(texts)))
    taken = zip_select(texts, count=count, pool=7, shortlist=4, batch=3)
    assert len(set(taken)) == len(taken) == count
    assert set(taken) <= set(range(len(texts)))
    assert taken == zip_select(texts, count=count, pool=7, shortlist=4, batch=3)


def test_of_equal_texts_the_earliest_is_taken_whichever_stage_cuts() -> None:
    assert zip_select(["same"] * 9, count=1, pool=4, shortlist=2, batch=1) == [0]


def test_a_lone_surrogate_is_text_like_any_other() -> None:
    assert zip_select(["\ud800", "plain"], count=2) in ([0, 1], [1, 0])


def test_more_rows_than_there_are_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match="3 rows asked for, 2 there"):
        zip_select(["a", "b"], count=3)


def test_a_shortlist_longer_than_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="shortlist"):
        zip_select(["a"], count=1, pool=10, shortlist=20, batch=1)
