"""What a plan would cost before anything is spent: tokens, minutes, disk and peak memory per step.

Rows and lengths come from finished steps where there are any, else from the recipe's limits, so the
figures are upper bounds. Minutes are floating-point operations at a rate a CPU core is known to
reach. What an `sft` step learns from is told by mode, from its data's own text where it is there.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tutelage.bench.pace import Pace
from tutelage.core.artifact import open_artifact
from tutelage.core.errors import RecipeError
from tutelage.data.identity import local_files, source_files
from tutelage.graph import Node
from tutelage.models.new import feed_forward_width, parameter_count
from tutelage.models.source import locate
from tutelage.pipeline import Planned
from tutelage.recipe.base import Step
from tutelage.recipe.curation import Curate, Data, Difficulty, Funnel, Magpie
from tutelage.recipe.evaluation import Evaluate, Task
from tutelage.recipe.screening import Screen
from tutelage.recipe.tables import (
    Export,
    Merge,
    ModelSource,
    New,
    Prune,
    Rollout,
    Score,
    Synthesize,
)
from tutelage.recipe.training import Distill, Online, Sft
from tutelage.store import Store
from tutelage.train.curriculum_forecast import (
    ANY_MODE,
    ForecastPart,
    Text,
    forecast,
    sampled_texts,
    together,
)  # fmt: skip

CORE_FLOPS = 25e9
"""Per core and second: half of what large matrix products reach, as these are not all large."""
PROMPT_TOKENS = 64
"""A prompt with its template, where nothing better is known."""
ANSWER_SHARE = 0.7
"""Of `max_tokens`, where nothing better is known."""
TARGET_BYTES = 40
"""A stored target token, its sampled id and log-probs."""
HUB_ITEMS = 1_319
"""Items of a task on the Hub without a limit: as many as GSM8K has."""
OPERATIONS = {"decode": 2, "read": 2, "train": 6}
"""Floating-point operations per parameter and token: forward 2, backward 4."""


BESIDE = {"online": "teacher", "evaluate": "teacher", "synthesize": "judge"}
"""The role whose model is in memory together with another one, by stage."""
PAGES = ("report", "ablation")
"""Stages that read what models did, and run none."""


@dataclass(frozen=True)
class Estimate:
    """Upper bounds for one step; zeros where there is nothing to tell."""

    rows: int = 0
    decoded: int = 0
    read: int = 0
    trained: int = 0
    minutes: float | None = 0.0
    """None while a model is not on this machine, so that its size is not known."""
    disk_bytes: int = 0
    memory_bytes: int = 0
    mix: tuple[ForecastPart, ...] = ()
    """What an `sft` step with a curriculum takes of each mode in each stage."""


@dataclass(frozen=True)
class _Model:
    parameters: int
    bytes: int
    vocab_size: int
    pace: Pace | None = None
    """As measured here, of this model or of the one it is made from."""
    own: bool = True
    """Whether the pace is its own, so that its answers' length is known too."""
    linear_width: int = 0
    """Inputs and outputs of its linear layers, summed: adapters have so many weights a rank."""


UNKNOWN_MODEL = _Model(0, 0, 0)


def estimate(
    planned: Sequence[Planned], store: Store, *, paces: Mapping[str, Pace] | None = None
) -> dict[str, Estimate]:
    """An estimate for each step of a plan, by name; `paces` is what `measure` found, by model."""
    paces = paces or {}
    found: dict[str, Estimate] = {}
    models: dict[str, _Model] = {}
    for item in planned:
        node = item.node
        if node.source:
            models[node.name] = replace(_outside(node.source, store), pace=paces.get(node.name))
            found[node.name] = Estimate()
            continue
        assert node.step is not None
        if isinstance(node.step, New):
            models[node.name] = _made(node, node.step, models)
        elif node.produces == "model":
            made_from = models[node.inputs["model"]]  # an upper bound for a pruned one
            own = paces.get(node.name)
            models[node.name] = replace(made_from, pace=own or made_from.pace, own=bool(own))
        if known := _finished(item, store):
            found[node.name] = known
            continue
        inputs = {role: found[name] for role, name in node.inputs.items()}
        used = {role: models[name] for role, name in node.inputs.items() if name in models}
        if isinstance(node.step, Sft):
            guess = _sft(item, planned, found, used["model"], store)
        elif isinstance(node.step, New):
            size = models[node.name].bytes
            guess = Estimate(disk_bytes=size, memory_bytes=2 * size)
        else:
            guess = _guess(node.step, inputs, used)
        found[node.name] = _timed(guess, node.stage, used)
    return found


