"""Stage `sft`: supervised fine-tuning on conversations, mixed by data step or by a curriculum."""

import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.core.errors import DataError
from tutelage.core.files import write_json
from tutelage.models.adapters import load_trainee, save_trainee
from tutelage.recipe.training import Sft
from tutelage.text.chat import ChatFormat
from tutelage.train import curriculum, curriculum_summary
from tutelage.train.batches import epoch_order, mixed_order, plan_steps
from tutelage.train.conversations import Conversations, load_conversations
from tutelage.train.heldout import BEST_STEP, HELD_OUT_LOSS
from tutelage.train.loop import METRICS, Plan, StepStage, train
from tutelage.train.objectives import CrossEntropy

CURRICULUM = "curriculum.json"

Steps = list[list[list[int]]]
"""Optimizer steps -> packed rows -> rows of the data."""


def run(config: Sft, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train the model on the assistants' tokens; returns the last loss and counts.

    With a curriculum, what was met in its stages is kept in `curriculum.json`.
    """
    loaded = load_trainee(inputs["model"], config, work)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    sources = [artifact.shards() for artifact in several(inputs, "data")]
    rows = load_conversations(chat, sources, config.pack_tokens)
    if not all(rows.counts):
        raise DataError("a data step has no row with a target within pack_tokens; raise it")
    if rows.left_out:
        work.reporter.say(f"  {rows.left_out} rows had no target within pack_tokens: left out")
    shares: dict[str, float] = {}
    if config.curriculum:
        order = _order(config, rows)
        plan = _by_stages(config, rows, order)
        shares = _keep_record(config, rows, order, plan, work)
    else:
        plan = _by_epochs(config, rows)
    if config.held_out:
        plan = _with_held_out(plan, config, chat, rows, inputs["held_out"], work)
    last = train(
        loaded.model, plan, CrossEntropy(), config, work, device=loaded.device, label="sft",
        before=inputs["model"].path,
    )  # fmt: skip
    sizes = save_trainee(loaded, config, work)
    log = work.path / METRICS
    done = len(log.read_text().splitlines()) if config.patience else None
    return {
        "loss": last["loss"],
        **{name: last[name] for name in (HELD_OUT_LOSS, BEST_STEP) if name in last},
        **plan.counts(config, done=done),
        **sizes,
        "rows": len(rows.names),
        "left_out": rows.left_out,
        "reasoning_share": rows.modes.count("reasoning") / len(rows.names),
        **shares,
    }


def _by_epochs(config: Sft, rows: Conversations) -> Plan:
    steps: Steps = []
    for epoch in range(config.whole_epochs):
        order = (
            mixed_order(rows.counts, config.mixture, seed=config.seed, epoch=epoch)
            if config.mixture
            else epoch_order(len(rows.names), seed=config.seed, epoch=epoch)
        )
        steps += _packed(config, rows, order)
    return Plan(rows.example, rows.names.__getitem__, steps)


def _with_held_out(
    plan: Plan, config: Sft, chat: ChatFormat, rows: Conversations, held_out: Artifact,
    work: WorkDir,
) -> Plan:  # fmt: skip
    """The plan with the rows of another data step behind its own, for the loop to look at."""
    held = load_conversations(chat, [held_out.shards()], config.pack_tokens)
    if not held.names:
        raise DataError("held_out has no row with a target within pack_tokens; raise it")
    count = len(rows.names)
    learnt = {rows.example(index).ids_L.tobytes() for index in range(count)}
    if same := sum(held.example(i).ids_L.tobytes() in learnt for i in range(len(held.names))):
        work.reporter.say(
            f"  {same} of {len(held.names)} held-out rows are learnt from too: their loss says "
            "little; take them out of data"
        )
    packed = plan_steps(
        held.lengths_N.tolist(), np.arange(len(held.names)), pack_tokens=config.pack_tokens,
        batch_tokens=sys.maxsize,
    )  # fmt: skip
    return replace(
        plan,
        load=lambda i: rows.example(i) if i < count else held.example(i - count),
        name=lambda i: rows.names[i] if i < count else held.names[i - count],
        held_out=[[count + index for index in row] for row in packed[0]],
    )


def _by_stages(config: Sft, rows: Conversations, order: curriculum.Plan) -> Plan:
    """Steps in the curriculum's order; a step ends with its stage, since the next has its own rate.

    So a stage's last step may be smaller than the others, as an epoch's is without a curriculum.
    """
    steps: Steps = []
    stages: list[StepStage] = []
    for number, stage in enumerate(config.curriculum):
        part = _packed(config, rows, order.order_E[order.stage_E == number])
        steps += part
        stages += [StepStage(number + 1, stage.lr_scale)] * len(part)
    return Plan(rows.example, rows.names.__getitem__, steps, stages)


def _packed(config: Sft, rows: Conversations, order: np.ndarray) -> Steps:
    lengths = rows.lengths_N.tolist()
    return plan_steps(
        lengths, order, pack_tokens=config.pack_tokens, batch_tokens=config.batch_tokens,
        batch_examples=config.batch_examples,
    )  # fmt: skip


def _order(config: Sft, rows: Conversations) -> curriculum.Plan:
    return curriculum.plan_order(
        config.curriculum, modes_N=rows.modes, difficulty_N=rows.difficulty_N,
        examples=config.epochs * len(rows.names), seed=config.seed,
    )  # fmt: skip


def _keep_record(
    config: Sft, rows: Conversations, order: curriculum.Plan, plan: Plan, work: WorkDir
) -> dict[str, float]:
    """Write `curriculum.json` over the steps that run; returns the modes' shares of examples."""
    examples_S = [sum(map(len, step)) for step in plan.steps[: config.max_steps or None]]
    met = order.first(sum(examples_S))
    if (reached := int(met.stage_E[-1]) + 1) < len(config.curriculum):
        work.reporter.say(
            f"  max_steps = {config.max_steps} ends in stage {reached} of {len(config.curriculum)}"
        )
    parts = curriculum_summary.summary(met, modes_N=rows.modes, tokens_N=rows.lengths_N)
    course = curriculum_summary.series(
        met, modes_N=rows.modes, difficulty_N=rows.difficulty_N, windows=curriculum_summary.WINDOWS
    )
    record = curriculum_summary.record(parts, course, examples_S=examples_S)
    write_json(work.path / CURRICULUM, record)
    shares = curriculum_summary.example_shares(parts)
    return {f"example_share.{mode}": share for mode, share in shares.items()}
