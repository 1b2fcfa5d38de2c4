"""The engine `server` against a fake of each API over a real tiny model, and against its faults."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_server import CONTEXT, ModelServer, Reply
from tiny import write_model

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import EngineError
from tutelage.core.progress import Reporter
from tutelage.engines import http, server, transformers
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.engines.served_llamacpp import _aligned
from tutelage.engines.server import ServerEngine
from tutelage.recipe.engines import Server, Transformers
from tutelage.recipe.tables import Score
from tutelage.records import ROLLOUTS, write_rows
from tutelage.stages import score
from tutelage.targets.estimator import Fixed, Threshold

EOS = 303
VLLM, SGLANG, LLAMACPP = "/v1/completions", "/generate", "/completion"
ROUTES = {"vllm": VLLM, "sglang": SGLANG, "llama.cpp": LLAMACPP}
KEY = "sk-very-secret-key"
TOP = 5
PROMPTS = [[319, 10, 20, 30], [319, 40, 50], [319, 60, 70, 80, 90]]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"), layers=1)


@pytest.fixture
def running(folder: Path) -> Iterator[ModelServer]:
    running = ModelServer(folder)
    yield running
    running.close()


Open = Callable[..., ServerEngine]


@pytest.fixture
def opened(folder: Path, running: ModelServer) -> Open:
    def make(**settings: Any) -> ServerEngine:
        table = {"kind": "server", "url": running.url, "top": TOP, "retries": 2, **settings}
        return server.open_engine(artifact(folder), Server.model_validate(table), device="cpu")

    return make


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, {"stage": "external", "fingerprint": "tiny", "identity": {}})


def params(**changes: Any) -> SamplingParams:
    given = {"max_tokens": 8, "temperature": 0.7, "seed": 5, "stop_ids": (EOS,), **changes}
    return SamplingParams(**given)


def sequences() -> list[Scorable]:
    return [
        Scorable(prompt, [100 + place, 7, 130, EOS], name=f"answer-{place}")
        for place, prompt in enumerate(PROMPTS)
    ]


def ignore(number: int) -> None:
    pass


def read(engine: ServerEngine, **settings: Any) -> Any:
    settings = {"estimator": Fixed(TOP, 0), "seed": 0, "keys": range(3), **settings}
    return engine.scorer(chunk_bytes=1).score(sequences(), on_tokens=ignore, **settings)


def always(status: int, content: Any, on: str = VLLM, **headers: str) -> Any:
    def fault(route: str, body: Any, count: int) -> Reply | None:
        return (status, content, headers) if route == on else None

    return fault


# What it gives


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_targets_are_those_of_transformers(api: str, opened: Open, folder: Path) -> None:
    here = transformers.open_engine(artifact(folder), Transformers(), device="cpu")
    settings = {"estimator": Fixed(TOP, 0), "seed": 0, "keys": range(3)}
    expected = here.scorer(chunk_bytes=2**20).score(sequences(), on_tokens=ignore, **settings)
    heard: list[int] = []
    engine = opened(api=api)
    found = engine.score(sequences(), on_tokens=heard.append, **settings)
    alone = engine.label_logps(sequences(), on_tokens=ignore)
    assert heard == [4, 4, 4]
    for a, b, labels in zip(found, expected, alone, strict=True):
        assert a.head_ids_M.tolist() == b.head_ids_M.tolist()
        assert a.head_counts_N.tolist() == [TOP] * 4
        np.testing.assert_allclose(a.head_logq_M, b.head_logq_M, atol=1e-5)
        np.testing.assert_allclose(a.label_logp_N, b.label_logp_N, atol=1e-5)
        np.testing.assert_allclose(labels, b.label_logp_N, atol=1e-5)
        q_NK = np.exp(a.head_logq_M.reshape(4, TOP).astype(float))
        rest_N = 1 - q_NK.sum(1)
        entropy_N = -(q_NK * np.log(q_NK)).sum(1) - rest_N * np.log(rest_N)
        np.testing.assert_allclose(a.entropy_N, entropy_N, rtol=1e-4)
        assert (a.tau, len(a.tail_ids_T)) == (None, 0)


@pytest.mark.parametrize("api", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_of_an_answer_are_at_temperature_1(
    api: str, temperature: float, opened: Open, folder: Path
) -> None:
    answers = opened(api=api).sample(
        PROMPTS, params(temperature=temperature), keys=[7, 8, 9], on_tokens=ignore
    )
    here = transformers.open_engine(artifact(folder), Transformers(), device="cpu")
    read = [Scorable(p, a.response_ids) for p, a in zip(PROMPTS, answers, strict=True)]
    expected = here.scorer(chunk_bytes=2**20).label_logps(read, on_tokens=ignore)
    for answer, logps in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.logps, logps, atol=1e-5)


@pytest.mark.parametrize("api", ["vllm", "sglang", "llama.cpp"])
def test_an_answer_holds_the_token_that_ended_it(
    api: str, opened: Open, running: ModelServer
) -> None:
    bias = np.zeros(320)
    bias[EOS] = 6.0
    plain = running.logp
    running.logp = lambda ids: (
        plain(ids) + bias - np.logaddexp.reduce(plain(ids) + bias, -1)[:, None]
    )  # type: ignore[method-assign]
    for running.old_llamacpp in (False, True):
        answers = opened(api=api).sample(
            PROMPTS, params(max_tokens=99), keys=[1, 2, 3], on_tokens=ignore
        )
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.finish_reason == "stop"
            assert answer.response_ids.index(EOS) == len(answer.response_ids) - 1
            logp_V = running.logp([*prompt, *answer.response_ids[:-1]])[-1]
            assert answer.logps[-1] == pytest.approx(logp_V[EOS], abs=1e-6)


def test_what_a_server_writes_behind_a_stop_token_of_the_recipe_is_cut(opened: Open) -> None:
    """llama.cpp stops at its file's own tokens only."""
    engine = opened(api="llama.cpp")
    [whole] = engine.sample(PROMPTS[:1], params(), keys=[1], on_tokens=ignore)
    stop = whole.response_ids[3]
    [cut] = engine.sample(PROMPTS[:1], params(stop_ids=(EOS, stop)), keys=[1], on_tokens=ignore)
    first = whole.response_ids.index(stop)
    assert cut.response_ids == whole.response_ids[: first + 1]
    assert (len(cut.logps), cut.finish_reason) == (first + 1, "stop")


