"""The engine `server`: a model behind HTTP. Only its tokenizer and config are here.

Owns the handshake (which model, how long a context, the same token ids) and turns batches into
requests. How a server is asked is in `served_<api>.py`; retries and the key are in `http.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tutelage.core.artifact import Artifact
from tutelage.core.errors import EngineError
from tutelage.core.progress import Reporter
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.http import Http, Session
from tutelage.engines.readings import (
    Reading,
    called,
    check_scorable,
    checked_logps,
    checked_targets,
    head_size,
    room,
)
from tutelage.engines.served import Api
from tutelage.engines.served_llamacpp import LlamaCppApi
from tutelage.engines.served_sglang import SglangApi
from tutelage.engines.served_vllm import VllmApi
from tutelage.models.inspect import read_config
from tutelage.models.load import directory_of, load_tokenizer
from tutelage.recipe.engines import Server
from tutelage.targets.schema import TokenTargets

if TYPE_CHECKING:
    from tutelage.engines.base import Estimator

APIS: Mapping[str, Callable[[str, int], Api]] = {
    "vllm": VllmApi, "sglang": SglangApi, "llama.cpp": LlamaCppApi,
}  # fmt: skip
SPREAD_IDS = 16
"""Ids compared, evenly over the vocabulary, so the last one too; and as many added tokens."""
UNREADABLE = "\ufffd"
"""Part of a character: servers write it in different ways."""
OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class ServerEngine:
    """See `base.Engine`; also its own `Sampler` and `Scorer`, for both are requests."""

    table: Server
    http: Http
    api: Api
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    vocab_size: int
    context: int | None
    name: str = "server"
    dtype: str = "unknown"

    def sampler(self, *, batch_rows: int) -> ServerEngine:
        """What answers; the table's `concurrency` says how many at a time."""
        return self

    def scorer(self, *, chunk_bytes: int) -> ServerEngine:
        """What reads. Raises EngineError for llama.cpp's, which only answers."""
        if not self.table.scores:
            raise EngineError(
                "llama.cpp's server only answers; score with api = 'vllm' or 'sglang', or here"
            )
        return self

    def close(self) -> None:
        """Nothing is held between two batches."""

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int],
        on_tokens: OnTokens,
    ) -> list[Completion]:  # fmt: skip
        """See `Sampler.sample`. Raises EngineError naming the prompt by its key."""

        def job(prompt: Sequence[int], key: int) -> Callable[[Session], Awaitable[Completion]]:
            name = f"prompt {key}"
            most = room(params, prompt, self.context, name)

            async def ask(session: Session) -> Completion:
                mine = replace(params, max_tokens=most)
                done = await self.api.complete(session, list(prompt), mine, key=key, name=name)
                on_tokens(len(done.response_ids))
                return done

            return ask

        return self.http.run([job(*pair) for pair in zip(prompts, keys, strict=True)])

    def score(
        self, sequences: Sequence[Scorable], *, estimator: Estimator, seed: int,
        keys: Sequence[int], on_tokens: OnTokens,
    ) -> list[TokenTargets]:  # fmt: skip
        """See `Scorer.score`. Raises EngineError, naming the row where it is one's."""
        head = head_size(estimator, top=self.table.top, engine=self.name)

        def targets(sequence: Scorable, reading: Reading, name: str) -> TokenTargets:
            return checked_targets(
                sequence, reading, head=head, vocab_size=self.vocab_size, name=name
            )

        return self._read(sequences, head, targets, on_tokens)

    def label_logps(
        self, sequences: Sequence[Scorable], *, on_tokens: OnTokens
    ) -> list[np.ndarray]:
        """See `Scorer.label_logps`. Raises EngineError, naming the row where it is one's."""

        def logps(sequence: Scorable, reading: Reading, name: str) -> np.ndarray:
            return checked_logps(sequence, reading, vocab_size=self.vocab_size, name=name)

        return self._read(sequences, 0, logps, on_tokens)

    def _read(
        self, sequences: Sequence[Scorable], top: int,
        make: Callable[[Scorable, Reading, str], Any], on_tokens: OnTokens,
    ) -> list[Any]:  # fmt: skip
        def job(place: int, sequence: Scorable) -> Callable[[Session], Awaitable[Any]]:
            check_scorable(sequence, place, self.context)

            async def ask(session: Session) -> Any:
                name = called(sequence, place)
                reading = await self.api.read(session, sequence, top=top, name=name)
                made = make(sequence, reading, name)
                on_tokens(len(sequence.response_ids))
                return made

            return ask

        return self.http.run([job(*pair) for pair in enumerate(sequences)])


def open_engine(artifact: Artifact, table: Server, *, device: str) -> ServerEngine:
    """Load the tokenizer here and shake hands with the server.

    Raises EngineError when it does not answer, serves another model, or has another tokenizer;
    ModelError when the tokenizer cannot be loaded.
    """
    directory = directory_of(artifact)
    config = read_config(directory)
    text = config.get("text_config", config)
    tokenizer = load_tokenizer(directory)
    http = Http(table, say=Reporter().say)
    [(model, context)] = http.run([lambda session: _served(session, table)])
    api = APIS[table.api](model, text["vocab_size"])
    ids = _spread(tokenizer)
    [theirs] = http.run([lambda session: api.texts(session, ids)])
    _check_tokenizer(tokenizer, ids, theirs, http.url)
    return ServerEngine(
        table=table, http=http, api=api, tokenizer=tokenizer, directory=directory,
        vocab_size=text["vocab_size"], context=context or text.get("max_position_embeddings"),
    )  # fmt: skip


async def _served(session: Session, table: Server) -> tuple[str, int | None]:
    """(the name of the model to ask for, its context). Raises EngineError."""
    found = await session.get("/v1/models", _contexts)
    if table.model in found:
        return table.model, found[table.model]
    names = ", ".join(list(found)[:8])
    if table.model:
        raise EngineError(f"{table.url} serves no model {table.model!r}; it has {names}")
    if len(found) > 1:
        raise EngineError(f"{table.url} serves {names}; name one as model in [engines.*]")
    return next(iter(found.items()))


def _contexts(got: Mapping[str, Any]) -> dict[str, int | None]:
    """Context by model. vLLM and SGLang call it max_model_len, llama.cpp n_ctx."""
    found = {
        entry["id"]: entry.get("max_model_len") or (entry.get("meta") or {}).get("n_ctx")
        for entry in got["data"]
    }
    if not found:
        raise ValueError("no model is served")
    return found


def _spread(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    evenly = np.linspace(0, len(tokenizer) - 1, SPREAD_IDS).astype(int).tolist()
    return sorted({*evenly, *sorted(tokenizer.added_tokens_decoder)[-SPREAD_IDS:]})


def _check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], theirs: Sequence[str], url: str
) -> None:
    """Raises EngineError naming the first id that the server reads as another text.

    Without surrounding spaces, which some servers drop, and without parts of characters.
    """
    for token, there in zip(ids, theirs, strict=True):
        here = str(tokenizer.decode([token], skip_special_tokens=False))
        readable = UNREADABLE not in here and UNREADABLE not in there
        if readable and here.strip() != there.strip():
            raise EngineError(
                f"{url} has another tokenizer: id {token} is {here!r} here and {there!r} there; "
                "serve the model whose tokenizer the models table names"
            )
