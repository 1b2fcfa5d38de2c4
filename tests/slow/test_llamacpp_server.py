"""A real llama.cpp server answers for the bundled model, exported as f16 and as q8_0."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutelage.core.artifact import Artifact
from tutelage.core.errors import EngineError
from tutelage.engines import server, transformers
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.server import ServerEngine
from tutelage.export.gguf import GgufMetadata, write_gguf
from tutelage.recipe.engines import Server, Transformers
from tutelage.text.chat import ChatFormat

pytestmark = pytest.mark.slow
xllamacpp: Any = pytest.importorskip("xllamacpp")

QUESTIONS = [
    "What is the capital of France?", "Say hi.", "List two fruits.", "你好吗？请用中文回答。",
    "Reply with three emoji.", "What is 2 + 2?", "Name a colour.", "Is water wet?",
]  # fmt: skip
BARS = {"f16": 0.05, "q8_0": 0.5}
"""Nats, the largest of all tokens: f16 keeps its cache in f16 as well."""


@dataclass(frozen=True)
class Served:
    kind: str
    engine: ServerEngine


@pytest.fixture(scope="module")
def artifact(smol_dir: Path) -> Artifact:
    return Artifact(smol_dir, {"stage": "external", "fingerprint": "smol", "identity": {}})


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def served(
    request: pytest.FixtureRequest,
    smol_dir: Path,
    artifact: Artifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    metadata = GgufMetadata("SmolLM2 135M Instruct", "Apache-2.0")
    write_gguf(smol_dir, path, kind=request.param, metadata=metadata)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 1024
    params.n_parallel = 2
    params.verbosity = -1
    params.fit_params = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    running = xllamacpp.Server(params)
    table = Server(kind="server", api="llama.cpp", url=running.listening_address, concurrency=2)
    yield Served(request.param, server.open_engine(artifact, table, device="cpu"))
    del running


@pytest.fixture(scope="module")
def chat(served: Served) -> ChatFormat:
    return ChatFormat.from_tokenizer(served.engine.tokenizer)


@pytest.fixture(scope="module")
def prompts(chat: ChatFormat) -> list[list[int]]:
    return [chat.prompt_ids([{"role": "user", "content": q}], "fast") for q in QUESTIONS]


@pytest.fixture(scope="module")
def answers(served: Served, prompts: list[list[int]], chat: ChatFormat) -> list[Completion]:
    params = SamplingParams(32, 0.7, 5, chat.stop_ids)
    keys = range(len(prompts))
    return served.engine.sample(prompts, params, keys=keys, on_tokens=lambda number: None)


def test_log_probabilities_of_answers_are_the_models_at_temperature_1(
    served: Served, artifact: Artifact, prompts: list[list[int]], answers: list[Completion]
) -> None:
    here = transformers.open_engine(artifact, Transformers(dtype="float32"), device="cpu")
    sequences = [Scorable(p, a.response_ids) for p, a in zip(prompts, answers, strict=True)]
    expected = here.scorer(chunk_bytes=2**26).label_logps(sequences, on_tokens=lambda number: None)
    gaps = np.abs(np.concatenate([a.logps for a in answers]) - np.concatenate(expected))
    print(f"{served.kind}: max {gaps.max():.2g}, mean {gaps.mean():.2g}, {len(gaps)} tokens")
    assert gaps.max() < BARS[served.kind]


def test_an_answer_that_ends_holds_its_stop_token(
    answers: list[Completion], chat: ChatFormat
) -> None:
    ends = [answer.response_ids[-1] in chat.stop_ids for answer in answers]
    assert ends == [answer.finish_reason == "stop" for answer in answers]
    assert any(ends)


def test_some_answers_have_tokens_that_end_inside_a_character(
    answers: list[Completion], served: Served
) -> None:
    """Of those the server itself reports nothing: the test above saw that path."""
    read = served.engine.tokenizer.decode
    assert any("\ufffd" in str(read([t])) for answer in answers for t in answer.response_ids)


def test_a_seed_and_a_key_give_the_same_answer(
    served: Served, prompts: list[list[int]], answers: list[Completion], chat: ChatFormat
) -> None:
    params = SamplingParams(32, 0.7, 5, chat.stop_ids)
    again = served.engine.sample(prompts[1::-1], params, keys=[1, 0], on_tokens=lambda number: None)
    assert [a.response_ids for a in again[::-1]] == [a.response_ids for a in answers[:2]]


def test_it_cannot_score(served: Served) -> None:
    with pytest.raises(EngineError, match="only answers"):
        served.engine.scorer(chunk_bytes=1)
