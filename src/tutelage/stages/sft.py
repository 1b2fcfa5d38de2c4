"""Stage `sft`: supervised fine-tuning on conversations, one or several data steps mixed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.core.errors import DataError
from tutelage.models.load import load_for_training, save_student
from tutelage.recipe.tables import Sft
from tutelage.records import count_rows, read_rows
from tutelage.text.chat import ChatFormat
from tutelage.train.batches import Example, epoch_order, mixed_order, plan_steps
from tutelage.train.loop import Plan, train
from tutelage.train.objectives import CrossEntropy


@dataclass(frozen=True)
class _Rendered:
    example: Example
    id: str
    mode: str


def run(config: Sft, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train the model on the assistants' tokens; returns the last loss and token counts."""
    loaded = load_for_training(inputs["model"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    sources = [
        list(_rendered(chat, artifact, config.pack_tokens)) for artifact in several(inputs, "data")
    ]
    rows = [row for source in sources for row in source]
    if not rows or not all(sources):
        raise DataError("a data step has no row with a target within pack_tokens; raise it")
    plan = Plan(
        load=lambda index: rows[index].example,
        name=lambda index: rows[index].id,
        steps=_steps(config, [len(source) for source in sources], rows),
    )
    last = train(
        loaded.model, plan, CrossEntropy(), config, work, device=loaded.device, label="sft"
    )
    save_student(loaded, work.path / "model")
    read = sum(count_rows(artifact.shards()) for artifact in several(inputs, "data"))
    if read > len(rows):
        work.reporter.say(f"  {read - len(rows)} rows had no target within pack_tokens: left out")
    reasoning = sum(row.mode == "reasoning" for row in rows)
    return {
        "loss": last["loss"],
        "steps": len(plan.steps[: config.max_steps or None]),
        "rows": len(rows),
        "left_out": read - len(rows),
        "reasoning_share": reasoning / len(rows),
    }


def _steps(config: Sft, counts: Sequence[int], rows: Sequence[_Rendered]) -> list[list[list[int]]]:
    lengths = [len(row.example.ids_L) for row in rows]
    steps = []
    for epoch in range(config.epochs):
        order = (
            mixed_order(counts, config.mixture, seed=config.seed, epoch=epoch)
            if config.mixture
            else epoch_order(len(rows), seed=config.seed, epoch=epoch)
        )
        steps += plan_steps(
            lengths, order, pack_tokens=config.pack_tokens, batch_tokens=config.batch_tokens
        )
    return steps


def _rendered(chat: ChatFormat, data: Artifact, limit: int) -> Iterator[_Rendered]:
    """The conversations of a data step as ids and targets; those without a target are left out."""
    for row in read_rows(data.shards()):
        if row["messages"][-1]["role"] != "assistant":
            raise DataError(
                f"row {row['id']} ends with the user's message: a prompt cannot be learnt from; "
                "let a synthesize step answer it first"
            )
        rendered = chat.render(row["messages"])
        example = Example(rendered.ids, rendered.mask)
        if not row["complete"]:  # cut off: the end of turn that was rendered was never written
            end = int(np.flatnonzero(example.mask_L)[-1])
            example = Example(example.ids_L[:end], example.mask_L[:end])
        example = Example(example.ids_L[:limit], example.mask_L[:limit])
        if example.mask_L.any():
            yield _Rendered(example, row["id"], row["mode"])
