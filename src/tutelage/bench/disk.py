"""How fast a store is written and read, and in how much memory, on synthetic targets.

One process, one core's work: rows come from a generator, shards are written one after the other,
then read in a shuffled order and padded as training does.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tutelage.core.artifact import measure_peak
from tutelage.targets.batch import pad_targets
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets
from tutelage.targets.writer import write_shard

VOCAB = 151_936
TAU = 0.03
ROW_TOKENS = 200
SHARD_ROWS = 1024
HEAD, TAIL = 5, 12
"""Entries a token, in the mean: a flat teacher at tau 0.03"""
POOL = 64
"""Different rows that are made once and repeated under new ids: making them is not what is timed"""


def run(folder: Path, *, tokens: int) -> dict[str, float]:
    """Tokens a second of writing, of reading, and of shuffled reading with padding; peak memory."""
    meta = StoreMeta(
        student="", teacher="", tokenizer="", chat_template="", vocab_size=VOCAB, temperature=1.0,
        engine="bench", dtype="float32", estimator="threshold", tau=TAU,
    )  # fmt: skip
    pool = [_row(index) for index in range(POOL)]
    count = max(1, tokens // ROW_TOKENS)
    peak, started = measure_peak(), time.perf_counter()
    paths = []
    for first in range(0, count, SHARD_ROWS):
        rows = (pool[i % POOL] for i in range(first, min(first + SHARD_ROWS, count)))
        paths.append(write_shard(folder / f"part-{first:08d}.parquet", rows, meta=meta).path)
    written = time.perf_counter()
    total = sum(len(row.response_ids) for row in TargetReader(paths))
    read = time.perf_counter()
    for batch in _batches(TargetReader(paths).iterate(seed=0, epoch=0)):
        pad_targets(batch)
    padded = time.perf_counter()
    return {
        "tokens": total,
        "write_tokens_s": total / (written - started),
        "read_tokens_s": total / (read - written),
        "shuffled_and_padded_tokens_s": total / (padded - read),
        "bytes_a_token": sum(path.stat().st_size for path in paths) / total,
        "peak_mib": peak() / 2**20,
    }


def _batches(rows: Iterator[TargetRow]) -> Iterator[list[TokenTargets]]:
    batch: list[TokenTargets] = []
    for row in rows:
        batch.append(row.targets)
        if len(batch) == 16:
            yield batch
            batch = []
    if batch:
        yield batch


def _row(index: int) -> TargetRow:
    rng = np.random.default_rng(index)
    heads = rng.poisson(HEAD - 1, ROW_TOKENS).astype(np.int32) + 1
    tails = rng.poisson(TAIL, ROW_TOKENS).astype(np.int32)
    # Ids by a power law, distinct within a token: rising gaps from a random place.
    head_ids = np.concatenate([_ids(rng, count) for count in heads])
    tail_ids = np.concatenate([np.sort(_ids(rng, count)) for count in tails])
    q = np.concatenate([np.sort(rng.uniform(TAU, 1, count))[::-1] / count for count in heads])
    targets = TokenTargets(
        head_counts_N=heads, head_ids_M=head_ids.astype(np.int32),
        head_logq_M=np.log(np.maximum(q, TAU)).astype(np.float32), tail_counts_N=tails,
        tail_ids_T=tail_ids.astype(np.int32),
        label_logp_N=-rng.exponential(2, ROW_TOKENS).astype(np.float32),
        entropy_N=rng.exponential(2, ROW_TOKENS).astype(np.float32), tau=TAU,
    )  # fmt: skip
    return TargetRow(
        id=f"row-{index}", prompt_id=f"row-{index}", source="bench", mode="fast",
        finish_reason="stop", verdict=None, prompt_ids=_ids(rng, 40).astype(np.int32),
        response_ids=_ids(rng, ROW_TOKENS).astype(np.int32),
        student_logp_N=-rng.exponential(2, ROW_TOKENS).astype(np.float32), targets=targets,
    )  # fmt: skip


def _ids(rng: np.random.Generator, count: int) -> np.ndarray:
    """Distinct ids, small ones far more often."""
    found = np.unique((VOCAB * rng.random(count * 4 + 8) ** 4).astype(np.int64))
    return rng.permutation(found)[:count]
