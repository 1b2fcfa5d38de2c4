"""The one training loop, for SFT and distillation alike: the objective is an argument.

Losses are summed over the targets of a whole optimizer step and divided once by their count. The
order of examples, the packing and the schedule follow from the seed and the lengths, so a run that
was killed goes on from its checkpoint and ends with the same bits (on one CPU set-up). Several
processes part each step's rows between them (`team`), and differ from one by rounding only.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import EngineError
from tutelage.core.progress import Bar
from tutelage.models.load import BackboneAndHead, backbone_and_head
from tutelage.recipe.training import Training
from tutelage.train import attention, checkpoint, heldout, optim
from tutelage.train.average import averaging, stored
from tutelage.train.batches import Example, PackedBatch, PackedRow, pack, stack
from tutelage.train.team import Joined, joined, whole
from tutelage.train.trackers import tracking

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
    watch: Callable[[int, int], Seen] | None = None
    """Looks at the model after step `done` of `steps`. It must follow from the model alone, so that
    a resumed run stops where one that was not killed does."""
    held_out: Sequence[Sequence[int]] = ()
    """Packed rows of examples that are not learnt from, whose loss is looked at."""
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
        self.way = attention.choose(model, backbone_and_head(model).backbone)

    def forward(self, batch: PackedBatch, device: torch.device) -> BatchLoss:
        """Hidden states of the rows, then the objective on those that predict a target."""
        head = backbone_and_head(self.model)
        return self._objective(self.way.hidden(head.backbone, batch, device), head, batch)


def train(
    model: nn.Module, plan: Plan, objective: Objective, config: Training, work: WorkDir,
    *, device: torch.device, label: str, before: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train `model` in place over its part of the plan's steps; returns the last step's averages.

    `before` is the folder of the artifact that the model comes from: the later part of a schedule
    goes on with the moments that the part before it left there.
    Raises EngineError with the rows of the batch when the loss or a gradient is not finite.
    """
    with joined(work.team, device) as team:
        return _train(team, model, plan, objective, config, work, device, label, before)


def _train(
    team: Joined, model: nn.Module, plan: Plan, objective: Objective, config: Training,
    work: WorkDir, device: torch.device, label: str, before: Path | None,
) -> dict[str, float]:  # fmt: skip
    accelerator = _accelerator(config, device)
    plan = plan.part(config)
    if config.gradient_checkpointing:
        _recompute_activations(model)
    ours = Trainee(model, objective)
    _check_way(team, ours.way)
    if ours.way.note:
        work.reporter.say(ours.way.note)
    trainee = team.wrap(ours, model)  # first: it may shard the parameters
    optimizer = optim.adamw(model, lr=config.lr, weight_decay=config.weight_decay)
    folder = work.scratch("checkpoints")
    found = team.texts(str(checkpoint.newest(folder) or ""))[0]  # rank 0's, whose folder is kept
    position = checkpoint.load(Path(found), model, optimizer) if found else None
    if position is None:
        position = checkpoint.Position(0, 0, 0.0)
        if config.schedule[0] > 0:
            _go_on(None if config.lora else before, model, optimizer, work)
    average = averaging(model, config, steps=len(plan.steps))
    if average and found:
        average.load(Path(found))
    best = heldout.Best(work.scratch("best"), model, team)
    trainee, optimizer = accelerator.prepare(trainee, optimizer)
    model.train()
    saved = started = time.monotonic()
    figures: dict[str, float] = {}
    averages: dict[str, float] = {}
    steps = plan.steps
    _check_team(team, steps, config)
    total = sum(len(_rows_of(step)) for step in steps)
    seen = sum(len(_rows_of(step)) for step in steps[: position.step])
    with (
        _Log(work.path / METRICS, position.step) as log,
        work.reporter.bar(total, label, unit="examples", done=seen) as bar,
        tracking(work.tracking if team.leads else None, begun=position.step) as track,
    ):
        for number in range(position.step, len(steps)):
            step = steps[number]
            passes = _passes(team, step, plan, config)
            lr = plan.lr_scale(number) * optim.rate(
                plan.first + number, steps=plan.whole, config=config
            )
            averages, tokens = _step(
                accelerator, team, trainee, optimizer, passes, lr, config, device, plan
            )
            tokens += position.trained_tokens
            position = replace(position, step=number + 1, trained_tokens=tokens)
            if average:
                average.update(number + 1)
            facts = {"step": number + 1, **plan.facts(number), "lr": lr, "tokens": tokens}
            look = Seen()
            if plan.watch:
                with team.readable(trainee):
                    look = plan.watch(number + 1, len(steps))
            figures, gained = dict(look.figures), False
            if plan.held_out and heldout.is_due(number + 1, len(steps), config.evaluations):
                passes = _passes(team, plan.held_out, plan, config)
                with average.in_place() if average else contextlib.nullcontext():
                    figures[heldout.HELD_OUT_LOSS] = loss = heldout.mean_loss(
                        trainee, passes, team, device=device, autocast=accelerator.autocast
                    )
                    position = heldout.told(position, loss)
                    gained = config.keep == "best" and position.best_step == number + 1
                    if gained:
                        best.save(number + 1)
            entry = facts | averages | figures
            log.write(entry)
            track(entry)
            _show(bar, len(_rows_of(step)), averages)
            tired = 0 < config.patience <= position.looks_since and number + 1 < len(steps)
            if tired:
                work.reporter.say(_tired(position, len(steps)))
            # Without a checkpoint: a resumed run looks here again.
            if team.decided(look.stop or tired):
                break
            due = team.decided(time.monotonic() - saved >= config.checkpoint_minutes * 60)
            if (due or gained) and number + 1 < len(steps):
                spent = position.seconds + time.monotonic() - started
                position = replace(position, seconds=spent)
                log.flush()  # first: a kill just after the checkpoint must not lose its lines
                checkpoint.save(
                    folder, model, _inner(optimizer), position, leads=team.leads,
                    average=stored(average),
                )  # fmt: skip
                best.drop_others(position.best_step)
                saved = started = time.monotonic()
    model.eval()
    if config.schedule[1] < 1 and not config.lora:  # the next part has adapters of its own
        checkpoint.save_moments(work.path / MOMENTS, model, _inner(optimizer), leads=team.leads)
    if average and average.has_any:
        average.apply()
    elif average:
        work.reporter.say("  it ended before the first snapshot of average_last: the weights as is")
    team.release(model)
    if config.keep == "best" and position.best_step < position.step:
        best.restore(position.best_step)
        work.reporter.say(f"  kept the weights of step {position.best_step}, the best held-out")
    work.commit(
        "train", seconds=position.seconds + time.monotonic() - started,
        tokens={"trained": position.trained_tokens},
    )  # fmt: skip
    return averages | _held_out_figures(position, figures, config)


