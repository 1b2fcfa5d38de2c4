"""How near an answer is to a reference, and whether it loops: text and ids only, no model."""

from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from tutelage.text.words import split

LOOP_NGRAM = 4


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 in [0, 1] of two texts, each as one sequence of `rouge_tokens`.

    With L the length of their longest common subsequence, m and n their lengths:
    `F1 = 2 L / (m + n)`, that is precision L / m and recall L / n weighted alike (beta = 1).
    No stemming, no stop words, no split into sentences. 0 where either has no token.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1.
    """
    ours, theirs = rouge_tokens(answer), rouge_tokens(reference)
    if not ours or not theirs:
        return 0.0
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))


def rouge_tokens(text: str) -> list[str]:
    """Words of spaced scripts; single characters of Chinese, Japanese, Thai and their like.

    Without case, layout and punctuation; see `text.words.split`.
    """
    return split([text], signs=False).of(0)


def repeated_share(ids: Sequence[int], *, n: int = LOOP_NGRAM) -> float:
    """Share in [0, 1] of an answer's n-grams of token ids that stood before: `1 - distinct / all`.

    Near 1 for an answer caught in a loop. 0 where it is shorter than n.
    Source: seq-rep-n of Welleck et al. (arXiv 1908.04319).
    """
    grams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer_length(response_ids: Sequence[int], *, finish_reason: str) -> int:
    """Tokens of an answer as a reader counts them: without the stop token that ended it."""
    return len(response_ids) - (finish_reason == "stop")