def _finished(item: Planned, store: Store) -> Estimate | None:
    """A finished step costs nothing more; its true counts serve the steps after it."""
    if item.status != "cached":
        return None
    artifact = open_artifact(store.place(item.node.stage, item.fingerprint))
    tokens = artifact.manifest["tokens"]
    return Estimate(
        rows=int(artifact.summary.get("rows", 0)),
        # What reads answers decodes none, but says how long they are to those that learn from them.
        decoded=tokens["student_decoded"] + tokens["teacher_decoded"]
        or int(artifact.summary.get("response_tokens", 0)),
        read=tokens["teacher_prefilled"],
    )


def _guess(step: Step, inputs: Mapping[str, Estimate], models: Mapping[str, _Model]) -> Estimate:
    model = models.get("model", models.get("teacher", UNKNOWN_MODEL))
    if isinstance(step, Data | Curate):
        sources = [e.rows for role, e in inputs.items() if role.startswith("data.")]
        rows = _narrowed(step, _source_rows(step) if isinstance(step, Data) else sum(sources))
        return Estimate(rows=rows, disk_bytes=rows * 400)
    if isinstance(step, Magpie | Difficulty | Synthesize | Rollout):
        rows, answers = _answers(step, inputs)
        decoded = int(answers * _answer_tokens(step, model))
        return Estimate(
            rows, decoded=decoded, disk_bytes=decoded * 12, memory_bytes=int(model.bytes * 1.6)
        )
    if isinstance(step, Screen):  # how many stay is not known: all of them at most
        rollouts = inputs["rollouts"]
        times = 3 if step.delta_ifd else 0  # the teacher twice, the student once
        return Estimate(
            rollouts.rows, decoded=rollouts.decoded,
            read=times * (rollouts.decoded + rollouts.rows * PROMPT_TOKENS),
            disk_bytes=rollouts.decoded * 12, memory_bytes=int(model.bytes * 1.6 * bool(times)),
        )  # fmt: skip
    if isinstance(step, Score):
        rollouts = inputs["rollouts"]
        return Estimate(
            rollouts.rows, decoded=rollouts.decoded,
            read=rollouts.decoded + rollouts.rows * PROMPT_TOKENS,
            disk_bytes=rollouts.decoded * TARGET_BYTES, memory_bytes=int(model.bytes * 1.6),
        )  # fmt: skip
    if isinstance(step, Distill):
        targets = inputs["targets"]
        tokens = targets.decoded + targets.rows * PROMPT_TOKENS
        return _training(step, targets.rows, tokens * step.epochs, model)
    if isinstance(step, Online):
        return _online(step, inputs["prompts"].rows, model, models["teacher"])
    if isinstance(step, Evaluate):
        return _evaluated(step, inputs, max(m.bytes for m in models.values()))
    if isinstance(step, Export):
        return Estimate(
            step.questions, decoded=step.questions * step.max_tokens * len(step.formats),
            disk_bytes=model.bytes, memory_bytes=int(model.bytes * 2.2),
        )  # fmt: skip
    if isinstance(step, Prune | Merge):
        return Estimate(disk_bytes=model.bytes, memory_bytes=int(model.bytes * 2))
    return Estimate()


def _online(step: Online, prompts: int, student: _Model, teacher: _Model) -> Estimate:
    steps = math.ceil(step.epochs * prompts / step.prompts_a_step)
    steps = min(steps, step.max_steps) if step.max_steps else steps
    answers = steps * step.prompts_a_step * step.samples
    decoded = int(answers * step.max_tokens * ANSWER_SHARE)
    seen = decoded + answers * PROMPT_TOKENS
    return Estimate(
        prompts, decoded=decoded, read=seen, trained=seen, disk_bytes=student.bytes,
        memory_bytes=int(student.bytes * 5 + teacher.bytes * 1.6),
    )  # fmt: skip


