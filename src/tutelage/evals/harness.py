"""Runs standard tasks through lm-evaluation-harness: its prompts, filters and metrics, our model.

Owns how a task is put together from lm_eval's description and a recipe's table, and the result of
a run, item by item. Names and files are in `benchmarks`, the model in `harness_model`. lm_eval, and
torch with it, is imported only when a task is run.

No network for local files. From the Hub, lm_eval's own data set is fetched by `datasets`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.core.errors import DataError, RecipeError, TutelageError
from tutelage.evals import benchmarks
from tutelage.evals.grading_text import short
from tutelage.recipe.evaluation import Task
from tutelage.text.chat import ChatFormat, Mode

if TYPE_CHECKING:
    from tutelage.evals.harness_model import Answered, Generate, GradedTask, Logps, Runner

_LOCAL, _SHOTS = "test", "shots"
_UNRUN = ("loglikelihood_rolling",)


@dataclass(frozen=True)
class Item:
    """One item of a task: what was asked, what was answered, and what it is worth."""

    item: str
    """Its number among the task's rows, from 0; behind the task's name where there are several."""
    prompt: str
    thinking: str | None
    answer: str
    """Without the chain, cut where lm_eval cuts it; of multiple choice, the option chosen."""
    gold: str | None
    correct: float
    """The score's metric, from 0 to 1."""
    reason: str
    tokens: int
    finish_reason: str
    """stop, length, or choice: nothing was decoded but a chain, which was closed."""


@dataclass(frozen=True)
class TaskResult:
    """A task's items, and what lm_eval says of them together."""

    task: str
    """As in the recipe."""
    lm_eval_task: str
    version: str
    metric: str
    filter: str
    lm_eval: str
    """The library's version."""
    shots: int
    all: Mapping[str, float]
    """Every metric that lm_eval aggregates: "metric,filter", or "task:metric,filter" of a group."""
    items: tuple[Item, ...]


def run_task(
    task: Task, *, chat: ChatFormat, generate: Generate, logps: Logps, mode: Mode = "fast",
    system: str = "", max_tokens: int, runner: Runner | None = None, seed: int = 0,
) -> TaskResult:  # fmt: skip
    """Ask every item of a task and judge the answers.

    `generate` answers prompts (ids) until a stop id of `chat`, and `logps` reads continuations;
    each is called once with all that a task asks, twice where a chain comes first. `max_tokens`
    holds where `task.max_tokens` is 0. `runner` is an entered sandbox; tasks of code need it.
    `seed` draws the solved examples.

    Raises: RecipeError for a task that is unknown or cannot be run; DataError for rows that are
    missing or unfit, and libraries that are not installed; what `generate` and `logps` raise.
    """
    tasks = _built(task, seed=seed)
    from lm_eval.evaluator import evaluate

    from tutelage.evals.harness_model import ChatModel, CodeTask

    for one in tasks:
        if isinstance(one, CodeTask):
            if runner is None:
                raise RecipeError(f"task {task.name} runs code and was given no sandbox")
            one.runner = runner
    model = ChatModel(
        chat, generate, logps, mode=mode, system=system, max_tokens=task.max_tokens or max_tokens,
        needs_greedy=any(_needs_greedy(one) for one in tasks),
    )  # fmt: skip
    with _quiet():
        found = evaluate(
            model, {"tasks": {one.task_name: one for one in tasks}}, limit=task.limit or None,
            bootstrap_iters=0, apply_chat_template=True, confirm_run_unsafe_code=True,
        )  # fmt: skip
    return _result(task, tasks, found, model.answered)


def runs_code(task: Task) -> bool:
    """Whether a task wants a sandbox; its names, files and rows are checked on the way.

    Raises as `run_task` does before it asks a model.
    """
    from tutelage.evals.harness_model import CodeTask

    return any(isinstance(one, CodeTask) for one in _built(task, seed=0))


def gold_answers(task: Task) -> list[str | None]:
    """For each item the answer that must score 1; None where the rows hold no such answer.

    Of multiple choice it is the text of the option. Raises as `run_task`.
    """
    tasks = _built(task, seed=0)
    docs = [(one, doc) for one in tasks for _, doc in one.doc_iterator(limit=task.limit or None)]
    return [_answerable(one, doc) for one, doc in docs]


def _built(task: Task, *, seed: int) -> list[GradedTask]:
    """The task of lm_eval, or those of the group, with rows and examples as the recipe says."""
    name = benchmarks.lm_eval_name(task.name)
    benchmarks.require()
    with _quiet():
        names = _members(name)
        if task.source and len(names) > 1:
            raise RecipeError(
                f"task {task.name} is a group of {len(names)} tasks: give local rows to one of "
                f"them, such as {names[0]!r}"
            )
        built = [_one(task, one) for one in names]
    for one in built:
        one.set_fewshot_seed(seed)
    return built


