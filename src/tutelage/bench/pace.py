"""What a model costs here, as measured on a few hundred tokens: plain figures, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetCost:
    """A setting of the target store on a teacher's own tokens."""

    setting: str
    """Such as `tau = 0.02` or `top-20`."""
    ids: float
    """Ids a token, head and tail."""
    bytes: float
    """On disk a token, of what the teacher says."""
    mass: float
    """Of the distribution, kept with its exact probabilities."""
    unbiased: bool
    """Whether a sampled tail stands for the rest."""


@dataclass(frozen=True)
class Pace:
    """Seconds a token, and memory at the peak of the process that did it."""

    decode_s: float
    read_s: float | None
    """None for an engine that only answers."""
    train_s: float | None
    """None where it was not asked for, or does not fit into memory."""
    inference_bytes: int
    train_bytes: int
    tokens: int
    """Answer tokens it was measured on."""
    answers: int
    ended: int
    """Answers that ended before they were cut off."""
    targets: tuple[TargetCost, ...] = ()

    def answer_tokens(self, most: int) -> float:
        """Mean length of an answer that is cut at `most`, from answers that were cut earlier.

        As if every token ended its answer equally likely: tokens / ended is then the likeliest mean
        of the lengths, those cut off included.
        """
        if not self.ended:
            return most
        stays = 1 - self.ended / self.tokens
        return (1 - stays**most) / (1 - stays)
