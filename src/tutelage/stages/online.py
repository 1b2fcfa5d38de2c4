"""Stage `online`: fresh answers of the student for every step, scored by the teacher at once.

The yardstick of offline distillation: how much of its gain is won from answers sampled once?
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, ModelError
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.adapters import load_trainee, save_trainee
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.training import Online
from tutelage.records import prompt_messages, read_rows
from tutelage.targets.estimator import Threshold
from tutelage.targets.schema import StoreMeta, TokenTargets
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest
from tutelage.train.batches import Example, epoch_order
from tutelage.train.loop import METRICS, Plan, train
from tutelage.train.objectives import Distillation, loss_spec

CHUNK_BYTES = 64 * 2**20
"""Teacher logits alive at a time."""


def run(config: Online, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train with a fresh batch of answers a step; returns the last step's loss and its parts."""
    prompts = list(read_rows(inputs["prompts"].shards()))
    if not prompts:
        raise DataError("there is no prompt to answer")
    teacher = load_for_inference(inputs["teacher"], device=work.device)
    student = load_trainee(inputs["model"], config, work)
    meta = _meta(config, inputs, teacher)
    chat = ChatFormat.from_tokenizer(student.tokenizer)
    _check_same_ids(student, teacher)
    fresh = _Fresh(config, prompts, student, teacher, chat)
    plan = Plan(fresh.load, fresh.name, fresh.steps(), notes=fresh.notes)
    objective = Distillation(loss_spec(config, meta), meta.temperature, fresh.targets)
    last = train(
        student.model, plan, objective, config, work, device=student.device, label="online",
        before=inputs["model"].path,
    )  # fmt: skip
    _keep_counts(work)
    sizes = save_trainee(student, config, work)
    return {
        **plan.counts(config),
        **sizes,
        "rows": len(prompts),
        **{name: value for name, value in last.items() if name != "grad_norm"},
    }


class _Fresh:
    """Answers of the running step: sampled and scored when the first of them is asked for.

    An answer's randomness comes from (seed, its number), and the model is that of the step, so a
    run that goes on from a checkpoint samples the same answers again.
    """

    def __init__(
        self, config: Online, prompts: Sequence[Mapping[str, Any]], student: Loaded,
        teacher: Loaded, chat: ChatFormat,
    ) -> None:  # fmt: skip
        self._config, self._prompts, self._student, self._chat = config, prompts, student, chat
        self._size = config.prompts_a_step * config.samples
        self._order_P = np.concatenate(
            [
                epoch_order(len(prompts), seed=config.seed, epoch=e)
                for e in range(config.whole_epochs)
            ]
        )
        self._params = SamplingParams(
            config.max_tokens, config.temperature, config.seed, chat.stop_ids
        )
        self._scorer = TransformersScorer(
            teacher.model, device=str(teacher.device), chunk_bytes=CHUNK_BYTES
        )
        self._step = -1
        self._examples: Sequence[Example] = ()
        self._targets: Sequence[TokenTargets] = ()

    def steps(self) -> list[list[list[int]]]:
        """Every answer a row of its own, since its length is not known before it is sampled."""
        count = len(self._order_P) * self._config.samples
        return [
            [[number] for number in range(first, min(first + self._size, count))]
            for first in range(0, count, self._size)
        ]

    def load(self, number: int) -> Example:
        self._have(number // self._size)
        return self._examples[number % self._size]

    def targets(self, number: int) -> TokenTargets:
        return self._targets[number % self._size]

    def name(self, number: int) -> str:
        row = self._prompts[self._order_P[number // self._config.samples]]
        return f"{row['id']}/{number}"

    def notes(self, step: int) -> dict[str, int]:
        decoded = sum(int(example.mask_L.sum()) for example in self._examples)
        return {"decoded": decoded, "read": sum(len(example.ids_L) for example in self._examples)}

    def _have(self, step: int) -> None:
        if step == self._step:
            return
        last = len(self._order_P) * self._config.samples
        numbers = range(step * self._size, min((step + 1) * self._size, last))
        rows = [self._prompts[self._order_P[n // self._config.samples]] for n in numbers]
        ids = [self._chat.prompt_ids(prompt_messages(row), self._config.mode) for row in rows]
        model = self._student.model
        sampler = TransformersSampler(model, batch_size=len(ids), device=str(self._student.device))
        done = sampler.sample(ids, self._params, keys=numbers, on_tokens=lambda count: None)
        model.train()
        answers = [
            Scorable(tuple(prompt), one.response_ids, name=self.name(number))
            for number, prompt, one in zip(numbers, ids, done, strict=True)
        ]
        self._targets = self._scorer.score(
            answers, estimator=Threshold(self._config.tau), seed=self._config.seed,
            keys=numbers, on_tokens=lambda count: None,
        )  # fmt: skip
        self._examples = [_example(answer) for answer in answers]
        self._step = step


def _example(answer: Scorable) -> Example:
    ids = np.array([*answer.prompt_ids, *answer.response_ids], np.int32)
    mask = np.zeros(len(ids), bool)
    mask[len(answer.prompt_ids) :] = True
    return Example(ids, mask)


def _check_same_ids(student: Loaded, teacher: Loaded) -> None:
    """One token of the answer must be the same question to both."""
    sizes = [one.model.config.vocab_size for one in (student, teacher)]
    ids = [tokenizer_digest(one.directory) for one in (student, teacher)]
    chats = [ChatFormat.from_tokenizer(one.tokenizer).fingerprint for one in (student, teacher)]
    told = {
        f"number of ids ({sizes[0]:,} and {sizes[1]:,})": sizes, "tokenizer": ids,
        "chat template": chats,
    }  # fmt: skip
    if different := [name for name, (one, other) in told.items() if one != other]:
        raise ModelError(
            f"student and teacher differ in the {' and the '.join(different)}; online "
            "distillation needs one for both: take a teacher of the same family"
        )


def _meta(config: Online, inputs: Mapping[str, Artifact], teacher: Loaded) -> StoreMeta:
    estimator = Threshold(config.tau)
    return StoreMeta(
        student=inputs["model"].fingerprint,
        teacher=inputs["teacher"].fingerprint,
        tokenizer=tokenizer_digest(teacher.directory),
        chat_template=ChatFormat.from_tokenizer(teacher.tokenizer).fingerprint,
        vocab_size=teacher.model.config.vocab_size,
        temperature=1.0,
        engine="transformers",
        dtype=str(teacher.model.dtype).removeprefix("torch."),
        estimator=estimator.name,
        tau=estimator.tau,
    )


def _keep_counts(work: WorkDir) -> None:
    """Decoded and read tokens from the log, which a resumed run has whole."""
    lines = [json.loads(line) for line in (work.path / METRICS).read_text().splitlines()]
    counts = {
        "student_decoded": sum(line["decoded"] for line in lines),
        "teacher_prefilled": sum(line["read"] for line in lines),
    }
    work.commit("answers", seconds=0.0, tokens=counts)
