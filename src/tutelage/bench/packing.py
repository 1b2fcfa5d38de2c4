"""Packed training beside padded batches, and beside one mask over the whole row.

A step is forward, backward and AdamW over the same examples in every way, on the bundled teacher in
float32; useful tokens are those of examples, never padding. Ways take turns within a round, a round
has examples of its own, the first one warms up, and ratios are medians over the rounds.
`padded` is what a plain loop does: examples in random order, as many a batch as fill `pack_tokens`
on average, padded right to the longest, with an attention mask. The head and the loss are ours
everywhere, so the difference is what the model reads.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from tutelage.bench import material
from tutelage.core.progress import Reporter
from tutelage.models.load import backbone_and_head, load_directory
from tutelage.train.attention import BLOCKS, Way
from tutelage.train.batches import Example, epoch_order, pack, plan_steps, stack
from tutelage.train.loop import Trainee
from tutelage.train.objectives import CrossEntropy
from tutelage.train.optim import adamw

PACKED, MASKED, PADDED, GROUPED = "packed", "one mask a row", "padded", "padded, by length"
WAYS = (PACKED, MASKED, PADDED, GROUPED)
GSM8K_MEAN, GSM8K_SPREAD = 200, 0.4
"""Mean and log-deviation of the lengths of school mathematics with solutions: 90 % lie between 95
and 355 tokens."""
LR = 1e-9
"""Steps are made in full, and change nothing."""


@dataclass(frozen=True)
class Measured:
    """One way over one spread of lengths, medians over the rounds."""

    spread: str
    mean: float
    longest: int
    """Tokens of the examples."""
    pack_tokens: int
    way: str
    tokens_s: float
    """Useful tokens a second."""
    to_padded: float
    """How many times the tokens/s of `padded`, where that was run."""
    to_masked: float
    """How many times the tokens/s of `one mask a row`."""


def run(
    *, repeats: int, batch_tokens: int, pack_tokens: Sequence[int], ways: Sequence[str] = WAYS,
    reporter: Reporter,
) -> list[Measured]:  # fmt: skip
    """Both spreads at every length of a row."""
    teacher = material.load_teacher(reporter)
    wanted = (repeats + 1) * batch_tokens
    answers = [_example(one) for one in material.answers(teacher, wanted, reporter=reporter)]
    spreads = {"answers": answers, "gsm8k-like": _of_lengths(answers, wanted)}
    trainee = Trainee(
        load_directory(teacher.directory, device="auto", dtype="float32").model, CrossEntropy()
    ).train()
    total = len(spreads) * len(pack_tokens) * len(ways) * (repeats + 1)
    with reporter.bar(total, "steps", unit="steps") as bar:
        return [
            line
            for name, examples in spreads.items()
            for length in pack_tokens
            for line in _measure(
                trainee, name, _rounds(examples, batch_tokens, repeats + 1), length, ways,
                lambda: bar.advance(1),
            )
        ]  # fmt: skip


def _measure(
    trainee: Trainee, spread: str, rounds: Sequence[Sequence[Example]], pack_tokens: int,
    ways: Sequence[str], done: Callable[[], None],
) -> list[Measured]:  # fmt: skip
    optimizer = adamw(trainee.model, lr=LR, weight_decay=0.0)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for examples in rounds:
        tokens = sum(len(one.ids_L) for one in examples)
        for way in ways:
            started = time.perf_counter()
            _step(trainee, way, examples, pack_tokens)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rates[way].append(tokens / (time.perf_counter() - started))
            done()
    timed = {way: values[1:] for way, values in rates.items()}
    lengths = [len(one.ids_L) for examples in rounds for one in examples]

    def against(way: str, other: str) -> float:
        pairs = zip(timed[way], timed.get(other, ()), strict=False)
        return statistics.median([a / b for a, b in pairs] or [float("nan")])

    return [
        Measured(
            spread, statistics.mean(lengths), max(lengths), pack_tokens, way,
            statistics.median(timed[way]), against(way, PADDED), against(way, MASKED),
        )
        for way in ways
    ]  # fmt: skip


def _step(trainee: Trainee, way: str, examples: Sequence[Example], pack_tokens: int) -> None:
    lengths = [len(one.ids_L) for one in examples]
    assert isinstance(trainee.model, PreTrainedModel)
    trainee.model.set_attn_implementation(BLOCKS if way == PACKED else "sdpa")
    if way == PADDED:
        at_once = max(1, round(pack_tokens / statistics.mean(lengths)))
        for first in range(0, len(examples), at_once):
            _padded(trainee, examples[first : first + at_once])
        return
    trainee.way = Way({PACKED: "blocks", MASKED: "masked", GROUPED: "alone"}[way])  # type: ignore[arg-type]
    (rows,) = plan_steps(
        lengths, np.arange(len(lengths)), pack_tokens=pack_tokens, batch_tokens=0,
        batch_examples=len(lengths),
    )  # fmt: skip
    for row in rows:
        batch = stack([pack([_cut(examples[i], pack_tokens) for i in row], row)])
        trainee(batch, _device(trainee)).loss_sum.backward()


def _padded(trainee: Trainee, examples: Sequence[Example]) -> None:
    batch = stack([pack([one], [index]) for index, one in enumerate(examples)])
    lengths_B1 = np.array([[len(one.ids_L)] for one in examples])
    seen_BT = np.arange(batch.ids_BT.shape[1])[None] < lengths_B1
    head = backbone_and_head(trainee.model)
    device = _device(trainee)
    hidden_BTD = head.backbone(
        input_ids=torch.from_numpy(batch.ids_BT).to(device),
        attention_mask=torch.from_numpy(seen_BT.astype(np.int64)).to(device), use_cache=False,
    ).last_hidden_state  # fmt: skip
    source_N = torch.from_numpy(batch.source_N).to(device)
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, source_N)
    CrossEntropy()(hidden_ND, head, batch).loss_sum.backward()


def _device(trainee: Trainee) -> torch.device:
    return next(trainee.model.parameters()).device


def _cut(example: Example, tokens: int) -> Example:
    return Example(example.ids_L[:tokens], example.mask_L[:tokens])


def _example(answer: material.Answer) -> Example:
    ids_L = np.array([*answer.ids.prompt_ids, *answer.ids.response_ids], np.int32)
    return Example(ids_L, np.arange(len(ids_L)) >= len(answer.ids.prompt_ids))


def _of_lengths(answers: Sequence[Example], tokens: int) -> list[Example]:
    """At least `tokens` of the answers' text, cut at random lengths; a third is the prompt."""
    random = np.random.Generator(np.random.Philox(key=[0, 1]))
    middle = np.log(GSM8K_MEAN) - GSM8K_SPREAD**2 / 2
    ids = np.concatenate([one.ids_L for one in answers])
    examples, first = [], 0
    while first < tokens:
        length = max(16, round(random.lognormal(middle, GSM8K_SPREAD)))
        ids_L = np.take(ids, range(first, first + length), mode="wrap")
        examples.append(Example(ids_L, np.arange(length) >= length // 3))
        first += length
    return examples


def _rounds(examples: Sequence[Example], tokens: int, count: int) -> list[list[Example]]:
    """`count` rounds of about `tokens` each, in random order; too few begin again."""
    order = epoch_order(len(examples), seed=0, epoch=0)
    rounds, place = [], 0
    for _ in range(count):
        taken: list[Example] = []
        while sum(len(one.ids_L) for one in taken) < tokens:
            taken.append(examples[order[place % len(order)]])
            place += 1
        rounds.append(taken)
    return rounds