def test_a_report_that_may_be_another_tokens_is_asked_for_again() -> None:
    """Two emoji of three tokens each: only the last one of a character is reported."""
    assert _aligned([5, 1, 9, 9, 2, 7], [(5, -1.0), (9, -2.0), (7, -3.0)]) == [
        -1.0, None, None, None, None, -3.0,
    ]  # fmt: skip
    assert _aligned([5, 1, 9, 2], [(5, -1.0), (9, -2.0)]) == [-1.0, None, -2.0, None]
    with pytest.raises(ValueError, match="not in list"):
        _aligned([5, 1], [(1, -1.0), (5, -2.0)])


@pytest.mark.parametrize("api", ["vllm", "sglang", "llama.cpp"])
def test_every_sampling_default_is_said(api: str, opened: Open, running: ModelServer) -> None:
    opened(api=api).sample(PROMPTS[:1], params(), keys=[1], on_tokens=ignore)
    body = next(b for b in running.bodies(ROUTES[api]) if "max_tokens" in b or "n_predict" in b
                or b["sampling_params"]["max_new_tokens"] == 8)  # fmt: skip
    if api == "llama.cpp":
        assert body["samplers"] == ["temperature"]
        return
    said = body.get("sampling_params", body)
    assert said["top_p"] == said["repetition_penalty"] == 1
    assert said["min_p"] == said["presence_penalty"] == said["frequency_penalty"] == 0
    assert said["top_k"] in (0, -1)
    assert said["ignore_eos"] is True
    assert said["stop_token_ids"] == [EOS]


