"""Many responses as flat arrays, and back: what a row group is in memory.

Owns the gathering, the checks of what is gathered, and the slicing; knows nothing of how arrays are
coded on disk.

Legend: R rows; P prompt and N response tokens of all rows together; R1 = R + 1 boundaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tutelage.core.errors import DataError
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets, concat_targets

TEXTS = ("id", "prompt_id", "source", "mode", "finish_reason", "verdict")
"""The columns of text, as `TargetRow` names them; only a verdict may be None."""
NOISE_NATS = 1e-3
"""Float noise carries a certain token's log-probability above 0, by 1e-6; more is a mistake."""


@dataclass(frozen=True)
class TargetGroup:
    """Whole-group arrays; `row(i)` gives views of them."""

    texts: dict[str, list[str | None]]
    """A list of R for each of TEXTS"""
    prompt_starts_R1: np.ndarray
    prompt_ids_P: np.ndarray
    """int32"""
    token_starts_R1: np.ndarray
    response_ids_N: np.ndarray
    """int32"""
    student_logp_N: np.ndarray
    """float32"""
    head_starts_R1: np.ndarray
    """Where each row's head entries begin in `targets.head_ids_M`"""
    tail_starts_R1: np.ndarray
    targets: TokenTargets
    """Of all N tokens"""

    def __len__(self) -> int:
        return len(self.token_starts_R1) - 1

    def row(self, index: int) -> TargetRow:
        """One response, as views."""

        def part(starts_R1: np.ndarray) -> slice:
            return slice(starts_R1[index], starts_R1[index + 1])

        tokens, heads, tails = map(
            part, (self.token_starts_R1, self.head_starts_R1, self.tail_starts_R1)
        )
        targets = replace(
            self.targets,
            head_counts_N=self.targets.head_counts_N[tokens],
            head_ids_M=self.targets.head_ids_M[heads],
            head_logq_M=self.targets.head_logq_M[heads],
            tail_counts_N=self.targets.tail_counts_N[tokens],
            tail_ids_T=self.targets.tail_ids_T[tails],
            label_logp_N=self.targets.label_logp_N[tokens],
            entropy_N=self.targets.entropy_N[tokens],
        )
        return TargetRow(
            **{name: values[index] for name, values in self.texts.items()},  # type: ignore[arg-type]
            prompt_ids=self.prompt_ids_P[part(self.prompt_starts_R1)],
            response_ids=self.response_ids_N[tokens],
            student_logp_N=self.student_logp_N[tokens],
            targets=targets,
        )


def gather(rows: Sequence[TargetRow], meta: StoreMeta) -> TargetGroup:
    """The group of one or more rows.

    Raises DataError naming the row whose arrays differ in length, whose ids are outside the
    vocabulary, whose log-probabilities are not finite and at most 0, or whose tau is not the
    store's.
    """
    for row in rows:
        _check_lengths(row, meta)
    group = TargetGroup(
        texts={name: [getattr(row, name) for row in rows] for name in TEXTS},
        prompt_starts_R1=starts(np.array([len(row.prompt_ids) for row in rows])),
        prompt_ids_P=np.concatenate([row.prompt_ids for row in rows]),
        token_starts_R1=starts(np.array([len(row.response_ids) for row in rows])),
        response_ids_N=np.concatenate([row.response_ids for row in rows]),
        student_logp_N=np.concatenate([row.student_logp_N for row in rows]),
        head_starts_R1=starts(np.array([len(row.targets.head_ids_M) for row in rows])),
        tail_starts_R1=starts(np.array([len(row.targets.tail_ids_T) for row in rows])),
        targets=concat_targets([row.targets for row in rows]),
    )
    _check_values(group, meta)
    return group


def starts(counts: np.ndarray) -> np.ndarray:
    """int64; the running sum of counts with a 0 before it."""
    result = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=result[1:])
    return result


def _check_lengths(row: TargetRow, meta: StoreMeta) -> None:
    targets, count = row.targets, len(row.response_ids)
    pairs = {
        "student_logp": (len(row.student_logp_N), count),
        "head counts": (len(targets.head_counts_N), count),
        "tail counts": (len(targets.tail_counts_N), count),
        "label_logp": (len(targets.label_logp_N), count),
        "entropy": (len(targets.entropy_N), count),
        "head ids": (len(targets.head_ids_M), targets.head_counts_N.sum()),
        "head log-probabilities": (len(targets.head_logq_M), targets.head_counts_N.sum()),
        "tail ids": (len(targets.tail_ids_T), targets.tail_counts_N.sum()),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise DataError(f"row {row.id}: {found} {name} where {wanted} are needed")
    if targets.tau != meta.tau:
        raise DataError(f"row {row.id}: made with tau {targets.tau}, the store's is {meta.tau}")


def _check_values(group: TargetGroup, meta: StoreMeta) -> None:
    targets = group.targets
    ids = {
        "prompt_ids": (group.prompt_ids_P, group.prompt_starts_R1),
        "response_ids": (group.response_ids_N, group.token_starts_R1),
        "head ids": (targets.head_ids_M, group.head_starts_R1),
        "tail ids": (targets.tail_ids_T, group.tail_starts_R1),
    }
    for name, (values, starts_R1) in ids.items():
        bad = (values < 0) | (values >= meta.vocab_size)
        _refuse(group, bad, starts_R1, f"{name} outside the vocabulary of {meta.vocab_size}")
    nats = {
        "student_logp": (-group.student_logp_N, group.token_starts_R1),
        "label_logp": (-targets.label_logp_N, group.token_starts_R1),
        "teacher_entropy": (targets.entropy_N, group.token_starts_R1),
        "head log-probabilities": (-targets.head_logq_M, group.head_starts_R1),
    }
    for name, (values, starts_R1) in nats.items():
        bad = ~((values >= -NOISE_NATS) & (values < np.inf))
        _refuse(group, bad, starts_R1, f"{name} that are not finite or of the wrong sign")


def _refuse(group: TargetGroup, bad: np.ndarray, starts_R1: np.ndarray, what: str) -> None:
    if bad.any():
        row = int(np.searchsorted(starts_R1, bad.argmax(), side="right")) - 1
        raise DataError(f"row {group.texts['id'][row]}: {what}")
