"""The engine `vllm` over a fake of its package, whose answers a real tiny model computes.

The real package is run by tests/slow/test_vllm_server.py, where it can be installed.
"""

import importlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from transformers import AutoModelForCausalLM

from tutelage.core.artifact import Artifact, Site
from tutelage.core.errors import EngineError
from tutelage.engines import transformers
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.engines.opening import opened
from tutelage.recipe.engines import Transformers, Vllm
from tutelage.targets.estimator import Fixed, Threshold

EOS = 318
TOP = 5


@dataclass
class Asked:
    """A fake of `vllm.SamplingParams`: only what the engine may use, so a wrong name raises."""

    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    detokenize: bool
    stop_token_ids: list[int] = field(default_factory=list)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: int | None = None


class Llm:
    """A fake of `vllm.LLM`; `settings` is what it was made with."""

    second_runner = False
    fails: Exception | None = None

    def __init__(self, model: str, **settings: Any) -> None:
        if self.fails:
            raise self.fails
        self.settings, self.asked, self.stopped = settings, [], False
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        config = SimpleNamespace(get_vocab_size=lambda: 320, max_model_len=200, dtype=torch.float32)
        self.llm_engine = SimpleNamespace(
            model_config=config, engine_core=SimpleNamespace(shutdown=self._stop),
            vllm_config=SimpleNamespace(use_v2_model_runner=self.second_runner),
        )  # fmt: skip

    def _stop(self) -> None:
        self.stopped = True

    def logp(self, ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            logits_TV = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        return logits_TV.double().log_softmax(-1).numpy()

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], asked: list[Asked], *, use_tqdm: bool
    ) -> list[SimpleNamespace]:
        if self.fails:
            raise self.fails
        self.asked += asked
        return [
            self._one(each["prompt_token_ids"], one)
            for each, one in zip(prompts, asked, strict=True)
        ]

    def _one(self, prompt: list[int], asked: Asked) -> SimpleNamespace:
        rng, ids, logps = np.random.default_rng(asked.seed), [], []
        while len(ids) < asked.max_tokens and not (ids and ids[-1] in asked.stop_token_ids):
            logp_V = self.logp([*prompt, *ids])[-1]
            ids.append(int((logp_V + asked.temperature * rng.gumbel(size=320)).argmax()))
            logps.append({ids[-1]: SimpleNamespace(logprob=float(logp_V[ids[-1]]))})
        answer = SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), logprobs=logps)])
        if asked.prompt_logprobs is not None:
            rows = zip(self.logp(prompt)[:-1], prompt[1:], strict=True)
            answer.prompt_logprobs = [None, *(
                {int(i): SimpleNamespace(logprob=float(row[i]))
                 for i in {*np.argsort(-row)[: asked.prompt_logprobs], label}}
                for row, label in rows
            )]  # fmt: skip
        if asked.prompt_logprob_token_ids is not None:
            first, wanted = asked.prompt_logprob_start or 0, asked.prompt_logprob_token_ids
            rows_NV = self.logp(prompt)[first:-1]
            assert len(rows_NV) == len(wanted)
            answer.prompt_token_id_logprobs = np.take_along_axis(rows_NV, wanted, axis=1)
        return answer


