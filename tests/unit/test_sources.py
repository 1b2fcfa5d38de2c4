"""Rows from files: each with its place, and what cannot be read told by it."""

import errno
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutelage.core.errors import DataError
from tutelage.data.identity import data_identity, source_files
from tutelage.data.rows import conversation
from tutelage.data.sources import UnreadableRow, read_source
from tutelage.evals.graders import grade
from tutelage.recipe.curation import Data, DataSource


def read(path: Path | str, **settings: Any) -> list[tuple[str, Any]]:
    """Places and rows; an unreadable row as its reason."""
    source = DataSource(source=str(path), **settings)
    return [
        (place, str(row) if isinstance(row, UnreadableRow) else row)
        for place, row in read_source(source, seed=0)
    ]


def written(path: Path, contents: bytes | str) -> Path:
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def test_lines_of_json_are_rows_by_file_and_line_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"prompt": "x"}\r\n\n  \n{"prompt": "y"}')
    assert read(path) == [("a.jsonl:1", {"prompt": "x"}), ("a.jsonl:4", {"prompt": "y"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b'{"prompt": "a\x00b"}', "not JSON: Invalid control character"),
        (b"\x00\x00\x00", "not JSON"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8 at byte 15"),
        (b'["x"]', "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"prompt": "\\ud83d"}', "half a character"),
        (b'{"meta": {"\\udc00": 1}, "prompt": "x"}', "half a character"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_bad_line_is_one_bad_row_and_its_neighbours_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = written(tmp_path / "a.jsonl", b'{"prompt": "x"}\n' + line + b'\n{"prompt": "y"}\n')
    first, bad, last = read(path)
    assert (first[1], last[1]) == ({"prompt": "x"}, {"prompt": "y"})
    assert bad[0] == "a.jsonl:2"
    assert reason in bad[1]


def test_an_escaped_nul_and_a_whole_pair_of_surrogates_are_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", r'{"prompt": "a\u0000b \ud83d\ude00"}')
    assert read(path) == [("a.jsonl:1", {"prompt": "a\0b 😀"})]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "x"}\n'),
        ("a.json", '[{"prompt": "x"}]'),
        ("a.csv", "prompt\nx\n"),
        ("a.tsv", "prompt\tz\nx\ty\n"),
    ],
)
def test_a_byte_order_mark_is_not_data(tmp_path: Path, name: str, text: str) -> None:
    (row,) = read(written(tmp_path / name, b"\xef\xbb\xbf" + text.encode()))
    assert row[1]["prompt"] == "x"


def test_a_json_list_is_rows_by_number(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", '[{"prompt": "x"}, 3, {"prompt": "\\ud800"}]')
    assert read(path) == [
        ("a.json[1]", {"prompt": "x"}),
        ("a.json[2]", "not a JSON object"),
        ("a.json[3]", "has half a character (a lone surrogate)"),
    ]


@pytest.mark.parametrize("text", ['{"prompt": "x"}', "[{", "", b"\xff", "[" * 100_000])
def test_a_json_file_that_is_no_list_is_refused(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(DataError, match=r"a\.json: (expected a JSON list|not JSON)"):
        read(written(tmp_path / "a.json", text))


def test_ragged_rows_of_a_csv_are_bad_by_line_and_the_rest_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'prompt,answer\n"a\nb",1\nshort\nx,2,3\ny,4\n')
    assert read(path) == [
        ("a.csv:3", {"prompt": "a\nb", "answer": "1"}),
        ("a.csv:4", "has another number of fields than the header"),
        ("a.csv:5", "has another number of fields than the header"),
        ("a.csv:6", {"prompt": "y", "answer": "4"}),
    ]


@pytest.mark.parametrize("text", [b'prompt\n"open', b"prompt\ncaf\xe9\n"])
def test_a_csv_that_cannot_be_parsed_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.csv: cannot be read as csv"):
        read(written(tmp_path / "a.csv", text))


def test_a_long_answer_in_a_csv_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "prompt,response\nx," + "y" * 200_000 + "\n")
    assert len(read(path)[0][1]["response"]) == 200_000


def test_parquet_rows_come_with_their_number_over_batches(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [str(i) for i in range(1500)]}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert len(found) == 1500
    assert found[1499] == ("a.parquet[1500]", {"prompt": "1499"})


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read(written(tmp_path / "a.parquet", b"PAR1 not really"))


@pytest.mark.parametrize("name", ["a.xlsx", "a.xlsx.gz", "a.gz", "a.parquet.zst"])
def test_an_unknown_kind_of_file_tells_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"unknown kind of file; known: \.jsonl.* \.gz or \.zst"):
        read(written(tmp_path / name, b"x"))


def packed(suffix: str, contents: bytes) -> bytes:
    """As the usual tools write it: both with a checksum of the contents."""
    if suffix == ".gz":
        return gzip.compress(contents)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(contents)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.jsonl": b'\xef\xbb\xbf{"prompt": "x"}\n\nnot JSON\n{"prompt": "caf\xc3\xa9"}',
    "a.ndjson": b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n',
    "a.json": b'\xef\xbb\xbf[{"prompt": "x"}, 3]',
    "a.csv": b'\xef\xbb\xbfprompt,answer\n"a\nb",1\nshort\n"q, r",2\n',
    "a.tsv": b"prompt\tanswer\r\na, b\t1\r\n",
}


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", KINDS)
def test_a_compressed_file_holds_the_same_rows(tmp_path: Path, name: str, suffix: str) -> None:
    plain = read(written(tmp_path / name, KINDS[name]))
    path = written(tmp_path / f"{name}{suffix}", packed(suffix.lower(), KINDS[name]))
    assert plain
    assert read(path) == [(place.replace(name, path.name), row) for place, row in plain]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_archives_one_behind_the_other_are_one(tmp_path: Path, suffix: str) -> None:
    two = packed(suffix, b'{"n": 1}\n') + packed(suffix, b'{"n": 2}\n')
    path = written(tmp_path / f"a.jsonl{suffix}", two)
    assert [row["n"] for _, row in read(path)] == [1, 2]
    assert read(written(path, packed(suffix, b""))) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("kept", [0, 3, 20, -9, -4, -1])
