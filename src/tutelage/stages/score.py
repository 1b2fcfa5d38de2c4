"""Stage `score`: the teacher reads the rollouts once, by prefill; sparse targets are stored."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.shards import Shard, run_shards
from tutelage.engines.base import Scorable
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.tables import Score
from tutelage.records import read_rows
from tutelage.targets.estimator import threshold_sample
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets
from tutelage.targets.writer import write_shard
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest


def run(config: Score, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Score every rollout; returns counts, ids and bytes a token, and how near the teacher is."""
    rollouts = [row for row in read_rows(inputs["rollouts"].shards()) if row["response_ids"]]
    if not rollouts:
        raise DataError("every rollout is empty: the student ends its turn at once")
    loaded = load_for_inference(inputs["teacher"], device=work.device)
    scorer = TransformersScorer(
        loaded.model, device=str(loaded.device), chunk_bytes=config.logit_chunk_mb * 2**20
    )

    def estimator(logits_NV: Tensor, labels_N: Tensor, offsets_N: Tensor) -> TokenTargets:
        return threshold_sample(
            logits_NV, labels_N, tau=config.tau, offsets_N=offsets_N, temperature=config.temperature
        )

    meta = _meta(config, inputs, loaded)

    def make(shard: Shard, on_tokens: Callable[[int], None]) -> dict[str, int]:
        rows = rollouts[shard.items.start : shard.items.stop]
        scored = scorer.score(
            [Scorable(tuple(r["prompt_ids"]), tuple(r["response_ids"])) for r in rows],
            estimator=estimator, seed=config.seed, keys=list(shard.items), on_tokens=on_tokens,
        )  # fmt: skip
        targets = [_row(row, target) for row, target in zip(rows, scored, strict=True)]
        write_shard(work.path / f"{shard.name}.parquet", targets, meta=meta)
        return {"teacher_prefilled": sum(map(_length, rows))}

    longest = max(map(_length, rollouts))
    run_shards(
        work, len(rollouts), config.shard_rows, make, label="teacher reads", tokens_each=longest
    )
    return _summary(work)


def _length(rollout: Mapping[str, Any]) -> int:
    return len(rollout["prompt_ids"]) + len(rollout["response_ids"])


def _meta(config: Score, inputs: Mapping[str, Artifact], loaded: Loaded) -> StoreMeta:
    return StoreMeta(
        student=inputs["rollouts"].manifest["inputs"]["model"]["fingerprint"],
        teacher=inputs["teacher"].fingerprint,
        tokenizer=tokenizer_digest(loaded.directory),
        chat_template=ChatFormat.from_tokenizer(loaded.tokenizer).fingerprint,
        vocab_size=loaded.model.config.vocab_size,
        temperature=config.temperature,
        engine="transformers",
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        estimator="threshold",
        tau=config.tau,
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
