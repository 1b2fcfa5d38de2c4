"""Stage `distill`: the student learns from the stored targets, at the speed of SFT."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.engines.base import Scorable
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.adapters import load_trainee, save_trainee
from tutelage.models.load import Loaded, backbone_and_head
from tutelage.recipe.training import Distill
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import TargetRow, TokenTargets, check_compatible
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest
from tutelage.train.batches import Example, epoch_order, plan_steps, position_budget
from tutelage.train.conversations import Rendered, rendered_rows
from tutelage.train.loop import METRICS, Plan, train
from tutelage.train.objectives import Distillation, loss_spec
from tutelage.train.staleness import (
    SAME,
    UNLIKELY,
    Gauge,
    affordable_points,
    kl_terms,
    surprise,
)

HELD_SHARE = 0.02
"""Most of a store that the gauge keeps out of training."""
HELD_STREAM = 2**63 - 1
"""Of the seed's random streams the one that draws them; the others are the epochs'."""
CHUNK_BYTES = 64 * 2**20
"""Logits that the gauge has alive at a time."""


def run(config: Distill, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train on every stored response; returns the last step's loss and its parts.

    The store is read from disk as it is needed, a few row groups in memory at a time.
    Raises ArtifactError when the store was made with another tokenizer or chat template.
    """
    reader = TargetReader(inputs["targets"].shards())
    spec = loss_spec(config, reader.meta)  # one that cannot be raises first
    loaded = load_trainee(inputs["model"], config, work)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    check_compatible(
        reader.meta, tokenizer=tokenizer_digest(loaded.directory),
        vocab_size=loaded.model.config.vocab_size, chat_template=chat.fingerprint,
    )  # fmt: skip
    budget = partial(
        position_budget, first_tokens=config.first_tokens, first_share=config.first_share
    )
    text: Sequence[Rendered] = []
    if "text" in inputs:
        text = list(rendered_rows(chat, inputs["text"].shards(), config.pack_tokens))
        if not text:
            raise DataError("text has no row with a target within pack_tokens; raise it")
    stored = len(reader)

    def load(index: int) -> Example:
        return text[index - stored].example if index >= stored else _example(reader, index, budget)

    def targets(index: int) -> TokenTargets | None:
        return None if index >= stored else reader.row(index).targets

    def name(index: int) -> str:
        return text[index - stored].id if index >= stored else reader.row(index).id

    prompts_R, kept_R = _lengths(reader, budget)
    lengths = [*(prompts_R + kept_R).tolist(), *(len(row.example.ids_L) for row in text)]
    held, unseen = _held_out(config, reader, prompts_R, kept_R)
    steps = _steps(config, reader, lengths, len(text), [*held, *unseen])
    plan = Plan(load=load, name=name, steps=steps, held_out=_packed(config, lengths, unseen))
    gauge, start = None, {}
    if held:
        trained = sum(lengths[i] for step in plan.part(config).steps for row in step for i in row)
        gauge, start = _gauge(config, reader, held, budget, loaded, trained, work)
    if gauge:
        plan = replace(plan, watch=gauge)
    objective = Distillation(spec, reader.meta.temperature, targets)
    last = train(
        loaded.model, plan, objective, config, work, device=loaded.device, label="distill",
        before=inputs["model"].path,
    )  # fmt: skip
    sizes = save_trainee(loaded, config, work)
    lines = [json.loads(line) for line in (work.path / METRICS).read_text().splitlines()]
    curve = [line["staleness"] for line in lines if "staleness" in line]
    return {
        **plan.counts(config, done=len(lines)),
        **sizes,
        "rows": stored,
        **({"text_rows": len(text)} if text else {}),
        **{name: value for name, value in last.items() if name != "grad_norm"},
        **start,
        **({"staleness": curve[-1], "staleness_most": max(curve)} if curve else {}),
    }