def test_the_seed_of_a_request_comes_from_seed_and_key_alone_and_a_retry_has_the_same(
    opened: Open, running: ModelServer
) -> None:
    engine = opened()
    running.fault = lambda route, body, count: (
        (503, {}, {}) if route == VLLM and count == 1 else None
    )
    engine.sample(PROMPTS[:1], params(), keys=[1], on_tokens=ignore)
    first, again = running.bodies(VLLM)
    assert first == again
    engine.sample(PROMPTS[::-1], params(), keys=[3, 2, 1], on_tokens=ignore)
    engine.sample(PROMPTS[:1], params(seed=6), keys=[1], on_tokens=ignore)
    seeds = [body["seed"] for body in running.bodies(VLLM)]
    assert seeds[0] in seeds[2:5]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_answer_takes_no_more_than_the_context_leaves(
    opened: Open, running: ModelServer
) -> None:
    engine = opened()
    assert engine.context == CONTEXT
    long = [20] * (CONTEXT - 2)
    [answer] = engine.sample([long], params(), keys=[0], on_tokens=ignore)
    assert len(answer.response_ids) == 2
    with pytest.raises(EngineError, match="prompt 4 has 200 tokens and the engine holds 200"):
        engine.sample([[20] * CONTEXT], params(), keys=[4], on_tokens=ignore)
    with pytest.raises(EngineError, match="row far: reading it takes 201 tokens"):
        engine.label_logps([Scorable(long, [1, 2], name="far")], on_tokens=ignore)
    with pytest.raises(EngineError, match="row none: its prompt or its response is empty"):
        engine.label_logps([Scorable(long, [], name="none")], on_tokens=ignore)


@pytest.mark.parametrize("estimator", [Threshold(0.1), Fixed(TOP, 2), Fixed(TOP + 1, 0),
                                       Fixed(0, 4), Fixed(TOP, 0, 2.0)])  # fmt: skip
def test_another_estimator_than_a_plain_top_k_is_refused(estimator: Any, opened: Open) -> None:
    with pytest.raises(EngineError, match="gives the 5 likeliest ids"):
        read(opened(), estimator=estimator)


def test_llamacpp_only_answers(opened: Open) -> None:
    with pytest.raises(EngineError, match="only answers"):
        opened(api="llama.cpp").scorer(chunk_bytes=1)


# The handshake


def test_another_tokenizer_is_named_by_an_id_and_both_texts(
    opened: Open, running: ModelServer
) -> None:
    plain = running._text
    running._text = lambda ids: "else" if ids == [302] else plain(ids)  # type: ignore[method-assign]
    for api in ROUTES:
        with pytest.raises(EngineError) as told:
            opened(api=api)
        assert "id 302 is '<|im_start|>' here and 'else' there" in str(told.value)


def test_the_model_is_the_named_one_or_the_only_one(opened: Open, running: ModelServer) -> None:
    assert opened(url=f"{running.url}/v1/").api.model == "tiny"  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="serves no model 'big'; it has tiny"):
        opened(model="big")
    running.models = ["tiny", "big"]
    with pytest.raises(EngineError, match="serves tiny, big; name one"):
        opened()
    assert opened(model="big").api.model == "big"  # type: ignore[attr-defined]


# Keys


