"""The gauge of staleness: how far the student in training is from the one that answered.

The answers y were sampled from the generating student g. For a token with r = log p(y) - log g(y)

    e^r r - (e^r - 1)

has the mean KL(p || g) at its position: E_g[e^r r] is that KL, and E_g[e^r - 1] = 0 takes variance
out and leaves a term that is never negative. Positions are those of g's own answers, which is where
training on them takes place; on answers of p itself the mean may differ. The mean is unbiased but
its tail is heavy: a token that p likes far better than g weighs e^r, so a standard error is told.

Both log-probabilities are at temperature 1, so the answers must have been sampled at it: of greedy
ones the figure means nothing, at another temperature it is approximate. Where the model begins as
the generating student itself, `surprise` tells sampled answers from others. The store keeps g's
log-probabilities rounded to about 0.02 nats, which adds less than 0.001 to the figure.

Legend: N tokens of the held-out answers, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tutelage.models.load import BackboneAndHead
from tutelage.train.heldout import is_due
from tutelage.train.loop import Seen

SAME = 0.01
"""Nats: a model that begins nearer than this to the generating student is that student."""
UNLIKELY = 4.0
"""Standard deviations of the answers' surprise beyond which they were not sampled as they are."""
READING_SHARE = 0.06
"""Tokens read by the gauge for one trained: reading costs about a third, so 2 % of the time."""
_CHUNK = 256


def kl_terms(logp_N: np.ndarray, generating_logp_N: np.ndarray) -> np.ndarray:
    """A token's part of KL(now || generating), in nats, float64, never negative."""
    ratio_N = np.asarray(logp_N, np.float64) - np.asarray(generating_logp_N, np.float64)
    return ratio_N * np.exp(ratio_N) - np.expm1(ratio_N)


def affordable_points(points: int, *, held_tokens: int, trained_tokens: int) -> int:
    """As many readings, or fewer that cost little beside the training; one at least.

    One more is made before the first step.
    """
    return max(1, min(points, int(READING_SHARE * trained_tokens / max(1, held_tokens)) - 1))


class Surprise(NamedTuple):
    """How a model finds tokens."""

    logp_N: np.ndarray
    """Their log-probabilities, nats, float32."""
    deviations: float
    """Of their mean surprise from its expectation were they sampled at temperature 1, in standard
    deviations: far below 0 for greedy answers."""


@torch.inference_mode()
def surprise(hidden_ND: Tensor, head: BackboneAndHead, labels_N: Tensor) -> Surprise:
    """What the model thinks of `labels_N`, from the hidden states that predict them.

    A sampled token's -log p has the entropy as its mean and, over p, a variance of its own; given
    what stands before them the tokens' deviations add up without correlation.
    """
    logps: list[Tensor] = []
    excess, variance = 0.0, 0.0
    for first in range(0, len(labels_N), _CHUNK):
        rows = slice(first, first + _CHUNK)
        logp_NV = head.logits(hidden_ND[rows]).log_softmax(-1)
        label_N = logp_NV.gather(-1, labels_N[rows, None])[:, 0]
        p_NV = logp_NV.exp()
        entropy_N = -(p_NV * logp_NV).sum(-1)
        second_N = (p_NV * logp_NV.square()).sum(-1)
        excess += float((-label_N - entropy_N).double().sum())
        variance += float((second_N - entropy_N.square()).double().sum())
        logps.append(label_N.cpu())
    return Surprise(torch.cat(logps).numpy(), excess / max(variance, 1e-9) ** 0.5)


@dataclass
class Gauge:
    """`Plan.watch`: reads the held-out answers at even points, warns, and may end the training."""

    read: Callable[[], np.ndarray]
    """Log-probabilities of the held-out tokens under the model as it is now, [N]."""
    generating_logp_N: np.ndarray
    points: int
    most: float
    """Nats a token above which the answers are too old."""
    stop: bool
    say: Callable[[str], None]
    _warned: bool = field(default=False, init=False)

    def __call__(self, done: int, steps: int) -> Seen:
        """See `Plan.watch`."""
        if not is_due(done, steps, self.points):
            return Seen()
        terms_N = kl_terms(self.read(), self.generating_logp_N)
        value, error = float(terms_N.mean()), float(terms_N.std() / len(terms_N) ** 0.5)
        stale = value > self.most
        if stale and not self._warned:
            self._warned = True
            self.say(
                f"  step {done} of {steps}: the student is {value:.2f} +- {error:.2f} nats a token "
                f"from the one that answered (max_staleness {self.most:g}); lower lr, or "
                "refresh its answers with rounds = 2"
            )
        if stale and self.stop and done < steps:
            self.say(f"  stopped after step {done} of {steps}: stop_when_stale")
        figures = {"staleness": value, "staleness_error": error}
        return Seen(figures, stop=stale and self.stop)