def _lengths(reader: TargetReader, budget: partial[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's prompt, and those of its response that are learnt from."""
    prompts_R, responses_R = reader.lengths()
    return prompts_R, np.array([budget(count) for count in responses_R.tolist()], np.int64)


def _steps(
    config: Distill, reader: TargetReader, lengths: Sequence[int], texts: int, held: Sequence[int]
) -> list[list[list[int]]]:
    """An epoch is every rollout once, in an order with locality, each beside a row of the text."""
    steps: list[list[list[int]]] = []
    for epoch in range(config.whole_epochs):
        order = reader.order(config.seed, epoch)
        order = order[~np.isin(order, held)]
        if texts:
            beside = epoch_order(texts, seed=config.seed, epoch=epoch)
            order = np.stack([order, len(reader) + np.resize(beside, len(order))], 1).ravel()
        steps += plan_steps(
            lengths, order, pack_tokens=config.pack_tokens, batch_tokens=config.batch_tokens,
            batch_examples=config.batch_examples,
        )  # fmt: skip
    return steps


def _packed(config: Distill, lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
    if not rows:
        return []
    return plan_steps(
        lengths, np.array(rows), pack_tokens=config.pack_tokens, batch_tokens=sys.maxsize
    )[0]


def _held_out(
    config: Distill, reader: TargetReader, prompts_R: np.ndarray, kept_R: np.ndarray
) -> tuple[list[int], list[int]]:
    """The rows of the gauge, and those whose loss is looked at, by the seed alone: the same in
    every part of a schedule.

    Raises DataError where little would be left to learn from.
    """
    count = min(config.gauge_rows, int(HELD_SHARE * len(reader)))
    if not reader.meta.student:  # targets from elsewhere: nobody's log-probabilities
        count = 0
    rng = np.random.Generator(np.random.Philox(key=[config.seed, HELD_STREAM]))
    order = rng.permutation(len(reader))
    readable_R = (prompts_R > 0) & (kept_R > 0) & (prompts_R < config.pack_tokens)
    readable = order[readable_R[order]]
    if config.held_out > len(readable) // 2:
        raise DataError(
            f"held_out = {config.held_out} of {len(readable)} rollouts that fit; take "
            f"{len(readable) // 2} at most"
        )
    return (
        sorted(readable[:count].tolist()),
        sorted(readable[count : count + config.held_out].tolist()),
    )


def _gauge(
    config: Distill, reader: TargetReader, held: Sequence[int], budget: partial[int],
    loaded: Loaded, trained_tokens: int, work: WorkDir,
) -> tuple[Gauge | None, dict[str, float]]:  # fmt: skip
    """The gauge over the held-out rows, and what it finds before the first step.

    None where the model that begins wrote the answers, but not by plain sampling at temperature 1,
    as far as its surprise can tell: then nothing that the gauge would measure means a KL.
    """
    answers, stored = [], []
    for index in held:
        row = reader.row(index)
        count = min(budget(len(row.response_ids)), config.pack_tokens - len(row.prompt_ids))
        answers.append(Scorable(row.prompt_ids.tolist(), row.response_ids[:count].tolist(), row.id))
        stored.append(row.student_logp_N[:count])
    stored_N = np.concatenate(stored)
    scorer = TransformersScorer(loaded.model, device=str(loaded.device), chunk_bytes=CHUNK_BYTES)
    labels = [token for answer in answers for token in answer.response_ids]
    found = surprise(
        scorer.hidden_states(answers, on_tokens=lambda count: None), scorer.head,
        torch.tensor(labels, device=loaded.device),
    )  # fmt: skip
    start = float(kl_terms(found.logp_N, stored_N).mean())
    if start < SAME and abs(found.deviations) > UNLIKELY:
        work.reporter.say(
            "  no gauge of staleness: the answers are not plain samples at temperature 1 (their "
            f"surprise is {found.deviations:+.0f} standard deviations off)"
        )
        return None, {}
    if start > config.max_staleness:
        work.reporter.say(
            f"  the answers are not this model's own: {start:.3f} nats a token before the first "
            f"step (max_staleness {config.max_staleness:g})"
        )

    def read() -> np.ndarray:
        loaded.model.eval()
        scorer.head = backbone_and_head(loaded.model)  # of several processes: no shard of it
        parts = scorer.label_logps(answers, on_tokens=lambda count: None)
        loaded.model.train()
        return np.concatenate(parts)

    read_tokens = sum(len(answer.prompt_ids) + len(answer.response_ids) for answer in answers)
    points = affordable_points(
        config.gauge_points, held_tokens=read_tokens, trained_tokens=trained_tokens
    )
    gauge = Gauge(
        read, stored_N, points, config.max_staleness, config.stop_when_stale, work.reporter.say
    )
    return gauge, {"gauge_rows": len(held), "gauge_tokens": len(labels), "staleness_start": start}


def _example(reader: TargetReader, index: int, budget: partial[int]) -> Example:
    """Prompt and response as sampled; the response's (first) tokens are targets, its end too."""
    row: TargetRow = reader.row(index)
    response = row.response_ids[: budget(len(row.response_ids))]
    ids = np.concatenate([row.prompt_ids, response])
    mask = np.zeros(len(ids), bool)
    mask[len(row.prompt_ids) :] = True
    return Example(ids, mask)
