"""The page tells of a step's rows, and of a curriculum, what their files hold; it runs nothing."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from handmade import conversation, dropped, funnel, step

from tutelage.core.artifact import Artifact
from tutelage.core.errors import ArtifactError
from tutelage.report import charts
from tutelage.report.page import write_page
from tutelage.store import Store

MARKUP = '<script>alert(1)</script> <img src=x onerror=alert(1)> & "q" {{ 7*7 }} $x$'
ROW = f"{MARKUP}\x00\x1b[1m"  # a row can hold control characters; the names of filters cannot
CURRICULUM = {
    "parts": [
        {"stage": 1, "mode": "fast", "examples": 20, "rows": 19, "tokens": 1234},
        {"stage": 1, "mode": "reasoning", "examples": 60, "rows": 55, "tokens": 56789},
        {"stage": 2, "mode": "fast", "examples": 20, "rows": 20, "tokens": 1300},
    ],
    "series": {
        "examples": [40, 80, 100], "step": [4, 8, 10],
        "shares": {"fast": [0.25, 0.25, 1.0], "reasoning": [0.75, 0.75, 0.0]},
        "difficulty": [0.2, None, 0.6],
    },
}  # fmt: skip


class Seen(HTMLParser):
    """The text of a page, its tags and their attributes, and tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.open, self.faults = "", list[str](), list[str]()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def page_of(store: Store, **artifacts: Artifact) -> str:
    path = store.root / "page.html"
    write_page(path, "hand", artifacts)
    return path.read_text(encoding="utf-8")


def cells(page: str) -> list[list[str]]:
    """The rows of the funnels, as text."""
    tables = "".join(re.findall(r'<table class="funnel">(.*?)</table>', page, re.DOTALL))
    rows = re.findall(r"<tr>(.*?)</tr>", tables, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_the_funnel_of_a_step_is_told_row_by_row(store: Store) -> None:
    rows = [conversation(n) for n in range(30)]
    artifact = step(store, "rows", rows, funnel=funnel(100, unreadable=0, length=10, duplicates=60))
    page = page_of(store, rows=artifact)
    assert "30 of 100 rows are left (30.0\xa0%); duplicates took most of the others, 60." in page
    assert cells(page)[1:] == [
        ["read", "", "", "100"], ["unreadable", "–", "", "100"],
        ["length", "10", "10.0\xa0%", "90"], ["duplicates", "60", "66.7\xa0%", "30"],
    ]  # fmt: skip
    assert re.findall(r"--part:([\d.]+)", page)[-4:] == ["100", "100.0", "90.0", "30.0"]


def test_histograms_are_drawn_where_rows_differ_and_said_where_they_do_not(store: Store) -> None:
    rows = [
        conversation(n, asked=["x" * (1 + n)], difficulty=n / 40, language="de") for n in range(40)
    ]
    page = page_of(store, scored=step(store, "scored", rows, stage="difficulty"))
    assert page.count('aria-label="Rows by ') == 2
    for label in ("0.0 to 0.1", "0.9 to 1.0"):
        assert f">{label}</text>" in page
    assert "The same in all rows: mode fast; language de; turns 1." in page
    assert "40 rows." in page
    assert cells(page) == []


def test_samples_tell_what_was_asked_and_said_and_why_it_was_dropped(store: Store) -> None:
    lost = [dropped(conversation(7, asked=["Lost question"]), "too long: 9 tokens", of="row-3")]
    rows = [conversation(0, asked=["Kept question"], said="Kept answer", thinking="Kept thought")]
    artifact = step(store, "rows", rows, stage="synthesize", quarantine={"failed": lost})
    text = Seen(page_of(store, rows=artifact)).text
    for words in ("1 of 1 rows kept", "Kept question", "Kept answer", "Kept thought", "row 0",
                  "1 of 1 rows dropped by failed", "Lost question", "too long: 9 tokens",
                  "of: row-3", "hand.jsonl:row-7"):  # fmt: skip
        assert words in text


def test_markup_in_rows_reasons_names_and_labels_is_shown_and_never_acts(store: Store) -> None:
    row = conversation(0, asked=[ROW], said=ROW, thinking=ROW, language=ROW, id=ROW)
    lost = {**dropped(row, ROW, item=ROW, **{ROW: ROW}), "place": ROW}
    counts = {"read": 3, "steps": [{"name": MARKUP, "dropped": 1, "left": 2}]}
    told = {**CURRICULUM, "parts": [{**CURRICULUM["parts"][0], "mode": MARKUP}]}
    told["series"] = {**CURRICULUM["series"], "shares": {MARKUP: [1.0, 1.0, 1.0]}}
    page = page_of(
        store,
        rows=step(store, "rows", [row, conversation(1)], funnel=counts,
                  quarantine={"length": [lost]}),
        trained=step(store, "trained", stage="sft", curriculum=told),
    )  # fmt: skip
    seen = Seen(page)
    assert seen.faults == []
    assert seen.tags & {"script", "img"} == set()
    assert not [key for key, _ in seen.attributes if key.startswith("on")]
    for whole in ("<script>alert(1)</script>", "{{ 7*7 }}"):
        assert seen.text.count(whole) >= 12
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.replace("\n", ""))