def _evaluated(step: Evaluate, inputs: Mapping[str, Estimate], largest: int) -> Estimate:
    """Distance to the teacher, tests and tasks together; a choice counts as an answer."""
    held_out = inputs["prompts"].rows if step.teacher else 0
    count = len(step.models)
    # Of the teacher, a sampled answer and a greedy one; of each model, a greedy one.
    decoded = held_out * step.max_tokens * (count + 2)
    read = 2 * count * held_out * (PROMPT_TOKENS + step.max_tokens)
    tests = sum(estimate.rows for role, estimate in inputs.items() if role.startswith("tests."))
    times = sum(step.samples if temperature else 1 for temperature in step.temperatures)
    decoded += count * tests * times * step.max_tokens
    items = [_items(task) for task in step.tasks]
    for task, number in zip(step.tasks, items, strict=True):
        decoded += count * number * (task.max_tokens or step.max_tokens)
        read += count * number * (1 + task.shots) * PROMPT_TOKENS
    return Estimate(
        held_out + tests + sum(items), decoded=int(decoded * ANSWER_SHARE), read=read,
        memory_bytes=int(largest * (2.6 if step.teacher else 1.6)),
    )  # fmt: skip


def _items(task: Task) -> int:
    """Its rows, where they are in files here; those on the Hub are not counted for an estimate."""
    rows = HUB_ITEMS
    if task.source:
        from tutelage.records import count_rows  # imports pyarrow, which a plan rarely needs

        paths = local_files(task.source)
        rows = _lines(paths) + count_rows([p for p in paths if p.suffix == ".parquet"])
    return min(rows, task.limit) if task.limit else rows


def _sft(
    item: Planned, planned: Sequence[Planned], found: Mapping[str, Estimate], model: _Model,
    store: Store,
) -> Estimate:  # fmt: skip
    """Raises RecipeError naming the setting of a curriculum that cannot be."""
    step = item.node.step
    assert isinstance(step, Sft)
    by_name = {other.node.name: other for other in planned}
    texts = _inputs_texts(item, by_name, found, store)
    rows = round(sum(text.rows for text in texts.values()))
    if not step.curriculum:
        tokens = step.epochs * sum(text.tokens for text in texts.values())
        return _training(step, rows, round(tokens), model)
    try:
        mix = forecast(step.curriculum, texts, epochs=step.epochs)
    except RecipeError as error:
        raise RecipeError(f"steps.{item.node.name}.{error}") from None
    trained = sum(part.tokens or 0 for part in mix)
    return replace(_training(step, rows, trained, model), mix=mix)


def _training(step: Sft | Distill, rows: int, tokens: int, model: _Model) -> Estimate:
    a_step = step.batch_examples * tokens / max(1, rows * step.epochs) or step.batch_tokens
    trained = min(tokens, round(step.max_steps * a_step)) if step.max_steps else tokens
    adapters = step.lora.rank * model.linear_width * 4 if step.lora else 0
    # Weights; and of what is trained gradients, two moments in fp32, and the checkpoint being
    # written beside them. Adapters have weights of their own too.
    memory = model.bytes + (5 * adapters if step.lora else 4 * model.bytes)
    return Estimate(rows, trained=trained, disk_bytes=model.bytes + adapters, memory_bytes=memory)


def _inputs_texts(
    item: Planned, by_name: Mapping[str, Planned], found: Mapping[str, Estimate], store: Store
) -> dict[str, Text]:
    names = [name for role, name in item.node.inputs.items() if role.partition(".")[0] == "data"]
    return together([_texts(by_name[name], by_name, found, store) for name in names])


def _texts(
    item: Planned, by_name: Mapping[str, Planned], found: Mapping[str, Estimate], store: Store
) -> dict[str, Text]:
    """What a step's conversations hold by mode: of its files, else by what it will be made of."""
    step, rows = item.node.step, found[item.node.name].rows
    artifact = store.find(item.node.stage, item.fingerprint)
    if artifact and (paths := artifact.shards()):
        texts = _sampled(tuple(paths))
    elif isinstance(step, Curate | Difficulty):
        texts = _inputs_texts(item, by_name, found, store)
    else:
        answer = _answer_tokens(step) if isinstance(step, Synthesize) else 0
        mode = step.mode if isinstance(step, Synthesize) else ANY_MODE
        texts = {mode: Text(1, PROMPT_TOKENS + answer)}
    seen = sum(text.rows for text in texts.values())
    return {mode: text.scaled(rows / seen) for mode, text in texts.items() if rows}


_sampled = cache(sampled_texts)  # a matrix has many steps over the same data


def _answers(
    step: Magpie | Difficulty | Synthesize | Rollout, inputs: Mapping[str, Estimate]
) -> tuple[int, int]:
    """How many rows come out, and how many answers are sampled for them."""
    if isinstance(step, Magpie):
        return step.count, step.count
    if isinstance(step, Difficulty):
        rows = inputs["data"].rows
        return rows, rows * step.samples if step.by == "pass-rate" else 0
    rows = inputs["prompts"].rows
    shortest = isinstance(step, Synthesize) and step.keep == "shortest"
    return rows if shortest else rows * step.samples, rows * step.samples