@pytest.fixture
def engine_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package: Any = types.ModuleType("vllm")
    package.LLM = type("LLM", (Llm,), {})
    package.SamplingParams = type(
        "SamplingParams", (Asked,), {"__struct_fields__": tuple(Asked.__dataclass_fields__)}
    )
    monkeypatch.setitem(sys.modules, "vllm", package)
    sys.modules.pop("tutelage.engines.vllm", None)
    yield importlib.import_module("tutelage.engines.vllm")
    sys.modules.pop("tutelage.engines.vllm", None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = write_model(tmp_path_factory.mktemp("vllm"), layers=1)
    return Artifact(folder, {"stage": "external", "fingerprint": "tiny", "identity": {}})


def ignore(number: int) -> None:
    pass


def table(**settings: Any) -> Vllm:
    return Vllm.model_validate({"kind": "vllm", "top": TOP, **settings})


def sequences() -> list[Scorable]:
    return [
        Scorable([319, 10 + n, 20], [100 + n, 7, 130, EOS][: 2 + n], name=f"answer-{n}")
        for n in range(3)
    ]


@pytest.mark.parametrize("second_runner", [False, True])
def test_what_it_reads_is_what_transformers_reads(
    second_runner: bool, engine_file: Any, artifact: Artifact
) -> None:
    engine_file.vllm.LLM.second_runner = second_runner
    engine = engine_file.open_engine(artifact, table(), device="cpu")
    here = transformers.open_engine(artifact, Transformers(), device="cpu")
    settings = {"estimator": Fixed(TOP, 0), "seed": 0, "keys": range(3)}
    heard: list[int] = []
    found = engine.scorer(chunk_bytes=1).score(sequences(), on_tokens=heard.append, **settings)
    expected = here.scorer(chunk_bytes=2**20).score(sequences(), on_tokens=ignore, **settings)
    alone = engine.scorer(chunk_bytes=1).label_logps(sequences(), on_tokens=ignore)
    assert heard == [2, 3, 4]
    for a, b, labels in zip(found, expected, alone, strict=True):
        assert a.head_ids_M.tolist() == b.head_ids_M.tolist()
        np.testing.assert_allclose(a.head_logq_M, b.head_logq_M, atol=1e-5)
        np.testing.assert_allclose(a.label_logp_N, b.label_logp_N, atol=1e-5)
        np.testing.assert_allclose(labels, b.label_logp_N, atol=1e-5)
    narrow = [one.prompt_logprob_token_ids is not None for one in engine.llm.asked]
    assert narrow == [False] * 3 + [second_runner] * 3


def test_answers_have_log_probabilities_at_temperature_1_and_depend_on_seed_and_key(
    engine_file: Any, artifact: Artifact
) -> None:
    engine = engine_file.open_engine(artifact, table(), device="cpu")
    params = SamplingParams(12, 0.7, 5, (EOS, 30))
    prompts = [[319, 10, 20], [319, 11], [319, 12, 13, 14]]
    answers = engine.sampler(batch_rows=1).sample(prompts, params, keys=[1, 2, 3], on_tokens=ignore)
    again = engine.sample(prompts[::-1], params, keys=[3, 2, 1], on_tokens=ignore)
    assert again[::-1] == answers
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(answer.response_ids)
        rows = engine.llm.logp([*prompt, *ids])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(answer.logps, rows[np.arange(len(ids)), ids], atol=1e-5)
        assert (answer.finish_reason == "stop") == (ids[-1] in params.stop_ids)
    assert all(one.ignore_eos for one in engine.llm.asked)


def test_the_table_reaches_vllm(engine_file: Any, artifact: Artifact) -> None:
    chosen = table(dtype="bfloat16", tensor_parallel=2, memory_share=0.5, max_length=128,
                   options={"enforce_eager": True})  # fmt: skip
    engine = engine_file.open_engine(artifact, chosen, device="cpu")
    assert engine.llm.settings == {
        "dtype": "bfloat16", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5,
        "max_logprobs": TOP, "logprobs_mode": "raw_logprobs", "generation_config": "vllm",
        "seed": 0, "max_model_len": 128, "enforce_eager": True,
    }  # fmt: skip
    assert (engine.name, engine.context, engine.dtype, engine.vocab_size) == (
        "vllm", 200, "float32", 320,
    )  # fmt: skip
    engine.close()
    assert engine.llm.stopped


def test_what_vllm_raises_is_one_line(engine_file: Any, artifact: Artifact) -> None:
    engine = engine_file.open_engine(artifact, table(), device="cpu")
    engine.llm.fails = RuntimeError("out of memory\non device 0")
    with pytest.raises(EngineError, match=r"vLLM cannot go on: out of memory on device 0; fin"):
        engine.label_logps(sequences(), on_tokens=ignore)
    engine_file.vllm.LLM.fails = ValueError("no such\noption")
    with pytest.raises(EngineError, match="vLLM cannot load .*: no such option"):
        engine_file.open_engine(artifact, table(), device="cpu")


def test_another_estimator_than_a_plain_top_k_is_refused(
    engine_file: Any, artifact: Artifact
) -> None:
    engine = engine_file.open_engine(artifact, table(), device="cpu")
    with pytest.raises(EngineError, match="gives the 5 likeliest ids"):
        engine.score(sequences(), estimator=Threshold(0.1), seed=0, keys=[0], on_tokens=ignore)


def test_without_the_package_the_extra_is_named(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    sys.modules.pop("tutelage.engines.vllm", None)
    site = Site(tmp_path, engines={"teacher": table()})
    with (
        pytest.raises(EngineError, match=r"needs vllm.*pip install 'tutelage\[vllm\]'"),
        opened("teacher", {"teacher": artifact}, site),
    ):
        pass