def _members(name: str) -> list[str]:
    """The tasks that a name of lm_eval stands for: itself, or those of a group and its groups."""
    if name in benchmarks.OWN_TASKS or not _is_group(name):
        return [name]
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index  # takes 4 s: it reads 14,000 files

    def below(member: Any) -> Iterator[str]:
        entry = index.get(member) if isinstance(member, str) else None
        if entry is None:
            raise RecipeError(f"the group {name!r} changes its tasks: name them one by one instead")
        if not entry.cfg:  # a tag
            yield from sorted(entry.tags)
        elif "group" in entry.cfg:
            for inner in entry.cfg["task"]:
                yield from below(inner)
        else:
            yield member

    return list(dict.fromkeys(below(name)))


def _is_group(name: str) -> bool:
    return "group" in _described(name, functions=False)


def _described(name: str, *, functions: bool) -> dict[str, Any]:
    """lm_eval's description of a task; its functions stay names unless asked for."""
    if name in benchmarks.OWN_TASKS:
        return dict(benchmarks.OWN_TASKS[name])
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(benchmarks.task_files()[name], resolve_func=functions)


def _one(task: Task, name: str) -> GradedTask:
    from tutelage.evals import harness_model

    described = _described(name, functions=False)
    _check(task, name, described)
    runs_code = bool(described.get("unsafe_code"))
    try:
        with _code_eval_unused() if runs_code else contextlib.nullcontext():
            config = _described(name, functions=True)
    except (ImportError, AssertionError) as error:  # lm_eval asserts versions
        raise DataError(f"task {task.name} needs more than is installed: {_line(error)}") from error
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    config["num_fewshot"] = task.shots
    if task.source:
        config |= _local(task, config)
    kind = harness_model.CodeTask if runs_code else harness_model.GradedTask
    if name == benchmarks.MATH500:
        kind = harness_model.MathTask
        ours = {"metric": benchmarks.MATH_VERIFY, "aggregation": "mean", "higher_is_better": True}
        config["metric_list"] = [*config["metric_list"], ours]
    try:
        built = kind(config)
    except TutelageError:
        raise
    except Exception as error:  # datasets and lm_eval raise dozens of kinds for rows and the Hub
        where, what = task.source, "give rows in the form in which they were published"
        if not task.source:
            where, what = f"{config.get('dataset_path')} (Hub)", "or give a local file as `source`"
        raise DataError(
            f"task {task.name} cannot be made of {where}: {_line(error)}; {what}"
        ) from error
    _check_shots(task, built)
    return built


def _check(task: Task, name: str, described: Mapping[str, Any]) -> None:
    """Raises RecipeError for what cannot be run here, DataError for what it lacks."""
    reason = ""
    if "class" in described:
        reason = "is a program of its own in lm-eval, without a description"
    elif described.get("output_type") in _UNRUN:
        reason = "measures the perplexity of a text, which is no question to a chat model"
    elif described.get("doc_to_image") or described.get("doc_to_audio"):
        reason = "is about pictures or sound"
    elif described.get("unsafe_code") and not name.startswith(("humaneval", "mbpp")):
        reason = "runs code in a way of its own; HumanEval and MBPP run in the sandbox"
    elif described.get("repeats", 1) > 1:
        reason = f"wants {described['repeats']} answers an item; for pass@k use a test of your own"
    elif any(m["metric"] == "acc_mutual_info" for m in described.get("metric_list") or ()):
        reason = "asks for the likelihood of an answer without its question"
    elif task.shots and described.get("num_fewshot") == 0:
        reason = "has no solved examples in lm-eval: leave out `shots`"
    if reason:
        raise RecipeError(f"task {task.name} {reason}")
    if "ifeval" in name:
        _check_punkt(task)


def _check_punkt(task: Task) -> None:
    """lm_eval would fetch it while it is imported, without asking."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise DataError(
            f"task {task.name} needs NLTK's punkt_tab to count sentences: "
            "python -m nltk.downloader punkt_tab"
        ) from error


def _local(task: Task, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a description read local rows instead of the Hub."""
    from datasets import Dataset

    asked, shots = benchmarks.local_rows(task)

    def data_set(**_: Any) -> dict[str, Dataset]:
        parts = {_LOCAL: asked, _SHOTS: shots}
        return {part: Dataset.from_list(rows) for part, rows in parts.items() if rows}

    examples = dict(config.get("fewshot_config") or {})
    drawn_from = None
    if task.shots and (shots or not examples.get("samples")):
        drawn_from = _SHOTS if shots else _LOCAL  # of those asked, all but the item itself
        examples.pop("samples", None)
    return {
        "custom_dataset": data_set, "test_split": _LOCAL, "validation_split": None,
        "training_split": None, "fewshot_split": drawn_from,
        "fewshot_config": {**examples, "split": drawn_from},
    }  # fmt: skip


def _check_shots(task: Task, built: GradedTask) -> None:
    if task.shots:
        own = built.fewshot_cfg.split == built.config.test_split
        found = len(built.sampler.df or ()) - own
        if found < task.shots:
            raise DataError(
                f"task {task.name}: {task.shots} solved examples are wanted and {max(found, 0)} "
                "are there: give more in `shots_source`"
            )


def _needs_greedy(one: GradedTask) -> bool:
    if one.OUTPUT_TYPE == "multiple_choice":
        return "exact_match" in one.aggregation()
    return one.OUTPUT_TYPE == "loglikelihood"


