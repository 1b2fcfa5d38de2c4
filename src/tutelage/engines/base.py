"""What every engine promises: protocols and plain data, no torch.

Owns the shape of a sampling request and its answer, of a scoring request, and the rule that the
randomness of a sequence comes from (seed, key) alone. Does not know how any engine computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from tutelage.targets.schema import TokenTargets

    class Estimator(Protocol):
        """Turns next-token logits into targets (`targets/estimator.py`)."""

        @property
        def draws(self) -> int:
            """Uniforms in [0, 1) a token that it asks for."""
            ...

        def __call__(
            self, logits_NV: Tensor, labels_N: Tensor, uniforms_NS: Tensor
        ) -> TokenTargets:
            """Targets of N tokens."""
            ...


Stream = Literal["sample", "score"]
_STREAMS: dict[Stream, int] = {"sample": 0, "score": 1}
_WORD = 2**64


@dataclass(frozen=True)
class SamplingParams:
    """How to answer: `temperature` 0 is greedy; a token in `stop_ids` ends an answer."""

    max_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One answer, exactly as sampled.

    `response_ids` includes the stop token when `finish_reason` is "stop". `logps` holds, for each
    of them, its log-probability (nats, float32) under the model at temperature 1, whatever
    temperature drew it.
    """

    response_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Scorable:
    """A prompt and the response whose every token is to be scored; both non-empty."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    name: str = ""
    """How an error calls it; by its place when empty."""


class Sampler(Protocol):
    """Answers prompts."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[Completion]:
        """One completion a prompt, in the given order.

        `keys` gives one integer a prompt: its randomness comes from (params.seed, key) only, so
        batching, order and worker change nothing but float noise. `on_tokens` hears the number of
        tokens decoded since it was last called.
        """
        ...


class Scorer(Protocol):
    """Reads responses under a teacher.

    One that gives no whole distributions (see `recipe.engines.TopEngine`) takes a plain top-k as
    its estimator, and no other.
    """

    def score(
        self,
        sequences: Sequence[Scorable],
        *,
        estimator: Estimator,
        seed: int,
        keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[TokenTargets]:
        """One TokenTargets a sequence, in the given order, one entry a response token.

        The uniforms that `estimator` is given for a sequence come from (seed, key) only.
        `on_tokens` hears the number of response tokens scored since it was last called.
        """
        ...

    def label_logps(
        self, sequences: Sequence[Scorable], *, on_tokens: Callable[[int], None]
    ) -> list[np.ndarray]:
        """Log-probability (nats, temperature 1, float32) of every response token, and no more."""
        ...


class Engine(Protocol):
    """A model ready to answer and to read, wherever it runs; its file is `engines/<kind>.py`.

    That file has `open_engine(artifact, table, *, device) -> Engine`.
    """

    @property
    def name(self) -> str:
        """Its kind, for the store's metadata."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, loaded here: ids are made and read here and nowhere else."""
        ...

    @property
    def directory(self) -> Path:
        """Where the tokenizer's files are."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        ...

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together; None where nothing says."""
        ...

    @property
    def dtype(self) -> str:
        """Of the weights, as far as it is known."""
        ...

    def sampler(self, *, batch_rows: int) -> Sampler:
        """What answers; `batch_rows` sequences at a time where it is ours to say."""
        ...

    def scorer(self, *, chunk_bytes: int) -> Scorer:
        """What reads; `chunk_bytes` of logits at a time where it is ours to say.

        Raises EngineError where it cannot.
        """
        ...

    def close(self) -> None:
        """Let go of connections and memory."""
        ...


def sequence_rng(seed: int, key: int, stream: Stream) -> np.random.Generator:
    """The uniforms of one sequence: Philox 4x64-10 with (seed, key) as its 128-bit key.

    The last counter word is the stream: sampling and scoring under equal seeds and keys must not
    share uniforms, or the draw of a token and the tail sample of its target would be correlated.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    words = np.array([seed % _WORD, key % _WORD], dtype=np.uint64)
    counter = np.array([0, 0, 0, _STREAMS[stream]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=counter))
