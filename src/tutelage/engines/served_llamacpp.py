"""llama.cpp's server, by its own `POST /completion` with token ids: answers only.

It gives log-probabilities of what it writes and of nothing that it reads. They are of the raw
logits (`post_sampling_probs` false), whatever the temperature. It stops where the file's own
end-of-generation tokens stand. Checked against llama.cpp of October 2026 (tests/slow).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.http import Session
from tutelage.engines.readings import Reading, checked_completion, request_seed

ROUTE = "/completion"
FEW = 64
"""Log-probabilities asked for first where a token's own is missing: a sampled token is mostly one
of them, and all 49,152 take 0.3 s."""
PUSH = 1e9


@dataclass(frozen=True)
class LlamaCppApi:
    """See `served.Api`."""

    model: str
    vocab_size: int

    async def texts(self, session: Session, ids: Sequence[int]) -> list[str]:
        """See `Api.texts`."""
        return [
            await session.post("/detokenize", {"tokens": [token]}, lambda got: got["content"])
            for token in ids
        ]

    async def complete(
        self, session: Session, prompt: Sequence[int], params: SamplingParams, *, key: int,
        name: str,
    ) -> Completion:  # fmt: skip
        """See `Api.complete`.

        The server reports nothing of a token that ends inside a UTF-8 character, and old ones
        nothing of the one that ends an answer: such a token is asked for once more, by itself.
        """
        body = self._body(
            prompt, n_predict=params.max_tokens, temperature=params.temperature, n_probs=1,
            seed=request_seed(params, key, bits=31), return_tokens=True,
            # A prompt that is read anew does not depend on what the slot read before.
            cache_prompt=False,
        )  # fmt: skip
        got = await session.post(ROUTE, body, _answer, about=name)
        if got.read != len(prompt) or got.truncated:
            raise EngineError(
                f"{name}: the server read {got.read} of its {len(prompt)} tokens; start it with a "
                "longer context (--ctx-size is shared by its slots)"
            )
        ids, logps = list(got.ids), list(got.logps)
        if got.ended and len(params.stop_ids) == 1 and ids[-1:] != list(params.stop_ids):
            ids, logps = [*ids, *params.stop_ids], [*logps, None]
        missing = [place for place, logp in enumerate(logps) if logp is None]
        letter = await self._letter(session) if missing else 0
        for place in missing:
            before = [*prompt, *ids[:place]]
            logps[place] = await self._logp(session, before, ids[place], letter, name)
        known = [logp for logp in logps if logp is not None]
        return checked_completion(ids, known, params, vocab_size=self.vocab_size, name=name)

    async def read(self, session: Session, sequence: Scorable, *, top: int, name: str) -> Reading:
        """Not in this API."""
        raise EngineError("llama.cpp's server only answers; score with vllm, sglang or here")

    async def _letter(self, session: Session) -> int:
        return await session.post("/tokenize", {"content": "a"}, lambda got: got["tokens"][-1])

    async def _logp(
        self, session: Session, before: Sequence[int], token: int, letter: int, name: str
    ) -> float:
        """Of `token` after `before`, from the report of a letter that is pushed in its place.

        The report is of the logits before that push.
        """
        for count in (FEW, self.vocab_size):
            body = self._body(
                before, n_predict=1, temperature=0.0, seed=0, n_probs=count,
                logit_bias=[[letter, PUSH]], cache_prompt=True,
            )  # fmt: skip
            found = await session.post(ROUTE, body, _first_report, about=name)
            if token in found:
                return found[token]
        raise EngineError(f"{name}: the server gives no log-probability of token {token}")

    def _body(self, prompt: Sequence[int], **settings: Any) -> dict[str, Any]:
        return {
            "model": self.model, "prompt": list(prompt), "samplers": ["temperature"],
            "post_sampling_probs": False, "ignore_eos": False, "stop": [], "stream": False,
            "dynatemp_range": 0.0, "mirostat": 0, "n_keep": 0, **settings,
        }  # fmt: skip


@dataclass(frozen=True)
class _Answer:
    ids: list[int]
    logps: list[float | None]
    """None where the server reports none."""
    read: int
    truncated: bool
    ended: bool


def _answer(got: Mapping[str, Any]) -> _Answer:
    ids = [int(token) for token in got["tokens"]]
    reports = [(int(one["id"]), float(one["logprob"])) for one in got["completion_probabilities"]]
    return _Answer(
        ids=ids,
        logps=_aligned(ids, reports),
        read=got["tokens_evaluated"],
        truncated=got["truncated"],
        ended=got["stop_type"] == "eos",
    )


def _first_report(got: Mapping[str, Any]) -> dict[int, float]:
    entries = got["completion_probabilities"][0]["top_logprobs"]
    return {int(entry["id"]): float(entry["logprob"]) for entry in entries}


def _aligned(ids: Sequence[int], reported: Sequence[tuple[int, float]]) -> list[float | None]:
    """A report for each token; None where there is none, or where it may be another token's.

    Reports are in order and some tokens have none. Fitted in from the front each stands as early as
    it can, from the back as late: where both agree there is no other place for it. With equal ids
    inside neighbouring characters (two emoji) they do not.
    """
    reports = [token for token, _ in reported]
    early = _places(ids, reports)
    late = [len(ids) - 1 - place for place in _places(ids[::-1], reports[::-1])][::-1]
    found: list[float | None] = [None] * len(ids)
    for first, last, (_, logp) in zip(early, late, reported, strict=True):
        if first == last:
            found[first] = logp
    return found


def _places(ids: Sequence[int], reports: Sequence[int]) -> list[int]:
    """Where each report stands when each is put as early as it can be. ValueError: nowhere."""
    found: list[int] = []
    for token in reports:
        found.append(ids.index(token, found[-1] + 1 if found else 0))
    return found
