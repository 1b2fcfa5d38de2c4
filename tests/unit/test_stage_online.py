"""Stage `online` over a tiny pair: what it learns, from whose answers, what it counts, resume."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, ModelError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.engines.base import Completion, SamplingParams
from tutelage.engines.sampler import TransformersSampler
from tutelage.models.load import load_directory
from tutelage.recipe.load import parse
from tutelage.recipe.training import Online
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.stages import online
from tutelage.text.chat import ChatFormat
from tutelage.train import checkpoint
from tutelage.train.loop import Plan

MAX_TOKENS = 6
PROMPTS = 6


def prompt(index: int) -> dict[str, Any]:
    return {
        "id": f"prompt-{index}", "source": "lab", "language": None, "mode": "fast",
        "messages": [{"role": "user", "content": "water " * (1 + index % 3), "thinking": None}],
        "complete": True, "answer": None, "task": None, "meta": None,
    }  # fmt: skip


class Stage:
    """The stage in a folder, with `count` prompts."""

    def __init__(self, folder: Path, student: Path, teacher: Path, count: int = PROMPTS) -> None:
        (folder / "prompts").mkdir(parents=True)
        self.folder, self.student, self.teacher = folder, student, teacher
        rows = [prompt(index) for index in range(count)]
        write_rows(folder / "prompts" / "conversations.parquet", rows, CONVERSATIONS)
        self.work: WorkDir

    def run(self, **settings: Any) -> dict[str, float]:
        values = {
            "stage": "online", "model": "s", "teacher": "t", "prompts": "p", "mode": "fast",
            "max_tokens": MAX_TOKENS, "prompts_a_step": 4, "seed": 3, "lr": 1e-2, "lam": 1.0,
            "ce_on": "none", "pack_tokens": 64, "checkpoint_minutes": 0,
        } | settings  # fmt: skip
        inputs = {
            role: Artifact(path, {"stage": "external", "fingerprint": role, "identity": {}})
            for role, path in (("model", self.student), ("teacher", self.teacher))
        } | {"prompts": Artifact(self.folder / "prompts", {})}
        quiet = Reporter(quiet=True)
        self.work = WorkDir.open(self.folder / "work", reporter=quiet, device="cpu")
        return online.run(Online.model_validate(values), inputs, self.work)

    @property
    def metrics(self) -> list[dict[str, float]]:
        lines = (self.folder / "work" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def weights(self) -> bytes:
        return (self.folder / "work" / "model" / "model.safetensors").read_bytes()


def sharp(folder: Path, factor: float) -> Path:
    """A random model is close to uniform: larger embeddings, which are the head too, give peaks."""
    write_model(folder, layers=1, seed=1)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] *= factor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return write_model(folder / "student", layers=1), sharp(folder / "teacher", 30.0)


@pytest.fixture
def stage(tmp_path: Path, pair: tuple[Path, Path]) -> Stage:
    return Stage(tmp_path / "stage", *pair)


Sampled = list[tuple[list[int], list[Completion]]]


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> Sampled:
    """(numbers, answers) of every step that was sampled."""
    found: Sampled = []
    sample = TransformersSampler.sample

    def noted(
        self: TransformersSampler, prompts: Sequence[Sequence[int]], params: SamplingParams,
        *, keys: Sequence[int], on_tokens: Callable[[int], None],
    ) -> list[Completion]:  # fmt: skip
        done = sample(self, prompts, params, keys=keys, on_tokens=on_tokens)
        found.append((list(keys), done))
        return done

    monkeypatch.setattr(TransformersSampler, "sample", noted)
    return found


# What is learnt, and from whose answers


def test_it_comes_closer_to_the_teacher_on_its_own_answers(stage: Stage) -> None:
    last = stage.run(epochs=12)
    kl = [line["forward_kl"] for line in stage.metrics]
    assert np.mean(kl[-4:]) < np.mean(kl[:4]) - 0.2
    assert last["forward_kl"] == pytest.approx(kl[-1], abs=1e-6)
    assert "grad_norm" not in last


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    same = Stage(tmp_path / "same", pair[1], pair[1])
    same.run(max_steps=1, tau=1e-6)  # whole distributions: no noise of sampled tails
    assert stage_kl(same) == pytest.approx(0.0, abs=1e-3)


def stage_kl(stage: Stage) -> float:
    return stage.metrics[0]["forward_kl"]


def test_every_step_has_answers_of_its_own_to_each_prompt_of_each_epoch(
    stage: Stage, sampled: Sampled
) -> None:
    stage.run(epochs=2, samples=2)
    numbers = [number for keys, _ in sampled for number in keys]
    assert numbers == list(range(2 * PROMPTS * 2))
    assert [len(keys) for keys, _ in sampled] == [8, 8, 8]
    answers = {one.response_ids for _, done in sampled for one in done}
    assert len(answers) > 20  # 24 draws of up to 6 of 320 ids, close to uniform at first


def test_an_answer_is_that_of_the_seed_and_its_number(
    stage: Stage, sampled: Sampled, pair: tuple[Path, Path]
) -> None:
    stage.run(max_steps=1)
    (keys, answers), *_ = sampled
    loaded = load_directory(pair[0], device="cpu", dtype="float32")
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    order = online.epoch_order(PROMPTS, seed=3, epoch=0)
    params = SamplingParams(MAX_TOKENS, 1.0, 3, chat.stop_ids)
    sampler = TransformersSampler(loaded.model, batch_size=1, device="cpu")
    for number, answer in zip(keys, answers, strict=True):  # alone: others play no part
        ids = chat.prompt_ids(prompt(int(order[number]))["messages"], "fast")
        (alone,) = sampler.sample([ids], params, keys=[number], on_tokens=lambda count: None)
        assert alone.response_ids == answer.response_ids


def test_another_seed_gives_other_answers(
    tmp_path: Path, pair: tuple[Path, Path], sampled: Sampled
) -> None:
    for seed in (3, 4):
        Stage(tmp_path / str(seed), *pair).run(seed=seed, max_steps=1)
    first, second = ([one.response_ids for one in done] for _, done in sampled)
    assert first != second


def test_a_later_step_is_answered_by_the_student_of_that_step(
    stage: Stage, sampled: Sampled, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    stage.run(epochs=6, lr=1e-1)
    slow = Stage(tmp_path / "slow", *pair)
    steps = len(sampled)
    slow.run(epochs=6, lr=1e-9)
    (_, first), (_, second) = sampled[0], sampled[steps]
    assert [a.response_ids for a in first] == [a.response_ids for a in second]
    (_, first), (_, second) = sampled[steps - 1], sampled[-1]
    assert [a.response_ids for a in first] != [a.response_ids for a in second]


def test_the_student_answers_without_dropout_and_learns_with_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[tuple[str, bool]] = []
    sample = TransformersSampler.sample

    def noted(self: TransformersSampler, *arguments: Any, **named: Any) -> list[Completion]:
        modes.append(("answers", self.model.training))
        return sample(self, *arguments, **named)

    def train(model: Any, plan: Plan, *_: Any, **__: Any) -> dict[str, float]:
        model.train()
        plan.load(0)
        modes.append(("learns", model.training))
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersSampler, "sample", noted)
    monkeypatch.setattr(online, "train", train)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    assert modes == [("answers", False), ("learns", True)]


# What it counts


def test_tokens_are_those_of_the_answers_and_of_the_log(stage: Stage, sampled: Sampled) -> None:
    stage.run(epochs=2)
    tokens, metrics = stage.work.tokens(), stage.metrics
    decoded = [sum(len(one.response_ids) for one in done) for _, done in sampled]
    assert [line["decoded"] for line in metrics] == decoded
    assert tokens["student_decoded"] == sum(decoded)
    assert tokens["teacher_prefilled"] == sum(line["read"] for line in metrics)
    assert tokens["teacher_prefilled"] > tokens["student_decoded"]  # prompts are read too
    assert tokens["trained"] == metrics[-1]["tokens"] == tokens["teacher_prefilled"]
    assert tokens["teacher_decoded"] == 0


def test_an_answer_cut_at_pack_tokens_is_paid_for_but_not_trained_on(stage: Stage) -> None:
    stage.run(pack_tokens=14)
    tokens = stage.work.tokens()
    assert tokens["trained"] < tokens["teacher_prefilled"]
    assert all(np.isfinite(list(line.values())).all() for line in stage.metrics)


@pytest.mark.parametrize(
    ("settings", "steps", "examples"),
    [
        ({}, 2, 6),
        ({"samples": 3}, 2, 18),
        ({"epochs": 2}, 3, 12),
        ({"epochs": 9, "max_steps": 2}, 2, 8),
        ({"prompts_a_step": 100, "epochs": 2}, 1, 12),
    ],
)
def test_the_summary_tells_steps_and_examples(
    stage: Stage, settings: dict[str, int], steps: int, examples: int
) -> None:
    summary = stage.run(**settings)
    assert (summary["steps"], summary["examples"]) == (steps, examples)
    assert summary["rows"] == PROMPTS
    assert len(stage.metrics) == steps


# Resume


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_run_killed_after_a_checkpoint_ends_with_the_same_bytes(
    stage: Stage, tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:  # fmt: skip
    stage.run(epochs=3, samples=2)
    other = Stage(tmp_path / "other", *pair)
    save, saved = checkpoint.save, 0

    def dies(*arguments: Any, **named: Any) -> None:
        nonlocal saved
        save(*arguments, **named)
        saved += 1
        if saved == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            other.run(epochs=3, samples=2)
    torch.manual_seed(99)  # no state of the process may decide
    other.run(epochs=3, samples=2)
    assert other.weights == stage.weights
    assert other.metrics == stage.metrics
    assert other.work.tokens() == stage.work.tokens()


def test_a_run_killed_after_its_last_step_counts_the_answers_once(stage: Stage) -> None:
    stage.run(epochs=2)
    tokens, weights, metrics = stage.work.tokens(), stage.weights, stage.metrics
    shutil.rmtree(stage.folder / "work" / "model")
    stage.run(epochs=2)
    assert (stage.work.tokens(), stage.weights, stage.metrics) == (tokens, weights, metrics)


# What cannot be


def test_no_prompt_is_refused_before_a_model_is_loaded(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "load_for_inference", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="there is no prompt to answer"):
        Stage(tmp_path / "empty", *pair, count=0).run()


def test_a_teacher_of_another_vocabulary_is_refused(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    other = write_model(tmp_path / "other", layers=1, vocab=400)
    with pytest.raises(ModelError, match=r"differ in the number of ids \(320 and 400\); online"):
        Stage(tmp_path / "stage", pair[0], other).run()


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("tokenizer.json", '"<|im_end|>"', '"<|done|>"', "tokenizer"),
        ("chat_template.jinja", "assistant", "model", "chat template"),
    ],
)
def test_a_teacher_of_other_ids_or_another_template_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], file: str, old: str, new: str, said: str
) -> None:
    other = shutil.copytree(pair[1], tmp_path / "other")
    for path in other.glob("*token*.json") if file == "tokenizer.json" else [other / file]:
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ModelError, match=f"student and teacher differ in the .*{said}"):
        Stage(tmp_path / "stage", pair[0], other).run()


def test_text_of_the_teacher_is_refused_for_there_is_none() -> None:
    raw = {
        "name": "r", "models": {"m": {"source": "./m"}},
        "steps": {
            "p": {"stage": "data", "sources": [{"source": "bundled:prompts"}]},
            "o": {"stage": "online", "model": "m", "teacher": "m", "prompts": "p",
                  "mode": "fast", "ce_on": "teacher"},
        },
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        parse(raw, "recipe.toml")
    assert "ce_on is rollout or none here: there is no stored text" in str(caught.value)
    assert "\n" not in str(caught.value)
