"""Models against their teacher on held-out prompts, token by token.

Two kinds of figures. *Distributions* are compared on the teacher's own answers, sampled at
temperature 1, which are the same sequences for every model; so forward KL is the sequence-level
one. *Answers* are each model's own, greedy, compared with the teacher's greedy answer. Intervals
resample prompts, since the tokens of one answer are not independent.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import write_json
from tutelage.engines.base import SamplingParams
from tutelage.engines.sampler import TransformersSampler
from tutelage.evals.compare import (
    TOP_K,
    Reading,
    SequenceComparison,
    TokenSequence,
    compare_readings,
    read_sequences,
)  # fmt: skip
from tutelage.evals.stats import Interval, paired_difference, ratio_interval, wilson
from tutelage.evals.textmatch import answer_length, rouge_l
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.evaluation import Evaluate
from tutelage.records import ANSWERS, prompt_messages, read_rows, write_rows
from tutelage.text.chat import ChatFormat

PER_TOKEN = {
    "forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "agreement": "top1_agreement",
    "topk_overlap": "topk_overlap", "overlap_mass": "overlap_mass", "entropy": "student_entropy",
}  # fmt: skip
"""Name in the table -> field of a comparison; each is a sum over tokens."""
DIFFERENCES = ("forward_kl", "reverse_kl", "agreement")
"""Measures whose change from one model to the next is tested on the same prompts."""


@dataclass(frozen=True)
class _Task:
    config: Evaluate
    work: WorkDir
    prompts: Sequence[Mapping[str, Any]]

    def params(self, chat: ChatFormat, temperature: float) -> SamplingParams:
        return SamplingParams(self.config.max_tokens, temperature, self.config.seed, chat.stop_ids)


@dataclass(frozen=True)
class _Reference:
    """What the teacher gives once: its sampled sequences, what it reads in them, greedy answers."""

    sequences: Sequence[TokenSequence]
    reading: Reading
    answers: Sequence[Mapping[str, Any]]


class Distance:
    """The comparison of one evaluate step; the teacher's part is made when this is."""

    def __init__(self, config: Evaluate, inputs: Mapping[str, Artifact], work: WorkDir) -> None:
        prompts = list(read_rows(inputs["prompts"].shards()))
        if len(prompts) < 2:
            raise DataError("an interval needs at least two held-out prompts; widen prompts")
        self._task = _Task(config, work, prompts)
        self._teacher = inputs["teacher"]
        self._reference = _reference(self._task, self._teacher)
        self._parts: list[Mapping[str, Any]] = []

    def measure(self, index: int, model: Artifact, loaded: Callable[[], Loaded]) -> None:
        """Compare one model; its part is kept, so that an interrupted evaluation repeats none."""
        part = _part(self._task, model, f"model-{index}", self._reference, loaded)
        self._parts.append(part)

    def finish(self, models: Sequence[Artifact]) -> dict[str, Any]:
        """Write `answers.parquet`; returns what `scores.json` says of the distance."""
        work, reference = self._task.work, self._reference
        write_rows(
            work.path / "answers.parquet",
            [answer for part in self._parts for answer in part["answers"]]
            + list(reference.answers),
            ANSWERS,
        )
        return _scores(self._task.config, models, self._teacher, self._parts, reference)