def test_the_key_is_sent_and_never_told(
    opened: Open, running: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    engine = opened(key_env="MY_KEY")
    assert {each["authorization"] for each in map(_lower, running.headers)} == {f"Bearer {KEY}"}
    assert KEY not in repr(engine)
    assert KEY not in repr(engine.http.__dict__["_table"])
    for status in (401, 500):
        running.fault = always(status, {"error": {"message": f"key {KEY}\nis wrong"}})
        with pytest.raises(EngineError) as told:
            read(engine)
        assert "key *** is wrong" in str(told.value)
        assert KEY not in str(told.value)
    running.fault = always(200, f"<html>{KEY}</html>".encode())
    with pytest.raises(EngineError) as told:
        read(engine)
    assert KEY not in str(told.value)
    assert KEY not in capsys.readouterr().err


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def test_a_missing_key_is_said_by_its_variable(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(EngineError, match="MY_KEY .* is not set"):
        opened(key_env="MY_KEY")


# Faults of the line


def test_a_server_that_is_down_is_asked_again_then_named(folder: Path, capsys: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    table = Server(kind="server", url=url, retries=3)
    with pytest.raises(EngineError) as told:
        server.open_engine(artifact(folder), table, device="cpu")
    assert url in str(told.value)
    assert "no connection" in str(told.value)
    assert "tried 4 times; finished shards are kept" in str(told.value)
    assert "\n" not in str(told.value)
    assert capsys.readouterr().err.count("asking again, up to 3 times") == 1


def test_a_server_that_is_slow_times_out(opened: Open, running: ModelServer) -> None:
    engine = opened(timeout_seconds=0.3, retries=1)
    go_on = threading.Event()

    def fault(route: str, body: Any, count: int) -> None:
        go_on.wait(20)

    running.fault = fault
    with pytest.raises(EngineError, match=r"no answer within 0.3 s .*tried 2 times"):
        read(engine)
    go_on.set()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(status: int, opened: Open, running: ModelServer) -> None:
    expected = read(opened())
    seen: list[Any] = []

    def fault(route: str, body: Any, count: int) -> Reply | None:
        if [route, body] in seen:
            return None
        seen.append([route, body])
        return status, {"message": "busy"}, {"Retry-After": "0.01"}

    running.fault = fault
    found = read(opened())
    assert [t.head_logq_M.tolist() for t in found] == [t.head_logq_M.tolist() for t in expected]


def test_retry_after_is_what_is_waited() -> None:
    reply = http.httpx2.Response
    assert http._retry_after(reply(429, headers={"Retry-After": "7"})) == 7
    assert http._retry_after(reply(429, headers={"Retry-After": "-7"})) == 0
    past = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert http._retry_after(reply(429, headers=past)) == 0
    assert http._retry_after(reply(429, headers={"Retry-After": "soon"})) is None
    assert http._retry_after(reply(429, headers={"Retry-After": "nan"})) is None
    assert http._retry_after(reply(429)) is None


@pytest.mark.parametrize("status", [400, 401, 404, 301])
def test_a_refusal_is_not_asked_again(status: int, opened: Open, running: ModelServer) -> None:
    engine = opened(concurrency=1)
    running.fault = always(status, {"error": {"message": "not so"}})
    with pytest.raises(EngineError, match=rf"row answer-\d: it answered {status}: not so"):
        read(engine)
    assert running.count(VLLM) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>gateway</html>", "no JSON came but '<html>gateway</html>'"),
        (b"\xff\xfe\x00", "no JSON came"),
        (b"", "no JSON came but 'nothing'"),
        (b'{"choices": [{"prompt_log', "no JSON came"),
        ({"choices": []}, "lacks what was asked for"),
        ({}, "lacks what was asked for"),
        ([1], "lacks what was asked for"),
        (None, "lacks what was asked for"),
    ],
)
def test_a_body_without_what_was_asked_is_asked_for_thrice(
    content: Any, says: str, opened: Open, running: ModelServer
) -> None:
    engine = opened(concurrency=1, retries=6)
    running.fault = always(200, content)
    with pytest.raises(EngineError) as told:
        read(engine)
    assert says in str(told.value)
    assert running.count(VLLM) == 3


def test_when_one_request_fails_for_good_the_others_are_not_made(
    opened: Open, running: ModelServer
) -> None:
    engine = opened(concurrency=2)
    running.fault = always(400, {"error": "no"})
    many = [Scorable([1, 2], [3], name=str(n)) for n in range(50)]
    with pytest.raises(EngineError):
        engine.label_logps(many, on_tokens=ignore)
    assert running.count(VLLM) <= 4


INTERRUPTED = """
import sys
from pathlib import Path
from tutelage.core.artifact import Artifact
from tutelage.engines import server
from tutelage.engines.base import Scorable
from tutelage.recipe.engines import Server
made = Artifact(Path(sys.argv[1]), {"stage": "external", "fingerprint": "t", "identity": {}})
engine = server.open_engine(made, Server(kind="server", url=sys.argv[2]), device="cpu")
engine.label_logps([Scorable([1, 2], [3])] * 4, on_tokens=print)
"""


def test_ctrl_c_does_not_wait_for_answers(folder: Path, running: ModelServer) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def fault(route: str, body: Any, count: int) -> None:
        if route == VLLM:
            asked.set()
            go_on.wait(120)

    running.fault = fault
    command = [sys.executable, "-c", INTERRUPTED, str(folder), running.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert asked.wait(120)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # the server would answer after 120 s
    go_on.set()
    assert "KeyboardInterrupt" in errors


# Faults of what is in an answer


def edited(change: Callable[[Any], Any]) -> Any:
    def edit(route: str, answer: Any) -> Any:
        if route == VLLM:
            change(answer["choices"][0])
        return answer

    return edit


def put(token: str, logp: float) -> Callable[[Any], Any]:
    return lambda choice: choice["prompt_logprobs"][-1].update({token: {"logprob": logp}})


def drop_most(choice: Any) -> None:
    label = str(EOS)
    choice["prompt_logprobs"][-1] = {label: choice["prompt_logprobs"][-1][label]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("320", -0.1), "token id 320 is none of the 320 of the local model"),
        (put("-1", -0.1), "token id -1 is none of"),
        (put("4", float("nan")), "nan came where a log-probability belongs"),
        (put(str(EOS), float("-inf")), "-inf came where"),
        (put("4", 3.5), "3.5 came where"),
        (drop_most, "1 log-probabilities came for token 3 where 5 were asked for"),
        (lambda choice: choice["prompt_logprobs"].__delitem__(slice(2, None)), "lacks what was"),
        (lambda choice: choice["prompt_logprobs"].__setitem__(-1, None), "lacks what was"),
        (lambda choice: choice.pop("prompt_logprobs"), "lacks what was asked for"),
        (lambda choice: choice.update(prompt_logprobs=choice["prompt_logprobs"][::-1]), "lacks"),
    ],
)
def test_a_wrong_reading_names_the_row(
    change: Any, says: str, opened: Open, running: ModelServer
) -> None:
    engine = opened()
    running.edit = edited(change)
    with pytest.raises(EngineError) as told:
        read(engine)
    assert says in str(told.value)
    assert "row answer-" in str(told.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda choice: choice["token_ids"].__setitem__(0, 320), "token id 320"),
        (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "8 tokens came with 7"),
        (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(2, float("nan")), "nan"),
        (lambda choice: choice.update(prompt_token_ids=[1]), "answer is to another prompt"),
        (lambda choice: choice.update(finish_reason="stop"), "--generation-config vllm"),
        (lambda choice: choice.update(token_ids=[]), "0 tokens came"),
        (lambda choice: choice.update(logprobs=None), "lacks what was asked for"),
    ],
)
def test_a_wrong_answer_names_the_prompt(
    change: Any, says: str, opened: Open, running: ModelServer
) -> None:
    engine = opened()
    running.edit = edited(change)
    with pytest.raises(EngineError) as told:
        engine.sample(PROMPTS[:1], params(temperature=0), keys=[33], on_tokens=ignore)
    assert says in str(told.value)
    assert "prompt 33" in str(told.value)


