"""How hard a row is for one student, in [0, 1], and which rows to prefer by it.

Difficulty is a property of the pair (row, student), so it is stored beside the student's
fingerprint and made anew for the next one. NaN says that it is not known. Knows no model: passes,
and negative log-likelihoods (NLL) in nats a token, come from the stages. `alone_openings` is what
stands before an answer whose NLL is taken without its prompt.
"""

from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from tutelage.data.balance import weighted_draw
from tutelage.recipe.base import Mode

if TYPE_CHECKING:
    from tutelage.text.chat import ChatFormat, Message

NO_USER_TEXT: "Message" = {"role": "user", "content": ""}
UNKNOWN = "unknown"
EDGE = 1e-9
"""1 - 9 / 10 is 0.09999999999999998 and belongs to the band that begins at 0.1."""


def alone_openings(chat: "ChatFormat") -> dict[str, list[int]]:
    """The ids behind which an answer of each mode stands by itself: NLL(y) is taken there.

    The same template with an empty user's turn, so that NLL(y|x) and NLL(y) differ by what was said
    alone: a bare answer would also pay for the missing frame, outside of which a chat model writes
    nothing. BOS would not do either: many models have none, and then no first token is scored.
    """
    return {mode: chat.prompt_ids([NO_USER_TEXT], mode) for mode in get_args(Mode)}


def mean_nll(logps_N: np.ndarray) -> float:
    """Mean NLL a token, in nats; not negative: float32 may put a log-probability 1e-7 above 0."""
    return max(0.0, -float(logps_N.mean(dtype=np.float64)))


def difficulty_from_passes(passes_N: npt.ArrayLike, samples_N: npt.ArrayLike) -> np.ndarray:
    """`C(x) = 1 - passes / samples`: the share of the student's answers a verifier turned down.

    NaN where a row has no sample. Raises ValueError unless 0 <= passes <= samples.
    Source: arXiv 2505.22375.
    """
    passes_N, samples_N = np.asarray(passes_N, np.float64), np.asarray(samples_N, np.float64)
    if passes_N.shape != samples_N.shape:
        raise ValueError(f"passes {passes_N.shape}, samples {samples_N.shape}: one of each a row")
    if not ((passes_N >= 0) & (passes_N <= samples_N)).all():
        raise ValueError("passes must lie between 0 and samples")
    return 1 - _ratio(passes_N, samples_N)


def difficulty_from_nll(nll_N: npt.ArrayLike, alone_nll_N: npt.ArrayLike) -> np.ndarray:
    """Difficulty without a verifier: the rank in [0, 1] of how little the prompt helps the answer.

    `nll_N` is the student's NLL a token of the answer y given the prompt x, `alone_nll_N` that of y
    without x. Rows are ranked by `instruction_following_difficulty` and, where that is equal, by
    NLL(y|x): of two answers that gain as little by their prompt, the less likely one is harder.
    0 is the easiest of the set, 1 the hardest, equal rows share the mean of their ranks, a single
    row has 0.5. A rank is a place in this set: do not compare it across sets. NaN stays NaN.
    """
    ifd_N = instruction_following_difficulty(nll_N, alone_nll_N)
    return _ranks(ifd_N, np.asarray(nll_N, np.float64))


def instruction_following_difficulty(
    nll_N: npt.ArrayLike, alone_nll_N: npt.ArrayLike
) -> np.ndarray:
    """`IFD = NLL(y|x) / NLL(y)`: near 0 the prompt settles the answer, near 1 it does not help.

    Above 1 the prompt makes the answer less likely: as a rule the two do not belong together, and
    a filter should take them out before hard rows are preferred. NaN where NLL(y) is 0 or either is
    NaN. Raises ValueError for a negative NLL or unequal shapes. Source: arXiv 2308.12032.
    """
    nll_N, alone_nll_N = np.asarray(nll_N, np.float64), np.asarray(alone_nll_N, np.float64)
    if nll_N.shape != alone_nll_N.shape:
        raise ValueError(f"NLL {nll_N.shape} with the prompt, {alone_nll_N.shape} without")
    if (nll_N < 0).any() or (alone_nll_N < 0).any():
        raise ValueError("an NLL is not negative")
    return _ratio(nll_N, alone_nll_N)


def difficulty_bands(difficulty_N: np.ndarray, *, count: int) -> list[str]:
    """The name of each row's band, of `count` equal parts of [0, 1], for a key of `balanced`.

    A band holds its lower edge and the last one 1.0 too; NaN is in a band of its own, "unknown".
    """
    known_N = ~np.isnan(difficulty_N)
    bands_N = np.full(len(difficulty_N), -1)
    bands_N[known_N] = np.clip(difficulty_N[known_N] * count + EDGE, 0, count - 1).astype(int)
    names = [f"{band / count:.2f}-{(band + 1) / count:.2f}" for band in range(count)] + [UNKNOWN]
    return [names[band] for band in bands_N]


def preference_weights(difficulty_N: np.ndarray, *, centre: float, width: float) -> np.ndarray:
    """`exp(-(C - centre)^2 / 2 width^2)`: rows near `centre` are worth most; `width` in difficulty.

    A row of unknown difficulty (NaN) weighs what a known one does on average, so the unscored are
    neither favoured nor lost; where none is known all weigh 1. No weight falls below the smallest
    normal float, so that far rows can still be drawn once nearer ones run out.
    """
    known_N = ~np.isnan(difficulty_N)
    z_N = (difficulty_N[known_N] - centre) / width
    weights_N = np.ones(len(difficulty_N))
    weights_N[known_N] = np.maximum(np.exp(-0.5 * z_N**2), np.finfo(np.float64).tiny)
    if known_N.any():
        weights_N[~known_N] = weights_N[known_N].mean()
    return weights_N


def prefer(
    difficulty_N: np.ndarray, *, count: int, centre: float, width: float, seed: int
) -> np.ndarray:
    """The ascending indices of `count` rows, drawn without replacement by `preference_weights`.

    Raises DataError for more rows than there are.
    """
    weights_N = preference_weights(difficulty_N, centre=centre, width=width)
    return weighted_draw(weights_N, count=count, seed=seed)


def _ratio(above_N: np.ndarray, below_N: np.ndarray) -> np.ndarray:
    """`above / below`, NaN where below is 0."""
    return np.divide(above_N, below_N, out=np.full(above_N.shape, np.nan), where=below_N != 0)


def _ranks(first_N: np.ndarray, then_N: np.ndarray) -> np.ndarray:
    """Mean rank over [0, 1] by `first_N`, ties by `then_N`; rows of NaN in the first stay NaN."""
    ranks_N = np.full(len(first_N), np.nan)
    known = np.flatnonzero(~np.isnan(first_N))
    if len(known) == 1:
        ranks_N[known] = 0.5
    elif len(known):
        pairs = np.stack([first_N[known], then_N[known]], axis=1)
        _, group_K, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
        means = np.cumsum(sizes) - (sizes + 1) / 2
        ranks_N[known] = means[group_K.reshape(-1)] / (len(known) - 1)
    return ranks_N