def _accelerator(config: Training, device: torch.device) -> Accelerator:
    """Raises EngineError for a precision that the device cannot train in."""
    if config.precision == "float16" and device.type == "cpu":
        raise EngineError(
            "precision = float16 needs a GPU or NPU, and this device is the CPU; take bfloat16"
        )
    AcceleratorState._reset_state()  # a step before may have had another precision
    return Accelerator(mixed_precision=_mixed(config.precision), cpu=device.type == "cpu")


def _recompute_activations(model: nn.Module) -> None:
    """Let the model keep only what enters each layer. Raises EngineError where it cannot."""
    known_as = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new, old
    enable: Any = next((getattr(model, name) for name in known_as if hasattr(model, name)), None)
    try:
        enable({"use_reentrant": False})
    except (TypeError, ValueError) as error:  # not a transformers model, or one without it
        raise EngineError(
            f"{type(model).__name__} has no gradient checkpointing ({error}); set "
            "gradient_checkpointing = false, and pack_tokens lower"
        ) from None


def _tired(position: checkpoint.Position, steps: int) -> str:
    return (
        f"  stopped after step {position.step} of {steps}: {position.looks_since} looks without a "
        f"gain on the held-out rows (best {position.best_loss:.4f} after step "
        f"{position.best_step})"
    )


def _held_out_figures(
    position: checkpoint.Position, last: Mapping[str, float], config: Training
) -> dict[str, float]:
    """Of the weights that are kept, for a summary."""
    if config.keep == "best":
        return {heldout.HELD_OUT_LOSS: position.best_loss, heldout.BEST_STEP: position.best_step}
    name = heldout.HELD_OUT_LOSS
    return {name: last[name]} if name in last else {}


def _go_on(
    before: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, work: WorkDir
) -> None:
    """Take over the moments of the part before; without them they begin at 0, as in any step."""
    if before and (before / MOMENTS).is_file():
        checkpoint.load_moments(before / MOMENTS, model, optimizer)
    else:
        work.reporter.say("  the model brings no moments of its optimizer: they begin anew")