def _answer_tokens(
    step: Magpie | Difficulty | Synthesize | Rollout, model: _Model = UNKNOWN_MODEL
) -> float:
    """The measured mean where the model's own answers were measured; a chain is never known."""
    longest = step.max_tokens
    if isinstance(step, Synthesize) and step.mode == "reasoning":
        longest += step.max_think_tokens
    elif model.pace and model.own:
        return model.pace.answer_tokens(longest)
    return longest * ANSWER_SHARE


def _timed(guess: Estimate, stage: str, models: Mapping[str, _Model]) -> Estimate:
    parameters = max((model.parameters for model in models.values()), default=0)
    if stage in PAGES:
        return guess
    if models and not parameters:
        return replace(guess, minutes=None)
    work = {"decode": guess.decoded, "read": guess.read, "train": guess.trained}
    if stage in ("screen", "score"):
        work["decode"] = 0  # its decoded count only tells how long the answers are
    measured = [model.pace for model in models.values() if model.pace]
    if measured and len(measured) == len(models):
        beside = models.get(BESIDE.get(stage, ""), UNKNOWN_MODEL)
        return _at_pace(guess, work, measured, beside.bytes)
    operations = sum(tokens * OPERATIONS[kind] * parameters for kind, tokens in work.items())
    rate = CORE_FLOPS * (os.cpu_count() or 1)
    return replace(guess, minutes=operations / rate / 60)


def _at_pace(
    guess: Estimate, work: Mapping[str, int], paces: Sequence[Pace], beside: int
) -> Estimate:
    """At the slowest of the measured paces; the peak is of the process that did the same.

    `beside`: bytes of the weights of a further model that is in memory at the same time.
    """
    seconds = work["decode"] * max(pace.decode_s for pace in paces)
    seconds += work["read"] * max(pace.read_s or pace.decode_s for pace in paces)
    trains = [pace.train_s for pace in paces if pace.train_s]
    peak = max(pace.inference_bytes for pace in paces)
    if work["train"]:
        if not trains:
            return replace(guess, minutes=None)
        seconds += work["train"] * max(trains)
        peak = max(pace.train_bytes for pace in paces)
    return replace(guess, minutes=seconds / 60, memory_bytes=peak + beside)


def _outside(source: ModelSource, store: Store) -> _Model:
    facts = locate(source, memo=store.memo).facts
    if facts is None:
        return UNKNOWN_MODEL
    width = _linear_width(
        facts.hidden_size, facts.intermediate_size, facts.layers, facts.kv_heads / facts.heads
    )
    return replace(_sized(facts.parameters, facts.vocab_size), linear_width=width)


def _made(node: Node, step: New, models: Mapping[str, _Model]) -> _Model:
    lent = models[node.inputs["tokenizer_of"]].vocab_size if step.tokenizer_of else 0
    if step.tokenizer_of and not lent:
        return UNKNOWN_MODEL
    ids = lent or step.vocab_size
    width = _linear_width(
        step.hidden_size, feed_forward_width(step), step.layers,
        (step.kv_heads or step.heads) / step.heads,
    )  # fmt: skip
    return replace(_sized(parameter_count(step, ids), ids), linear_width=width)


def _linear_width(hidden: int, intermediate: int, layers: int, kv_share: float) -> int:
    """Of the attention's q and o, its narrower k and v, and the three of the MLP, in each layer."""
    attention = 4 * hidden + 2 * (hidden + round(hidden * kv_share))
    return layers * (attention + 3 * (hidden + intermediate))


def _sized(parameters: int, vocab_size: int) -> _Model:
    return _Model(parameters, parameters * 4, vocab_size)


def _source_rows(step: Data) -> int:
    return sum(source.limit or _lines(source_files(source)) for source in step.sources)


def _narrowed(step: Funnel, rows: int) -> int:
    """Rows that pass where no filter drops one."""
    if step.part != "all":
        share = step.holdout_share if step.part == "holdout" else 1 - step.holdout_share
        rows = round(rows * share)
    if step.select:
        rows = min(rows, step.select.count)
    return min(rows, step.limit) if step.limit else rows


def _lines(paths: Sequence[Path]) -> int:
    """Rows of line-based files, by counting; other kinds are not opened for an estimate."""
    count = 0
    for path in paths:
        if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv"):
            with path.open("rb") as stream:
                count += sum(1 for _ in stream)
    return count
