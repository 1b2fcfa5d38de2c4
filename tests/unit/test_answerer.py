"""Answers that are remembered: who is asked again, who is not, and what becomes of the file."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.core.errors import ArtifactError
from tutelage.engines import answerer as module
from tutelage.engines.answerer import Answerer
from tutelage.engines.base import Completion, SamplingParams, Scorable

GREEDY = SamplingParams(6, 0.0, 5, (2,))
SAMPLED = SamplingParams(6, 1.0, 5, (2,))
PROMPTS = [[3 + n, 9, 4 + n] for n in range(7)]


class Counted:
    """A random model of a few thousand parameters that counts its forward passes."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        self.forwards = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def over(self, memory: Path | None, *, name: str = "model", batch_size: int = 2) -> Answerer:
        loaded: Any = SimpleNamespace(model=self.model, device=torch.device("cpu"))
        return Answerer(loaded, model=name, batch_size=batch_size, memory=memory)


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "store" / "answers.sqlite"


def ask(
    answerer: Answerer, params: SamplingParams = GREEDY, prompts: Sequence[list[int]] = PROMPTS,
    told: Callable[[int], None] = lambda count: None,
) -> list[Completion]:  # fmt: skip
    return answerer.sample(prompts, params, keys=range(len(prompts)), on_tokens=told)


def read(answerer: Answerer, pairs: Sequence[Scorable]) -> list[np.ndarray]:
    return answerer.label_logps(pairs, on_tokens=lambda count: None)


PAIRS = [Scorable([5, 6 + n], [7, 8 + n]) for n in range(4)]


def test_the_second_time_the_model_is_asked_nothing(counted: Counted, memory: Path) -> None:
    first = ask(counted.over(memory))
    asked = counted.forwards
    assert asked
    assert ask(counted.over(memory)) == first
    assert counted.forwards == asked


def test_with_no_memory_the_model_is_asked_again(counted: Counted) -> None:
    ask(counted.over(None))
    asked = counted.forwards
    ask(counted.over(None))
    assert counted.forwards == 2 * asked


def test_more_items_ask_only_the_new_ones(counted: Counted, memory: Path) -> None:
    kept = ask(counted.over(memory), prompts=PROMPTS[:4])
    fresh = Counted()
    both = ask(fresh.over(memory))
    alone = Counted()
    new = alone.over(None).sample(
        PROMPTS[4:], GREEDY, keys=range(4, 7), on_tokens=lambda count: None
    )
    assert both == [*kept, *new]
    assert fresh.forwards == alone.forwards


def test_the_memory_gives_back_ids_logps_and_how_it_ended(counted: Counted, memory: Path) -> None:
    made = ask(counted.over(None), SAMPLED)
    ask(counted.over(memory), SAMPLED)
    found = ask(counted.over(memory), SAMPLED)
    assert [(c.response_ids, c.finish_reason) for c in found] == [
        (c.response_ids, c.finish_reason) for c in made
    ]
    for ours, theirs in zip(found, made, strict=True):
        np.testing.assert_array_equal(ours.logps, np.asarray(theirs.logps, np.float32))


def test_remembered_tokens_move_the_bar_as_new_ones_do(counted: Counted, memory: Path) -> None:
    counts: list[list[int]] = [[], []]
    for told in counts:
        ask(counted.over(memory), told=told.append)
    assert sum(counts[0]) == sum(counts[1]) > 0


def test_a_greedy_answer_is_the_same_for_every_seed(counted: Counted, memory: Path) -> None:
    ask(counted.over(memory))
    asked = counted.forwards
    ask(counted.over(memory), SamplingParams(6, 0.0, 99, (2,)))
    assert counted.forwards == asked


@pytest.mark.parametrize(
    "other",
    [SamplingParams(6, 1.0, 99, (2,)), SamplingParams(6, 0.5, 5, (2,)),
     SamplingParams(5, 1.0, 5, (2,)), SamplingParams(6, 1.0, 5, (2, 3))],
    ids=["seed", "temperature", "length", "stops"],
)  # fmt: skip
def test_a_sample_of_other_decoding_is_made_anew(
    counted: Counted, memory: Path, other: SamplingParams
) -> None:
    ask(counted.over(memory), SAMPLED)
    asked = counted.forwards
    ask(counted.over(memory), other)
    assert counted.forwards > asked


