"""Looking at a step shows what its files hold: every count, the same samples again, safe text."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import conversation, dropped, funnel, step
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tutelage.cli.app import main
from tutelage.cli.look import print_look
from tutelage.core.artifact import Artifact
from tutelage.core.errors import ArtifactError
from tutelage.report import histograms as histograms_module
from tutelage.report.histograms import Histogram, Tally
from tutelage.report.look import dropped as dropped_rows
from tutelage.report.look import look
from tutelage.report.plain import TEXT_CHARS, plain
from tutelage.store import Store

NASTY = "\x1b[31mred [bold]not bold[/bold] <script>alert(1)</script> \x00 \x9b"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def bars(found: tuple[Histogram, ...], name: str, unit: str = "") -> dict[str, int]:
    return next(dict(h.bars) for h in found if h.name == name and unit in ("", h.unit))


def shown(artifact: Artifact, *, samples: int = 2, seed: int = 0) -> str:
    """What the terminal shows at 80 columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    print_look(console, look(artifact, samples=samples, seed=seed), "rows", again="again")
    return stream.getvalue()


def test_the_funnel_is_told_as_the_step_counted_it(store: Store) -> None:
    counts = funnel(9, unreadable=1, length=0, duplicates=4)
    artifact = step(store, "rows", [conversation(n) for n in range(4)], funnel=counts)
    seen = look(artifact, samples=0, seed=0)
    assert (seen.rows, seen.read) == (4, 9)
    assert [(s.name, s.dropped, s.left) for s in seen.funnel] == [
        ("unreadable", 1, 8), ("length", 0, 8), ("duplicates", 4, 4)
    ]  # fmt: skip
    lines = shown(artifact, samples=0).splitlines()
    for words in (["read", "9"], ["unreadable", "8", "-1"], ["length", "8"]):
        assert any([w for w in line.split() if "█" not in w] == words for line in lines)


def test_every_histogram_counts_the_rows_one_by_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.Generator(np.random.Philox(7))
    rows = [
        conversation(
            n, asked=["Wörd " * int(rng.integers(1, 60))] * int(rng.integers(1, 4)),
            thinking="hm 思考" * 9 if n % 3 == 0 else None, language=[None, "de", "ja"][n % 3],
            difficulty=None if n % 5 == 0 else float(rng.random()),
        )
        for n in range(300)
    ]  # fmt: skip
    monkeypatch.setattr("tutelage.records.ROW_GROUP_ROWS", 64)  # several row groups
    found = look(step(store, "rows", rows), samples=0, seed=0).histograms
    assert bars(found, "mode") == {"fast": 200, "reasoning": 100}
    assert bars(found, "language") == {"unknown": 100, "de": 100, "ja": 100}
    turns = Counter(sum(m["role"] == "user" for m in row["messages"]) for row in rows)
    assert bars(found, "turns") == {str(n): turns[n] for n in (1, 2, 3)}
    lengths = [
        sum(len(m["content"]) + len(m["thinking"] or "") for m in row["messages"]) for row in rows
    ]
    length = next(h for h in found if h.name == "length")
    assert length.rows == 300
    assert length.most == max(lengths)
    assert length.mean == pytest.approx(np.mean(lengths))
    check_bars(length, lengths)
    bands = Counter(
        "unknown" if row["difficulty"] is None else f"{int(row['difficulty'] * 10) / 10:.1f}"
        for row in rows
    )
    assert {name.split(" ")[0]: n for name, n in bars(found, "difficulty").items()} == {
        f"{band / 10:.1f}": bands[f"{band / 10:.1f}"] for band in range(10)
    } | {"unknown": 60}


def check_bars(found: Histogram, values: list[int]) -> None:
    """Each bar holds as many values as lie in the range its label says."""
    for label, count in found.bars:
        low, *high = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", label))
        top = high[0] if high else (10**19 if "more" in label else low)
        assert count == sum(low <= value <= top for value in values), label


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**7) | st.integers(0, 30), min_size=1, max_size=60))
def test_a_bar_holds_just_what_its_label_says(values: list[int]) -> None:
    tally = Tally()
    for part in np.array_split(np.array(values, np.int64), 3):
        tally.add(part)
    found = tally.histogram("length", "characters")
    assert found.rows == len(values)
    assert len(found.bars) <= 13
    assert found.most == max(values)
    ends = [count for _, count in found.bars][:: max(len(found.bars) - 1, 1)]
    assert all(ends)  # no empty bar at either end
    check_bars(found, values)


