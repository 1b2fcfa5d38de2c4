"""From examples to optimizer steps: packing, order and positions; knows nothing of losses.

Legend: T tokens of a packed row, N targets of a packed row or of several, B rows of a batch.
A row holds several examples end to end; positions restart with each, which is how attention is
kept from crossing examples. Which examples meet in which step depends on lengths and the seed
alone, so a resumed run finds the same steps again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """One conversation's token ids and which of them are targets."""

    ids_L: np.ndarray
    """int32 token ids."""
    mask_L: np.ndarray
    """bool; True where the token is a target. The first token never is: nothing predicts it."""


@dataclass(frozen=True)
class PackedRow:
    """Several examples end to end, ready for one forward pass."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    """Position within the example; restarts at 0 with each example."""
    source_N: np.ndarray
    """Index in the row of the hidden state that predicts each target (one before it)."""
    labels_N: np.ndarray
    """The target ids."""
    examples: tuple[int, ...]
    """Which examples, in order."""
    counts: tuple[int, ...]
    """Targets of each, in the same order; they sum to N."""


def pack(examples: Sequence[Example], indices: Sequence[int]) -> PackedRow:
    """Lay examples end to end. Raises ValueError when a target has nothing before it."""
    ids, positions, sources, labels = [], [], [], []
    offset = 0
    for example in examples:
        targets = np.flatnonzero(example.mask_L)
        if targets.size and targets[0] == 0:
            raise ValueError("the first token of an example cannot be a target")
        ids.append(example.ids_L)
        positions.append(np.arange(len(example.ids_L)))
        sources.append(offset + targets - 1)
        labels.append(example.ids_L[targets])
        offset += len(example.ids_L)
    return PackedRow(
        ids_T=np.concatenate(ids).astype(np.int64),
        positions_T=np.concatenate(positions).astype(np.int64),
        source_N=np.concatenate(sources).astype(np.int64),
        labels_N=np.concatenate(labels).astype(np.int64),
        examples=tuple(indices),
        counts=tuple(len(targets) for targets in labels),
    )


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows side by side, padded at their end to the longest."""

    ids_BT: np.ndarray
    positions_BT: np.ndarray
    """Padding goes on counting, so that it looks like the row's last example going on."""
    source_N: np.ndarray
    """Index in the flattened [B * T] hidden states that predicts each target."""
    labels_N: np.ndarray
    examples: tuple[int, ...]
    counts: tuple[int, ...]
    """Targets of each example, in the same order; they sum to N."""


def stack(rows: Sequence[PackedRow]) -> PackedBatch:
    """Rows as one batch. Causal attention never looks at padding, which stands at the end."""
    width = max(len(row.ids_T) for row in rows)
    ids_BT = np.zeros((len(rows), width), np.int64)
    positions_BT = np.empty((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        length = len(row.ids_T)
        ids_BT[index, :length] = row.ids_T
        positions_BT[index, :length] = row.positions_T
        positions_BT[index, length:] = row.positions_T[-1] + 1 + np.arange(width - length)
    return PackedBatch(
        ids_BT, positions_BT,
        source_N=np.concatenate([row.source_N + i * width for i, row in enumerate(rows)]),
        labels_N=np.concatenate([row.labels_N for row in rows]),
        examples=tuple(example for row in rows for example in row.examples),
        counts=tuple(count for row in rows for count in row.counts),
    )  # fmt: skip


def position_budget(length: int, *, first_tokens: int = 0, first_share: float = 1.0) -> int:
    """How many first tokens of an answer are learnt from: early tokens teach most.

    `min(first_tokens, ceil(first_share * length))`, where first_tokens = 0 sets no limit
    (arXiv 2606.22600).
    """
    # 0.1 * 30 is a hair above 3 in floating point; the hair must not buy a fourth token.
    kept = math.ceil(first_share * length - 1e-9)
    return min(kept, first_tokens) if first_tokens else kept


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` examples from (seed, epoch) alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def plan_steps(
    lengths: Sequence[int], order: np.ndarray, *, pack_tokens: int, batch_tokens: int,
    batch_examples: int = 0,
) -> list[list[list[int]]]:  # fmt: skip
    """Optimizer steps -> packed rows -> examples, in `order`.

    A row is filled until the next example would pass `pack_tokens` (lengths are cut there first);
    a step takes rows until it has `batch_tokens`, or all rows of `batch_examples` examples. The
    last step of an epoch may be smaller.
    """
    if batch_examples:
        parts = [order[i : i + batch_examples] for i in range(0, len(order), batch_examples)]
        return [_packed_rows(lengths, part, pack_tokens) for part in parts]
    rows = _packed_rows(lengths, order, pack_tokens)
    steps: list[list[list[int]]] = []
    size = batch_tokens
    for row in rows:
        if size >= batch_tokens:
            steps.append([])
            size = 0
        steps[-1].append(row)
        size += sum(min(lengths[index], pack_tokens) for index in row)
    return steps


def _packed_rows(lengths: Sequence[int], order: np.ndarray, pack_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    used = pack_tokens
    for index in order:
        length = min(lengths[index], pack_tokens)
        if used + length > pack_tokens:
            rows.append([])
            used = 0
        rows[-1].append(int(index))
        used += length
    return rows


def length_groups(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices by length, shortest first, in groups that padded to their longest hold `limit` tokens
    at most (one alone may be longer)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if not groups or (len(groups[-1]) + 1) * lengths[index] > limit:
            groups.append([])
        groups[-1].append(index)
    return groups


def mixed_order(
    counts: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int
) -> np.ndarray:
    """An epoch over several sources laid end to end, mixed by weight.

    Every row of the first source is seen once; the others, such as replay of an earlier stage, come
    in the share their weight gives them, each shuffled and repeated where it is too short.
    """
    length = counts[0] / weights[0]
    taken, offset = [], 0
    for source, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        wanted = max(1, round(length * weight))
        rounds = [
            epoch_order(count, seed=seed, epoch=epoch * 1000 + source * 100 + lap)
            for lap in range(-(-wanted // count))
        ]
        taken.append(np.concatenate(rounds)[:wanted] + offset)
        offset += count
    together = np.concatenate(taken)
    return together[epoch_order(len(together), seed=seed + 1, epoch=epoch)]
