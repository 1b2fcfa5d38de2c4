"""What reaches the loss: through real messages, packing and the real forward of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_model
from torch import Tensor

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import EngineError
from tutelage.core.progress import Reporter
from tutelage.models.load import BackboneAndHead, load_model, load_tokenizer
from tutelage.recipe.training import Sft
from tutelage.text.chat import ChatFormat
from tutelage.train import checkpoint, loop
from tutelage.train.batches import Example, PackedBatch, pack, plan_steps, stack
from tutelage.train.loop import BatchLoss, Plan, Seen, StepStage, Trainee, train
from tutelage.train.objectives import CrossEntropy

CONVERSATIONS = [
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2 + 2?", "thinking": None},
        {"role": "assistant", "content": "four", "thinking": "two and two"},
        {"role": "user", "content": "and 3 + 3?"},
        {"role": "assistant", "content": "six", "thinking": None},
    ],
    [
        {"role": "user", "content": "<|im_end|> is a token"},
        {"role": "assistant", "content": "so it is: <|im_end|>"},
    ],
]
ANSWERS = [["two and two\n</think>\n\nfour<|im_end|>", "six<|im_end|>"],
           ["so it is: <|im_end|><|im_end|>"]]  # fmt: skip
CPU = torch.device("cpu")


class Recorded(CrossEntropy):
    """The real objective, which also keeps the labels that reached it."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []

    def __call__(self, hidden_ND: Tensor, head: BackboneAndHead, batch: PackedBatch) -> BatchLoss:
        self.labels.append(batch.labels_N.tolist())
        return super().__call__(hidden_ND, head, batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    chat = ChatFormat.from_tokenizer(load_tokenizer(folder))
    rendered = [chat.render(messages) for messages in CONVERSATIONS]  # type: ignore[arg-type]
    return [Example(r.ids, r.mask) for r in rendered]


def config(**settings: object) -> Sft:
    values = {"stage": "sft", "model": "m", "data": ("d",), "seed": 0, "lr": 1e-3} | settings
    return Sft.model_validate(values)


def plan_of(examples: list[Example]) -> Plan:
    steps = [[list(range(len(examples)))]]
    return Plan(lambda i: examples[i], lambda i: f"row-{i}", steps)


def work_in(path: Path) -> WorkDir:
    return WorkDir.open(path, reporter=Reporter(quiet=True), device="cpu")


def logged_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_prompt_tokens_never_reach_the_loss(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    seen = Recorded()
    train(model, plan_of(examples), seen, config(), work_in(tmp_path), device=CPU, label="t")
    (labels,) = seen.labels
    wanted = "".join(answer for answers in ANSWERS for answer in answers)
    assert load_tokenizer(folder).decode(labels) == wanted


@pytest.mark.parametrize("side_by_side", [False, True], ids=["one row", "rows padded together"])
def test_examples_together_have_the_loss_and_gradient_of_each_alone(
    folder: Path, examples: list[Example], side_by_side: bool
) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    trainee = Trainee(model, CrossEntropy())
    rows = [[0], [1]] if side_by_side else [[0, 1]]
    packed = trainee(stack([pack([examples[i] for i in row], row) for row in rows]), CPU).loss_sum
    packed.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = sum(trainee(stack([pack([e], [i])]), CPU).loss_sum for i, e in enumerate(examples))
    assert isinstance(alone, Tensor)
    alone.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_one_example_does_not_see_the_one_before_it(folder: Path, examples: list[Example]) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    other = Example(examples[0].ids_L[::-1].copy(), examples[0].mask_L)
    hidden: list[Tensor] = []

    def keep(hidden_ND: Tensor, head: BackboneAndHead, batch: PackedBatch) -> BatchLoss:
        hidden.append(hidden_ND[-batch.counts[-1] :].detach())
        return CrossEntropy()(hidden_ND, head, batch)

    for first in (examples[0], other):
        Trainee(model, keep)(stack([pack([first, examples[1]], [0, 1])]), CPU)
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-5, atol=1e-6)


def test_a_step_without_a_finite_loss_names_its_rows(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    with torch.no_grad():
        next(model.parameters())[0] = float("nan")
    with pytest.raises(EngineError, match="row-0, row-1"):
        train(
            model, plan_of(examples), CrossEntropy(), config(), work_in(tmp_path), device=CPU,
            label="t",
        )  # fmt: skip


def test_a_kill_just_after_a_checkpoint_loses_no_line_of_the_log(
    folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, lines = checkpoint.save, []

    def looked_at(*args: Any, **named: Any) -> None:
        save(*args, **named)
        lines.append(len((tmp_path / "metrics.jsonl").read_text().splitlines()))

    monkeypatch.setattr(checkpoint, "save", looked_at)
    model = load_model(folder, dtype="float32", device=CPU)
    plan = Plan(lambda i: examples[i], str, [[[1]]] * 3)
    at_once = config(checkpoint_minutes=0)
    train(model, plan, CrossEntropy(), at_once, work_in(tmp_path), device=CPU, label="t")
    assert lines == [1, 2]


def test_training_on_one_batch_learns_it(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    steps = [
        step
        for _ in range(40)
        for step in plan_steps(
            [len(e.ids_L) for e in examples], torch.arange(2).numpy(), pack_tokens=512,
            batch_tokens=512,
        )
    ]  # fmt: skip
    plan = Plan(lambda i: examples[i], str, steps)
    last = train(
        model, plan, CrossEntropy(), config(lr=1e-2), work_in(tmp_path), device=CPU, label="t"
    )
    assert last["loss"] < 1.0  # from 5.8, the log of 320 ids


def test_a_steps_rate_is_the_schedules_times_its_stages(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    def logged(where: Path, stages: list[StepStage], **settings: object) -> list[dict]:
        model = load_model(folder, dtype="float32", device=CPU)
        plan = Plan(lambda i: examples[i], str, [[[1]]] * 4, stages)
        train(
            model, plan, CrossEntropy(), config(**settings), work_in(where), device=CPU, label="t"
        )
        return logged_in(where)

    plain = logged(tmp_path / "plain", [])
    staged = logged(tmp_path / "staged", [StepStage(1, 1.0)] * 2 + [StepStage(2, 0.25)] * 2)
    assert [line["lr"] for line in staged] == [
        line["lr"] * scale for line, scale in zip(plain, [1, 1, 0.25, 0.25], strict=True)
    ]
    assert [line["stage"] for line in staged] == [1, 1, 2, 2]
    assert "stage" not in plain[0]
    cut = logged(tmp_path / "cut", [StepStage(1, 0.5)] * 4, max_steps=3)
    # The schedule runs over the steps that are left: the last of them has the least rate.
    assert [line["lr"] for line in cut] == [0.5e-3, 0.5e-3, pytest.approx(0.5e-4)]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("epochs", "max_steps", "epoch_steps"), [(2, 0, 5), (3, 4, 9), (400, 50, 3)]
)
def test_the_parts_of_a_schedule_are_its_steps_each_once(
    parts: int, epochs: int, max_steps: int, epoch_steps: int
) -> None:
    found: list[int] = []
    for number in range(parts):
        part = config(
            epochs=epochs, max_steps=max_steps,
            schedule=[number / parts, round((number + 1) / parts, 12)],
        )  # fmt: skip
        assert part.whole_epochs == epochs * parts
        first, last, whole = part.steps_of_whole(epochs * parts * epoch_steps)
        found += range(first, last)
        assert whole == parts * (max_steps or epochs * epoch_steps)
    assert found == list(range(whole))


def test_a_part_has_the_rates_of_the_whole(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    def rates(where: str, steps: int, **settings: object) -> list[float]:
        model = load_model(folder, dtype="float32", device=CPU)
        work = work_in(tmp_path / where)
        plan = Plan(lambda i: examples[i], str, [[[1]]] * steps)
        train(model, plan, CrossEntropy(), config(**settings), work, device=CPU, label="t")
        return [line["lr"] for line in logged_in(work.path)]

    # A stage plans the whole: 40 steps are two epochs of 20, of which each half runs one.
    whole = rates("whole", 40, epochs=2)
    first = rates("first", 40, epochs=1, schedule=[0.0, 0.5])
    second = rates("second", 40, epochs=1, schedule=[0.5, 1.0])
    assert first + second == whole
    assert max(second) < max(first)  # no warm-up of its own
    few = [
        rates(f"few{n}", 40, epochs=1, max_steps=3, schedule=[n / 2, n / 2 + 0.5]) for n in (0, 1)
    ]
    assert few[0] + few[1] == rates("six", 40, epochs=2, max_steps=6)


def test_what_watches_sees_each_step_is_logged_and_may_end_the_training(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    asked: list[tuple[int, int]] = []

    def watch(done: int, steps: int) -> Seen:
        asked.append((done, steps))
        return Seen({"drift": done / 10} if done > 1 else {}, stop=done == 3)

    plan = Plan(lambda i: examples[i], str, [[[1]]] * 5, watch=watch)
    settings = config(checkpoint_minutes=0)
    last = train(model, plan, CrossEntropy(), settings, work_in(tmp_path), device=CPU, label="t")
    lines = logged_in(tmp_path)
    assert asked == [(1, 5), (2, 5), (3, 5)]
    assert [line.get("drift") for line in lines] == [None, 0.2, 0.3]
    assert last["loss"] == pytest.approx(lines[-1]["loss"], abs=1e-6)
    assert plan.counts(settings, done=len(lines)) == {"steps": 3, "examples": 3}
    # Not of the step that ended it: a resumed run must look at that one again.
    kept = [path.name for path in (tmp_path / "scratch" / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


@pytest.mark.parametrize("schedule", [[0.5, 0.5], [0.6, 0.2], [0.0, 1.5]])
def test_a_part_that_is_none_is_refused(schedule: list[float]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        config(schedule=schedule)


def trained(folder: Path, where: Path, examples: list[Example], **settings: object) -> Any:
    model = load_model(folder, dtype="float32", device=CPU)
    plan = Plan(lambda i: examples[i], str, [[[0], [1]]] * 4)
    train(model, plan, CrossEntropy(), config(**settings), work_in(where), device=CPU, label="t")
    return model, [line["loss"] for line in logged_in(where)]


def test_activations_computed_twice_give_the_same_training_with_fewer_kept(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    plain, losses = trained(folder, tmp_path / "plain", examples)
    again, found = trained(folder, tmp_path / "again", examples, gradient_checkpointing=True)
    assert found == losses
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)

    def kept(model: Any) -> int:
        """Bytes that autograd holds for the backward of one row."""
        sizes: dict[int, int] = {}

        def held(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.train()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(held, lambda tensor: tensor):
            Trainee(model, CrossEntropy())(stack([pack([examples[0]], [0])]), CPU)
        return sum(size for place, size in sizes.items() if place not in parameters)

    assert kept(again) < 0.5 * kept(plain)


def test_a_model_without_gradient_checkpointing_says_so(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load_model(folder, dtype="float32", device=CPU)
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(EngineError, match="no gradient checkpointing"):
            train(
                model, plan_of(examples), CrossEntropy(), config(gradient_checkpointing=True),
                work_in(tmp_path), device=CPU, label="t",
            )  # fmt: skip
    finally:
        type(model).supports_gradient_checkpointing = True


def test_bfloat16_trains_near_float32_and_keeps_its_weights_in_float32(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    # In one process, as the steps of a recipe are: the second has another precision.
    _, wide = trained(folder, tmp_path / "wide", examples)
    model, narrow = trained(folder, tmp_path / "narrow", examples, precision="bfloat16")
    assert narrow == pytest.approx(wide, rel=0.02)
    assert narrow != wide
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_float16_is_refused_on_the_cpu(
    folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="float16 needs a GPU or NPU"):
        trained(folder, tmp_path, examples, precision="float16")


def test_a_step_whose_scaled_gradient_overflows_is_taken_back(
    folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real scaler and real float16, which Accelerate has for GPUs only, on the CPU."""
    real = loop._accelerator

    def scaling(*args: Any) -> Any:
        found = real(*args)
        found.native_amp, found.state._mixed_precision = True, "fp16"
        found.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36, backoff_factor=2.0**-26)
        return found

    monkeypatch.setattr(loop, "_accelerator", scaling)
    trained(folder, tmp_path, examples, lr_schedule="constant", warmup_share=0.0)
    lines = logged_in(tmp_path)
    assert lines[0]["skipped"] == 1.0
    assert "grad_norm" not in lines[0]
    assert lines[1]["loss"] == lines[0]["loss"]
    assert lines[-1]["grad_norm"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]
