"""From ragged stored targets to the padded arrays a loss takes; numpy, no loop over tokens.

Legend: N tokens, K most ids of any token, M head entries, T tail entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.targets.schema import TokenTargets, concat_targets


@dataclass(frozen=True)
class PaddedTargets:
    """Targets of N tokens as rectangles; the ids of a token are distinct, its head comes first."""

    ids_NK: np.ndarray
    """int64; 0 in the padding"""
    q_NK: np.ndarray
    """float32; q in the head, the mass an id stands for in the tail, 0 in the padding"""
    head_mask_NK: np.ndarray
    """bool; True = head"""
    valid_NK: np.ndarray
    """bool; False = padding"""
    label_logq_N: np.ndarray
    """float32; teacher log-probability of the sampled token, nats"""
    teacher_entropy_N: np.ndarray
    """float32; nats"""


def pad_targets(parts: Sequence[TokenTargets]) -> PaddedTargets:
    """The tokens of one or more parts (`row.targets`), one after the other, padded.

    An id that was drawn several times becomes one id with their common mass.
    """
    whole = concat_targets(parts)
    N = len(whole)
    token_M = np.repeat(np.arange(N), whole.head_counts_N)
    token_T, tail_ids_T, tail_q_T = _distinct_tail(whole)
    tail_counts_N = np.bincount(token_T, minlength=N)
    counts_N = whole.head_counts_N + tail_counts_N
    place_M = _places(token_M, whole.head_counts_N)
    place_T = _places(token_T, tail_counts_N) + whole.head_counts_N[token_T]
    shape = (N, int(counts_N.max(initial=0)))
    ids_NK, q_NK = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    ids_NK[token_M, place_M], ids_NK[token_T, place_T] = whole.head_ids_M, tail_ids_T
    q_NK[token_M, place_M], q_NK[token_T, place_T] = np.exp(whole.head_logq_M), tail_q_T
    place_K = np.arange(shape[1])
    return PaddedTargets(
        ids_NK=ids_NK,
        q_NK=q_NK,
        head_mask_NK=place_K < whole.head_counts_N[:, None],
        valid_NK=place_K < counts_N[:, None],
        label_logq_N=whole.label_logp_N,
        teacher_entropy_N=whole.entropy_N,
    )


def _distinct_tail(whole: TokenTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token, id and mass of each distinct tail id; repeats of a token stand side by side."""
    token_T = np.repeat(np.arange(len(whole)), whole.tail_counts_N)
    ids_T, q_T = whole.tail_ids_T, whole.tail_unit_N()[token_T]
    first_T = np.ones(len(ids_T), bool)
    first_T[1:] = (ids_T[1:] != ids_T[:-1]) | (token_T[1:] != token_T[:-1])
    if first_T.all():
        return token_T, ids_T, q_T
    mass = np.bincount(np.cumsum(first_T) - 1, q_T)
    return token_T[first_T], ids_T[first_T], mass


def _places(token_E: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """Place within its token of each entry."""
    starts_N = np.cumsum(counts_N) - counts_N
    return np.arange(len(token_E)) - starts_N[token_E]