def _check_team(team: Joined, steps: Sequence[Sequence[Sequence[int]]], config: Training) -> None:
    """Raises EngineError for a team that this training cannot use."""
    examples: set[int] = set()
    for step in steps:
        examples.update(_rows_of(step))
        if len(examples) >= team.team.size:
            break
    else:
        raise EngineError(
            f"{team.team.size} processes for {len(examples)} examples; set runtime.processes to "
            f"{max(1, len(examples))} at most"
        )
    if not team.alone and team.team.sharding == "fsdp" and config.precision == "float16":
        raise EngineError(
            "float16 scales its loss, which shards cannot agree on; set precision = bfloat16, or "
            "runtime.sharding = ddp"
        )


def _check_way(team: Joined, way: attention.Way) -> None:
    """Raises EngineError where ranks would not come to the same layers equally often."""
    if not team.alone and team.team.sharding == "fsdp" and way.kind == "alone":
        raise EngineError(
            "the examples of a packed row mix in this model, so it reads them one a row, which "
            "shards cannot; set runtime.sharding = ddp"
        )


Passes = Sequence[tuple[Sequence[PackedRow], float]]
"""Packed rows of each forward pass of a step, and whether they count: 1 or 0."""


def _passes(team: Joined, step: Sequence[Sequence[int]], plan: Plan, config: Training) -> Passes:
    """This rank's part of a step: the only rows it loads.

    All ranks make as many passes, since they wait for each other in each; a rank without enough
    rows fills up with one that counts nothing.
    """

    def packed(row: Sequence[int]) -> PackedRow:
        return pack([_cut(plan.load(i), config) for i in row], row)

    rows = [packed(row) for row in team.share(step)]
    size = config.rows_together
    passes = [(rows[first : first + size], 1.0) for first in range(0, len(rows), size)]
    lacking = -(-team.most(len(step)) // size) - len(passes)
    if lacking:
        passes += [(rows[:1] or [packed(step[0][:1])], 0.0)] * lacking
    return passes


def _step(
    accelerator: Accelerator, team: Joined, trainee: nn.Module, optimizer: Any, passes: Passes,
    lr: float, config: Training, device: torch.device, plan: Plan,
) -> tuple[dict[str, float], int]:  # fmt: skip
    """One optimizer step over its packed rows; the loss is divided once, by all its targets.

    Returns the step's means and its tokens, of all ranks.
    """
    rows = [row for rows, counts in passes if counts for row in rows]
    tokens, targets = team.sums(
        [sum(len(row.ids_T) for row in rows), sum(len(row.labels_N) for row in rows)]
    )
    sums: dict[str, list[float]] = {}
    broken: list[PackedRow] = []
    for number, (together, counts) in enumerate(passes):
        batch = stack(together)
        with team.gathering(trainee, last=number + 1 == len(passes)):
            with accelerator.autocast():
                out = trainee(batch, device)
            # Gradients are averaged over the ranks, hence their number.
            loss = out.loss_sum / max(1, targets) * (counts * team.team.size)
            if not math.isfinite(float(loss.detach())):
                broken += together  # told below: the others wait for this backward
            accelerator.backward(loss)
        logged = {"loss": (out.loss_sum.detach(), len(batch.labels_N)), **out.sums}
        for name, (value, count) in logged.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += counts * float(value)
            total[1] += counts * float(count)
    *flat, bad = team.sums([*(part for pair in sums.values() for part in pair), len(broken)])
    totals = dict(zip(sums, zip(flat[::2], flat[1::2], strict=True), strict=True))
    if bad:
        raise _not_finite("loss", totals["loss"][0], team.texts(_names(broken, plan)))
    clipped = accelerator.clip_grad_norm_(trainee.parameters(), config.clip_norm)
    assert clipped is not None  # only under DeepSpeed
    norm = float(whole(clipped))
    # float16 scales its loss up until a gradient overflows, and takes that step back.
    scaler = accelerator.scaler
    overflown = not math.isfinite(norm) and scaler is not None and scaler.get_scale() > 1
    if not math.isfinite(norm) and not overflown:
        raise _not_finite("gradient", norm, team.texts(_names(rows, plan)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means = {name: value / max(1.0, count) for name, (value, count) in totals.items()}
    return means | ({"skipped": 1.0} if overflown else {"grad_norm": norm}), int(tokens)


def _names(rows: Sequence[PackedRow], plan: Plan) -> str:
    names = [plan.name(index) for row in rows for index in row.examples]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _not_finite(what: str, value: float, names: Sequence[str]) -> EngineError:
    """Of all ranks' rows, for each of them to raise."""
    shown = ", ".join(filter(None, names))
    return EngineError(f"the {what} is {value}; look at these rows or lower lr: {shown}")


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