def test_an_archive_that_was_cut_off_is_refused_by_name(
    tmp_path: Path, suffix: str, name: str, kept: int
) -> None:
    path = written(tmp_path / f"{name}{suffix}", packed(suffix, KINDS[name])[:kept])
    kind = rf"{name}{suffix}: cannot be read as {name[2:]}{suffix}: Truncated compressed stream"
    with pytest.raises(DataError, match=kind):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_that_is_none_or_not_only_one_is_refused_by_name(
    tmp_path: Path, suffix: str
) -> None:
    whole = packed(suffix, b'{"n": 1}\n')
    for contents in (b'{"n": 1}\n{"n": 1}\n', whole + b"and more that is no archive"):
        path = written(tmp_path / f"a.jsonl{suffix}", contents)
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: cannot be read as jsonl{suffix}"):
            read(path)


def test_a_gzip_whose_contents_changed_is_refused_by_its_checksum(tmp_path: Path) -> None:
    whole = bytearray(packed(".gz", b'{"n": 1}\n'))
    whole[-6] ^= 0xFF  # of the CRC: whatever was damaged, the two do not fit
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read as jsonl\.gz"):
        read(written(tmp_path / "a.jsonl.gz", bytes(whole)))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_large_archive_is_read_in_constant_memory(tmp_path: Path, suffix: str) -> None:
    line = json.dumps({"prompt": "x" * 100_000}).encode() + b"\n"
    path = written(tmp_path / f"a.jsonl{suffix}", packed(suffix, line * 200))  # 20 MB
    before, native, count = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    for _ in read_source(DataSource(source=str(path)), seed=0):
        native, count = max(native, pa.total_allocated_bytes() - before), count + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200
    assert peak + native < 4_000_000


