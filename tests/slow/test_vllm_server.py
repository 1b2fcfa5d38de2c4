"""A real vLLM server, in its own virtual environment, answers for and reads the bundled model.

`make vllm` makes that environment; TUTELAGE_VLLM_PYTHON names the Python of another one.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from digests import digests

from tutelage.core.artifact import Artifact
from tutelage.core.errors import EngineError
from tutelage.engines import server, transformers
from tutelage.engines.base import Completion, SamplingParams, Scorable
from tutelage.engines.scorer import TransformersScorer
from tutelage.engines.server import ServerEngine
from tutelage.recipe.engines import Server, Transformers
from tutelage.targets.estimator import Fixed
from tutelage.text.chat import ChatFormat

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TUTELAGE_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def _installed() -> bool:
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", FIND]).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _installed(), reason=f"no vLLM at {PYTHON}: make vllm"),
]
START_SECONDS = 240
KEY = "a-key-for-this-test"
TOP = 20
BAR = 0.02
"""Nats; float32 on both sides, measured 4e-5 at most."""
NEAR_TIE = 0.01
QUESTIONS = [
    "What is the capital of France?", "Say hi.", "List two fruits.", "你好吗？", "What is 2 + 2?",
    "Name a colour.", "Who wrote Hamlet?", "Is water wet?", "Write a haiku about the sea.",
    "Translate 'good morning' into German.", "What is a prime number?", "Name three animals.",
    "Why is the sky blue?", "What day comes after Monday?", "Say a word that rhymes with cat.",
    "Give me one sentence about trees.",
]  # fmt: skip


@pytest.fixture(scope="module")
def address(smol_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", smol_dir,
        "--served-model-name", "smol", "--dtype", "float32", "--max-model-len", "1024",
        "--max-num-seqs", "8", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
        "--api-key", KEY,
    ]  # fmt: skip
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=out, stderr=out)
    try:
        _wait(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx2.get(f"{url}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(1)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def artifact(smol_dir: Path) -> Artifact:
    return Artifact(smol_dir, {"stage": "external", "fingerprint": "smol", "identity": {}})


@pytest.fixture(scope="module")
def engine(artifact: Artifact, address: str) -> ServerEngine:
    os.environ["VLLM_TEST_KEY"] = KEY
    table = Server(kind="server", url=address, key_env="VLLM_TEST_KEY", top=TOP, concurrency=8)
    return server.open_engine(artifact, table, device="cpu")


@pytest.fixture(scope="module")
def here(artifact: Artifact) -> transformers.TransformersEngine:
    return transformers.open_engine(artifact, Transformers(dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def chat(engine: ServerEngine) -> ChatFormat:
    return ChatFormat.from_tokenizer(engine.tokenizer)


@pytest.fixture(scope="module")
def prompts(chat: ChatFormat) -> list[list[int]]:
    return [chat.prompt_ids([{"role": "user", "content": q}], "fast") for q in QUESTIONS]


@pytest.fixture(scope="module")
def answers(engine: ServerEngine, prompts: list[list[int]], chat: ChatFormat) -> list[Completion]:
    params = SamplingParams(32, 0.7, 5, chat.stop_ids)
    return engine.sample(prompts, params, keys=range(16), on_tokens=lambda number: None)


@pytest.fixture(scope="module")
def sequences(prompts: list[list[int]], answers: list[Completion]) -> list[Scorable]:
    return [
        Scorable(prompt, answer.response_ids, name=str(place))
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


@pytest.fixture(scope="module")
def expected(here: transformers.TransformersEngine, sequences: list[Scorable]) -> list[np.ndarray]:
    scorer: TransformersScorer = here.scorer(chunk_bytes=2**26)
    return scorer.label_logps(sequences, on_tokens=lambda number: None)


def test_labels_and_heads_are_those_of_transformers(
    engine: ServerEngine,
    here: transformers.TransformersEngine,
    sequences: list[Scorable],
    expected: list[np.ndarray],
) -> None:
    settings = {"estimator": Fixed(TOP, 0), "seed": 0, "keys": range(16)}
    seen: list[int] = []
    there = engine.score(sequences, **settings, on_tokens=seen.append)
    ours = here.scorer(chunk_bytes=2**26).score(
        sequences, **settings, on_tokens=lambda number: None
    )
    assert sum(seen) == sum(map(len, expected))
    gaps = np.concatenate(
        [np.abs(a.label_logp_N - b) for a, b in zip(there, expected, strict=True)]
    )
    print(
        f"label log-probability: max {gaps.max():.2g}, mean {gaps.mean():.2g}, {len(gaps)} tokens"
    )
    assert gaps.max() < BAR
    same = np.concatenate([a.head_ids_M == b.head_ids_M for a, b in zip(there, ours, strict=True)])
    print(f"ids of the head at the same rank: {same.mean():.5f}")
    assert same.mean() > 0.99
    for a, b in zip(there, ours, strict=True):
        np.testing.assert_allclose(a.head_logq_M, b.head_logq_M, atol=BAR)
        assert (a.entropy_N <= b.entropy_N + 1e-3).all()  # the rest as one bucket: a lower bound


def test_label_logps_alone_are_those_of_transformers(
    engine: ServerEngine, sequences: list[Scorable], expected: list[np.ndarray]
) -> None:
    alone = engine.label_logps(sequences, on_tokens=lambda number: None)
    np.testing.assert_allclose(np.concatenate(alone), np.concatenate(expected), atol=BAR)


def test_sampled_log_probabilities_are_of_the_model_at_temperature_1(
    answers: list[Completion], expected: list[np.ndarray]
) -> None:
    sampled = np.concatenate([answer.logps for answer in answers])
    gaps = np.abs(sampled - np.concatenate(expected))
    print(f"sampled log-probability: max {gaps.max():.2g}, mean {gaps.mean():.2g}")
    assert gaps.max() < BAR


def test_an_answer_that_ends_holds_its_stop_token(
    answers: list[Completion], chat: ChatFormat
) -> None:
    ends = [answer.response_ids[-1] in chat.stop_ids for answer in answers]
    assert ends == [answer.finish_reason == "stop" for answer in answers]
    assert any(ends)
    assert not all(ends)
    assert all(set(chat.stop_ids).isdisjoint(a.response_ids[:-1]) for a in answers)


def test_a_seed_and_a_key_give_the_same_answer_in_any_batch(
    engine: ServerEngine, prompts: list[list[int]], answers: list[Completion], chat: ChatFormat
) -> None:
    params = SamplingParams(32, 0.7, 5, chat.stop_ids)
    again = engine.sample(prompts[3::-1], params, keys=[3, 2, 1, 0], on_tokens=lambda number: None)
    assert [a.response_ids for a in again[::-1]] == [a.response_ids for a in answers[:4]]
    other = engine.sample(prompts[:4], params, keys=range(4, 8), on_tokens=lambda number: None)
    assert [a.response_ids for a in other] != [a.response_ids for a in answers[:4]]


def test_greedy_answers_are_those_of_transformers_but_for_near_ties(
    engine: ServerEngine,
    here: transformers.TransformersEngine,
    prompts: list[list[int]],
    chat: ChatFormat,
) -> None:
    params = SamplingParams(24, 0.0, 0, chat.stop_ids)
    there = engine.sample(prompts, params, keys=range(16), on_tokens=lambda number: None)
    ours = here.sampler(batch_rows=8).sample(
        prompts, params, keys=range(16), on_tokens=lambda number: None
    )
    differing = 0
    for a, b in zip(there, ours, strict=True):
        pairs = zip(a.response_ids, b.response_ids, a.logps, b.logps, strict=False)
        gap = next((abs(x - y) for i, j, x, y in pairs if i != j), None)
        differing += gap is not None
        assert gap is None or gap < NEAR_TIE
    print(f"greedy answers that differ at a near-tie: {differing} of {len(there)}")


def test_more_log_probabilities_than_the_server_gives_are_said_to_be_too_many(
    artifact: Artifact, address: str, sequences: list[Scorable], engine: ServerEngine
) -> None:
    table = Server(kind="server", url=address, key_env="VLLM_TEST_KEY", top=TOP + 1)
    greedy = server.open_engine(artifact, table, device="cpu")
    with pytest.raises(EngineError, match="greater than max allowed: 20"):
        greedy.score(
            sequences[:1], estimator=Fixed(TOP + 1, 0), seed=0, keys=[0],
            on_tokens=lambda number: None,
        )  # fmt: skip


def test_another_models_tokenizer_is_found_out(address: str, model_folder: Path) -> None:
    tiny = Artifact(model_folder, {"stage": "external", "fingerprint": "tiny", "identity": {}})
    table = Server(kind="server", url=address, key_env="VLLM_TEST_KEY")
    with pytest.raises(EngineError, match=r"another tokenizer: id \d+ is"):
        server.open_engine(tiny, table, device="cpu")


RECIPE = """
name = "tiny"
seed = 3
[models.teacher]
source = "bundled:smollm2-135m-instruct"
[engines.teacher]
kind = "server"
url = "{url}"
key_env = "VLLM_TEST_KEY"
concurrency = 1
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts" }}]
limit = 16
[steps.rollouts]
stage = "rollout"
model = "teacher"
prompts = "prompts"
mode = "fast"
max_tokens = 12
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
shard_rows = 1
"""


def _started(recipe: Path, store: Path, *words: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "tutelage", "run", recipe, "--store", store, *words,
        "--set", "runtime.threads=1",
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def _ended(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, said
    return said


def test_two_ray_workers_score_through_it_and_one_is_killed_the_bytes_are_those_of_one_process(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("VLLM_TEST_KEY", KEY)
    recipe, alone, fleet = tmp_path / "r.toml", tmp_path / "alone", tmp_path / "fleet"
    recipe.write_text(RECIPE.format(url=address))
    _ended(_started(recipe, alone, "--until", "rollouts"))
    shutil.copytree(alone, fleet)
    _ended(_started(recipe, alone))
    process = _started(
        recipe, fleet, "--set", "runtime.executor=ray", "--set", "runtime.ray.actors=2"
    )
    end = time.monotonic() + START_SECONDS
    workers: list[psutil.Process] = []
    while time.monotonic() < end and process.poll() is None:
        if list(fleet.glob("artifacts/score/*.partial/part-*.parquet")):
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [p for p in children if "ray::Worker.make" in " ".join(p.cmdline()[:1])]
            if workers:
                workers[0].kill()
                break
        time.sleep(0.02)
    said = _ended(process)
    assert workers, said
    assert "was lost at part-" in said
    assert "2 actors on 1 node" in said
    assert digests(fleet) == digests(alone)
    assert KEY not in said
    assert not [p for p in tmp_path.rglob("*.json") if KEY in p.read_text()]
