"""What the target store holds, as plain data: one response, its sparse targets, and their origin.

Owns the ragged layout in memory; knows neither logits (estimator) nor files (codec, writer,
reader).

Legend: N tokens, M head entries of all tokens, T tail entries of all tokens. Ragged arrays are flat
values beside a count a token, in token order.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from tutelage.core.errors import ArtifactError

FORMAT = 2
TOP_K = "top"
"""Drops what is outside its head: `top-12`."""
PURE = "pure"
"""Draws from the whole distribution, without a head: `pure-12`."""
DISTILLKIT = "distillkit"
"""A converted top-k, where outside the head even the text's own token has no probability."""


@dataclass(frozen=True)
class TokenTargets:
    """Sparse teacher distributions of N response tokens.

    The estimate of the teacher's probability of id i at one token is

        q_hat_i = q_i                         for i in the head,
        q_hat_i = unit * (times i is listed)  for i in the tail,       0 for every other id.

    `unit` is `tau` where threshold sampling made the targets; where `tau` is None, the tail entries
    of a token share what its head leaves: `unit = (1 - sum of head q) / tail count`. So pure
    sampling and a head with draws need no stored weight, and a plain top-k has an empty tail.
    """

    head_counts_N: np.ndarray
    """int32"""
    head_ids_M: np.ndarray
    """int32; sorted by falling q within a token"""
    head_logq_M: np.ndarray
    """float32; log-probabilities, nats"""
    tail_counts_N: np.ndarray
    """int32"""
    tail_ids_T: np.ndarray
    """int32; rising within a token; an id drawn twice (never with a tau) is listed twice"""
    label_logp_N: np.ndarray
    """float32; teacher log-probability of the token that was sampled, nats"""
    entropy_N: np.ndarray
    """float32; entropy of the whole teacher distribution, nats"""
    tau: float | None

    @classmethod
    def blank(cls, count: int, tau: float | None) -> "TokenTargets":
        """Tokens of which the teacher says nothing."""
        none, ints = np.zeros(0, np.int32), np.zeros(count, np.int32)
        floats = np.zeros(count, np.float32)
        return cls(ints, none, none.astype(np.float32), ints, none, floats, floats, tau)

    def __len__(self) -> int:
        return len(self.head_counts_N)

    def tail_unit_N(self) -> np.ndarray:
        """The mass one tail entry stands for, float32, a value a token."""
        if self.tau is not None:
            return np.full(len(self), self.tau, np.float32)
        token_M = np.repeat(np.arange(len(self)), self.head_counts_N)
        mass_N = np.bincount(token_M, np.exp(self.head_logq_M), minlength=len(self))
        rest_N = np.maximum(1.0 - mass_N, 0.0)  # rounding may carry a full head past 1
        return (rest_N / np.maximum(self.tail_counts_N, 1)).astype(np.float32)

    def first(self, count: int) -> "TokenTargets":
        """The targets of the first `count` tokens, as views."""
        heads, tails = self.head_counts_N[:count].sum(), self.tail_counts_N[:count].sum()
        return replace(
            self,
            head_counts_N=self.head_counts_N[:count],
            head_ids_M=self.head_ids_M[:heads],
            head_logq_M=self.head_logq_M[:heads],
            tail_counts_N=self.tail_counts_N[:count],
            tail_ids_T=self.tail_ids_T[:tails],
            label_logp_N=self.label_logp_N[:count],
            entropy_N=self.entropy_N[:count],
        )


def concat_targets(parts: Sequence[TokenTargets]) -> TokenTargets:
    """The tokens of one or more parts, one after the other; all of one tau."""
    assert len({part.tau for part in parts}) == 1, "targets of different tau cannot be joined"
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(TokenTargets)
        if field.name != "tau"
    }
    return TokenTargets(**arrays, tau=parts[0].tau)


@dataclass(frozen=True)
class TargetRow:
    """One response of the student, exactly as sampled, and what the teacher says of each token.

    A response may be empty (N = 0), and one that was cut off (`finish_reason` "length") has no end
    of turn: nothing is added to it.
    """

    id: str
    prompt_id: str
    source: str
    mode: str
    prompt_ids: np.ndarray
    """int32"""
    response_ids: np.ndarray
    """int32 [N]"""
    finish_reason: str
    verdict: str | None
    """What a grader said; None = not graded."""
    student_logp_N: np.ndarray
    """float32; log-probability under the sampling policy at temperature 1, nats"""
    targets: TokenTargets


@dataclass(frozen=True)
class StoreMeta:
    """Where the targets of a file come from; the same for all its rows."""

    student: str
    teacher: str
    tokenizer: str
    """sha256"""
    chat_template: str
    """sha256"""
    vocab_size: int
    temperature: float
    """The teacher's; probabilities, entropies and `label_logp` are taken at it."""
    engine: str
    dtype: str
    estimator: str
    tau: float | None

    @property
    def has_tail(self) -> bool:
        """Whether ids outside the head were sampled, so that the targets are unbiased."""
        return not self.estimator.startswith((TOP_K, DISTILLKIT))

    @property
    def has_head(self) -> bool:
        """Whether some ids are kept with their exact probability."""
        return not self.estimator.startswith(PURE)

    @property
    def has_label(self) -> bool:
        """Whether the sampled token's own probability is always known."""
        return not self.estimator.startswith(DISTILLKIT)

    def to_json(self) -> str:
        """One line of JSON, with the version of the format."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "StoreMeta":
        """Raises ArtifactError for another version, a missing or an unknown field."""
        try:
            values = json.loads(text)
            version = values.pop("format")
            if version != FORMAT:
                raise ArtifactError(
                    f"format {version} of a target store; this version reads {FORMAT}: score again"
                )
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"not the metadata of a target store: {error}") from error


def check_compatible(
    meta: StoreMeta, *, tokenizer: str, vocab_size: int, chat_template: str
) -> None:
    """Ids mean nothing under another tokenizer, nor prompts under another template.

    Raises ArtifactError naming everything that differs.
    """
    wanted = {"tokenizer": tokenizer, "vocab_size": vocab_size, "chat_template": chat_template}
    differing = [
        f"{name} is {getattr(meta, name)} in the store and {value} in the model"
        for name, value in wanted.items()
        if getattr(meta, name) != value
    ]
    if differing:
        raise ArtifactError(
            f"targets do not fit the model: {'; '.join(differing)}; score again with this model's"
        )
