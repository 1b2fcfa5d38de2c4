"""What a loss is made of: a validated spec; knows no tensor, so it can be checked without torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tutelage.core.errors import RecipeError

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew", "policy_gradient"]
Treatment = Literal["unbiased", "bucket", "truncated", "renormalised", "dense", "sampled"]
CeOn = Literal["rollout", "teacher", "none"]

DEFAULT_TREATMENT: Mapping[Divergence, Treatment] = {
    "forward_kl": "unbiased",
    "reverse_kl": "bucket",
    "jsd": "bucket",
    "skew": "bucket",
    "policy_gradient": "sampled",
}


@dataclass(frozen=True)
class Term:
    """One divergence of a mixture, with its treatment of what is outside the head.

    `beta` is the teacher's weight in `jsd`; `alpha` the teacher's weight in the mixture of `skew`.
    Raises RecipeError when the two do not go together.
    """

    divergence: Divergence
    treatment: Treatment
    share: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise RecipeError(
                f"divergence {self.divergence!r} is unknown; use one of {get_args(Divergence)}"
            )
        if self.treatment not in get_args(Treatment):
            raise RecipeError(
                f"treatment {self.treatment!r} is unknown; use one of {get_args(Treatment)}"
            )
        if (self.divergence == "policy_gradient") != (self.treatment == "sampled"):
            raise RecipeError(
                f"{self.divergence} with treatment {self.treatment}: policy_gradient sees the"
                " sampled token only, so it and the treatment 'sampled' go together"
            )
        if self.treatment == "unbiased" and self.divergence != "forward_kl":
            raise RecipeError(
                f"{self.divergence} cannot be unbiased from a sampled target: its gradient is not"
                " linear in q; use treatment 'bucket'"
            )
        for name in ("share", "beta", "alpha"):
            value = getattr(self, name)
            if not 0 < value <= 1 or (value == 1 and name != "share"):
                raise RecipeError(
                    f"{name} is {value} in {self.divergence}; it lies between 0 and 1"
                )


@dataclass(frozen=True)
class LossSpec:
    """The objective `(1 - lam) * CE + lam * KD` (arXiv 2509.26497), KD a mixture of `terms`.

    Which rows carry the cross-entropy is `ce_on`. `rollout`: every row, on the student's own
    sampled token (a trust region around the sampling policy). `teacher`: rows of text that the
    teacher wrote for the same prompts, packed into the same batch and marked in
    `SparseTarget.teacher_text_N`; they carry cross-entropy and no KD, rollout rows KD and no
    cross-entropy, since the teacher's text has no token at a position of the student's.
    `none`: no row; then lam must be 1.

    `temperature` T divides the student's logits in KD (never in the cross-entropy), and KD is
    multiplied by T^2. See `prepare` for what a stored target allows. No terms and lam = 0 is SFT.

    Raises RecipeError for a combination that cannot be, before anything runs.
    """

    terms: tuple[Term, ...] = (Term("forward_kl", "unbiased"),)
    lam: float = 0.9
    ce_on: CeOn = "rollout"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise RecipeError(f"lam is {self.lam}; it is the weight of KD, from 0 to 1")
        if self.ce_on not in get_args(CeOn):
            raise RecipeError(f"ce_on is {self.ce_on!r}; use one of {get_args(CeOn)}")
        if self.ce_on == "none" and self.lam != 1:
            raise RecipeError(f"ce_on is none with lam {self.lam}: set lam = 1, or name a label")
        if not self.terms and self.lam != 0:
            raise RecipeError(
                f"lam is {self.lam} and there is no divergence: add one, or set lam = 0"
            )
        if self.terms and not math.isclose(sum(t.share for t in self.terms), 1, abs_tol=1e-6):
            raise RecipeError(
                f"shares of the divergences are {[t.share for t in self.terms]}; sum 1"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise RecipeError(f"temperature is {self.temperature}; it must be above 0")
        if self.temperature != 1 and any(t.treatment == "sampled" for t in self.terms):
            raise RecipeError(
                f"policy_gradient at temperature {self.temperature}: its token was sampled at 1;"
                " set temperature = 1"
            )


CROSS_ENTROPY = LossSpec(terms=(), lam=0.0)
"""Plain SFT."""
