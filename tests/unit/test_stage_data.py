"""Stage `data`: counts that add up, bad rows set aside by place, a stable split."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import DataError
from tutelage.core.progress import Reporter
from tutelage.recipe.curation import Data
from tutelage.records import read_rows
from tutelage.stages import data


class Stage:
    """The stage over files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.console = Console(record=True, width=200, file=(folder / "log").open("w"))

    def write(self, name: str, *lines: object) -> str:
        text = "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines)
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def run(self, *sources: str, **settings: Any) -> tuple[dict[str, int], list[dict[str, Any]]]:
        config = Data.model_validate(
            {"stage": "data", "seed": 1, "sources": [{"source": s} for s in sources], **settings}
        )
        work = WorkDir.open(
            self.folder / "work", reporter=Reporter(console=self.console), device="cpu"
        )
        summary = data.run(config, {}, work)
        return summary, list(read_rows([work.path / "conversations.parquet"]))


@pytest.fixture
def stage(tmp_path: Path) -> Any:
    made = Stage(tmp_path)
    yield made
    made.console.file.close()


def prompts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}"} for i in range(start, start + count)]


def text(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"]


def test_every_row_arrives_once_in_an_order_that_follows_from_the_seed(stage: Stage) -> None:
    source = stage.write("a.jsonl", *prompts(50))
    summary, rows = stage.run(source)
    assert summary == {"rows": 50, "read": 50, "dropped_unreadable": 0}
    assert sorted(map(text, rows)) == sorted(p["prompt"] for p in prompts(50))
    assert list(map(text, rows)) == list(map(text, stage.run(source)[1]))
    assert list(map(text, rows)) != list(map(text, stage.run(source, seed=2)[1]))


def test_few_bad_rows_are_set_aside_with_file_and_line(stage: Stage, tmp_path: Path) -> None:
    lines = [*prompts(3), '{"prompt": "x"', *prompts(6, 3), {"messages": [{"role": "[/x]"}]}]
    summary, rows = stage.run(stage.write("a.jsonl", *lines), max_bad_share=0.2)
    assert summary == {"rows": 9, "read": 11, "dropped_unreadable": 2}
    assert len(rows) == 9
    aside = (tmp_path / "work" / "quarantine" / "unreadable.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in aside] == ["a.jsonl:4", "a.jsonl:11"]
    assert "'[/x]'" in json.loads(aside[1])["reason"]
    assert "2 bad rows set aside, first: a.jsonl:4: not JSON" in stage.console.export_text()


def test_a_reason_with_brackets_is_shown_as_it_is(stage: Stage) -> None:
    bad = {"messages": [{"role": "[/x]", "content": "y"}]}
    stage.run(stage.write("a.jsonl", *prompts(9), bad), max_bad_share=0.2)
    assert "role '[/x]'" in stage.console.export_text()


def test_too_many_bad_rows_stop_the_step_with_the_first_place(stage: Stage, tmp_path: Path) -> None:
    source = stage.write("a.jsonl", *prompts(8), '{"prompt": "x"', "[]")
    with pytest.raises(DataError, match=r"2 of 10 rows are bad .*first: a\.jsonl:9: not JSON") as e:
        stage.run(source, max_bad_share=0.1)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "work" / "conversations.parquet").exists()


def test_a_share_of_bad_rows_just_at_the_limit_passes(stage: Stage) -> None:
    source = stage.write("a.jsonl", *prompts(9), "[]")
    assert stage.run(source, max_bad_share=0.1)[0]["dropped_unreadable"] == 1
    with pytest.raises(DataError):
        stage.run(source, max_bad_share=0.09)


def test_a_mapping_to_a_missing_column_stops_the_step(stage: Stage) -> None:
    source = {"source": stage.write("a.jsonl", *prompts(3)), "columns": {"prompt": "question"}}
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no column 'question' \(mapped to prompt"):
        stage.run(sources=[source])


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_an_empty_data_set_is_refused(stage: Stage, lines: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"no rows at all in .*a\.jsonl"):
        stage.run(stage.write("a.jsonl", *lines))


def test_a_part_without_rows_is_refused(stage: Stage) -> None:
    source = stage.write("a.jsonl", *prompts(4))
    with pytest.raises(DataError, match=r"no row is left of 4 read: holdout dropped the last 4"):
        stage.run(source, part="holdout", holdout_share=0.0)


def test_the_two_parts_share_nothing_miss_nothing_and_hold_their_share(stage: Stage) -> None:
    source = stage.write("a.jsonl", *prompts(1000))
    train = set(map(text, stage.run(source, part="train", holdout_share=0.2)[1]))
    holdout = set(map(text, stage.run(source, part="holdout", holdout_share=0.2)[1]))
    assert not train & holdout
    assert len(train | holdout) == 1000
    assert len(holdout) == pytest.approx(200, abs=50)  # 4 standard deviations of sqrt(1000*.2*.8)


def test_equal_prompts_are_on_one_side_whatever_their_answers_seed_and_neighbours(
    stage: Stage,
) -> None:
    source = stage.write("a.jsonl", *prompts(200))
    held = set(map(text, stage.run(source, part="holdout", holdout_share=0.3)[1]))
    answered = [{"prompt": f" question {i} ", "response": f"{i}"} for i in range(150)]
    other = stage.write("b.jsonl", *prompts(40, 900), *answered)
    again = stage.run(other, part="holdout", holdout_share=0.3, seed=9)[1]
    expected = {f"question {i}" for i in range(150)} & held
    assert {text(row).strip() for row in again if len(row["messages"]) == 2} == expected


def test_a_limit_is_taken_after_the_shuffle(stage: Stage) -> None:
    source = stage.write("a.jsonl", *prompts(50))
    whole = list(map(text, stage.run(source)[1]))
    assert list(map(text, stage.run(source, limit=7)[1])) == whole[:7]


def test_ids_are_unique_even_where_the_source_repeats_them(stage: Stage) -> None:
    rows = [{"prompt": f"q{i}", "id": name} for i, name in enumerate(["a", "a", "a#2", "a", "b"])]
    ids = [row["id"] for row in stage.run(stage.write("a.jsonl", *rows))[1]]
    assert len(set(ids)) == 5
    assert {"a", "a#2", "b"} <= set(ids)


def test_sources_are_named_without_their_folder(stage: Stage, tmp_path: Path) -> None:
    sources = [stage.write("a.jsonl", *prompts(2)), stage.write("b.jsonl", *prompts(2, 2))]
    rows = stage.run(*sources)[1]
    assert {row["source"] for row in rows} == {"a.jsonl", "b.jsonl"}
    assert str(tmp_path) not in json.dumps(rows)
