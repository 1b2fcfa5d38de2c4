"""Stage `distill`: the student learns from the stored targets, at the speed of SFT."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.models.load import load_for_training, save_student
from tutelage.recipe.training import Distill
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import TargetRow, TokenTargets, check_compatible
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest
from tutelage.train.batches import Example, epoch_order, plan_steps, position_budget
from tutelage.train.conversations import Rendered, rendered_rows
from tutelage.train.loop import Plan, train
from tutelage.train.objectives import Distillation, loss_spec


def run(config: Distill, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Train on every stored response; returns the last step's loss and its parts.

    The store is read from disk as it is needed, a few row groups in memory at a time.
    Raises ArtifactError when the store was made with another tokenizer or chat template.
    """
    reader = TargetReader(inputs["targets"].shards())
    spec = loss_spec(config, reader.meta)  # one that cannot be raises first
    loaded = load_for_training(inputs["model"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    check_compatible(
        reader.meta, tokenizer=tokenizer_digest(loaded.directory),
        vocab_size=loaded.model.config.vocab_size, chat_template=chat.fingerprint,
    )  # fmt: skip
    budget = partial(
        position_budget, first_tokens=config.first_tokens, first_share=config.first_share
    )
    text: Sequence[Rendered] = []
    if "text" in inputs:
        text = list(rendered_rows(chat, inputs["text"].shards(), config.pack_tokens))
        if not text:
            raise DataError("text has no row with a target within pack_tokens; raise it")
    stored = len(reader)

    def load(index: int) -> Example:
        return text[index - stored].example if index >= stored else _example(reader, index, budget)

    def targets(index: int) -> TokenTargets | None:
        return None if index >= stored else reader.row(index).targets

    def name(index: int) -> str:
        return text[index - stored].id if index >= stored else reader.row(index).id

    plan = Plan(load=load, name=name, steps=_steps(config, reader, text, budget))
    objective = Distillation(spec, reader.meta.temperature, targets)
    last = train(loaded.model, plan, objective, config, work, device=loaded.device, label="distill")
    save_student(loaded, work.path / "model")
    return {
        **plan.counts(config.max_steps),
        "rows": stored,
        **({"text_rows": len(text)} if text else {}),
        **{name: value for name, value in last.items() if name != "grad_norm"},
    }


def _steps(
    config: Distill, reader: TargetReader, text: Sequence[Rendered], budget: partial[int]
) -> list[list[list[int]]]:
    """An epoch is every rollout once, in an order with locality, each beside a row of the text."""
    prompts_R, responses_R = reader.lengths()
    lengths = [
        prompt + budget(response)
        for prompt, response in zip(prompts_R.tolist(), responses_R.tolist(), strict=True)
    ]
    lengths += [len(row.example.ids_L) for row in text]
    steps: list[list[list[int]]] = []
    for epoch in range(config.epochs):
        order = reader.order(config.seed, epoch)
        if text:
            beside = epoch_order(len(text), seed=config.seed, epoch=epoch)
            order = np.stack([order, len(reader) + np.resize(beside, len(order))], 1).ravel()
        steps += plan_steps(
            lengths, order, pack_tokens=config.pack_tokens, batch_tokens=config.batch_tokens,
            batch_examples=config.batch_examples,
        )  # fmt: skip
    return steps


def _example(reader: TargetReader, index: int, budget: partial[int]) -> Example:
    """Prompt and response as sampled; the response's (first) tokens are targets, its end too."""
    row: TargetRow = reader.row(index)
    response = row.response_ids[: budget(len(row.response_ids))]
    ids = np.concatenate([row.prompt_ids, response])
    mask = np.zeros(len(ids), bool)
    mask[len(row.prompt_ids) :] = True
    return Example(ids, mask)
