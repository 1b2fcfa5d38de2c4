"""Stage `distill`: the student learns from the stored targets, at the speed of SFT."""

from collections.abc import Mapping

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.models.load import load_for_training, save_student
from tutelage.recipe.tables import Distill
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import TargetRow, check_compatible
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest
from tutelage.train.batches import Example, epoch_order, plan_steps
from tutelage.train.loop import Plan, train
from tutelage.train.objectives import Distillation, loss_spec


def run(config: Distill, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train on every stored response; returns the last step's loss and its parts.

    Raises ArtifactError when the store was made with another tokenizer or chat template.
    """
    reader = TargetReader(inputs["targets"].shards())
    temperature = reader.meta.temperature
    spec = loss_spec(config, temperature=temperature)  # one that cannot be raises first
    loaded = load_for_training(inputs["model"], device=work.device)
    check_compatible(
        reader.meta, tokenizer=tokenizer_digest(loaded.directory),
        vocab_size=loaded.model.config.vocab_size,
        chat_template=ChatFormat.from_tokenizer(loaded.tokenizer).fingerprint,
    )  # fmt: skip
    rows = list(reader)
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    steps = [
        step
        for epoch in range(config.epochs)
        for step in plan_steps(
            lengths, epoch_order(len(rows), seed=config.seed, epoch=epoch),
            pack_tokens=config.pack_tokens, batch_tokens=config.batch_tokens,
        )
    ]  # fmt: skip
    plan = Plan(
        load=lambda index: _example(rows[index], config.first_tokens),
        name=lambda index: rows[index].id, steps=steps,
    )  # fmt: skip
    objective = Distillation(spec, temperature, lambda index: rows[index].targets)
    last = train(loaded.model, plan, objective, config, work, device=loaded.device, label="distill")
    save_student(loaded, work.path / "model")
    return {
        "steps": len(steps[: config.max_steps or None]),
        "rows": len(rows),
        **{name: value for name, value in last.items() if name != "grad_norm"},
    }


def _example(row: TargetRow, first_tokens: int) -> Example:
    """Prompt and response as sampled; the response's (first) tokens are targets, its end too."""
    response = row.response_ids[: first_tokens or None]
    ids = np.concatenate([row.prompt_ids, response])
    mask = np.zeros(len(ids), bool)
    mask[len(row.prompt_ids) :] = True
    return Example(ids, mask)
