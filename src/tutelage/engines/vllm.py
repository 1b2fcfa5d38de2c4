"""The engine `vllm`: a model run by vLLM in this process, for GPUs and NPUs. Answers and top-k.

Checked on vLLM's CPU build; not on an accelerator. Log-probabilities are of the raw model at
temperature 1 (`logprobs_mode`), whatever temperature draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import vllm  # type: ignore[import-not-found]
from transformers import PreTrainedTokenizerBase

from tutelage.core.artifact import Artifact
from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.readings import (
    Reading,
    called,
    check_scorable,
    checked_completion,
    checked_logps,
    checked_targets,
    head_size,
    request_seed,
    room,
)
from tutelage.models.load import directory_of, load_tokenizer
from tutelage.recipe.engines import Vllm
from tutelage.targets.schema import TokenTargets

if TYPE_CHECKING:
    from tutelage.engines.base import Estimator

OnTokens = Callable[[int], None]
QUOTED_CHARACTERS = 300


@dataclass(frozen=True)
class VllmEngine:
    """See `base.Engine`; also its own `Sampler` and `Scorer`, for vLLM batches by itself."""

    table: Vllm
    llm: Any
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    name: str = "vllm"

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.llm.llm_engine.model_config.get_vocab_size()

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together."""
        return self.llm.llm_engine.model_config.max_model_len

    @property
    def dtype(self) -> str:
        """Of its weights."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def sampler(self, *, batch_rows: int) -> VllmEngine:
        """What answers; how many at a time is vLLM's to say."""
        return self

    def scorer(self, *, chunk_bytes: int) -> VllmEngine:
        """What reads."""
        return self

    def close(self) -> None:
        """Stop vLLM's own process, which holds the device's memory."""
        stop = getattr(self.llm.llm_engine.engine_core, "shutdown", None)
        if stop is not None:
            stop()

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int],
        on_tokens: OnTokens,
    ) -> list[Completion]:  # fmt: skip
        """See `Sampler.sample`. Raises EngineError naming the prompt by its key."""
        names = [f"prompt {key}" for key in keys]
        mine = [
            replace(params, max_tokens=room(params, prompt, self.context, name))
            for prompt, name in zip(prompts, names, strict=True)
        ]
        asked = [
            vllm.SamplingParams(
                max_tokens=each.max_tokens, temperature=each.temperature,
                seed=request_seed(params, key, bits=63), stop_token_ids=list(each.stop_ids),
                ignore_eos=True, logprobs=0, detokenize=False,
            )
            for each, key in zip(mine, keys, strict=True)
        ]  # fmt: skip
        done = []
        for answer, each, name in zip(self._run(prompts, asked), mine, names, strict=True):
            [output] = answer.outputs
            ids = list(output.token_ids)
            logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
            done.append(checked_completion(ids, logps, each, vocab_size=self.vocab_size, name=name))
            on_tokens(len(done[-1].response_ids))
        return done

    def score(
        self, sequences: Sequence[Scorable], *, estimator: Estimator, seed: int,
        keys: Sequence[int], on_tokens: OnTokens,
    ) -> list[TokenTargets]:  # fmt: skip
        """See `Scorer.score`. Raises EngineError, naming the row where it is one's."""
        head = head_size(estimator, top=self.table.top, engine=self.name)
        targets = []
        for place, (sequence, reading) in enumerate(self._readings(sequences, head)):
            name = called(sequence, place)
            made = checked_targets(
                sequence, reading, head=head, vocab_size=self.vocab_size, name=name
            )
            targets.append(made)
            on_tokens(len(sequence.response_ids))
        return targets

    def label_logps(
        self, sequences: Sequence[Scorable], *, on_tokens: OnTokens
    ) -> list[np.ndarray]:
        """See `Scorer.label_logps`. Raises EngineError, naming the row where it is one's."""
        logps = []
        for place, (sequence, reading) in enumerate(self._readings(sequences, 0)):
            name = called(sequence, place)
            logps.append(checked_logps(sequence, reading, vocab_size=self.vocab_size, name=name))
            on_tokens(len(sequence.response_ids))
        return logps

    def _readings(
        self, sequences: Sequence[Scorable], top: int
    ) -> Sequence[tuple[Scorable, Reading]]:
        for place, sequence in enumerate(sequences):
            check_scorable(sequence, place, self.context)
        narrow = not top and _reads_chosen_ids(self.llm)
        asked = [
            vllm.SamplingParams(
                max_tokens=1, temperature=1.0, seed=0, ignore_eos=True, detokenize=False,
                **(_chosen_ids(sequence) if narrow else {"prompt_logprobs": top}),
            )
            for sequence in sequences
        ]  # fmt: skip
        whole = [[*each.prompt_ids, *each.response_ids] for each in sequences]
        read = _chosen_reading if narrow else _reading
        done = self._run(whole, asked)
        return [(each, read(answer, each)) for each, answer in zip(sequences, done, strict=True)]

    def _run(self, prompts: Sequence[Sequence[int]], asked: Sequence[Any]) -> Sequence[Any]:
        given = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts]
        try:
            return self.llm.generate(given, list(asked), use_tqdm=False)
        except Exception as error:  # vLLM's own, a driver's or a dead process's: all end the step
            raise EngineError(
                f"vLLM cannot go on: {_line(error)}; finished shards are kept: run again, with "
                "a smaller memory_share or max_length where memory was short"
            ) from error


