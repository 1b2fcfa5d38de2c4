"""A GGUF run by llama.cpp inside this process, through the optional package `xllamacpp`.

Owns loading, chat rendering by the file's own template, greedy and sampled completion, and the
numbers a device bench asks for. Knows nothing of the model the file came from. llama.cpp is asked
through its own server, on a free port of the loopback address for as long as the runtime is open.
"""

import http.client
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from tutelage.core.errors import ExportError

Messages = Sequence[Mapping[str, Any]]
QUIET = -1  # llama.cpp's verbosity: errors come back as replies, not as log lines
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Generation:
    """One completion.

    Fields:
        token_ids: with the token that ended the answer, when one did (finish_reason "stop").
        tokens_per_second, prompt_tokens_per_second: writing and reading, by llama.cpp's clock.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    tokens_per_second: float
    prompt_tokens_per_second: float


class EdgeRuntime:
    """A loaded GGUF; use it as a context manager, or `close` it.

    Args:
        threads: 0 takes llama.cpp's own choice.
        context: tokens of prompt and answer together.

    Raises:
        ExportError: the package is missing, or the file does not load.
    """

    def __init__(self, path: Path, *, threads: int = 0, context: int = 4096) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise ExportError(
                'running a GGUF needs xllamacpp: pip install "tutelage[edge]"'
            ) from error
        llama_cpp: Any = xllamacpp  # a compiled module without types
        params = llama_cpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.verbosity = QUIET
        params.fit_params = False  # keep the context asked for
        params.cache_ram_mib = 0  # one prompt at a time: no need to keep 8 GB of old ones
        if threads:
            params.cpuparams.n_threads = threads
            params.cpuparams_batch.n_threads = threads
        try:
            self._server: Any = llama_cpp.Server(params)
        except RuntimeError as error:
            raise ExportError(
                f"llama.cpp cannot load {path}: missing, cut short or unfit"
            ) from error
        self._path = path
        self._host = self._server.listening_address.removeprefix("http://")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and free the model; harmless when done twice."""
        self._server = None  # its destructor joins the server's threads

    def chat(
        self,
        messages: Messages,
        *,
        max_tokens: int,
        thinking: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Answer a conversation, rendered by the file's own template; see `render`, `complete`."""
        prompt = self.render(messages, thinking=thinking)
        return self.complete(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Continue raw text (special tokens are read as such) or ids; temperature 0 is greedy.

        Raises:
            ExportError: the prompt does not fit into the context, or holds unknown ids.
        """
        reply = self._ask(
            "/completion",
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            n_predict=max_tokens,
            temperature=temperature,
            seed=seed,
            samplers=["temperature"],
            return_tokens=True,
            cache_prompt=False,  # a reused cache changes the float noise, and the timing
        )
        timings = reply["timings"]
        return Generation(
            text=reply["content"],
            token_ids=tuple(reply["tokens"]),
            finish_reason="length" if reply["stop_type"] == "limit" else "stop",
            prompt_tokens=reply["tokens_evaluated"],
            tokens_per_second=timings["predicted_per_second"],
            prompt_tokens_per_second=timings["prompt_per_second"],
        )

    def next_logp(self, prompt_ids: Sequence[int], *, vocab_size: int) -> np.ndarray:
        """Log-probabilities [V] of the token after `prompt_ids`, over all ids, in nats.

        Prompts that grow by a token reuse the cache. About 0.3 s for 49,152 tokens.
        """
        # llama.cpp drops the report of a token that ends inside a UTF-8 character, so it is made to
        # pick a letter; the report is of the logits before that push.
        letter = self.tokenize("a")[-1]
        reply = self._ask(
            "/completion",
            prompt=list(prompt_ids),
            n_predict=1,
            temperature=0.0,
            n_probs=vocab_size,
            logit_bias=[[letter, 1e9]],
            cache_prompt=True,
        )
        logp_V = np.full(vocab_size, -math.inf)
        for entry in reply["completion_probabilities"][0]["top_logprobs"]:
            logp_V[entry["id"]] = entry["logprob"]
        return logp_V - np.logaddexp.reduce(logp_V)  # llama.cpp sums in float32: off by up to 1e-4

    def render(self, messages: Messages, *, thinking: bool = False) -> str:
        """The prompt that the file's own chat template makes of `messages`, up to the answer.

        `thinking` always reaches the template as `enable_thinking`, which llama.cpp else sets.
        A message's `thinking` is passed on under llama.cpp's name for it, `reasoning_content`.
        """
        reply = self._ask(
            "/apply-template",
            messages=[_as_openai(message) for message in messages],
            chat_template_kwargs={"enable_thinking": thinking},
        )
        return reply["prompt"]

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Ids of a rendered prompt as the runtime reads it: specials as such, its BOS added."""
        reply = self._ask("/tokenize", content=text, add_special=True, parse_special=True)
        return tuple(reply["tokens"])

    def _ask(self, route: str, **body: Any) -> dict[str, Any]:
        if self._server is None:
            raise ValueError("the runtime is closed")
        connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT_SECONDS)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", route, json.dumps(body).encode(), headers)
            reply = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        if "error" in reply:
            raise ExportError(f"llama.cpp on {self._path.name}: {reply['error']['message']}")
        return reply


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    chain = message.get("thinking")
    known = {"role": message["role"], "content": message["content"]}
    return known | ({"reasoning_content": chain} if chain else {})


def generate(
    path: Path, prompt: str | Messages, *, max_tokens: int, threads: int = 0
) -> Generation:
    """Load a GGUF, answer greedily (text is continued as it is, messages are rendered), close."""
    with EdgeRuntime(path, threads=threads) as runtime:
        if isinstance(prompt, str):
            return runtime.complete(prompt, max_tokens=max_tokens)
        return runtime.chat(prompt, max_tokens=max_tokens)