def test_a_difficulty_stands_in_the_band_that_begins_with_it(store: Store) -> None:
    edges = [0.0, 1 - 9 / 10, 0.3, 0.7, 1 - 1 / 10, 1.0]
    rows = [conversation(n, difficulty=value) for n, value in enumerate(edges)]
    found = bars(look(step(store, "rows", rows), samples=0, seed=0).histograms, "difficulty")
    counted = {name: count for name, count in found.items() if count}
    assert counted == {"0.0 to 0.1": 1, "0.1 to 0.2": 1, "0.3 to 0.4": 1, "0.7 to 0.8": 1,
                       "0.9 to 1.0": 2}  # fmt: skip


def test_tokens_are_shown_where_the_rows_say_them(store: Store) -> None:
    told = ['{"tokens": 12}', '{"tokens": "many"}', '["tokens"]', '{"a": "\\"tokens\\": 3"}', None]
    rows = [conversation(n, meta=meta) for n, meta in enumerate(told)]
    found = look(step(store, "rows", rows), samples=0, seed=0).histograms
    assert bars(found, "length", "tokens, of the rows that say them") == {"12 to 13": 1}
    plain_rows = look(step(store, "plain", [conversation(0)]), samples=0, seed=0).histograms
    assert [h.unit for h in plain_rows if h.name == "length"] == ["characters"]


def test_a_column_of_many_names_takes_no_more_memory_than_a_few(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histograms_module, "MAX_NAMES", 20)
    monkeypatch.setattr("tutelage.records.ROW_GROUP_ROWS", 16)
    rows = [conversation(n, language=f"l{n:03d}") for n in range(50)]
    rows += [conversation(99, language="l001")] * 3
    found = bars(look(step(store, "rows", rows), samples=0, seed=0).histograms, "language")
    assert found["other"] == 30
    assert found["l001"] == 4
    assert sum(found.values()) == 53
    assert len(found) == 12