def _reference(task: _Task, teacher: Artifact) -> _Reference:
    """The teacher's answers are sampled once and kept; what it reads in them is made anew."""
    started = time.monotonic()
    loaded = load_for_inference(teacher, device=task.work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    path = task.work.scratch("teacher") / "sampled.json"
    if task.work.done("teacher"):
        kept = json.loads(path.read_text())
        sequences = [TokenSequence(s["prompt_ids"], s["response_ids"]) for s in kept["sequences"]]
        return _Reference(sequences, read_sequences(loaded.model, sequences), kept["answers"])
    prompt_ids = _prompt_ids(task, chat)
    with _bar(task, "teacher answers", 2) as advance:
        sampled = _sampler(task, loaded).sample(
            prompt_ids, task.params(chat, 1.0), keys=range(len(prompt_ids)), on_tokens=advance
        )
        answers = _greedy(task, loaded, chat, teacher.fingerprint, advance)
    sequences = [
        TokenSequence(ids, list(completion.response_ids))
        for ids, completion in zip(prompt_ids, sampled, strict=True)
    ]
    reading = read_sequences(loaded.model, sequences)
    write_json(
        path,
        {
            "sequences": [
                {"prompt_ids": s.prompt_ids, "response_ids": s.response_ids} for s in sequences
            ],
            "answers": answers,
        },
    )
    decoded = sum(len(s.response_ids) for s in sequences) + sum(a["tokens"] for a in answers)
    prefilled = sum(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    task.work.commit(
        "teacher", seconds=time.monotonic() - started,
        tokens={"teacher_decoded": decoded, "teacher_prefilled": prefilled},
    )  # fmt: skip
    return _Reference(sequences, reading, answers)


def _part(
    task: _Task, model: Artifact, name: str, reference: _Reference, load: Callable[[], Loaded]
) -> dict[str, Any]:
    """One model's comparison with the teacher and its own answers."""
    path = task.work.scratch("models") / f"{name}.json"
    if task.work.done(name):
        return json.loads(path.read_text())
    started = time.monotonic()
    loaded = load()
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    compared = compare_readings(
        read_sequences(loaded.model, reference.sequences), reference.reading, reference.sequences
    )
    with _bar(task, f"answers of {name}", 1) as advance:
        answers = _greedy(task, loaded, chat, model.fingerprint, advance)
    for answer, right in zip(answers, reference.answers, strict=True):
        answer["rouge_l"] = rouge_l(answer["answer"], right["answer"])
    part = {"compared": [vars(comparison) for comparison in compared], "answers": answers}
    write_json(path, part)
    task.work.commit(
        name, seconds=time.monotonic() - started,
        tokens={"student_decoded": sum(answer["tokens"] for answer in answers)},
    )  # fmt: skip
    return part


@contextlib.contextmanager
def _bar(task: _Task, label: str, rounds: int) -> Iterator[Callable[[int], None]]:
    total = len(task.prompts) * task.config.max_tokens * rounds
    with task.work.reporter.bar(total, label, unit="tokens") as bar:
        yield bar.advance
        bar.advance(total - bar.done)


def _prompt_ids(task: _Task, chat: ChatFormat) -> list[list[int]]:
    return [chat.prompt_ids(prompt_messages(row), task.config.mode) for row in task.prompts]


def _sampler(task: _Task, loaded: Loaded) -> TransformersSampler:
    return TransformersSampler(
        loaded.model, batch_size=task.config.batch_rows, device=str(loaded.device)
    )


def _greedy(
    task: _Task, loaded: Loaded, chat: ChatFormat, fingerprint: str, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """The model's likeliest answers as rows of `records.ANSWERS`."""
    completions = _sampler(task, loaded).sample(
        _prompt_ids(task, chat), task.params(chat, 0.0), keys=range(len(task.prompts)),
        on_tokens=advance,
    )  # fmt: skip
    rows = []
    for row, completion in zip(task.prompts, completions, strict=True):
        thinking, answer = chat.decode_response(completion.response_ids, task.config.mode)
        rows.append(
            {
                "model": fingerprint,
                "prompt_id": row["id"],
                "language": row["language"],
                "mode": task.config.mode,
                "prompt": prompt_messages(row)[-1]["content"],
                "thinking": thinking,
                "answer": answer,
                "tokens": answer_length(
                    completion.response_ids, finish_reason=completion.finish_reason
                ),
                "finish_reason": completion.finish_reason,
                "rouge_l": None,
            }
        )
    return rows


def _scores(
    config: Evaluate, models: Sequence[Artifact], teacher: Artifact,
    parts: Sequence[Mapping[str, Any]], reference: _Reference,
) -> dict[str, Any]:  # fmt: skip
    compared = [[SequenceComparison(**row) for row in part["compared"]] for part in parts]
    entries = [
        {
            "role": f"models.{index}",
            "fingerprint": model.fingerprint,
            "metrics": _distribution_metrics(config, compared[index])
            | _answer_metrics(config, part["answers"]),
        }
        for index, (model, part) in enumerate(zip(models, parts, strict=True))
    ]
    entropy = _per_token(config, compared[0], "teacher_entropy")
    entries.append(
        {
            "role": "teacher",
            "fingerprint": teacher.fingerprint,
            "metrics": {"entropy": shown(entropy)} | _answer_metrics(config, reference.answers),
        }
    )
    return {
        "prompts": len(reference.sequences),
        "reference_tokens": sum(len(s.response_ids) for s in reference.sequences),
        "k": TOP_K,
        "models": entries,
        "differences": _differences(config, models, compared),
    }


def _per_token(config: Evaluate, rows: Sequence[SequenceComparison], field: str) -> Interval:
    return ratio_interval(
        [getattr(row, field) for row in rows], [row.tokens for row in rows],
        seed=config.seed, resamples=config.bootstrap,
    )  # fmt: skip


def _distribution_metrics(config: Evaluate, rows: Sequence[SequenceComparison]) -> dict[str, Any]:
    return {name: shown(_per_token(config, rows, field)) for name, field in PER_TOKEN.items()}


def _answer_metrics(config: Evaluate, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ones = np.ones(len(answers))

    def mean(values: Sequence[float]) -> dict[str, Any]:
        return shown(ratio_interval(values, ones, seed=config.seed, resamples=config.bootstrap))

    cut = sum(answer["finish_reason"] == "length" for answer in answers)
    metrics = {
        "answer_tokens": mean([answer["tokens"] for answer in answers]),
        "truncated_share": shown(wilson(cut, len(answers))),
    }
    if answers[0]["rouge_l"] is not None:
        metrics["rouge_l"] = mean([answer["rouge_l"] for answer in answers])
    return metrics


def _differences(
    config: Evaluate, models: Sequence[Artifact], compared: Sequence[Sequence[SequenceComparison]]
) -> list[dict[str, Any]]:
    """Each model against the one before it in the recipe's list, on the same sequences."""
    rows = []
    for later in range(1, len(models)):
        for name in DIFFERENCES:
            field = PER_TOKEN[name]
            difference = paired_difference(
                [getattr(row, field) for row in compared[later]],
                [getattr(row, field) for row in compared[later - 1]],
                [row.tokens for row in compared[later]],
                seed=config.seed, resamples=config.bootstrap,
            )  # fmt: skip
            rows.append(
                {
                    "metric": name,
                    "model": models[later].fingerprint,
                    "against": models[later - 1].fingerprint,
                    **shown(difference.interval),
                    "p": round(difference.p_value, 5),
                }
            )
    return rows


def shown(interval: Interval) -> dict[str, Any]:
    return {
        "estimate": round(interval.estimate, 6),
        "low": round(interval.low, 6),
        "high": round(interval.high, 6),
        "n": interval.n,
    }
