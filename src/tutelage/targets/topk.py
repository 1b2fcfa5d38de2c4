"""Targets of a plain top-k: the likeliest ids with their log-probabilities, and no sampled tail.

Owns what can be said of a token's label and entropy from them. Knows neither where they come from
(an engine without whole distributions, a captured dataset) nor files.

Legend: N tokens, K ids each.
"""

import numpy as np

from tutelage.targets.schema import TokenTargets

LEAST = 1e-30


def targets_of_top_k(
    ids_NK: np.ndarray,
    logp_NK: np.ndarray,
    labels_N: np.ndarray,
    *,
    label_logp_N: np.ndarray | None = None,
) -> TokenTargets:
    """A top-k as the head of a target, with what can be said of label and entropy.

    Without `label_logp_N` a label outside the head has the bound `min(rest, smallest of the k)`.
    The entropy is that of the head with the rest as one bucket: a lower bound. A token whose head
    sums to more than 1 (the curve of a capture, rounding) is normalised.
    """
    order_NK = np.argsort(-logp_NK, axis=1, kind="stable")
    ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1)
    logq_NK = np.take_along_axis(logp_NK, order_NK, axis=1).astype(np.float64)
    logq_NK = np.maximum(logq_NK, np.log(LEAST))
    mass_N = np.exp(logq_NK).sum(1)
    logq_NK -= np.log(np.maximum(mass_N, 1.0))[:, None]
    q_NK = np.exp(logq_NK)
    rest_N = np.maximum(1 - q_NK.sum(1), LEAST)
    if label_logp_N is None:
        is_label_NK = ids_NK == labels_N[:, None]
        bound_N = np.log(np.minimum(rest_N, q_NK[:, -1]))
        inside_N = is_label_NK.any(1)
        label_logp_N = np.where(inside_N, np.where(is_label_NK, logq_NK, 0).sum(1), bound_N)
    entropy_N = -(q_NK * logq_NK).sum(1) - rest_N * np.log(rest_N)
    count, k = ids_NK.shape
    return TokenTargets(
        head_counts_N=np.full(count, k, np.int32),
        head_ids_M=ids_NK.ravel().astype(np.int32),
        head_logq_M=logq_NK.ravel().astype(np.float32),
        tail_counts_N=np.zeros(count, np.int32),
        tail_ids_T=np.zeros(0, np.int32),
        label_logp_N=np.asarray(label_logp_N, np.float32),
        entropy_N=entropy_N.astype(np.float32),
        tau=None,
    )
