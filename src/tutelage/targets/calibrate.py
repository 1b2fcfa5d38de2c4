"""Finds the threshold that a budget buys, on a sample of a teacher's logits.

Legend: N tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Cost:
    """Of a setting, a token on average."""

    ids: float
    bytes: float
    mass: float
    """Kept with exact probabilities: in the head."""


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

    def cost(tau: float) -> float:
        return getattr(expected_cost(q_NV, tau), unit)

    least = cost(1.0)
    if budget < least:
        raise RecipeError(
            f"budget of {budget} {unit} a token is under the least, {least:.1f} (tau = 1); raise it"
        )
    return _bisect(lambda tau: cost(tau) <= budget)


def _bisect(fits: Callable[[float], bool]) -> float:
    """The smallest tau in [SMALLEST, 1] that fits, from above; `fits(1)` holds."""
    below, above = SMALLEST, 1.0
    for _ in range(STEPS):
        middle = (below * above) ** 0.5
        below, above = (below, middle) if fits(middle) else (middle, above)
    return above


def expected_cost(q_NV: Tensor, tau: float) -> Cost:
    """Of threshold sampling at tau: a tail id for each tau of the mass that is left."""
    in_head_NV = q_NV >= tau
    rest = float(torch.where(in_head_NV, 0, q_NV).sum(-1).double().mean())
    return _cost(float(in_head_NV.sum(-1).double().mean()), rest / tau, 1 - rest)


def cost_of_top(q_NV: Tensor, top: int) -> Cost:
    """Of the `top` likeliest ids and nothing else."""
    top = min(top, q_NV.shape[1])
    return _cost(float(top), 0.0, float(q_NV.topk(top, -1).values.sum(-1).double().mean()))


def _cost(head: float, tail: float, mass: float) -> Cost:
    return Cost(head + tail, TOKEN_BYTES + HEAD_BYTES * head + TAIL_BYTES * tail, mass)
