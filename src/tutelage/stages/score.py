"""Stage `score`: the teacher reads the rollouts once, by prefill; sparse targets are stored."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import write_json
from tutelage.core.shards import Shard, run_shards
from tutelage.engines.base import Scorable
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.tables import Score
from tutelage.records import RowFiles
from tutelage.targets.calibrate import tau_for_budget
from tutelage.targets.estimator import Fixed, Threshold
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets
from tutelage.targets.writer import write_shard
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest

CALIBRATION = "calibration.json"
CALIBRATION_TOKENS = 512
CALIBRATION_ROWS = 32


def run(config: Score, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Score every rollout; returns counts, ids and bytes a token, and how near the teacher is.

    An empty rollout has no token to score and is left out, and counted.
    """
    rollouts = RowFiles(inputs["rollouts"].shards())
    responses = rollouts.lengths("response_ids")
    if not any(responses):
        raise DataError("every rollout is empty: the student ends its turn at once")
    loaded = load_for_inference(inputs["teacher"], device=work.device)
    scorer = TransformersScorer(
        loaded.model, device=str(loaded.device), chunk_bytes=config.logit_chunk_mb * 2**20
    )
    estimator = _estimator(config, scorer, rollouts, work)
    meta = _meta(config, inputs, loaded, estimator)

    def make(shard: Shard, on_tokens: Callable[[int], None]) -> dict[str, int]:
        numbered = zip(shard.items, rollouts.rows(shard.items), strict=True)
        kept = [(key, row) for key, row in numbered if row["response_ids"]]
        rows = [row for _, row in kept]
        scored = scorer.score(
            [_scorable(row) for row in rows], estimator=estimator, seed=config.seed,
            keys=[key for key, _ in kept], on_tokens=on_tokens,
        )  # fmt: skip
        targets = [_row(row, target) for row, target in zip(rows, scored, strict=True)]
        write_shard(work.path / f"{shard.name}.parquet", targets, meta=meta)
        return {"teacher_prefilled": sum(map(_length, rows))}

    run_shards(
        work, len(rollouts), config.shard_rows, make,
        label="teacher reads", tokens_each=max(responses),
    )  # fmt: skip
    tau = {} if estimator.tau is None else {"tau": estimator.tau}
    return {**_summary(work), "empty": responses.count(0), **tau}


def _estimator(
    config: Score, scorer: TransformersScorer, rollouts: RowFiles, work: WorkDir
) -> Threshold | Fixed:
    if config.estimator == "fixed":
        return Fixed(config.head, config.draws, config.temperature)
    if not config.budget:
        return Threshold(config.tau, config.temperature)
    kept = work.path / CALIBRATION  # found once: a resumed run must not find a hair another one
    if not kept.exists():
        tau = _calibrated(config, scorer, rollouts)
        write_json(kept, {"tau": tau, "budget": config.budget, "unit": config.budget_unit})
        work.reporter.say(f"  tau {tau:.4f} buys {config.budget} {config.budget_unit} a token")
    return Threshold(json.loads(kept.read_text())["tau"], config.temperature)


def _calibrated(config: Score, scorer: TransformersScorer, rollouts: RowFiles) -> float:
    """tau for the budget, on tokens spread evenly over the rollouts."""
    answered = np.flatnonzero(rollouts.lengths("response_ids"))
    spread = np.linspace(0, len(answered) - 1, min(CALIBRATION_ROWS, len(answered)))
    chosen = answered[spread.round().astype(int)].tolist()
    rows = [row for index in chosen for row in rollouts.rows(range(index, index + 1))]
    sequences = [_scorable(row) for row in rows]
    hidden_ND = scorer.hidden_states(sequences, on_tokens=lambda count: None)
    picked = torch.linspace(0, len(hidden_ND) - 1, min(CALIBRATION_TOKENS, len(hidden_ND))).long()
    with torch.inference_mode():
        logits_NV: Tensor = scorer.head.logits(hidden_ND[picked.to(hidden_ND.device)])
    return tau_for_budget(
        logits_NV, budget=config.budget, unit=config.budget_unit, temperature=config.temperature
    )


def _scorable(rollout: Mapping[str, Any]) -> Scorable:
    return Scorable(
        tuple(rollout["prompt_ids"]), tuple(rollout["response_ids"]), name=rollout["id"]
    )


def _length(rollout: Mapping[str, Any]) -> int:
    return len(rollout["prompt_ids"]) + len(rollout["response_ids"])


def _meta(
    config: Score, inputs: Mapping[str, Artifact], loaded: Loaded, estimator: Threshold | Fixed
) -> StoreMeta:
    return StoreMeta(
        student=inputs["rollouts"].manifest["inputs"]["model"]["fingerprint"],
        teacher=inputs["teacher"].fingerprint,
        tokenizer=tokenizer_digest(loaded.directory),
        chat_template=ChatFormat.from_tokenizer(loaded.tokenizer).fingerprint,
        vocab_size=loaded.model.config.vocab_size,
        temperature=config.temperature,
        engine="transformers",
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        estimator=estimator.name,
        tau=estimator.tau,
    )


def _row(rollout: Mapping[str, Any], targets: TokenTargets) -> TargetRow:
    return TargetRow(
        id=rollout["id"], prompt_id=rollout["prompt_id"], source=rollout["source"],
        mode=rollout["mode"], finish_reason=rollout["finish_reason"], verdict=None,
        prompt_ids=np.asarray(rollout["prompt_ids"], np.int32),
        response_ids=np.asarray(rollout["response_ids"], np.int32),
        student_logp_N=np.asarray(rollout["student_logp"], np.float32), targets=targets,
    )  # fmt: skip


def _summary(work: WorkDir) -> dict[str, float]:
    """Sums over row groups, so that no store need fit into memory."""
    paths = sorted(work.path.glob("part-*.parquet"))
    reader = TargetReader(paths)
    tokens = reader.num_tokens
    sums = dict.fromkeys(("ids_per_token", "head_mass", "teacher_entropy", "logq_minus_logp"), 0.0)
    for index in range(reader.num_groups):
        group = reader.group(index)
        targets = group.targets
        sums["ids_per_token"] += len(targets.head_ids_M) + len(targets.tail_ids_T)
        sums["head_mass"] += float(np.exp(targets.head_logq_M).sum())
        sums["teacher_entropy"] += float(targets.entropy_N.sum())
        # E_student[log q - log p]: minus this is the reverse KL; near 0 nothing is to be learnt.
        sums["logq_minus_logp"] += float((targets.label_logp_N - group.student_logp_N).sum())
    return {
        "rows": len(reader),
        "response_tokens": tokens,
        "bytes_per_token": sum(path.stat().st_size for path in paths) / tokens,
        **{name: value / tokens for name, value in sums.items()},
    }