def test_a_missing_file_and_an_empty_glob_are_told(tmp_path: Path) -> None:
    for name in ("no.jsonl", "*.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / name)


def test_a_glob_takes_files_in_name_order_and_no_folders(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", '{"n": 2}')
    written(tmp_path / "a.jsonl", '{"n": 1}')
    (tmp_path / "c.jsonl").mkdir()
    assert [row["n"] for _, row in read(tmp_path / "*.jsonl")] == [1, 2]


def test_a_limit_cuts_in_the_sources_own_order(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(9)))
    assert [row["n"] for _, row in read(path, limit=3)] == [0, 1, 2]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        assert read(written(tmp_path / name, b"")) == []


def test_bundled_prompts_are_there_and_nothing_else_is_bundled() -> None:
    found = read("bundled:prompts", limit=3)
    assert len(found) == 3
    assert all(row["prompt"] for _, row in found)
    with pytest.raises(DataError, match="the only bundled data is bundled:prompts"):
        read("bundled:answers")


def test_a_task_repeats_by_seed_and_needs_a_limit() -> None:
    pytest.importorskip("reasoning_gym")
    source = DataSource(source="task:chain_sum", limit=4)
    first, again = list(read_source(source, seed=1)), list(read_source(source, seed=1))
    other = list(read_source(source, seed=2))
    assert first == again
    assert first != other
    assert len(first) == 4
    with pytest.raises(DataError, match="no end of its own: set limit"):
        read("task:chain_sum")
    with pytest.raises(DataError, match="task:no_such_task cannot be made"):
        read("task:no_such_task", limit=1)


@pytest.mark.parametrize("task", ["chain_sum", "puzzle24", "graph_color"])
def test_a_task_s_row_can_be_graded_by_its_own_scorer_later(task: str) -> None:
    pytest.importorskip("reasoning_gym")
    settings = {"puzzle24": {"max_value": 6}}.get(task, {})
    source = DataSource(source=f"task:{task}", limit=2, task_config=settings)
    for place, row in read_source(source, seed=1):
        if isinstance(row, UnreadableRow):
            assert (task, str(row)[:18]) == ("graph_color", "has no gold answer")
            continue
        made = conversation(row, source, place=place, name=source.source)
        kept = json.loads(made["meta"])["reasoning_gym"]
        assert (made["task"], kept["config"]) == (task, settings)
        assert kept["entry"]["question"] == made["messages"][0]["content"]
        assert set(kept["entry"]) == {"question", "answer", "metadata"}
        verdict = grade("auto", made["answer"], made["answer"], row=made)
        assert verdict.correct
        assert verdict.reason == f"{task} scores 1"


def test_a_task_that_runs_programs_in_this_process_is_refused() -> None:
    with pytest.raises(DataError, match="task:codeio is refused: .*; take another task"):
        read("task:codeio", limit=1)


def identity(path: Path, memo: Path) -> dict[str, Any]:
    step = Data(stage="data", seed=0, sources=(DataSource(source=str(path)),))
    return data_identity(step, memo=memo)


def test_a_source_is_known_by_content_not_by_name_or_time(tmp_path: Path) -> None:
    memo = tmp_path / "hashes.json"
    one, two = written(tmp_path / "a.jsonl", '{"n": 1}'), written(tmp_path / "b.jsonl", '{"n": 1}')
    before = identity(one, memo)
    assert before == identity(two, memo)
    os.utime(one, (1, 1))
    assert identity(one, memo) == before
    written(one, '{"n": 2}')
    assert identity(one, memo) != before


def test_a_damaged_memo_of_hashes_only_costs_time(tmp_path: Path) -> None:
    memo = tmp_path / "hashes.json"
    path = written(tmp_path / "a.jsonl", '{"n": 1}')
    before = identity(path, memo)
    assert json.loads(memo.read_text())
    for text in ("{", "[]", "3"):
        memo.write_text(text)
        assert identity(path, memo) == before


def test_only_local_sources_have_files() -> None:
    assert source_files(DataSource(source="hub:owner/name")) == []
    assert source_files(DataSource(source="task:chain_sum")) == []


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> str:  # a fake: root may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tutelage.core.hashes.sha256_file", forbidden)
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    step = Data.model_validate({"stage": "data", "sources": [{"source": str(file)}], "seed": 0})
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: Permission denied"):
        data_identity(step, memo=tmp_path / "memo.json")
