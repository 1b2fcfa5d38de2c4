"""Stage `distill` over a tiny model: what is learnt from what, resume to the bit, little memory."""

import json
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor, nn

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ArtifactError, DataError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.engines.base import SamplingParams
from tutelage.engines.sampler import TransformersSampler
from tutelage.models.load import BackboneAndHead, load_model, load_tokenizer
from tutelage.recipe.load import parse
from tutelage.recipe.training import Distill
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.stages import distill
from tutelage.targets import reader as reader_module
from tutelage.targets import writer as writer_module
from tutelage.targets.estimator import fixed_sample, threshold_sample
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets
from tutelage.targets.writer import write_shard
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest
from tutelage.train.batches import PackedBatch
from tutelage.train.loop import METRICS, MOMENTS, Plan
from tutelage.train.objectives import Distillation
from tutelage.train.spec import LossSpec, Term

VOCAB = 320
TAU = 0.05


def stored(index: int, tokens: int, *, vocab: int = VOCAB) -> TargetRow:
    generator = torch.Generator().manual_seed(1000 * index + tokens)
    logits_NV = torch.randn(tokens, vocab, generator=generator) * 3
    labels_N = torch.randint(0, vocab - 4, (tokens,), generator=generator)
    offsets_N = torch.rand(tokens, generator=generator)
    return TargetRow(
        id=f"answer-{index}", prompt_id=f"prompt-{index}", source="lab", mode="fast",
        prompt_ids=np.arange(3 + index % 3, dtype=np.int32), finish_reason="length", verdict=None,
        response_ids=labels_N.int().numpy(), student_logp_N=np.full(tokens, -1.0, np.float32),
        targets=threshold_sample(logits_NV, labels_N, tau=TAU, offsets_N=offsets_N),
    )  # fmt: skip