def test_exchanged_answers_are_found_out(opened: Open, running: ModelServer) -> None:
    for api in ("vllm", "sglang"):
        engine = opened(api=api)
        held: list[Any] = []

        def exchange(route: str, answer: Any, held: list[Any] = held) -> Any:
            held.append(answer)
            return held[0]  # the first answer for everybody

        running.edit = exchange
        with pytest.raises(EngineError, match="lacks what was asked for"):
            read(engine)
        running.edit = lambda route, answer: answer


# Through a stage


def test_a_server_that_dies_costs_no_finished_shard_and_the_rest_gives_the_same_bytes(
    tmp_path: Path, folder: Path, running: ModelServer
) -> None:
    rows = [
        {"id": f"answer-{n}", "prompt_id": f"prompt-{n}", "source": "lab", "mode": "fast",
         "prompt_ids": [319, 10 + n], "response_ids": [20 + n, 30, EOS],
         "student_logp": [-1.0, -2.0, -3.0], "finish_reason": "stop", "text": ""}
        for n in range(6)
    ]  # fmt: skip
    made = {"inputs": {"model": {"fingerprint": "student"}}, "fingerprint": "r"}
    (tmp_path / "rollouts").mkdir()
    write_rows(tmp_path / "rollouts" / "part-00000.parquet", rows, ROLLOUTS)
    inputs = {"rollouts": Artifact(tmp_path / "rollouts", made), "teacher": artifact(folder)}
    config = Score.model_validate(
        {"stage": "score", "teacher": "t", "rollouts": "r", "seed": 3, "shard_rows": 2}
    )
    table = Server(kind="server", url=running.url, top=TOP, retries=1)

    def run(name: str) -> list[bytes]:
        work = WorkDir.open(
            tmp_path / name, reporter=Reporter(quiet=True), engines={"teacher": table}
        )
        score.run(config, inputs, work)
        return [path.read_bytes() for path in sorted(work.path.glob("part-*.parquet"))]

    whole = run("whole")
    before = running.count(VLLM)
    running.fault = lambda route, body, count: (
        (500, {}, {}) if route == VLLM and count > before + 4 else None
    )
    with pytest.raises(EngineError, match="finished shards are kept"):
        run("cut")
    assert len(list((tmp_path / "cut").glob("part-*.parquet"))) == 2
    running.fault = lambda route, body, count: None
    before = running.count(VLLM)
    assert run("cut") == whole
    assert running.count(VLLM) == before + 2  # the two rows of the third shard
