"""What an engine without whole distributions gives, checked, as answers and as top-k targets.

Owns the checks on ids and log-probabilities that come from elsewhere, and the seed of a request.
Knows neither HTTP nor any engine's own format.

Legend: N response tokens, K ids of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, SamplingParams, Scorable, sequence_rng
from tutelage.targets.estimator import Fixed
from tutelage.targets.schema import TokenTargets
from tutelage.targets.topk import targets_of_top_k

if TYPE_CHECKING:
    from tutelage.engines.base import Estimator

ROUNDING = 1e-3
"""What float16 sums may carry a log-probability past 0; more than that is not one."""


@dataclass(frozen=True)
class Reading:
    """What an engine says of each of N response tokens, as it came."""

    label_logps: Sequence[float]
    """Of the response's own tokens, nats, at temperature 1."""
    tops: Sequence[Mapping[int, float]]
    """Log-probabilities by id; the label may be one more than was asked for."""


def head_size(estimator: Estimator, *, top: int, engine: str) -> int:
    """How many ids a plain top-k asks for. Raises EngineError for any other estimator."""
    if (
        not isinstance(estimator, Fixed)
        or estimator.draws
        or estimator.temperature != 1
        or not 0 < estimator.head <= top
    ):
        raise EngineError(
            f"the engine {engine} gives the {top} likeliest ids at temperature 1 and nothing else; "
            "score with estimator = 'fixed', draws = 0 and head up to its top"
        )
    return estimator.head


def check_scorable(sequence: Scorable, place: int, context: int | None) -> None:
    """Raises EngineError for an empty prompt or response, and for one that the engine cannot hold.

    Engines that read a prompt only on the way to an answer need room for one token of it.
    """
    if not len(sequence.prompt_ids) or not len(sequence.response_ids):
        raise EngineError(f"{called(sequence, place)}: its prompt or its response is empty")
    length = len(sequence.prompt_ids) + len(sequence.response_ids) + 1
    if context is not None and length > context:
        raise EngineError(
            f"{called(sequence, place)}: reading it takes {length:,} tokens and the engine holds "
            f"{context:,}; start it with a longer context, or make rollouts shorter"
        )


def called(sequence: Scorable, place: int) -> str:
    """How an error names it."""
    return f"row {sequence.name}" if sequence.name else f"sequence {place}"


def checked_logps(
    sequence: Scorable, reading: Reading, *, vocab_size: int, name: str
) -> np.ndarray:
    """The response's log-probabilities, float32 [N]. Raises EngineError naming the row."""
    labels = reading.label_logps
    if len(labels) != len(sequence.response_ids):
        raise EngineError(
            f"{name}: {len(labels)} log-probabilities came for its {len(sequence.response_ids)} "
            "tokens; the server speaks another version of its API"
        )
    _check_ids(sequence.response_ids, vocab_size, name)
    _check_logps(labels, name)
    return np.asarray(labels, np.float32)


def checked_targets(
    sequence: Scorable, reading: Reading, *, head: int, vocab_size: int, name: str
) -> TokenTargets:
    """The plain top-k of one response. Raises EngineError naming the row."""
    label_logp_N = checked_logps(sequence, reading, vocab_size=vocab_size, name=name)
    count = len(sequence.response_ids)
    if len(reading.tops) != count:
        raise EngineError(
            f"{name}: likeliest ids came for {len(reading.tops)} of its {count} tokens; "
            "the server speaks another version of its API"
        )
    head = min(head, vocab_size)
    ids_NK, logp_NK = np.empty((count, head), np.int64), np.empty((count, head))
    for place, top in enumerate(reading.tops):
        if len(top) < head:
            raise EngineError(
                f"{name}: {len(top)} log-probabilities came for token {place} where {head} were "
                "asked for; lower top in [engines.*], or let the server give more"
            )
        _check_ids(top, vocab_size, name)
        _check_logps(list(top.values()), name)
        # By falling log-probability, then by id: ties in the same order on every run.
        likeliest = sorted(top.items(), key=lambda pair: (-pair[1], pair[0]))[:head]
        ids_NK[place] = [token for token, _ in likeliest]
        logp_NK[place] = [logp for _, logp in likeliest]
    labels_N = np.asarray(sequence.response_ids)
    return targets_of_top_k(ids_NK, logp_NK, labels_N, label_logp_N=label_logp_N)


def checked_completion(
    ids: Sequence[int], logps: Sequence[float], params: SamplingParams, *, vocab_size: int,
    name: str,
) -> Completion:  # fmt: skip
    """An answer up to its first stop token. Raises EngineError naming the prompt.

    An engine that does not know a stop token goes on behind it: what comes then is cut, which is
    the answer that stopping there would have given. An end of the engine's own that the recipe
    does not count as one makes an answer that was cut off.
    """
    if not ids or len(ids) != len(logps) or len(ids) > params.max_tokens:
        raise EngineError(
            f"{name}: {len(ids)} tokens came with {len(logps)} log-probabilities, of at most "
            f"{params.max_tokens}; the server speaks another version of its API"
        )
    stops = [place for place, token in enumerate(ids) if token in params.stop_ids]
    kept = slice(None, stops[0] + 1 if stops else None)
    _check_ids(ids[kept], vocab_size, name)
    _check_logps(logps[kept], name)
    return Completion(tuple(ids[kept]), tuple(logps[kept]), "stop" if stops else "length")


def request_seed(params: SamplingParams, key: int, *, bits: int) -> int:
    """A seed for the engine's own generator that depends on (params.seed, key) alone."""
    return int(sequence_rng(params.seed, key, "sample").integers(0, 2**bits))


def room(params: SamplingParams, prompt: Sequence[int], context: int | None, name: str) -> int:
    """Tokens that an answer may take: those asked for, or what the context leaves.

    Raises EngineError when it leaves none, or the prompt is empty.
    """
    if not len(prompt):
        raise EngineError(f"{name} is empty; give it at least one token")
    if context is None:
        return params.max_tokens
    if len(prompt) >= context:
        raise EngineError(
            f"{name} has {len(prompt):,} tokens and the engine holds {context:,}; start it with a "
            "longer context, or leave such prompts out"
        )
    return min(params.max_tokens, context - len(prompt))


def _check_ids(ids: Mapping[int, float] | Sequence[int], vocab_size: int, name: str) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise EngineError(
                f"{name}: token id {token} is none of the {vocab_size:,} of the local model; the "
                "engine runs another model, or the models table names another tokenizer"
            )


def _check_logps(logps: Sequence[float], name: str) -> None:
    for logp in logps:
        if math.isfinite(logp) and logp <= ROUNDING:
            continue
        raise EngineError(
            f"{name}: {logp} came where a log-probability belongs; check the engine's weights and "
            "dtype, and that it gives raw log-probabilities (vLLM: --logprobs-mode raw_logprobs)"
        )
