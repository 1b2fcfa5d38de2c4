"""Stage `sft`: supervised fine-tuning on conversations, one or several data steps mixed."""

from collections.abc import Mapping, Sequence

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.core.errors import DataError
from tutelage.models.load import load_for_training, save_student
from tutelage.recipe.tables import Sft
from tutelage.records import count_rows
from tutelage.text.chat import ChatFormat
from tutelage.train.batches import epoch_order, mixed_order, plan_steps
from tutelage.train.conversations import Rendered, rendered_rows
from tutelage.train.loop import Plan, train
from tutelage.train.objectives import CrossEntropy


def run(config: Sft, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train the model on the assistants' tokens; returns the last loss and token counts."""
    loaded = load_for_training(inputs["model"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    sources = [
        list(rendered_rows(chat, artifact.shards(), config.pack_tokens))
        for artifact in several(inputs, "data")
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


def _steps(config: Sft, counts: Sequence[int], rows: Sequence[Rendered]) -> list[list[list[int]]]:
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
