"""SGLang's server, by its own `POST /generate` with token ids: answers and reading.

Written from its documentation and not run against a real one. At a temperature other than 1 the
log-probabilities of sampled tokens are of the tempered policy there, so the answer is read once
more: `input_token_logprobs` are always at temperature 1. `sampling_seed` makes an answer repeatable
only where the server runs with --enable-deterministic-inference.
Source: docs.sglang.io, "Sampling Parameters" and "SGLang Native APIs".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.http import Session
from tutelage.engines.readings import Reading, checked_completion, request_seed

ROUTE = "/generate"
PLAIN = {
    "n": 1, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_new_tokens": 0, "ignore_eos": True,
    "skip_special_tokens": False, "no_stop_trim": True,
}  # fmt: skip
"""Each said, for what is not said comes from the model's generation_config.json."""


@dataclass(frozen=True)
class SglangApi:
    """See `served.Api`."""

    model: str
    vocab_size: int

    async def texts(self, session: Session, ids: Sequence[int]) -> list[str]:
        """See `Api.texts`: reading a text tells the text of each token with its probability."""
        body = {
            "input_ids": list(ids), "sampling_params": {**PLAIN, "max_new_tokens": 1},
            "return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True,
        }  # fmt: skip

        def texts(got: Mapping[str, Any]) -> list[str]:
            found = [entry[2] for entry in got["meta_info"]["input_token_logprobs"]]
            if len(found) != len(ids):
                raise ValueError(f"{len(found)} texts for {len(ids)} ids")
            return found

        return await session.post(ROUTE, body, texts)

    async def complete(
        self, session: Session, prompt: Sequence[int], params: SamplingParams, *, key: int,
        name: str,
    ) -> Completion:  # fmt: skip
        """See `Api.complete`."""
        sampling = {
            **PLAIN, "max_new_tokens": params.max_tokens, "temperature": params.temperature,
            "sampling_seed": request_seed(params, key, bits=31),
            "stop_token_ids": list(params.stop_ids),
        }  # fmt: skip
        body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True}
        ids, logps, ended = await session.post(ROUTE, body, _answer, about=name)
        if ended and ids[-1] not in params.stop_ids:
            raise EngineError(f"{name}: the server ends answers at token {ids[-1]} of its own")
        if params.temperature != 1 and ids:
            read = await self.read(session, Scorable(prompt, ids), top=0, name=name)
            logps = read.label_logps
        return checked_completion(ids, logps, params, vocab_size=self.vocab_size, name=name)

    async def read(self, session: Session, sequence: Scorable, *, top: int, name: str) -> Reading:
        """See `Api.read`."""
        body = {
            "input_ids": [*sequence.prompt_ids, *sequence.response_ids],
            "sampling_params": {**PLAIN, "max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True, "logprob_start_len": len(sequence.prompt_ids) - 1,
            "top_logprobs_num": top,
        }  # fmt: skip
        response = sequence.response_ids
        return await session.post(ROUTE, body, lambda got: _reading(got, response, top), about=name)


def _answer(got: Mapping[str, Any]) -> tuple[list[int], Sequence[float], bool]:
    about = got["meta_info"]
    entries = about["output_token_logprobs"]
    ended = about["finish_reason"]["type"] == "stop"
    return [int(e[1]) for e in entries], [float(e[0]) for e in entries], ended


def _reading(got: Mapping[str, Any], response: Sequence[int], top: int) -> Reading:
    """Entries are [log-probability, id, text]; those of the response stand at the end."""
    about, count = got["meta_info"], len(response)
    entries = about["input_token_logprobs"][-count:]
    if [entry[1] for entry in entries] != list(response):
        raise ValueError("log-probabilities of another text")
    labels = [float(entry[0]) for entry in entries]
    tops = about["input_top_logprobs"][-count:] if top else []
    return Reading(labels, [{int(e[1]): float(e[0]) for e in position} for position in tops])