def open_engine(artifact: Artifact, table: Vllm, *, device: str) -> VllmEngine:
    """Load the artifact's model into vLLM, which finds its device by itself.

    Raises EngineError when vLLM cannot, ModelError for a tokenizer that cannot be loaded.
    """
    directory = directory_of(artifact)
    tokenizer = load_tokenizer(directory)
    settings: dict[str, Any] = {
        "dtype": table.dtype,
        "tensor_parallel_size": table.tensor_parallel,
        "gpu_memory_utilization": table.memory_share,
        "max_logprobs": table.top,
        "logprobs_mode": "raw_logprobs",
        # Not the model's generation_config.json: temperature and stop tokens are the recipe's.
        "generation_config": "vllm",
        "seed": 0,
    }
    if table.max_length:
        settings["max_model_len"] = table.max_length
    try:
        llm = vllm.LLM(str(directory), **{**settings, **table.options})
    except Exception as error:  # a driver, memory, an option that it has not: all end the step
        raise EngineError(f"vLLM cannot load {directory}: {_line(error)}") from error
    return VllmEngine(table, llm, tokenizer, directory)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:QUOTED_CHARACTERS] or type(error).__name__


def _reads_chosen_ids(llm: Any) -> bool:
    """Whether this version can say log-probabilities of chosen ids of a prompt, and of no others.

    `prompt_logprob_token_ids` needs vLLM's second model runner. It saves sorting the vocabulary at
    each position; of no use for a top-k, whose ids are not known before. That runner needs a GPU:
    not verified here beyond the shapes its documentation gives.
    """
    known = getattr(vllm.SamplingParams, "__struct_fields__", ())
    runner = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False)
    return "prompt_logprob_token_ids" in known and bool(runner)


def _chosen_ids(sequence: Scorable) -> dict[str, Any]:
    return {
        "prompt_logprob_token_ids": np.asarray(sequence.response_ids)[:, None],
        "prompt_logprob_start": len(sequence.prompt_ids) - 1,
    }


def _chosen_reading(answer: Any, sequence: Scorable) -> Reading:
    rows = np.asarray(answer.prompt_token_id_logprobs, float).reshape(-1)
    return Reading(rows.tolist(), [])


def _reading(answer: Any, sequence: Scorable) -> Reading:
    found = [
        {token: entry.logprob for token, entry in position.items()}
        for position in answer.prompt_logprobs[-len(sequence.response_ids) :]
    ]
    labels = [at[token] for at, token in zip(found, sequence.response_ids, strict=True)]
    return Reading(labels, found)