def test_another_model_is_asked_for_itself(counted: Counted, memory: Path) -> None:
    ask(counted.over(memory, name="one"))
    other = Counted(seed=1)
    assert ask(other.over(memory, name="two")) == ask(other.over(None))


def test_log_probabilities_are_remembered_too(counted: Counted, memory: Path) -> None:
    first = read(counted.over(memory), PAIRS)
    asked = counted.forwards
    second = read(counted.over(memory), PAIRS)
    assert counted.forwards == asked
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_response_read_is_not_taken_for_an_answer(counted: Counted, memory: Path) -> None:
    ask(counted.over(memory), prompts=[PROMPTS[0]])
    asked = counted.forwards
    read(counted.over(memory), [Scorable(PROMPTS[0], [7])])
    assert counted.forwards > asked


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(b"no database at all" * 300),
     lambda path: path.write_bytes(path.read_bytes()[:100] + bytes(8192))],
    ids=["another file", "zeros behind the header"],
)  # fmt: skip
def test_a_damaged_memory_is_one_clear_line(
    counted: Counted, memory: Path, damage: Callable[[Path], Any]
) -> None:
    ask(counted.over(memory))
    for path in memory.parent.glob("*-*"):  # the write-ahead log would mend it
        path.unlink()
    damage(memory)
    with pytest.raises(ArtifactError, match=r"answers\.sqlite: .*delete the file") as caught:
        ask(counted.over(memory))
    assert "\n" not in str(caught.value)


def test_a_kill_between_chunks_costs_one_chunk(
    counted: Counted, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    real = module.TransformersSampler.sample
    asked: list[int] = []

    def killed_in_the_third(self: Any, prompts: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module.TransformersSampler, "sample", killed_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            ask(counted.over(memory))
        assert asked == [2, 2, 2]
        ask(counted.over(memory))
    assert sum(asked[3:]) == len(PROMPTS) - 4  # two chunks of two had been kept


class Echo:
    """Stands for the sampler: each answer is its prompt."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def sample(self, prompts: Any, params: Any, *, keys: Any, on_tokens: Any) -> Any:
        return [Completion(tuple(p), (0.5,) * len(p), "stop") for p in prompts]


def _fill(memory: Path, start: Any, first: int) -> None:
    module.TransformersSampler = Echo  # type: ignore[misc]
    loaded: Any = SimpleNamespace(model=None, device="cpu")
    start.wait()
    for _ in range(10):  # opens the file each time, as steps do
        answerer = Answerer(loaded, model="m", batch_size=1, memory=memory)
        prompts = [[first + n] for n in range(150)]
        assert [c.response_ids for c in ask(answerer, prompts=prompts)] == [
            (p[0],) for p in prompts
        ]


def test_two_processes_share_one_memory(
    counted: Counted, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")  # no torch is used in the children
    start = context.Barrier(2)
    workers = [context.Process(target=_fill, args=(memory, start, first)) for first in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    monkeypatch.setattr(Echo, "sample", None)  # whoever asked now would fail
    monkeypatch.setattr(module, "TransformersSampler", Echo)
    found = ask(counted.over(memory, name="m"), prompts=[[n] for n in range(250)])
    assert [c.response_ids for c in found] == [(n,) for n in range(250)]


def test_a_new_memory_is_made_by_one_at_a_time(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite says `database is locked` at once, whatever its timeout, when two turn a file WAL."""
    inside, most = [], []

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, *more: Any) -> sqlite3.Cursor:
            if not sql.startswith("PRAGMA journal_mode"):
                return super().execute(sql, *more)
            inside.append(sql)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()
            return super().execute(sql, *more)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Slow))
    monkeypatch.setattr(module, "TransformersSampler", Echo)
    loaded: Any = SimpleNamespace(model=None, device="cpu")
    answerers = [Answerer(loaded, model="m", batch_size=1, memory=memory) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda answerer: ask(answerer, prompts=[[1]]), answerers))
    assert most == [1, 1, 1]
