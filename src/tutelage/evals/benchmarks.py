"""Standard benchmarks: which task of lm-evaluation-harness a name stands for, and rows from files.

Owns the names, what the rows of a published file must become for a task, and which of the task's
metrics is its score. How a model is asked and judged is `harness`' affair. Imports neither lm_eval
nor torch: a name is looked up in the text of lm_eval's index, which takes a second and not six; and
pyarrow only for rows, so that a plan, which asks for names, needs none of the three.
"""

import csv
import difflib
import glob
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tutelage.core.errors import DataError, RecipeError
from tutelage.recipe.evaluation import Task

Row = dict[str, Any]

CLUE_WSC = "clue-wsc"
MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
SHORT_NAMES: Mapping[str, str] = {
    r"math500": "hendrycks_math500",
    rf"mgsm_({'|'.join(MGSM_LANGUAGES)})": r"mgsm_native_cot_\1",
    r"humaneval": "humaneval_instruct",
    r"mbpp": "mbpp_instruct",
    r"ceval": "ceval-valid",
    r"ceval_(.+)": r"ceval-valid_\1",
}
"""Our names whose task lm_eval calls otherwise; every other name is lm_eval's own.

MGSM is asked in its language for steps in that language (the NATIVE-COT of arXiv 2210.03057), not
for the number alone (`mgsm_direct_zh`) nor for English steps (`mgsm_en_cot_zh`). HumanEval and MBPP
are asked as chat models are asked: lm_eval's plain tasks want bare code that goes on from the
prompt, on which an answer with a word or a code fence around it fails."""

OWN_TASKS: Mapping[str, Mapping[str, Any]] = {
    CLUE_WSC: {
        "task": CLUE_WSC,
        "dataset_path": "clue/clue",
        "dataset_name": "cluewsc2020",
        "validation_split": "validation",  # the labels of its test split are not public
        "training_split": "train",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": (
            "{{text}}\n上文中的“{{target.span2_text}}”指的是“{{target.span1_text}}”吗？\n答案："
        ),
        "doc_to_choice": ["是", "否"],
        "doc_to_target": "{{['true', 'false'].index(label)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": "tutelage 1"},
    }
}
"""Tasks that lm_eval lacks, in its own form (arXiv 2004.05986 for CLUEWSC2020)."""