def _result(
    task: Task, tasks: Sequence[GradedTask], found: Any, answered: Mapping[Any, Answered]
) -> TaskResult:
    items: list[Item] = []
    aggregates: dict[str, float] = {}
    score = ("", "")
    for one in tasks:
        samples = found["samples"][one.task_name]
        score = _score(task, one, samples)
        lead = "" if len(tasks) == 1 else one.task_name
        for reason, sample in zip(one.reasons, samples, strict=True):
            if sample["filter"] == score[1]:
                own = answered[one.task_name, sample["doc_id"]]
                items.append(_item(one, sample, own, score[0], reason=reason, lead=lead))
        for key, value in found["results"][one.task_name].items():
            if "," in key and isinstance(value, int | float):
                aggregates[f"{lead}:{key}" if lead else key] = float(value)
    if wrong := [item for item in items if not 0 <= item.correct <= 1]:
        raise RecipeError(
            f"task {task.name}: its metric {score[0]} is no share of right answers: "
            f"{wrong[0].correct:g} for item {wrong[0].item}"
        )
    versions = dict.fromkeys(str(one.VERSION) for one in tasks)
    return TaskResult(
        task=task.name, lm_eval_task=benchmarks.lm_eval_name(task.name),
        version=", ".join(versions), metric=score[0], filter=score[1],
        lm_eval=importlib.metadata.version("lm_eval"), shots=task.shots, all=aggregates,
        items=tuple(items),
    )  # fmt: skip


def _score(task: Task, one: GradedTask, samples: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(Metric, filter) that give an item's worth: a number, and the more the better."""
    better = one.higher_is_better()
    usable = [
        name
        for name in samples[0]["metrics"]
        if isinstance(samples[0][name], int | float) and better.get(name, True)
    ]
    if not usable:
        raise RecipeError(f"task {task.name} gives no item a score of its own; take another one")
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    return benchmarks.score_of(one.task_name, usable, filters)


def _item(
    one: GradedTask, sample: Mapping[str, Any], own: Answered, metric: str, *,
    reason: str, lead: str,
) -> Item:  # fmt: skip
    gold, text = _gold(one, sample["doc"]), own.text
    if one.OUTPUT_TYPE == "multiple_choice":
        options = one.doc_to_choice(sample["doc"])
        logps = [logp for logp, _ in sample["filtered_resps"][: len(options)]]
        text = judged = options[logps.index(max(logps))]
    else:
        judged = str(sample["filtered_resps"][0])
    correct = float(sample[metric])
    return Item(
        item=f"{lead}/{sample['doc_id']}" if lead else str(sample["doc_id"]),
        prompt=own.prompt, thinking=own.thinking, answer=text, gold=gold, correct=correct,
        reason=reason or _reason(text, judged, gold, metric, correct),
        tokens=own.tokens, finish_reason=own.finish_reason,
    )  # fmt: skip


def _reason(text: str, judged: str, gold: str | None, metric: str, correct: float) -> str:
    if not text.strip():
        return "empty answer"
    if gold is None or 0 < correct < 1:
        return f"{metric} {correct:g}"
    final = gold.split("####")[-1].strip()  # GSM8K's gold is a solution with its number at the end
    return f"{short(judged)} {'=' if correct else 'is not'} {short(final)}"


def _gold(one: GradedTask, doc: Mapping[str, Any]) -> str | None:
    """The gold answer as a reader wants to see it; None where there is none, only a test."""
    if code := doc.get("canonical_solution") or doc.get("code"):
        return code
    if one.task_name == benchmarks.MATH500:
        return doc["answer"]
    if one.task_name == "drop":
        return " | ".join(", ".join(spans) for spans in doc["answers"])
    target = one.doc_to_target(doc)
    if one.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
        return one.doc_to_choice(doc)[target]
    if one.config.doc_to_target == 0:  # IFEval: instructions that are checked
        return None
    return " | ".join(map(str, target)) if isinstance(target, list) else str(target)


def _answerable(one: GradedTask, doc: Mapping[str, Any]) -> str | None:
    """The gold as a model would have to say it."""
    gold = _gold(one, doc)
    if gold is None or one.task_name == "drop":  # of several spans, lm_eval takes one at most
        return None
    if one.task_name == benchmarks.MATH500:
        return f"${gold}$"
    return f"\n{gold}\n```" if "```" in (one.config.gen_prefix or "") else gold


@contextlib.contextmanager
def _code_eval_unused() -> Iterator[None]:
    """lm_eval's files for code fetch a metric that runs code, and try it, while they are imported.

    They get one that does nothing, and the files are forgotten after: nobody else may meet it.
    """
    import evaluate

    known, load = set(sys.modules), evaluate.load
    evaluate.load = lambda *_, **__: _Nothing()
    try:
        yield
    finally:
        evaluate.load = load
        for name in set(sys.modules) - known:
            if name.startswith("lm_eval.tasks."):
                del sys.modules[name]


class _Nothing:
    def compute(self, **_: Any) -> tuple[dict[str, float], dict[str, Any]]:
        return {"pass@1": 0.0}, {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval's and datasets' bars and remarks are for their own command line."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
