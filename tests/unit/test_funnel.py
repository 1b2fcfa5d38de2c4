"""The funnel of `data` and `curate`: who drops what, in which order, the same for all workers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import DataError
from tutelage.core.progress import Reporter
from tutelage.data import prepare, waiting
from tutelage.recipe.curation import Data
from tutelage.recipe.load import parse
from tutelage.records import read_rows
from tutelage.stages import data

WORDS = [
    "river",
    "stone",
    "lamp",
    "garden",
    "window",
    "paper",
    "engine",
    "winter",
    "copper",
    "signal",
    "harbour",
    "meadow",
]


def sentence(number: int, words: int = 16) -> str:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, words)) + f" {number}"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(
    folder: Path, sources: list[Any], *, workers: int = 1, **settings: Any
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    listed = [{"source": s} if isinstance(s, str) else s for s in sources]
    config = Data.model_validate({"stage": "data", "seed": 1, "sources": listed, **settings})
    work = WorkDir.open(folder, reporter=Reporter(quiet=True), device="cpu", workers=workers)
    summary = data.run(config, {}, work)
    return summary, list(read_rows([folder / "conversations.parquet"]))


def aside(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "quarantine" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def mixed_bag(tmp_path: Path) -> tuple[str, str]:
    """Sixty sound rows, two of each kind of fault, and an evaluation file."""
    sound = [{"prompt": sentence(i), "response": sentence(1000 + i)} for i in range(60)]
    loop = "again and again and again and again and again and " * 20
    faults = [
        {"prompt": sentence(70), "response": loop},
        {"prompt": sentence(71), "response": "caf\ufffd"},
        {"prompt": sentence(5).upper() + "!", "response": "a copy in capitals"},
        {"prompt": sentence(6).replace(" ", "  ") + " indeed", "response": "nearly a copy"},
        {"prompt": "Tell me: " + sentence(500) + " please.", "response": "leaked"},
    ]
    evaluation = [{"question": sentence(500)}, {"question": sentence(501)}]
    return (
        write(tmp_path / "rows.jsonl", sound + faults),
        write(tmp_path / "test.jsonl", evaluation),
    )


FULL = {
    "filters": [{"name": "encoding"}, {"name": "repetition"}],
    "duplicates": {"near": 0.64},
}


def test_each_fault_is_dropped_by_its_own_step_and_kept_aside(
    tmp_path: Path, mixed_bag: tuple[str, str]
) -> None:
    rows, evaluation = mixed_bag
    folder = tmp_path / "work"
    summary, kept = run(folder, [rows], decontaminate=[{"source": evaluation}], **FULL)
    assert summary == {
        "rows": 60, "read": 65, "dropped_unreadable": 0, "dropped_encoding": 1,
        "dropped_repetition": 1, "dropped_contamination": 1, "dropped_duplicates": 2,
    }  # fmt: skip
    assert {row["messages"][0]["content"] for row in kept} == {sentence(i) for i in range(60)}
    assert aside(folder, "encoding")[0]["place"] == "rows.jsonl:62"
    (leak,) = aside(folder, "contamination")
    assert leak["item"] == sentence(500)
    assert leak["row"]["messages"][1]["content"] == "leaked"
    copies = aside(folder, "duplicates")
    assert [copy["of"] for copy in copies] == ["rows.jsonl:6", "rows.jsonl:7"]
    assert copies[0]["similarity"] == 1
    steps = json.loads((folder / "funnel.json").read_text())["steps"]
    assert [step["name"] for step in steps] == [
        "unreadable", "encoding", "repetition", "contamination", "duplicates",
    ]  # fmt: skip
    assert [step["left"] for step in steps] == [65, 64, 63, 62, 60]


def test_the_bytes_do_not_depend_on_the_number_of_workers_or_of_buckets(
    tmp_path: Path, mixed_bag: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, evaluation = mixed_bag
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 9)
    found = {}
    for name, workers, bucket in (("one", 1, 1 << 16), ("two", 2, 1 << 16), ("small", 1, 7)):
        monkeypatch.setattr(waiting, "BUCKET_ROWS", bucket)
        folder = tmp_path / name
        run(
            folder, [rows], workers=workers, decontaminate=[{"source": evaluation}],
            select={"by": "zip", "count": 30}, **FULL,
        )  # fmt: skip
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found[name] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in files
            if ".scratch" not in path.as_posix() and "ledger" not in path.name
        }
    one, two = ({k: v for k, v in found[n].items() if "funnel/" not in k} for n in ("one", "two"))
    assert one == two
    assert [row["id"] for row in read_rows([tmp_path / "small" / "conversations.parquet"])] == [
        row["id"] for row in read_rows([tmp_path / "one" / "conversations.parquet"])
    ]


def test_the_earlier_source_keeps_the_row_that_both_have(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": sentence(1)}, {"prompt": sentence(2)}])
    second = write(tmp_path / "b.jsonl", [{"prompt": sentence(2)}, {"prompt": sentence(3)}])
    _, kept = run(tmp_path / "work", [second, first], duplicates={})
    assert Counter(row["source"] for row in kept) == {"b.jsonl": 2, "a.jsonl": 1}


def test_exact_only_keeps_what_is_merely_similar(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in (sentence(1), sentence(1) + " now", sentence(1))]
    path = write(tmp_path / "a.jsonl", rows)
    assert run(tmp_path / "work", [path], duplicates={"near": 0})[0]["rows"] == 2
    assert run(tmp_path / "work", [path], duplicates={})[0]["rows"] == 1


def test_weights_set_the_shares_and_never_repeat_a_row(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": f"a {i}"} for i in range(90)])
    second = write(tmp_path / "b.jsonl", [{"prompt": f"b {i}"} for i in range(20)])
    sources = [{"source": first, "weight": 3}, {"source": second, "weight": 1}]
    summary, kept = run(tmp_path / "work", sources)
    assert Counter(row["source"] for row in kept) == {"a.jsonl": 60, "b.jsonl": 20}
    assert summary["dropped_mix"] == 30
    _, kept = run(tmp_path / "work", sources, limit=40)
    assert Counter(row["source"] for row in kept) == {"a.jsonl": 30, "b.jsonl": 10}


def test_a_balance_over_languages_takes_as_many_of_each(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "language": "en" if i % 10 else "de"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", rows)
    select = {"by": "balance", "count": 16, "over": ["language"]}
    _, kept = run(tmp_path / "work", [path], select=select)
    assert Counter(row["language"] for row in kept) == {"en": 8, "de": 8}


def test_the_step_that_dropped_the_last_row_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "caf\ufffd"}, {"prompt": "na\ufffdve"}])
    with pytest.raises(
        DataError, match=r"no row is left of 2 read: encoding dropped the last 2 \(f"
    ):
        run(tmp_path / "work", [path], filters=[{"name": "encoding"}])
    with pytest.raises(DataError, match="no row has one; add a difficulty step"):
        run(tmp_path / "work", [path], select={"by": "difficulty", "count": 1})


def test_an_evaluation_file_that_cannot_be_read_is_no_clean_bill(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": sentence(1)}])
    broken = tmp_path / "test.jsonl"
    broken.write_text('{"question": "whole"}\n{"question": ')
    with pytest.raises(DataError, match=r"decontaminate: test\.jsonl:2: not JSON"):
        run(tmp_path / "work", [path], decontaminate=[{"source": str(broken)}])


def test_length_needs_a_tokenizer_in_the_recipe() -> None:
    raw = {
        "name": "x", "models": {},
        "steps": {"d": {"stage": "data", "sources": [{"source": "bundled:prompts"}],
                        "filters": [{"name": "length", "max_tokens": 9}]}},
    }  # fmt: skip
    with pytest.raises(Exception, match="filter length counts tokens: name a model in tokenizer"):
        parse(raw, "x.toml")