MATH500 = "hendrycks_math500"
MATH_VERIFY = "math_verify"
SCORES: Mapping[str, str] = {"drop": "f1", MATH500: MATH_VERIFY}
"""The metric that is a task's score, where it is not the first one that lm_eval lists."""
FLEXIBLE = "flexible-extract"
"""Where a task has several filters, this one: the last number of an answer, however it is said.
The strict one wants words that only solved examples in the prompt teach ("#### 72")."""

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_LETTERS = "ABCD"
_NAMED = re.compile(r"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
_MBPP_TEST = range(11, 511)
csv.field_size_limit(1 << 28)  # the default of 128 KiB cuts long passages


def require() -> None:
    """Raises DataError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError('standard tasks need lm-eval: pip install "tutelage[evals]"')


@cache
def task_files() -> Mapping[str, Path]:
    """The YAML file of every task and group of lm_eval, by name. Raises DataError without it."""
    require()
    spec = importlib.util.find_spec("lm_eval")
    assert spec
    assert spec.origin
    found: dict[str, Path] = {}
    for path in sorted((Path(spec.origin).parent / "tasks").rglob("*.yaml")):
        for name in _NAMED.findall(path.read_text(encoding="utf-8")):
            found.setdefault(name, path)
    return found


def lm_eval_name(name: str) -> str:
    """The task that `name` stands for, as lm_eval (or `OWN_TASKS`) calls it.

    Raises: RecipeError for an unknown name, with the nearest one; DataError without lm_eval.
    """
    theirs = name
    for pattern, replacement in SHORT_NAMES.items():
        if match := re.fullmatch(pattern, name):
            theirs = match.expand(replacement)
    if theirs in OWN_TASKS or theirs in task_files():
        return theirs
    ours = ["math500", "humaneval", "mbpp", "ceval", *OWN_TASKS]
    ours += [f"mgsm_{language}" for language in MGSM_LANGUAGES]
    ours += [t.replace("-valid_", "_") for t in task_files() if t.startswith("ceval-valid_")]
    close = difflib.get_close_matches(name, [*ours, *task_files()], n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ": see `lm-eval ls tasks`"
    raise RecipeError(f"there is no task {name!r}{hint}")


def score_of(task: str, metrics: Sequence[str], filters: Sequence[str]) -> tuple[str, str]:
    """(Metric, filter) that are the score of a task, of those that lm_eval gave for it."""
    metric = SCORES.get(task, metrics[0])
    return metric, FLEXIBLE if FLEXIBLE in filters else filters[0]


@dataclass(frozen=True)
class _Form:
    """What a task's rows hold, and what makes them of a published file's rows."""

    columns: tuple[str, ...]
    headless: tuple[str, ...] = ()
    """Columns of a .csv or .tsv that is published without a header."""
    adapt: Callable[[Row], Row] = lambda row: row
    is_test: Callable[[Row], bool] = lambda row: True
    """Whether a row of a file with all parts belongs to the part that is asked."""


def _mgsm(row: Row) -> Row:
    if "equation_solution" in row:  # as on the Hub
        return row
    return {**row, "answer": None, "answer_number": int(str(row["answer_number"]).replace(",", ""))}


def _mmlu(row: Row) -> Row:
    if "choices" in row:
        return row
    choices = [row[letter] for letter in _LETTERS]
    return {**row, "choices": choices, "answer": _LETTERS.index(row["answer"].strip())}


_CHOICES = tuple(_LETTERS)
_FORMS: Mapping[str, _Form] = {
    r"gsm8k.*": _Form(("question", "answer")),
    r"mgsm_.*": _Form(
        ("question", "answer", "answer_number"), ("question", "answer_number"), _mgsm
    ),
    r"humaneval(_instruct|_plus)?": _Form(("prompt", "entry_point", "canonical_solution", "test")),
    r"mbpp(_instruct)?": _Form(
        ("text", "code", "test_list"), is_test=lambda row: row.get("task_id", 11) in _MBPP_TEST
    ),
    r"mmlu_(?!pro).*": _Form(
        ("question", "choices", "answer"), ("question", *_CHOICES, "answer"), _mmlu
    ),
    r"cmmlu_.*": _Form(("Question", *_CHOICES, "Answer")),
    r"ceval-valid_.*": _Form(("question", *_CHOICES, "answer")),
    r"ifeval": _Form(("key", "prompt", "instruction_id_list", "kwargs")),
    r"drop": _Form(("query_id", "passage", "question", "answer", "validated_answers")),
    r"(hendrycks|minerva)_math.*": _Form(("problem", "solution")),
    CLUE_WSC: _Form(("text", "target", "label")),
}


def local_rows(task: Task) -> tuple[list[Row], list[Row]]:
    """(Rows to ask, rows to draw examples from) of `task.source` and `task.shots_source`.

    In the columns that lm_eval's task wants. Of MBPP's file, which holds all parts, the rows of the
    test part (`task_id` 11 to 510) are asked.

    Raises: DataError for a file that is missing or cannot be read, and rows that do not fit.
    """
    form = next(
        (form for name, form in _FORMS.items() if re.fullmatch(name, lm_eval_name(task.name))),
        _Form(()),
    )
    asked = [row for row in _read(task.source, task.name, form) if form.is_test(row)]
    if not asked:
        raise DataError(f"task {task.name}: {task.source} holds no row of its test part")
    shots = list(_read(task.shots_source, task.name, form)) if task.shots_source else []
    return asked, shots


def _read(pattern: str, task: str, form: _Form) -> Iterator[Row]:
    first: set[str] | None = None
    for path in _files(pattern, task):
        for place, raw in _rows(path, form):
            try:
                row = form.adapt(raw)
                missing = [name for name in form.columns if name not in row]
            except (KeyError, ValueError, AttributeError) as error:
                raise DataError(f"{place}: no row of task {task}: {error!r}") from error
            if missing:
                raise DataError(
                    f"{place}: task {task} needs the column {missing[0]!r}; it has {', '.join(row)}"
                )
            first = first or set(row)
            if set(row) != first:  # what is missing would be asked as "None"
                odd = ", ".join(sorted(set(row) ^ first))
                raise DataError(f"{place}: other columns than in the first row: {odd}")
            yield row


def _files(pattern: str, task: str) -> list[Path]:
    paths = [Path(pattern)] if Path(pattern).is_file() else [*map(Path, sorted(glob.glob(pattern)))]
    if not paths:
        raise DataError(f"task {task}: there is no file {pattern}")
    if wrong := [path for path in paths if path.suffix.lower() not in SUFFIXES]:
        raise DataError(f"{wrong[0]}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return paths


def _rows(path: Path, form: _Form) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            for number, row in enumerate(pq.read_table(path).to_pylist(), 1):
                yield f"{path}[{number}]", row
        elif suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}:{number}", _object(line)
        else:
            yield from _delimited(path, form)
    except (pa.ArrowException, csv.Error, ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as {suffix[1:]}: {error}") from error


def _object(line: str) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a line is not an object: {line[:40]!r}")
    return row


def _delimited(path: Path, form: _Form) -> Iterator[tuple[str, Row]]:
    header: Sequence[str] = ()
    with path.open(encoding="utf-8-sig", newline="") as stream:
        # MGSM's .tsv quotes nothing: a quotation mark in it is the question's own
        plain = path.suffix.lower() == ".tsv" and form.headless
        lines = (
            csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            if plain
            else csv.reader(stream, strict=True)
        )
        for cells in lines:
            place = f"{path}:{lines.line_num}"
            if not header:
                if not form.headless or set(form.headless) <= set(cells):
                    header = cells
                    continue
                header = form.headless
            if len(cells) != len(header):
                raise ValueError(
                    f"line {lines.line_num} has {len(cells)} fields, not {len(header)}"
                )
            # a column without a name is the row number that pandas wrote
            yield place, {name: cell for name, cell in zip(header, cells, strict=True) if name}
