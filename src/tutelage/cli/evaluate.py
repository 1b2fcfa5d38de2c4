"""`tutelage evaluate`: standard tasks for one model, outside a recipe.

Makes a recipe of one step in memory, so that an evaluation is cached, resumed and told like any
other, and shows what it found.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage import pipeline
from tutelage.cli import runs
from tutelage.cli.options import (
    STORE,
    AllowUnsandboxed,
    AsJson,
    RunName,
    StorePath,
    check_sandbox,
    print_json,
)
from tutelage.core.errors import DataError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.recipe.load import parse
from tutelage.report.run import read_json
from tutelage.store import Store

STEP = "scores"
COLUMNS = ("task", "items", "score", "95 %", "tokens", "cut off", "per correct", "metric")
"""tokens: the mean answer's; per correct: tokens of all answers by correct answers."""


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A step of a run, a model's directory, a Hub id, or bundled:NAME.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, with commas between: gsm8k, math500, mgsm_zh, humaneval, mbpp, "
            "mmlu_SUBJECT, cmmlu_SUBJECT, ceval_SUBJECT, ifeval, drop, clue-wsc, and every other "
            "of lm-eval.",
            show_default=False,
        ),
    ],
    files: Annotated[
        list[str],
        typer.Option(
            "--file",
            metavar="TASK=PATH",
            help="Take a task's rows from a file (.jsonl, .csv, .tsv, .parquet) instead of the "
            "Hub; repeatable.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    limit: Annotated[int, typer.Option(min=0, help="The first so many items; 0: all.")] = 0,
    shots: Annotated[
        int, typer.Option(min=0, help="Solved examples in the prompt before each item.")
    ] = 0,
    mode: Annotated[
        Literal["fast", "reasoning"], typer.Option(help="Answer at once, or think first.")
    ] = "fast",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, chain included; cut-off ones are counted.")
    ] = 512,
    system: Annotated[str, typer.Option(help="System prompt; the usual evaluation has none.")] = "",
    batch_rows: Annotated[int, typer.Option(min=1, help="Items answered together.")] = 32,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the solved examples; answers are greedy.")
    ] = 0,
    device: Annotated[
        Literal["auto", "cpu", "cuda", "npu", "mps"], typer.Option(help="Where the model runs.")
    ] = "auto",
    sandbox: Annotated[
        Literal["bubblewrap", "none"],
        typer.Option(help="Where programs of humaneval and mbpp run; none wants the next option."),
    ] = "bubblewrap",
    allow_unsandboxed: AllowUnsandboxed = False,
    run: RunName = "",
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Ask a model standard tasks: maths, code, knowledge, several languages, instructions.

    Every score comes with its interval and with what it cost. Answers are remembered in the store:
    more items, or the same ones after an interruption, ask the model only what is new.
    """
    check_sandbox(sandbox, allowed=allow_unsandboxed)
    listed = _listed(tasks, files, limit=limit, shots=shots)
    source = _source(Store(store), run, model)
    recipe = {
        "name": _run_name(model),
        "seed": seed,
        "runtime": {"device": device, "sandbox": sandbox},
        "models": {"model": {"source": source}},
        "steps": {
            STEP: {
                "stage": "evaluate", "models": ["model"], "tasks": listed, "mode": mode,
                "max_tokens": max_tokens, "system": system, "batch_rows": batch_rows,
            }
        },
    }  # fmt: skip
    result = pipeline.run([parse(recipe, "evaluate")], Store(store), reporter=Reporter())
    artifact = result.artifacts[STEP]
    found = read_json(artifact.path / "scores.json")["tests"]
    if as_json:
        print_json({"model": model, "path": str(artifact.path), "mode": mode, "tests": found})
    else:
        _print(Console(), found, artifact.path, result.seconds)


def _listed(
    tasks: str, files: Sequence[str], *, limit: int, shots: int
) -> list[dict[str, str | int]]:
    """The recipe's `tasks`.

    Raises RecipeError for a file of a task that is not asked, DataError for one that is not there.
    """
    names = [name for name in re.split(r"[,\s]+", tasks) if name]
    if not names:
        raise RecipeError("--tasks names no task, as in --tasks gsm8k,humaneval")
    sources: dict[str, str] = {}
    for given in files:
        name, separator, path = given.partition("=")
        if not separator or not path:
            raise RecipeError(f"--file {given}: expected TASK=PATH, as gsm8k=gsm8k_test.jsonl")
        if name not in names:
            raise RecipeError(f"--file {given}: {name} is not among --tasks {','.join(names)}")
        if not glob.glob(path):
            raise DataError(f"--file {given}: there is no such file")
        sources[name] = path
    return [
        {"name": name, "source": sources.get(name, ""), "limit": limit, "shots": shots}
        for name in names
    ]


def _source(store: Store, run: str, model: str) -> str:
    """What `[models]` calls it. Raises ArtifactError for a step that made no model."""
    if ":" in model or "/" in model or Path(model).exists():
        return model
    return str(runs.model_directory(store, run, model))


def _run_name(model: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    return f"evaluate-{stem or 'model'}"


def _print(
    console: Console, tests: Sequence[Mapping[str, Any]], path: Path, seconds: float
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        left = name in ("task", "metric")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "task")
    for test in tests:
        metrics = test["models"][0]["metrics"]
        score, cost = metrics["accuracy"], metrics["tokens_per_correct"]
        interval = [_number(score[bound], "{:.3f}") for bound in ("low", "high")]
        table.add_row(
            test["test"], f"{test['items']:,}", _number(score["estimate"], "{:.3f}"),
            "{}–{}".format(*interval), _number(metrics["answer_tokens"]["estimate"], "{:,.0f}"),
            _number(metrics["truncated_share"]["estimate"], "{:.0%}"),
            _number(cost["estimate"], "{:,.0f}"), test["task"]["metric"],
        )  # fmt: skip
    console.print(table)
    for test in tests:
        for warning in test["models"][0]["warnings"]:
            console.print(Text(f"WARNING: {test['test']}: {warning}", "yellow"), soft_wrap=True)
    versions = ", ".join(f"{t['test']} {t['task']['version']}" for t in tests)
    harness = tests[0]["task"]["lm_eval"]
    console.print(
        f"\nlm-eval {harness}; versions of the tasks: {versions}; {seconds:,.1f} s\n"
        f"each answer with its verdict: {path / 'verdicts.parquet'}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