def test_samples_are_the_same_for_a_seed_and_others_for_another(store: Store) -> None:
    rows = [conversation(n, said=f"Answer {n}") for n in range(200)]
    lost = [dropped(conversation(n), f"reason {n}") for n in range(1000, 1100)]
    artifact = step(store, "rows", rows, quarantine={"length": lost})
    first, again, other = (look(artifact, samples=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.kept != other.kept
    assert first.dropped[0].samples != other.dropped[0].samples
    assert first.dropped[0].count == 100
    for sample in first.kept:
        number = int(sample.place.removeprefix("row "))
        assert (sample.id, sample.answer) == (f"row-{number}", f"Answer {number}")
    for sample in first.dropped[0].samples:
        assert sample.reason == f"reason {sample.id.removeprefix('row-')}"
    assert len(look(artifact, samples=500, seed=0).kept) == 200


def test_paging_through_a_quarantine_file_meets_every_row_once(store: Store) -> None:
    lost = [dropped(conversation(n), "too long", tokens=n) for n in range(7)]
    artifact = step(store, "rows", [conversation(9)], quarantine={"length": lost})
    pages = [dropped_rows(artifact, "length", start=start, count=3) for start in (0, 3, 6, 9)]
    assert [len(page.samples) for page in pages] == [3, 3, 1, 0]
    assert {page.count for page in pages} == {7}
    met = [sample for page in pages for sample in page.samples]
    assert [sample.id for sample in met] == [f"row-{n}" for n in range(7)]
    assert ("tokens", "4") in met[4].notes


def test_quarantine_files_stand_in_the_order_of_the_funnel(store: Store) -> None:
    lost = [dropped(conversation(1), "why")]
    artifact = step(
        store, "rows", [conversation(0)], funnel=funnel(4, unreadable=1, refusal=1, duplicates=1),
        quarantine={"duplicates": lost, "unreadable": lost, "refusal": lost},
    )  # fmt: skip
    names = [group.name for group in look(artifact, samples=0, seed=0).dropped]
    assert names == ["unreadable", "refusal", "duplicates"]


def test_a_row_that_could_not_be_read_is_shown_by_its_place_and_reason(store: Store) -> None:
    line = {"place": "hand.jsonl:3", "id": None, "reason": "no JSON", "row": None}
    artifact = step(store, "rows", [conversation(0)], quarantine={"unreadable": [line]})
    (sample,) = look(artifact, samples=1, seed=0).dropped[0].samples
    assert (sample.id, sample.place, sample.reason) == ("", "hand.jsonl:3", "no JSON")
    assert (sample.prompt, sample.answer, sample.notes) == ("", "", ())
    assert "hand.jsonl:3\n  why     no JSON" in shown(artifact)


def test_what_a_row_was_compared_with_is_shown(store: Store) -> None:
    row = conversation(1, asked=["One?", "Two?"], difficulty=0.25, answer="72")
    lost = dropped(row, "shares 60%", item="How many\nclips?", shared="many clips", share=0.6)
    artifact = step(store, "rows", [conversation(0)], quarantine={"contamination": [lost]})
    (sample,) = look(artifact, samples=1, seed=0).dropped[0].samples
    assert sample.prompt == "Two?"
    assert dict(sample.notes) == {
        "source": "hand.jsonl", "mode": "fast", "language": "en", "difficulty": "0.25",
        "turns": "2", "gold": "72", "item": "How many\nclips?", "shared": "many clips",
        "share": "0.6",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"), [("lenght", "did you mean 'length'?"), ("x", "it dropped rows in: length")]
)
def test_an_unknown_quarantine_file_is_answered_with_those_there_are(
    store: Store, name: str, told: str
) -> None:
    lost = [dropped(conversation(1), "why")]
    artifact = step(store, "rows", [conversation(0)], quarantine={"length": lost})
    with pytest.raises(ArtifactError, match=re.escape(f"no quarantine file {name!r}; {told}")):
        dropped_rows(artifact, name, start=0, count=1)
    whole = step(store, "whole", [conversation(0)])
    with pytest.raises(ArtifactError, match="it dropped no row"):
        dropped_rows(whole, name, start=0, count=1)


def test_a_step_without_conversations_says_what_it_is(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"of stage distill: it holds no conversations"):
        look(step(store, "d", stage="distill"), samples=1, seed=0)


@pytest.mark.parametrize("line", ["{", "[]", '{"place": "a"}', '{"place": "a", "row": {}}'])
def test_a_damaged_quarantine_line_is_named(store: Store, line: str) -> None:
    whole = dropped(conversation(1), "why")
    artifact = step(store, "rows", [conversation(0)], quarantine={"length": [whole, line]})
    with pytest.raises(ArtifactError, match=r"length\.jsonl:2 cannot be read"):
        look(artifact, samples=5, seed=0)


@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_shown_text_can_be_written_and_holds_no_control_character(text: str) -> None:
    found = plain(text)
    assert found.encode("utf-8").decode("utf-8") == found
    assert not set(found) & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    assert len(found) == len(text)


def test_a_row_of_a_million_characters_is_cut(store: Store) -> None:
    artifact = step(store, "rows", [conversation(0, asked=["x" * 1_000_000])])
    (sample,) = look(artifact, samples=1, seed=0).kept
    assert sample.prompt == "x" * TEXT_CHARS + "…"


def test_the_terminal_shows_markup_and_control_codes_and_obeys_none(store: Store) -> None:
    rows = [conversation(0, asked=[NASTY], said=NASTY, thinking=NASTY, language=NASTY)]
    lost = dropped(conversation(1, asked=[NASTY]), NASTY, item=NASTY * 3)
    rows.append(conversation(2))
    artifact = step(store, "rows", rows, quarantine={"length": [lost]}, funnel=funnel(3, length=1))
    text = shown(artifact)
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert text.count("[bold]not bold[/bold]") >= 5
    assert max(map(len, text.splitlines())) <= 80


def test_samples_take_a_few_lines_each_and_every_line_fits(store: Store) -> None:
    long = "A sentence that goes on about 文字 and more. " * 40
    artifact = step(store, "rows", [conversation(0, asked=[long], said=long, thinking=long)])
    lines = shown(artifact).splitlines()
    assert sum("A sentence" in line or "文字" in line for line in lines) <= 9
    assert sum(line.endswith("…") for line in lines) == 3


def told(
    store: Store, words: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[Any, str, str]:  # fmt: skip
    monkeypatch.setattr("sys.argv", ["tutelage", "data", "look", *words, f"--store={store.root}"])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_the_command_looks_pages_and_prints_json(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [dropped(conversation(n), f"reason {n}") for n in range(5)]
    rows = [conversation(n) for n in range(10)]
    step(store, "rows", rows, funnel=funnel(15, length=5), quarantine={"length": lost})
    code, out, _ = told(store, ["rows", "--samples=1"], monkeypatch, capsys)
    assert code == 0
    assert "rows (data): 10 rows" in out
    assert "dropped by length: 1 of 5" in out
    page = ["rows", "--dropped=length", "--samples=2", "--start=2"]
    _, out, _ = told(store, page, monkeypatch, capsys)
    assert re.findall(r"reason (\d)", out) == ["2", "3"]
    again = f"--run hand --store {store.root} --dropped length --samples 2 --start 4"
    assert f"next: tutelage data look rows {again}\n" in out
    _, out, _ = told(store, ["rows", "--json", "--samples=1"], monkeypatch, capsys)
    assert json.loads(out)["funnel"] == [{"name": "length", "dropped": 5, "left": 10}]
    _, out, _ = told(store, ["rows", "--json", "--dropped=length"], monkeypatch, capsys)
    assert [s["reason"] for s in json.loads(out)["samples"]] == ["reason 0", "reason 1", "reason 2"]
    code, _, err = told(store, ["rows", "--dropped=lenght"], monkeypatch, capsys)
    assert code == 2
    assert "did you mean 'length'?" in err