def test_a_row_that_no_utf8_can_hold_does_not_stop_the_page(store: Store) -> None:
    line = '{"place": "a:1", "id": "\\ud800", "reason": "half \\udfff", "row": null}'
    artifact = step(store, "rows", [conversation(0)], quarantine={"unreadable": [line]})
    assert "half \N{REPLACEMENT CHARACTER}" not in page_of(store)
    artifact = step(
        store, "again", [conversation(0)], funnel=funnel(2, unreadable=1),
        quarantine={"unreadable": [line]},
    )  # fmt: skip
    assert "half \N{REPLACEMENT CHARACTER}" in page_of(store, rows=artifact)


def test_a_curriculum_is_drawn_over_its_examples_with_its_stages_in_a_table(store: Store) -> None:
    artifact = step(store, "trained", stage="sft", curriculum=CURRICULUM)
    page = page_of(store, trained=artifact)
    assert "Curriculum of trained" in page
    for label in ("fast", "reasoning", "difficulty", "examples, in 10 optimizer steps"):
        assert f">{label}</text>" in page
    rows = re.findall(r"<tr><th>(\d)</th><td class=\"left\">(\w+)</td>(.*?)</tr>", page)
    figures = [re.findall(r"<td>(.*?)</td>", rest) for _, _, rest in rows]
    assert [(stage, mode) for stage, mode, _ in rows] == [
        ("1", "fast"), ("1", "reasoning"), ("2", "fast")
    ]  # fmt: skip
    assert figures[1] == ["60", "60.0\xa0%", "55", "56,789"]


def test_a_curriculum_of_unknown_difficulty_draws_no_line_for_it() -> None:
    series: dict[str, Any] = CURRICULUM["series"]
    known, unknown = (
        charts.course("k", "c", series["examples"], series["shares"], difficulty, "examples")
        for difficulty in (series["difficulty"], [None] * 3)
    )
    assert ">difficulty</text>" in known
    assert ">difficulty</text>" not in unknown
    assert "nan" not in known.lower()


def test_steps_that_kept_no_counts_take_no_room(store: Store) -> None:
    page = page_of(
        store,
        plain=step(store, "plain", [conversation(0)]),
        answers=step(store, "answers", [conversation(0)], stage="synthesize"),
        trained=step(store, "trained", stage="sft"),
    )
    assert "Data in " not in page
    assert "Curriculum of" not in page


def test_several_steps_keep_their_drawings_apart_and_the_bytes_are_the_same_again(
    store: Store,
) -> None:
    rows = [conversation(n, asked=["x" * n * 20], difficulty=n / 9) for n in range(9)]
    made = {
        name: step(store, name, rows, stage=stage, funnel=funnel(9, length=0))
        for name, stage in (("a", "data"), ("b", "curate"), ("c", "difficulty"))
    }
    made["d"] = step(store, "d", stage="sft", curriculum=CURRICULUM)
    page = page_of(store, **made)
    assert page.count("<h2>Data in ") == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)
    assert page_of(store, **dict(reversed(made.items()))) == page
    assert Seen(page).faults == []


def test_a_curriculum_that_is_no_json_is_named(store: Store) -> None:
    artifact = step(store, "trained", stage="sft", curriculum=CURRICULUM)
    (artifact.path / "curriculum.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"curriculum\.json cannot be read"):
        page_of(store, trained=artifact)
