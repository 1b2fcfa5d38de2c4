"""The one training loop, for SFT and distillation alike: the objective is an argument.

Losses are summed over the targets of a whole optimizer step and divided once by their count. The
order of examples, the packing and the schedule follow from the seed and the lengths, so a run that
was killed goes on from its checkpoint and ends with the same bits (on one CPU set-up).
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import EngineError
from tutelage.core.progress import Bar
from tutelage.models.load import BackboneAndHead, backbone_and_head
from tutelage.recipe.training import Training
from tutelage.train import checkpoint, optim
from tutelage.train.batches import Example, PackedBatch, PackedRow, pack, stack

METRICS = "metrics.jsonl"
MOMENTS = "moments.safetensors"
"""The optimizer's state beside the model, where a later step goes on with the same schedule."""


class Objective(Protocol):
    """A loss over the targets of packed rows."""

    def __call__(
        self, hidden_ND: Tensor, head: BackboneAndHead, batch: PackedBatch
    ) -> "BatchLoss": ...


@dataclass(frozen=True)
class BatchLoss:
    """Summed loss of rows (with gradient), and what is worth logging beside it."""

    loss_sum: Tensor
    sums: Mapping[str, tuple[Tensor, Tensor | int]]
    """Detached sum of a figure, and over how many targets: the log shows their mean of a step."""


@dataclass(frozen=True)
class StepStage:
    """The stage of a curriculum that a step belongs to."""

    number: int
    """From 1, for the log."""
    lr_scale: float
    """Factor on the rate the schedule gives."""


@dataclass(frozen=True)
class Seen:
    """What a look at the model between two steps found."""

    figures: Mapping[str, float] = field(default_factory=dict)
    """For the log, beside the step's own."""
    stop: bool = False
    """Whether the training ends here."""


@dataclass(frozen=True)
class Plan:
    """What to train on: examples by index, and each step as packed rows of indices.

    Made for the whole training; `part` is what a step with a `schedule` of its own runs of it.
    """

    load: Callable[[int], Example]
    name: Callable[[int], str]
    """A row's id, for the message when a step goes wrong."""
    steps: Sequence[Sequence[Sequence[int]]]
    stages: Sequence[StepStage] = ()
    """Of each step; empty where there is no curriculum."""
    notes: Callable[[int], Mapping[str, int]] = lambda number: {}
    """Counts that the log keeps beside a step's figures, once its examples were loaded."""
    watch: Callable[[int, int], Seen] = lambda done, steps: Seen()
    """Looks at the model after step `done` of `steps`. It must follow from the model alone, so that
    a resumed run stops where one that was not killed does."""
    first: int = 0
    """Place of its first step in the whole training."""
    whole: int = 0
    """Steps of the whole training; 0: those that are here."""

    def part(self, config: Training) -> "Plan":
        """The steps that `config.schedule` and `config.max_steps` leave of a whole plan."""
        first, last, whole = config.steps_of_whole(len(self.steps))
        return replace(
            self, steps=self.steps[first:last], stages=self.stages[first:last], first=first,
            whole=whole,
        )  # fmt: skip

    def lr_scale(self, number: int) -> float:
        """Factor on the schedule's rate at step `number`."""
        return self.stages[number].lr_scale if self.stages else 1.0

    def facts(self, number: int) -> dict[str, int]:
        """What the log says of step `number` beside its figures."""
        stage = {"stage": self.stages[number].number} if self.stages else {}
        return {**stage, **self.notes(number)}

    def counts(self, config: Training, done: int | None = None) -> dict[str, int]:
        """Steps and examples of a run, for a summary: what a fair comparison must match.

        `done` where it was stopped after so many steps.
        """
        steps = self.part(config).steps[:done]
        return {"steps": len(steps), "examples": sum(len(_rows_of(step)) for step in steps)}


