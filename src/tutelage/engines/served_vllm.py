"""vLLM's server, by `POST /v1/completions` with token ids: answers, and reading by prompt_logprobs.

Log-probabilities are those of the raw model at temperature 1 as long as the server runs with its
default `--logprobs-mode raw_logprobs`. It is checked against vLLM 0.32 (tests/slow).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.http import Session
from tutelage.engines.readings import Reading, checked_completion, request_seed

ROUTE = "/v1/completions"
PLAIN = {
    "n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "min_tokens": 0,
    "add_special_tokens": False, "stop": [],
}  # fmt: skip
"""Each said, for what is not said comes from the model's generation_config.json. Its EOS is
ignored: the stop tokens are the recipe's, all of them."""


@dataclass(frozen=True)
class VllmApi:
    """See `served.Api`."""

    model: str
    vocab_size: int

    async def texts(self, session: Session, ids: Sequence[int]) -> list[str]:
        """See `Api.texts`."""
        return [
            await session.post(
                "/detokenize", {"model": self.model, "tokens": [token]}, lambda got: got["prompt"]
            )
            for token in ids
        ]

    async def complete(
        self, session: Session, prompt: Sequence[int], params: SamplingParams, *, key: int,
        name: str,
    ) -> Completion:  # fmt: skip
        """See `Api.complete`."""
        body = {
            **PLAIN, "model": self.model, "prompt": list(prompt), "max_tokens": params.max_tokens,
            "temperature": params.temperature, "seed": request_seed(params, key, bits=63),
            "stop_token_ids": list(params.stop_ids), "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        got = await session.post(ROUTE, body, _answer, about=name)
        if got.prompt_ids != list(prompt):
            raise EngineError(f"{name}: the answer is to another prompt; check what is in between")
        if got.ended and got.ids[-1] not in params.stop_ids:
            raise EngineError(
                f"{name}: the server ends answers at token {got.ids[-1]} of its own; start it with "
                "--generation-config vllm"
            )
        return checked_completion(got.ids, got.logps, params, vocab_size=self.vocab_size, name=name)

    async def read(self, session: Session, sequence: Scorable, *, top: int, name: str) -> Reading:
        """See `Api.read`. One token is answered, for the server makes no fewer."""
        ids = [*sequence.prompt_ids, *sequence.response_ids]
        body = {
            **PLAIN, "model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0,
            "seed": 0, "prompt_logprobs": top,
        }  # fmt: skip
        response = sequence.response_ids
        return await session.post(ROUTE, body, lambda got: _reading(got, response), about=name)


@dataclass(frozen=True)
class _Answer:
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]
    ended: bool


def _answer(got: Mapping[str, Any]) -> _Answer:
    choice = got["choices"][0]
    return _Answer(
        prompt_ids=[int(token) for token in choice["prompt_token_ids"]],
        ids=[int(token) for token in choice["token_ids"]],
        logps=[float(logp) for logp in choice["logprobs"]["token_logprobs"]],
        ended=choice["finish_reason"] == "stop",
    )


def _reading(got: Mapping[str, Any], response: Sequence[int]) -> Reading:
    """Position by position: an object from id to its log-probability, the label's among them."""
    positions = got["choices"][0]["prompt_logprobs"]
    if len(positions) < len(response):
        raise ValueError(f"{len(positions)} positions for {len(response)} tokens of the response")
    found = [
        {int(token): float(entry["logprob"]) for token, entry in position.items()}
        for position in positions[-len(response) :]
    ]
    # A label that is missing means another text: the order of two answers was exchanged.
    labels = [position[token] for position, token in zip(found, response, strict=True)]
    return Reading(labels, found)
