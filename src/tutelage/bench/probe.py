"""Measures one model on a few hundred tokens: how fast it answers, reads, trains, and its memory.

Meant for a process of its own (`measure.py` starts one a model), so that a peak is that model's.
Shapes: N tokens, V vocabulary.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from tutelage.bench.pace import Pace, TargetCost
from tutelage.core.artifact import Artifact, Site, measure_peak
from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, Engine, SamplingParams, Scorable
from tutelage.engines.opening import opened
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.inspect import describe
from tutelage.models.load import directory_of, load_for_training
from tutelage.recipe.engines import EngineTable
from tutelage.targets.calibrate import cost_of_top, expected_cost
from tutelage.text.chat import ChatFormat
from tutelage.train.batches import Example, pack, stack
from tutelage.train.loop import Trainee
from tutelage.train.objectives import CrossEntropy
from tutelage.train.optim import adamw

ANSWERS = 16
TOKENS_EACH = 24
WARM_UP_TOKENS = 2
CHUNK_BYTES = 64 * 2**20
TAUS = (0.1, 0.05, 0.02, 0.01, 0.005)
TOPS = (10, 20, 64)
TRAINING_BYTES = 16
"""A parameter in training: weight, gradient and two moments in float32."""
LR = 1e-9
"""The step is made in full and its result thrown away."""


def probe(
    artifact: Artifact, table: EngineTable, prompts: Sequence[Sequence[Any]], *, device: str,
    batch_rows: int, train_tokens: int,
) -> Pace:  # fmt: skip
    """The pace of the artifact's model on conversations `prompts`, sampled at temperature 1.

    `train_tokens`: length of the packed row of a training step; 0 makes none. Raises ModelError,
    EngineError.
    """
    peak = measure_peak()
    site = Site(Path(), device=device, engines={"model": table})
    with opened("model", {"model": artifact}, site) as engine:
        sequences, done, decode_s = _decode(engine, prompts, batch_rows)
        read_s, targets = _read(engine, sequences)
    inference_bytes = peak()
    train_s, train_bytes = None, 0
    if train_tokens and table.kind == "transformers" and _fits(artifact):
        peak = measure_peak()
        train_s = _train(artifact, sequences, device, train_tokens)
        train_bytes = peak()
    return Pace(
        decode_s=decode_s, read_s=read_s, train_s=train_s, inference_bytes=inference_bytes,
        train_bytes=train_bytes, tokens=sum(len(one.response_ids) for one in sequences),
        answers=len(done), ended=sum(one.finish_reason == "stop" for one in done),
        targets=targets,
    )  # fmt: skip


def _decode(
    engine: Engine, prompts: Sequence[Sequence[Any]], batch_rows: int
) -> tuple[list[Scorable], list[Completion], float]:
    chat = ChatFormat.from_tokenizer(engine.tokenizer)
    ids = [chat.prompt_ids(messages, "fast") for messages in prompts]
    asked = [ids[index % len(ids)] for index in range(ANSWERS)]
    sampler = engine.sampler(batch_rows=batch_rows)

    def sample(most: int) -> list[Completion]:
        return sampler.sample(
            asked, SamplingParams(most, 1.0, 0, chat.stop_ids), keys=range(ANSWERS),
            on_tokens=lambda count: None,
        )  # fmt: skip

    sample(WARM_UP_TOKENS)
    started = time.perf_counter()
    done = sample(TOKENS_EACH)
    seconds = time.perf_counter() - started
    sequences = [
        Scorable(tuple(prompt), one.response_ids) for prompt, one in zip(asked, done, strict=True)
    ]
    return sequences, done, seconds / sum(len(one.response_ids) for one in done)


def _read(
    engine: Engine, sequences: Sequence[Scorable]
) -> tuple[float | None, tuple[TargetCost, ...]]:
    try:
        scorer = engine.scorer(chunk_bytes=CHUNK_BYTES)
    except EngineError:  # a server that only answers
        return None, ()
    started = time.perf_counter()
    scorer.label_logps(sequences, on_tokens=lambda count: None)
    seconds = time.perf_counter() - started
    tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in sequences)
    if not isinstance(scorer, TransformersScorer):
        return seconds / tokens, ()
    hidden_ND = scorer.hidden_states(sequences, on_tokens=lambda count: None)
    with torch.inference_mode():
        logits_NV = scorer.head.logits(hidden_ND)
    return seconds / tokens, _targets(logits_NV)


def _targets(logits_NV: Tensor) -> tuple[TargetCost, ...]:
    q_NV = logits_NV.softmax(-1)
    found = []
    for tau in TAUS:
        cost = expected_cost(q_NV, tau)
        found.append(TargetCost(f"tau = {tau}", cost.ids, cost.bytes, cost.mass, True))
    for top in TOPS:
        cost = cost_of_top(q_NV, top)
        found.append(TargetCost(f"top-{top}", cost.ids, cost.bytes, cost.mass, False))
    return tuple(found)


def _fits(artifact: Artifact) -> bool:
    """Whether there is room for weights, gradients and moments; activations come on top."""
    parameters = describe(directory_of(artifact)).parameters
    return parameters * TRAINING_BYTES < psutil.virtual_memory().available


def _train(
    artifact: Artifact, sequences: Sequence[Scorable], device: str, train_tokens: int
) -> float:
    """Seconds a token of a whole step: forward, backward and AdamW; the second of two."""
    loaded = load_for_training(artifact, device=device)
    examples = [_example(one) for one in sequences]
    chosen: list[Example] = []
    while sum(len(one.ids_L) for one in chosen) < train_tokens:
        chosen.append(examples[len(chosen) % len(examples)])
    batch = stack([pack(chosen, range(len(chosen)))])
    trainee = Trainee(loaded.model, CrossEntropy()).train()
    optimizer = adamw(loaded.model, lr=LR, weight_decay=0.0)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        trainee(batch, loaded.device).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
    return seconds / sum(len(one.ids_L) for one in chosen)


def _example(one: Scorable) -> Example:
    ids = np.array([*one.prompt_ids, *one.response_ids], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(one.prompt_ids))