class Trainee(nn.Module):
    """Model and objective in one module, so that a distributed wrapper sees the whole forward."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, batch: PackedBatch, device: torch.device) -> BatchLoss:
        """Hidden states of the rows, then the objective on those that predict a target."""
        head = backbone_and_head(self.model)
        # No attention mask, but positions that restart: transformers derives the block mask.
        hidden_BTD = head.backbone(
            input_ids=torch.from_numpy(batch.ids_BT).to(device),
            position_ids=torch.from_numpy(batch.positions_BT).to(device),
            use_cache=False,
        ).last_hidden_state
        source_N = torch.from_numpy(batch.source_N).to(device)
        return self._objective(hidden_BTD.flatten(0, 1).index_select(0, source_N), head, batch)


def train(
    model: nn.Module, plan: Plan, objective: Objective, config: Training, work: WorkDir,
    *, device: torch.device, label: str, before: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train `model` in place over its part of the plan's steps; returns the last step's averages.

    `before` is the folder of the artifact that the model comes from: the later part of a schedule
    goes on with the moments that the part before it left there.
    Raises EngineError with the rows of the batch when the loss or a gradient is not finite.
    """
    accelerator = Accelerator(mixed_precision=_mixed(config.precision), cpu=device.type == "cpu")
    optimizer = optim.adamw(model, lr=config.lr, weight_decay=config.weight_decay)
    folder = work.scratch("checkpoints")
    position = checkpoint.restore(folder, model, optimizer)
    if position is None:
        position = checkpoint.Position(0, 0, 0.0)
        if config.schedule[0] > 0:
            _go_on(before, model, optimizer, work)
    trainee, optimizer = accelerator.prepare(Trainee(model, objective), optimizer)
    model.train()
    saved = started = time.monotonic()
    averages: dict[str, float] = {}
    plan = plan.part(config)
    steps = plan.steps
    total = sum(len(_rows_of(step)) for step in steps)
    seen = sum(len(_rows_of(step)) for step in steps[: position.step])
    with (
        _Log(work.path / METRICS, position.step) as log,
        work.reporter.bar(total, label, unit="examples", done=seen) as bar,
    ):
        for number in range(position.step, len(steps)):
            step = steps[number]
            rows = [pack([_cut(plan.load(i), config) for i in row], row) for row in step]
            lr = plan.lr_scale(number) * optim.cosine_lr(
                plan.first + number, steps=plan.whole, lr=config.lr, min_share=config.min_lr_share,
                warmup_share=config.warmup_share,
            )  # fmt: skip
            averages = _step(accelerator, trainee, optimizer, rows, lr, config, device, plan)
            tokens = position.trained_tokens + sum(len(row.ids_T) for row in rows)
            position = checkpoint.Position(number + 1, tokens, position.seconds)
            facts = {"step": number + 1, **plan.facts(number), "lr": lr, "tokens": tokens}
            look = plan.watch(number + 1, len(steps))
            log.write(facts | averages | dict(look.figures))
            _show(bar, len(_rows_of(step)), averages)
            if look.stop:  # without a checkpoint: a resumed run looks here again
                break
            due = time.monotonic() - saved >= config.checkpoint_minutes * 60
            if due and number + 1 < len(steps):
                spent = position.seconds + time.monotonic() - started
                position = checkpoint.Position(number + 1, tokens, spent)
                log.flush()  # first: a kill just after the checkpoint must not lose its lines
                checkpoint.save(folder, model, _inner(optimizer), position)
                saved = started = time.monotonic()
    model.eval()
    if config.schedule[1] < 1:
        checkpoint.save_moments(work.path / MOMENTS, model, _inner(optimizer))
    work.commit(
        "train", seconds=position.seconds + time.monotonic() - started,
        tokens={"trained": position.trained_tokens},
    )  # fmt: skip
    return averages


def _go_on(
    before: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, work: WorkDir
) -> None:
    """Take over the moments of the part before; without them they begin at 0, as in any step."""
    if before and (before / MOMENTS).is_file():
        checkpoint.load_moments(before / MOMENTS, model, optimizer)
    else:
        work.reporter.say("  the model brings no moments of its optimizer: they begin anew")


def _step(
    accelerator: Accelerator, trainee: nn.Module, optimizer: Any, rows: Sequence[PackedRow],
    lr: float, config: Training, device: torch.device, plan: Plan,
) -> dict[str, float]:  # fmt: skip
    """One optimizer step over its packed rows; the loss is divided once, by all its targets."""
    targets = sum(len(row.labels_N) for row in rows)
    sums: dict[str, list[float]] = {}
    for first in range(0, len(rows), config.rows_together):
        together = rows[first : first + config.rows_together]
        batch = stack(together)
        with accelerator.autocast():
            out = trainee(batch, device)
        loss = out.loss_sum / max(1, targets)
        _check_finite(float(loss.detach()), "loss", together, plan)
        accelerator.backward(loss)
        logged = {"loss": (out.loss_sum.detach(), len(batch.labels_N)), **out.sums}
        for name, (value, count) in logged.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(value)
            total[1] += float(count)
    clipped = accelerator.clip_grad_norm_(trainee.parameters(), config.clip_norm)
    assert clipped is not None  # only under DeepSpeed
    norm = float(clipped)
    _check_finite(norm, "gradient", rows, plan)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: value / max(1.0, count) for name, (value, count) in sums.items()}
    return means | {"grad_norm": norm}


def _check_finite(value: float, what: str, rows: Sequence[PackedRow], plan: Plan) -> None:
    if not math.isfinite(value):
        names = [plan.name(index) for row in rows for index in row.examples]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise EngineError(f"the {what} is {value}; look at these rows or lower lr: {shown}")


def _cut(example: Example, config: Training) -> Example:
    return Example(example.ids_L[: config.pack_tokens], example.mask_L[: config.pack_tokens])


def _rows_of(step: Sequence[Sequence[int]]) -> list[int]:
    return [index for row in step for index in row]


def _mixed(precision: str) -> str:
    return {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _show(bar: Bar, examples: int, averages: Mapping[str, float]) -> None:
    bar.note("  ".join(f"{k} {v:.3f}" for k, v in averages.items()))
    bar.advance(examples)


class _Log:
    """`metrics.jsonl`, one line a step; on resume, lines past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = path.read_text().splitlines()[:step] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._stream = path.open("a")

    def write(self, entry: Mapping[str, Any]) -> None:
        rounded = {k: round(v, 6) if isinstance(v, float) and k != "lr" else v
                   for k, v in entry.items()}  # fmt: skip
        self._stream.write(json.dumps(rounded) + "\n")

    def flush(self) -> None:
        self._stream.flush()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
