"""Finds the threshold that a budget buys, on a sample of a teacher's logits.

Legend: N tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tutelage.core.errors import RecipeError

# Bytes on disk, measured on 16,384 tokens of a 135M teacher (V = 49,152) at temperatures 1 and 0.5;
# they predict real shards within 3 %. A larger vocabulary adds up to log2(V / 49,152) / 8 an id.
TOKEN_BYTES = 2.5
"""The label's log-probability, the entropy and two counts"""
HEAD_BYTES = 2.07
"""A head entry: id 1.35, probability 0.72"""
TAIL_BYTES = 1.5
"""A tail id"""

STEPS = 30  # halvings of log tau over [SMALLEST, 1]: its last step is 1e-8
SMALLEST = 1e-6


def tau_for_budget(
    logits_NV: Tensor, *, budget: float, unit: Literal["ids", "bytes"], temperature: float = 1.0
) -> float:
    """The smallest tau whose expected cost a token is within the budget.

    `ids(tau) = mean over tokens of sum_i min(1, q_i / tau)`, which falls as tau rises, and so does
    `bytes(tau) = TOKEN_BYTES + HEAD_BYTES * head + TAIL_BYTES * tail`, as a tail id is cheaper than
    a head entry. `bytes` counts what the teacher says; text and student are 2.6 a token more.

    Args:
        logits_NV: a few hundred tokens from real responses.
        budget: ids or bytes a token.

    Raises:
        RecipeError: a budget that even tau = 1 (one id a token) does not meet.
    """
    q_NV = (logits_NV.float() / temperature).softmax(-1)
    cost = {"ids": _ids, "bytes": _bytes}[unit]
    least = cost(q_NV, 1.0)
    if budget < least:
        raise RecipeError(
            f"budget of {budget} {unit} a token is under the least, {least:.1f} (tau = 1); raise it"
        )
    return _bisect(lambda tau: cost(q_NV, tau) <= budget)


def _bisect(fits: Callable[[float], bool]) -> float:
    """The smallest tau in [SMALLEST, 1] that fits, from above; `fits(1)` holds."""
    below, above = SMALLEST, 1.0
    for _ in range(STEPS):
        middle = (below * above) ** 0.5
        below, above = (below, middle) if fits(middle) else (middle, above)
    return above


def _ids(q_NV: Tensor, tau: float) -> float:
    return sum(_head_and_tail(q_NV, tau))


def _bytes(q_NV: Tensor, tau: float) -> float:
    head, tail = _head_and_tail(q_NV, tau)
    return TOKEN_BYTES + HEAD_BYTES * head + TAIL_BYTES * tail


def _head_and_tail(q_NV: Tensor, tau: float) -> tuple[float, float]:
    """Expected head entries and tail ids a token."""
    in_head_NV = q_NV >= tau
    rest = torch.where(in_head_NV, 0, q_NV).sum(-1).double().mean()
    return float(in_head_NV.sum(-1).double().mean()), float(rest / tau)