def conversation(index: int, words: int = 4, *, prompt_only: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {index}", "thinking": None}]
    if not prompt_only:
        answer = " ".join(["water"] * words)
        messages.append({"role": "assistant", "content": answer, "thinking": None})
    return {
        "id": f"text-{index}", "source": "lab", "language": None, "mode": "fast",
        "messages": messages, "complete": True, "answer": None, "task": None, "meta": None,
    }  # fmt: skip


class Stage:
    """The stage in a folder, over a store of `rows` and, where given, a text.

    It trains `model`, or what the stage `after` made of it.
    """

    def __init__(self, folder: Path, model: Path, after: "Stage | None" = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.model, self.after = folder, model, after
        self.meta = StoreMeta(
            student="s", teacher="t", tokenizer=tokenizer_digest(model),
            chat_template=ChatFormat.from_tokenizer(load_tokenizer(model)).fingerprint,
            vocab_size=VOCAB, temperature=1.0, engine="test", dtype="float32",
            estimator="threshold", tau=TAU,
        )  # fmt: skip

    def store(self, rows: Sequence[TargetRow], *, shards: int = 1) -> None:
        size = -(-len(rows) // shards)
        (self.folder / "targets").mkdir()
        for index in range(shards):
            path = self.folder / "targets" / f"part-{index:05d}.parquet"
            write_shard(path, rows[index * size : (index + 1) * size], meta=self.meta)

    def text(self, rows: Sequence[Mapping[str, Any]]) -> None:
        (self.folder / "text").mkdir()
        write_rows(self.folder / "text" / "conversations.parquet", rows, CONVERSATIONS)

    def run(self, **settings: Any) -> dict[str, float]:
        values = {
            "stage": "distill", "model": "m", "targets": "t", "seed": 3, "lr": 1e-2,
            "batch_tokens": 64, "pack_tokens": 64, "checkpoint_minutes": 0,
        } | settings  # fmt: skip
        if (self.folder / "text").exists():
            values |= {"text": "x", "ce_on": "teacher"}
        begin = {
            "stage": "distill" if self.after else "external", "fingerprint": "f", "identity": {}
        }  # fmt: skip
        folder = self.after.folder / "work" if self.after else self.model
        inputs = {
            "model": Artifact(folder, begin),
            **{name: Artifact(self.folder / name, {}) for name in ("targets", "text")
               if (self.folder / name).exists()},
        }  # fmt: skip
        work = WorkDir.open(self.folder / "work", reporter=Reporter(), device="cpu")
        return distill.run(Distill.model_validate(values), inputs, work)

    @property
    def metrics(self) -> list[dict[str, float]]:
        lines = (self.folder / "work" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def weights(self) -> bytes:
        return (self.folder / "work" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", layers=1)


@pytest.fixture
def stage(tmp_path: Path, model: Path) -> Stage:
    return Stage(tmp_path / "stage", model)


def some(count: int, tokens: int = 9) -> list[TargetRow]:
    return [stored(index, tokens + index % 4) for index in range(count)]


def plan_of(stage: Stage, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Plan:
    """What the stage would train on."""
    found: list[Plan] = []

    def train(
        model: nn.Module, plan: Plan, objective: Any, config: Any, work: WorkDir, **_: Any
    ) -> dict[str, float]:
        found.append(plan)
        (work.path / METRICS).touch()
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(distill, "train", train)
        stage.run(**settings)
    return found[0]


def flat(plan: Plan) -> Iterator[int]:
    return (index for step in plan.steps for row in step for index in row)


# What is learnt from what


def test_it_learns_what_the_teacher_says(stage: Stage) -> None:
    stage.store(some(8))
    last = stage.run(epochs=8)
    metrics = stage.metrics
    assert last["steps"] == len(metrics)
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    kl = [line["forward_kl"] for line in metrics]
    assert np.mean(kl[-2:]) < np.mean(kl[:2]) - 0.2
    assert set(metrics[0]) >= {"loss", "ce", "forward_kl", "agreement", "grad_norm"}
    assert last["forward_kl"] == pytest.approx(kl[-1], abs=1e-6)


def test_it_learns_from_text_beside_the_rollouts(stage: Stage) -> None:
    stage.store(some(8))
    stage.text([conversation(index) for index in range(3)])
    last = stage.run(epochs=8, lam=0.5)
    metrics = stage.metrics
    assert (last["rows"], last["text_rows"]) == (8, 3)
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    for name in ("ce", "forward_kl", "loss"):
        curve = [line[name] for line in metrics]
        assert np.mean(curve[-2:]) < np.mean(curve[:2]) - 0.2, name
    assert all("agreement" in line for line in metrics)


@pytest.mark.parametrize("texts", [3, 20])
def test_each_epoch_sees_every_rollout_once_and_a_text_beside_each(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    stage.store(some(8))
    stage.text([conversation(index) for index in range(texts)])
    plan = plan_of(stage, monkeypatch, epochs=2)
    seen = list(flat(plan))
    for epoch in (seen[:16], seen[16:]):
        assert sorted(epoch[::2]) == list(range(8))
        text = Counter(epoch[1::2])
        assert min(text) >= 8
        assert max(text.values()) == -(-8 // texts)  # as evenly as can be
    assert seen[:16] != seen[16:]
    assert {plan.name(index) for index in seen} >= {"answer-0", "answer-7"}
    assert plan.name(seen[1]) == f"text-{seen[1] - 8}"


def test_a_response_and_its_prompt_are_as_sampled(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some(5)
    stage.store(rows)
    plan = plan_of(stage, monkeypatch)
    for index, row in enumerate(rows):
        example = plan.load(index)
        assert example.ids_L.tolist() == [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
        assert example.mask_L.sum() == len(row.response_ids)
        assert not example.mask_L[: len(row.prompt_ids)].any()
        assert plan.name(index) == row.id


# A budget of positions


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"first_tokens": 4}, [4, 4, 3, 0]),
        ({"first_share": 0.5}, [5, 4, 2, 0]),  # the half of 9, 7 and 3 is rounded up
        ({"first_share": 0.5, "first_tokens": 3}, [3, 3, 2, 0]),
    ],
)
def test_a_budget_of_positions_cuts_exactly(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], kept: list[int]
) -> None:
    rows = [stored(index, tokens) for index, tokens in enumerate((9, 7, 3, 0))]
    stage.store(rows)
    plan = plan_of(stage, monkeypatch, **settings)
    for index, (row, count) in enumerate(zip(rows, kept, strict=True)):
        example = plan.load(index)
        assert example.mask_L.sum() == count
        wanted = [*row.prompt_ids.tolist(), *row.response_ids[:count].tolist()]
        assert example.ids_L.tolist() == wanted


def cut(row: TargetRow, count: int) -> TargetRow:
    return replace(
        row, response_ids=row.response_ids[:count], student_logp_N=row.student_logp_N[:count],
        targets=row.targets.first(count),
    )  # fmt: skip


def test_a_budget_of_positions_trains_as_a_store_of_them_alone(stage: Stage, model: Path) -> None:
    """Each token keeps its own target: as cut before storing, so cut when reading."""
    rows = some(6)
    stage.store(rows)
    stage.run(first_tokens=4)
    other = Stage(stage.folder.parent / "cut", model)
    other.store([cut(row, 4) for row in rows])
    other.run()
    assert stage.weights == other.weights


def test_a_response_longer_than_a_packed_row_is_cut_with_its_targets(
    stage: Stage, model: Path
) -> None:
    rows = [replace(stored(n, 20), prompt_ids=np.arange(4, dtype=np.int32)) for n in range(4)]
    stage.store(rows)
    stage.run(pack_tokens=12)
    other = Stage(stage.folder.parent / "cut", model)
    other.store([cut(row, 8) for row in rows])
    other.run(pack_tokens=12)
    assert stage.weights == other.weights


def test_empty_responses_teach_nothing_and_stop_nothing(stage: Stage) -> None:
    stage.store([stored(0, 0), *some(3), stored(4, 0)])
    assert math.isfinite(stage.run(batch_tokens=1, pack_tokens=16)["loss"])
    assert any(line["loss"] == 0 for line in stage.metrics)


# Resume


@pytest.mark.parametrize("with_text", [False, True])
def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(
    stage: Stage, model: Path, monkeypatch: pytest.MonkeyPatch, with_text: bool
) -> None:
    other = Stage(stage.folder.parent / "killed", model)
    for one in (stage, other):
        one.store(some(10), shards=2)
        if with_text:
            one.text([conversation(index) for index in range(4)])
    whole = stage.run(epochs=2)
    example, calls = distill._example, [0]

    def killed(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in (7, 20):  # the second strikes the run that resumed
            raise KeyboardInterrupt
        return example(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_example", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                other.run(epochs=2)
        resumed = other.run(epochs=2)
    assert calls[0] < 20 + 22  # it went on, and did not begin anew
    assert resumed == whole
    assert other.metrics == stage.metrics
    assert other.weights == stage.weights


# A part of a schedule


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 4}, {"epochs": 4, "max_steps": 10}, {"epochs": 2, "batch_examples": 4},
     {"epochs": 6, "lr": 3e-2, "weight_decay": 0.1}],
    ids=["epochs", "within an epoch", "by examples", "with decay"],
)  # fmt: skip
@pytest.mark.parametrize("with_text", [False, True])
def test_two_halves_of_a_schedule_are_one_training_to_the_bit(
    stage: Stage, model: Path, settings: dict[str, Any], with_text: bool
) -> None:
    rows = sampled_rows(model, 60)
    whole = stage
    first = Stage(stage.folder.parent / "first", model)
    second = Stage(stage.folder.parent / "second", model, first)
    for one in (whole, first, second):
        one.store(rows, shards=2)
        if with_text:
            one.text([conversation(index) for index in range(4)])
    half = {key: settings[key] // 2 for key in ("epochs", "max_steps") if key in settings}
    told = whole.run(**settings)
    first.run(**{**settings, **half, "schedule": [0.0, 0.5]})
    last = second.run(**{**settings, **half, "schedule": [0.5, 1.0]})
    assert second.weights == whole.weights != first.weights
    lines = [*first.metrics, *second.metrics]
    for key in ("lr", "loss", "grad_norm"):
        assert [line[key] for line in lines] == [line[key] for line in whole.metrics]
    assert last["loss"] == told["loss"]
    assert len(lines) == told["steps"] == settings.get("max_steps", told["steps"])
    assert not (whole.folder / "work" / MOMENTS).exists()
    assert not (second.folder / "work" / MOMENTS).exists()


def test_three_parts_of_unequal_epochs_are_one_training_to_the_bit(
    stage: Stage, model: Path
) -> None:
    rows = some(7)
    stage.store(rows)
    stage.run(epochs=3)
    part, lines = None, []
    for number in range(3):
        part = Stage(stage.folder.parent / f"part-{number}", model, part)
        part.store(rows)
        part.run(epochs=1, schedule=[number / 3, (number + 1) / 3])
        lines += part.metrics
    assert part is not None
    assert part.weights == stage.weights
    assert [line["lr"] for line in lines] == [line["lr"] for line in stage.metrics]


def test_a_killed_later_part_ends_with_the_bits_of_one_that_was_not(
    stage: Stage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.store(some(10))
    stage.run(schedule=[0.0, 0.5])
    parts = [Stage(stage.folder.parent / name, model, stage) for name in ("a", "killed")]
    for one in parts:
        one.store(some(10))
    whole = parts[0].run(schedule=[0.5, 1.0])
    example, calls = distill._example, [0]

    def killed(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return example(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "_example", killed)
        with pytest.raises(KeyboardInterrupt):
            parts[1].run(schedule=[0.5, 1.0])
        assert parts[1].run(schedule=[0.5, 1.0]) == whole
    assert parts[1].weights == parts[0].weights
    assert parts[1].metrics == parts[0].metrics


def test_a_later_part_without_moments_says_so_and_is_another_training(
    stage: Stage, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.store(some(10))
    stage.run(schedule=[0.0, 0.5])
    second = Stage(stage.folder.parent / "second", model, stage)
    second.store(some(10))
    second.run(schedule=[0.5, 1.0])
    assert "moments" not in capsys.readouterr().err
    (stage.folder / "work" / MOMENTS).unlink()
    other = Stage(stage.folder.parent / "other", model, stage)
    other.store(some(10))
    other.run(schedule=[0.5, 1.0])
    assert "the model brings no moments of its optimizer" in capsys.readouterr().err
    assert other.weights != second.weights


# The gauge of staleness


def sampled_rows(model: Path, count: int, *, temperature: float = 1.0) -> list[TargetRow]:
    """Answers that the tiny model really gave, with its log-probabilities."""
    loaded = load_model(model, dtype="float32", device=torch.device("cpu"))
    prompts = [[5 + index % 50, 60 + index % 7, 12] for index in range(count)]
    params = SamplingParams(max_tokens=10, temperature=temperature, seed=2, stop_ids=(318,))
    done = TransformersSampler(loaded, batch_size=count, device="cpu").sample(
        prompts, params, keys=range(count), on_tokens=lambda count: None
    )
    return [
        replace(
            stored(index, len(one.response_ids)), prompt_ids=np.array(prompt, np.int32),
            response_ids=np.array(one.response_ids, np.int32),
            student_logp_N=np.array(one.logps, np.float32),
        )
        for index, (prompt, one) in enumerate(zip(prompts, done, strict=True))
    ]  # fmt: skip


def test_the_gauge_reads_rows_that_are_never_trained_on(
    stage: Stage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sampled_rows(model, 120)
    rows[0] = stored(0, 0)  # an empty answer cannot be read
    stage.store(rows)
    trained = set(flat(plan_of(stage, monkeypatch, epochs=2)))
    held = set(range(120)) - trained
    assert len(held) == 2  # 2 % of 120
    assert held != {0}
    assert set(flat(plan_of(stage, monkeypatch, schedule=[0.5, 1.0]))) == trained
    assert set(flat(plan_of(stage, monkeypatch, seed=4))) != trained
    assert set(flat(plan_of(stage, monkeypatch, gauge_rows=1))) > trained
    assert set(flat(plan_of(stage, monkeypatch, gauge_rows=0))) == set(range(120))
    told = stage.run(epochs=2)
    assert told["gauge_rows"] == 2
    assert told["gauge_tokens"] == sum(len(rows[index].response_ids) for index in held)
    assert told["examples"] == 2 * 118


def test_the_gauge_starts_at_0_and_rises_as_the_student_moves(stage: Stage, model: Path) -> None:
    stage.store(sampled_rows(model, 120))
    told = stage.run(epochs=12, lr=3e-3)
    curve = [line["staleness"] for line in stage.metrics if "staleness" in line]
    assert 0 <= told["staleness_start"] < 1e-3  # the store rounds log-probabilities
    assert len(curve) == 10
    assert told["staleness"] == curve[-1] > curve[0] > told["staleness_start"]
    assert told["staleness_most"] == max(curve)
    assert "staleness" in stage.metrics[-1]


def test_the_gauge_changes_nothing_of_the_training(
    stage: Stage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sampled_rows(model, 60)
    stage.store(rows)
    stage.run(epochs=2)
    other = Stage(stage.folder.parent / "unread", model)
    other.store(rows)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_gauge", lambda *_: (None, {}))
        other.run(epochs=2)
    assert not any("staleness" in line for line in other.metrics)
    assert any("staleness" in line for line in stage.metrics)
    assert stage.weights == other.weights


def test_greedy_answers_have_no_gauge_and_the_reason_is_said(
    stage: Stage, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.store(sampled_rows(model, 120, temperature=0.0))
    told = stage.run()
    assert not any("stale" in name or "gauge" in name for name in told)
    assert "no gauge of staleness: the answers are not plain samples" in capsys.readouterr().err


def test_answers_of_nobody_have_no_gauge_and_are_all_trained_on(stage: Stage) -> None:
    stage.meta = replace(stage.meta, student="")
    stage.store(some(120))
    told = stage.run()
    assert told["examples"] == 120
    assert "staleness" not in told


def test_answers_of_another_model_are_said_to_be_so(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.store(some(120))  # all tokens at -1 nat, where the model would say -5.8
    assert stage.run()["staleness_start"] > 0.1
    assert "the answers are not this model's own" in capsys.readouterr().err


def test_a_training_that_stops_when_stale_is_resumed_to_the_same_bits(
    stage: Stage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sampled_rows(model, 120)
    killed = Stage(stage.folder.parent / "killed", model)
    settings = {"epochs": 4, "stop_when_stale": True, "max_staleness": 0.05, "lr": 1e-2}
    for one in (stage, killed):
        one.store(rows)
    planned = len(plan_of(stage, monkeypatch, epochs=4).steps)
    told = stage.run(**settings)
    assert 0 < told["steps"] < planned
    assert len(stage.metrics) == told["steps"]
    assert told["staleness"] == told["staleness_most"] > 0.05
    assert told["examples"] < 4 * 118
    save = distill.save_trainee

    def struck(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distill, "save_trainee", struck)  # just after it had stopped
        with pytest.raises(KeyboardInterrupt):
            killed.run(**settings)
        patch.setattr(distill, "save_trainee", save)
        assert killed.run(**settings) == told
    assert killed.weights == stage.weights
    assert killed.metrics == stage.metrics


# Memory


def test_few_row_groups_are_held_and_each_is_decoded_once_an_epoch(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, epochs = 3, 2
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 40)
    monkeypatch.setattr(reader_module, "WINDOW", window)
    stage.store(some(60), shards=3)
    groups = TargetReader(sorted((stage.folder / "targets").glob("*.parquet"))).num_groups
    assert groups >= 6 * window
    load, loads = reader_module._load, [0]
    alive: list[weakref.ref[Any]] = []

    def counted(*arguments: Any) -> Any:
        loads[0] += 1
        group = load(*arguments)
        alive.append(weakref.ref(group.targets.head_ids_M))
        held = sum(reference() is not None for reference in alive)
        assert held <= window + 2, "row groups pile up"
        return group

    monkeypatch.setattr(reader_module, "_load", counted)
    last = stage.run(epochs=epochs, batch_tokens=1)
    windows = -(-groups // window)
    # A row packed across two windows goes back for the targets of the first.
    assert groups * epochs <= loads[0] <= (groups + 2 * window * windows) * epochs
    assert last["rows"] == 60


# What the gradient is made of


def dense_q(targets: TokenTargets) -> Tensor:
    """q_hat over the vocabulary, from its definition."""
    q_NV = torch.zeros(len(targets), VOCAB, dtype=torch.float64)
    token_M = np.repeat(np.arange(len(targets)), targets.head_counts_N)
    token_T = np.repeat(np.arange(len(targets)), targets.tail_counts_N)
    q_NV[token_M, targets.head_ids_M] = torch.from_numpy(targets.head_logq_M).double().exp()
    unit_N = torch.from_numpy(targets.tail_unit_N()).double()
    q_NV.index_put_(
        (torch.from_numpy(token_T), torch.from_numpy(targets.tail_ids_T).long()), unit_N[token_T],
        accumulate=True,
    )  # fmt: skip
    return q_NV


def packed(labels: Sequence[int], examples: Sequence[int], counts: Sequence[int]) -> PackedBatch:
    none = np.zeros(0, np.int64)
    return PackedBatch(none, none, none, np.array(labels), tuple(examples), tuple(counts))


def sampled(estimator: str, count: int) -> TokenTargets:
    row = stored(1, count)
    if estimator == "threshold":
        return row.targets
    generator = torch.Generator().manual_seed(5)
    logits_NV = torch.randn(count, VOCAB, generator=generator) * 3
    uniforms_NS = torch.rand(count, 6, generator=generator)
    labels_N = torch.zeros(count, dtype=torch.long)
    return fixed_sample(logits_NV, labels_N, head=0, uniforms_NS=uniforms_NS)


@pytest.mark.parametrize("estimator", ["threshold", "pure"])
@pytest.mark.parametrize(
    ("order", "ce_on"),
    [
        ((0, 1), "teacher"), ((1, 0), "teacher"), ((1, 1), "teacher"), ((0, 0), "teacher"),
        ((0, 0), "rollout"),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_the_dense_objective(
    estimator: str, order: tuple[int, int], ce_on: Any
) -> None:
    """Example 0 is a rollout of 7 targets of which 5 were packed, example 1 a text of 3.

    `(1 - lam) CE + lam KD`: with text, CE on its rows alone and KD on the others alone.
    """
    lam, all_targets = 0.7, sampled(estimator, 7)
    counts = [5 if index == 0 else 3 for index in order]
    N, D = sum(counts), 8
    generator = torch.Generator().manual_seed(2)
    hidden_ND = torch.randn(N, D, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD = torch.randn(VOCAB, D, dtype=torch.float64, generator=generator, requires_grad=True)
    labels_N = torch.randint(0, VOCAB, (N,), generator=generator)
    objective = Distillation(
        LossSpec((Term("forward_kl", "unbiased"),), lam=lam, ce_on=ce_on), 1.0,
        lambda index: None if index else all_targets,
    )  # fmt: skip
    head = BackboneAndHead(nn.Identity(), weight_VD, None, None)
    out = objective(hidden_ND, head, packed(labels_N.tolist(), order, counts))
    found = torch.autograd.grad(out.loss_sum, (hidden_ND, weight_VD))

    logp_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
    is_text_N = torch.tensor([index == 1 for index, n in zip(order, counts, strict=True)
                              for _ in range(n)])  # fmt: skip
    part = all_targets.first(5)
    q_NV = torch.zeros(N, VOCAB, dtype=torch.float64)
    q_NV[~is_text_N] = dense_q(part).repeat(order.count(0), 1)
    entropy_N = torch.zeros(N, dtype=torch.float64)
    entropy_N[~is_text_N] = torch.from_numpy(part.entropy_N).double().repeat(order.count(0))
    kd_N = -(q_NV * logp_NV).sum(-1) - entropy_N  # 0 where q is 0: on text
    ce_N = -logp_NV[torch.arange(N), labels_N]
    with_ce_N = is_text_N if ce_on == "teacher" else torch.ones_like(is_text_N)
    wanted = lam * kd_N.sum() + (1 - lam) * ce_N[with_ce_N].sum()
    torch.testing.assert_close(out.loss_sum, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        found, torch.autograd.grad(wanted, (hidden_ND, weight_VD)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    for name, value, count in (
        ("ce", ce_N[with_ce_N].sum(), with_ce_N.sum()),
        ("forward_kl", kd_N[~is_text_N].sum(), (~is_text_N).sum()),
    ):
        total, over = out.sums[name]
        assert float(total) == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name
        assert int(over) == int(count), name
    best_N = logp_NV[~is_text_N].argmax(-1)
    has_head_N = np.tile(part.head_counts_N > 0, order.count(0))
    total, over = out.sums["agreement"]
    agree_N = (best_N == q_NV[~is_text_N].argmax(-1)).numpy() & has_head_N
    assert (float(total), int(over)) == (agree_N.sum(), has_head_N.sum())


# What cannot be


def refusal(**settings: Any) -> str:
    raw = {
        "name": "r", "models": {"m": {"source": "./m"}},
        "steps": {"d": {"stage": "distill", "model": "m", "targets": "t", **settings}},
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        parse(raw, "recipe.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ce_on": "teacher"}, "ce_on = \"teacher\" and text go together"),
        ({"text": "answers"}, "ce_on = \"teacher\" and text go together"),
        ({"text": "answers", "ce_on": "none", "lam": 1.0}, "go together"),
        ({"first_share": 0.0}, "first_share: Input should be greater than 0"),
        ({"first_tokens": -1}, "first_tokens: Input should be greater than or equal to 0"),
        ({"reverse_share": 1.0}, "reverse_share: Input should be less than 1"),
        ({"outside": "dense"}, "'auto', 'unbiased', 'bucket'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_line(settings: dict[str, Any], said: str) -> None:
    assert said in refusal(**settings)


def test_an_objective_that_cannot_be_stops_before_a_model_is_loaded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.store(some(2))
    monkeypatch.setattr(distill, "load_trainee", lambda *_, **__: 1 / 0)
    with pytest.raises(RecipeError, match="ce_on is none with lam 0.9"):
        stage.run(ce_on="none")
    with pytest.raises(RecipeError, match="jsd cannot be unbiased"):
        stage.run(divergence="jsd", outside="unbiased")


def test_text_without_an_answer_or_without_room_is_refused(stage: Stage, model: Path) -> None:
    stage.store(some(2))
    stage.text([conversation(0), conversation(1, prompt_only=True)])
    with pytest.raises(DataError, match="row text-1 ends with the user's message"):
        stage.run()
    other = Stage(stage.folder.parent / "long", model)
    other.store(some(2))
    other.text([conversation(0)])
    with pytest.raises(DataError, match="text has no row with a target within pack_tokens"):
        other.run(pack_tokens=4)


@pytest.mark.parametrize("field", ["tokenizer", "chat_template", "vocab_size"])
def test_a_store_of_another_origin_is_refused(stage: Stage, field: str) -> None:
    stage.meta = replace(stage.meta, **{field: 400 if field == "vocab_size" else "f" * 64})
    stage.store(some(2))
    with pytest.raises(ArtifactError, match=f"targets do not fit the model: {field} is"):
        stage.run()


def test_a_damaged_row_group_stops_the_training_and_is_named(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 40)
    stage.store(some(12))
    path = stage.folder / "targets" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet: row group \d .* is damaged"):
        stage.run()


def test_held_out_rows_of_the_store_are_looked_at_and_never_learnt(
    stage: Stage, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.store(sampled_rows(model, 100))
    plan = plan_of(stage, monkeypatch, held_out=7, epochs=2)
    held = {index for row in plan.held_out for index in row}
    assert len(held) == 7
    learnt = list(flat(plan))
    assert not held & set(learnt)
    gauge = int(0.02 * 100)
    assert len(learnt) == 2 * (100 - 7 - gauge)
    again = plan_of(stage, monkeypatch, held_out=7, schedule=[0.5, 1.0])
    assert again.held_out == plan.held_out  # the same in every part of a schedule


def test_the_held_out_loss_of_distillation_is_looked_at_to_the_last_step(stage: Stage) -> None:
    stage.store(some(12))
    last = stage.run(held_out=3, evaluations=4, epochs=4, gauge_rows=0)
    looked = [line["held_out_loss"] for line in stage.metrics if "held_out_loss" in line]
    assert len(set(looked)) == 4
    assert "held_out_loss" in stage.metrics[-1]
    assert last["held_out_loss"] == pytest.approx(looked[-1], abs=1e-6)
    assert {"steps", "rows", "loss"} <= last.keys()


def test_more_held_out_rows_than_half_of_the_store_are_refused(stage: Stage) -> None:
    stage.store(some(12))
    with pytest.raises(DataError, match="held_out = 7 of 12 rollouts that fit; take 6 at most"):
        stage.run(held_out=7)
