"""The bundled instruction prompts: what the shipped file promises to whoever trains on it."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import combinations

import pytest

from tutelage.data.rows import conversation
from tutelage.data.sources import read_source
from tutelage.recipe.curation import DataSource

FIELDS = ["id", "language", "category", "prompt"]
LANGUAGES = {"en", "zh", "de", "es", "fr", "ja"}
CATEGORIES = {
    "advice", "arithmetic", "classify", "code", "compare", "creative", "everyday", "explain",
    "extract", "factual", "format", "howto", "list", "reasoning", "rewrite", "summarise",
    "translate",
}  # fmt: skip
UNSPACED = {"zh", "ja"}  # no spaces between words: counted and compared by character
WORDS = (8, 60)
CHARACTERS = (12, 120)  # about the same span: a Chinese or Japanese word is near two characters
SHINGLE = 5
NEAR_DUPLICATE = 0.5  # Jaccard of 5-gram sets from which two prompts count as one
KANA = re.compile(r"[\u3040-\u30ff]")
HAN = re.compile(r"[\u4e00-\u9fff]")
OWN_WORDS = {  # frequent words whose counts tell the four apart
    "en": "the is what how why my this it give with or which to of and by from into that there for",
    "de": "der die das ein eine einen einem ich ist den und wie im aus auf mir zum für welche",
    "es": "el los las una qué y con del esta estos por cómo quién cuál cuántos sobre frase",
    "fr": "le les une du et ce cette pour est à au avec des chaque combien qui puis ces l d",
}


def raw_file() -> bytes:
    return (files("tutelage.data") / "prompts.jsonl").read_bytes()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in raw_file().decode("utf-8").splitlines()]


def units(row: dict[str, str]) -> list[str]:
    """Words in lower case, or characters where a script has no spaces; punctuation left out."""
    text = row["prompt"].lower()
    if row["language"] in UNSPACED:
        return re.findall(r"\w", text)
    return [word.strip("'") for word in re.findall(r"[\w'’-]*\w[\w'’-]*", text)]


def shingles(row: dict[str, str]) -> frozenset[tuple[str, ...]]:
    parts = units(row)
    return frozenset(tuple(parts[i : i + SHINGLE]) for i in range(len(parts) - SHINGLE + 1))


def near_duplicates(rows: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    sets = [(row["id"], shingles(row)) for row in rows]
    for (left, a), (right, b) in combinations(sets, 2):
        if len(a & b) >= NEAR_DUPLICATE * len(a | b):
            yield left, right


def test_file_is_utf8_with_unix_line_ends_and_no_byte_order_mark() -> None:
    raw = raw_file()
    raw.decode("utf-8")
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in raw
    assert raw.endswith(b"}\n")
    assert b"\n\n" not in raw


def test_every_row_has_exactly_the_four_text_fields(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert list(row) == FIELDS
        assert all(isinstance(value, str) and value == value.strip() for value in row.values())


def test_there_are_at_least_400_prompts(rows: list[dict[str, str]]) -> None:
    assert len(rows) >= 400


def test_english_is_half_to_three_fifths_and_every_other_language_has_its_share(
    rows: list[dict[str, str]],
) -> None:
    counts = Counter(row["language"] for row in rows)
    assert set(counts) == LANGUAGES
    assert 0.5 <= counts["en"] / len(rows) <= 0.6
    assert all(counts[language] >= 40 for language in ("zh", "de", "es", "fr"))


def test_categories_are_balanced_within_a_tenth_of_their_mean(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["category"] for row in rows)
    assert set(counts) == CATEGORIES
    mean = len(rows) / len(CATEGORIES)
    assert all(abs(count - mean) <= 0.1 * mean for count in counts.values())


def test_ids_name_language_and_category_and_count_up_without_a_gap(
    rows: list[dict[str, str]],
) -> None:
    seen: Counter[str] = Counter()
    for row in rows:
        group = f"{row['language']}-{row['category']}"
        seen[group] += 1
        assert row["id"] == f"{group}-{seen[group]:03d}"


def test_ids_and_prompts_are_unique(rows: list[dict[str, str]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({" ".join(units(row)) for row in rows}) == len(rows)


def test_no_two_prompts_are_near_duplicates(rows: list[dict[str, str]]) -> None:
    assert list(near_duplicates(rows)) == []


def test_near_duplicate_check_finds_a_prompt_with_one_word_changed(
    rows: list[dict[str, str]],
) -> None:
    first = rows[0]
    twin = {**first, "id": "twin", "prompt": first["prompt"].rsplit(" ", 1)[0] + " lines."}
    assert list(near_duplicates([first, twin])) == [(first["id"], "twin")]


def test_prompts_are_short_but_not_terse(rows: list[dict[str, str]]) -> None:
    for row in rows:
        low, high = CHARACTERS if row["language"] in UNSPACED else WORDS
        assert low <= len(units(row)) <= high, row["id"]


def test_prompts_are_written_in_the_language_they_state(rows: list[dict[str, str]]) -> None:
    for row in rows:
        language, prompt = row["language"], row["prompt"]
        if language == "ja":
            assert KANA.search(prompt), row["id"]
        elif language == "zh":
            assert len(HAN.findall(prompt)) >= 8, row["id"]
            assert not KANA.search(prompt), row["id"]
        else:
            words = re.findall(r"\w+", prompt.lower())
            score = {
                known: sum(word in own.split() for word in words)
                for known, own in OWN_WORDS.items()
            }
            stated = score.pop(language)
            assert stated > max(score.values()), (row["id"], stated, score)


def test_chinese_is_in_simplified_characters(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if row["language"] == "zh":
            "".join(HAN.findall(row["prompt"])).encode("gb2312")  # has no traditional forms


def test_the_head_of_the_file_is_already_a_mix(rows: list[dict[str, str]]) -> None:
    """A recipe's `limit` takes the first rows: it must not get English explanations only."""
    head = rows[:64]
    assert {row["language"] for row in head} == LANGUAGES
    assert {row["category"] for row in head} == CATEGORIES


def test_every_row_reads_as_a_prompt_that_waits_for_an_answer(rows: list[dict[str, str]]) -> None:
    source = DataSource(source="bundled:prompts")
    count = 0
    for (place, row), expected in zip(read_source(source, seed=0), rows, strict=True):
        assert isinstance(row, dict)
        record = conversation(row, source, place=place, name="bundled:prompts")
        assert record["id"] == expected["id"]
        assert record["language"] == expected["language"]
        assert [message["role"] for message in record["messages"]] == ["user"]
        assert record["messages"][0]["content"] == expected["prompt"]
        count += 1
    assert count == len(rows)
