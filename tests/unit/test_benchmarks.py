"""Names of standard tasks, and their rows from published files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutelage.core.errors import DataError, RecipeError
from tutelage.evals import benchmarks
from tutelage.recipe.evaluation import Task

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")

SUM = {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def asked(name: str, source: str) -> list[dict]:
    return benchmarks.local_rows(Task(name=name, source=source))[0]


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("gsm8k", "gsm8k"),
        ("math500", "hendrycks_math500"),
        ("mgsm_zh", "mgsm_native_cot_zh"),
        ("mgsm_direct_zh", "mgsm_direct_zh"),
        ("humaneval", "humaneval_instruct"),
        ("mbpp", "mbpp_instruct"),
        ("mmlu", "mmlu"),
        ("mmlu_anatomy", "mmlu_anatomy"),
        ("cmmlu_agronomy", "cmmlu_agronomy"),
        ("ceval", "ceval-valid"),
        ("ceval_law", "ceval-valid_law"),
        ("ifeval", "ifeval"),
        ("drop", "drop"),
        ("clue-wsc", "clue-wsc"),
        ("arc_easy", "arc_easy"),
    ],
)
def test_a_name_stands_for_a_task_that_lm_eval_has(name: str, theirs: str) -> None:
    assert benchmarks.lm_eval_name(name) == theirs


@needs_lm_eval
@pytest.mark.parametrize(
    ("typo", "meant"),
    [("gsm8", "gsm8k"), ("mgsm-zh", "mgsm_zh"), ("clue_wsc", "clue-wsc"), ("math_500", "math500")],
)
def test_an_unknown_task_names_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"no task '{typo}'; did you mean '{meant}'"):
        benchmarks.lm_eval_name(typo)


@needs_lm_eval
def test_a_name_is_looked_up_without_lm_eval_and_torch() -> None:
    code = (
        "import sys; from tutelage.evals.benchmarks import lm_eval_name; lm_eval_name('mmlu');"
        "sys.exit('torch' in sys.modules or 'lm_eval' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_lm_eval_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "tutelage\[evals\]"'):
        benchmarks.require()


@pytest.mark.parametrize(
    ("metrics", "filters", "score"),
    [
        (
            ["exact_match"],
            ["strict-match", "flexible-extract"],
            ("exact_match", "flexible-extract"),
        ),
        (["acc", "acc_norm"], ["none"], ("acc", "none")),
    ],
)
def test_the_score_is_the_first_metric_after_the_flexible_filter(metrics, filters, score) -> None:
    assert benchmarks.score_of("any", metrics, filters) == score


@needs_lm_eval
class TestLocalRows:
    def test_gsm8k_is_read_as_published(self, tmp_path: Path) -> None:
        assert asked("gsm8k", jsonl(tmp_path / "a.jsonl", SUM, SUM)) == [SUM, SUM]

    def test_parquet_is_read(self, tmp_path: Path) -> None:
        pq.write_table(pa.Table.from_pylist([SUM]), tmp_path / "a.parquet")
        assert asked("gsm8k", str(tmp_path / "a.parquet")) == [SUM]

    def test_a_glob_reads_its_files_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            jsonl(tmp_path / f"{name}.jsonl", {**SUM, "question": name})
        assert [row["question"] for row in asked("gsm8k", str(tmp_path / "*.jsonl"))] == ["a", "b"]

    def test_mgsm_has_no_header_quotes_nothing_and_writes_thousands(self, tmp_path: Path) -> None:
        path = tmp_path / "mgsm_es.tsv"
        path.write_text('La tienda "Sol" vende mucho. ¿Cuánto?\t2,125\n', encoding="utf-8")
        (row,) = asked("mgsm_es", str(path))
        assert row == {
            "question": 'La tienda "Sol" vende mucho. ¿Cuánto?',
            "answer": None, "answer_number": 2125,
        }  # fmt: skip

    def test_cmmlu_loses_the_column_of_row_numbers(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text(',Question,A,B,C,D,Answer\n0,"一, 二?",甲,乙,丙,丁,B\n', encoding="utf-8")
        assert asked("cmmlu_agronomy", str(path)) == [
            {"Question": "一, 二?", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "B"}
        ]

    def test_mmlu_of_the_published_csv_gets_choices_and_a_number(self, tmp_path: Path) -> None:
        path = tmp_path / "anatomy_test.csv"
        path.write_text("Which?,one,two,three,four,C\n", encoding="utf-8")
        (row,) = asked("mmlu_anatomy", str(path))
        assert (row["choices"], row["answer"]) == (["one", "two", "three", "four"], 2)

    def test_of_the_whole_mbpp_the_test_part_is_asked(self, tmp_path: Path) -> None:
        row = {"text": "Add.", "code": "a", "test_list": ["assert f()"]}
        rows = [{**row, "task_id": n} for n in (10, 11, 510, 511)]
        found = asked("mbpp", jsonl(tmp_path / "mbpp.jsonl", *rows))
        assert [row["task_id"] for row in found] == [11, 510]

    def test_shots_come_from_their_own_file(self, tmp_path: Path) -> None:
        shot = {"question": "What is 1 + 1?", "answer": "#### 2"}
        task = Task(
            name="gsm8k", source=jsonl(tmp_path / "a.jsonl", SUM), shots=1,
            shots_source=jsonl(tmp_path / "b.jsonl", shot),
        )  # fmt: skip
        assert benchmarks.local_rows(task) == ([SUM], [shot])

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"task gsm8k: there is no file .*nowhere\.jsonl"):
            asked("gsm8k", str(tmp_path / "nowhere.jsonl"))

    def test_a_kind_of_file_that_is_not_known_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(DataError, match=r"unknown kind of file; known: \.jsonl"):
            asked("gsm8k", str(tmp_path / "a.txt"))

    def test_a_column_that_is_missing_is_named_with_its_line(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", {"question": "Why?"})
        with pytest.raises(DataError, match=r"a\.jsonl:1: task gsm8k needs the column 'answer'"):
            asked("gsm8k", source)

    def test_a_row_with_other_columns_is_refused(self, tmp_path: Path) -> None:
        source = jsonl(tmp_path / "a.jsonl", SUM, {**SUM, "note": "x"})
        with pytest.raises(DataError, match=r"a\.jsonl:2: other columns .*: note"):
            asked("gsm8k", source)

    def test_a_number_that_is_none_is_refused_with_its_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("What?\ta lot\n")
        with pytest.raises(DataError, match=r"a\.tsv:1: no row of task mgsm_en"):
            asked("mgsm_en", str(tmp_path / "a.tsv"))

    def test_a_line_that_is_no_json_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("{")
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read as jsonl"):
            asked("gsm8k", str(tmp_path / "a.jsonl"))

    def test_a_csv_row_that_is_too_short_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("Question,A,B,C,D,Answer\nWas?,a,b\n")
        with pytest.raises(DataError, match="line 2 has 3 fields, not 6"):
            asked("cmmlu_agronomy", str(tmp_path / "a.csv"))
