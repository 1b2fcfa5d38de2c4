"""Whether prompts and answers fit: into the model's context, and into a row of training."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tutelage.core.errors import DataError
from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.doctor.template import Voice, voices
from tutelage.models.inspect import read_config
from tutelage.recipe.tables import Sampling, Synthesize
from tutelage.recipe.training import Distill, Online
from tutelage.records import prompt_messages

MOST_PROMPTS = 300
FEW = 0.05


def check(case: Case) -> list[Finding]:
    """Every check of this file."""
    found: list[Finding] = []
    for name, step in case.steps(Sampling, Online):
        found += _context(case, name, step)
    for name, step in case.steps(Distill):
        found += _packing(case, name, step)
    return found


def _context(case: Case, name: str, step: Any) -> Iterator[Finding]:
    check = f"context of {name}"
    inputs = case.inputs(name)
    model = inputs.get("teacher") if isinstance(step, Synthesize) else inputs["model"]
    assert model is not None
    lengths = _lengths(case, model, inputs["prompts"], step.mode)
    if isinstance(lengths, str):
        yield unchecked(check, lengths)
        return
    context = _context_of(case, model)
    answer = step.max_tokens + getattr(step, "max_think_tokens", 0) * (step.mode == "reasoning")
    longest = int(max(lengths))
    if not context:
        yield unchecked(check, "the config names no context")
        return
    over = sum(length >= context for length in lengths)
    cut = sum(length + answer > context for length in lengths)
    if over:
        yield against(
            check, f"{over} of {len(lengths)} prompts are longer than the {context:,} tokens of "
            f"the context (the longest has {longest:,})",
            "filter them out: filters = [{ name = 'length', ... }] in the data step",
        )  # fmt: skip
    elif cut:
        yield (against if cut > FEW * len(lengths) else warn)(
            check, f"{cut} of {len(lengths)} prompts with an answer of {answer:,} tokens need more "
            f"than the {context:,} of the context (the longest prompt has {longest:,})",
            f"lower max_tokens to {max(1, context - longest):,}, or filter long prompts out",
        )  # fmt: skip
    else:
        yield ok(check, f"prompts up to {longest:,} tokens and {answer:,} for the answer: they fit")


def _packing(case: Case, name: str, step: Distill) -> Iterator[Finding]:
    """What is longer than a packed row is cut at its end, where an answer says when to stop."""
    source = case.asking(name)
    rollout = case.nodes[source].step
    if not isinstance(rollout, Sampling):
        return
    lengths = _lengths(
        case, case.inputs(source)["model"], case.inputs(source)["prompts"], rollout.mode
    )
    if isinstance(lengths, str):
        return
    cut = sum(length + rollout.max_tokens > step.pack_tokens for length in lengths)
    check = f"packing of {name}"
    if cut > FEW * len(lengths):
        yield warn(
            check, f"{cut} of {len(lengths)} prompts with a whole answer are longer than a packed "
            f"row of {step.pack_tokens:,} tokens: the ends of long answers are not trained on",
            f"pack_tokens = {int(max(lengths)) + rollout.max_tokens:,}",
        )  # fmt: skip
    else:
        yield ok(check, f"answers fit into rows of {step.pack_tokens:,} tokens")


def _lengths(case: Case, model: str, prompts: str, mode: str) -> Sequence[int] | str:
    """Tokens of the prompts, or why they are not known."""
    voice = voice_of(case, model)
    if voice is None or voice.chat is None:
        return f"the tokenizer of {model} is not here"
    rows = case.rows(prompts)
    if rows is None or not rows.records:
        return f"the rows of {prompts} are not here yet"
    kept = case.kept.setdefault("lengths", {})
    key = (voice.name, prompts, mode)
    if key not in kept:
        step = max(1, len(rows.records) // MOST_PROMPTS)
        try:
            kept[key] = np.array(
                [
                    len(voice.chat.prompt_ids(prompt_messages(row), mode))  # type: ignore[arg-type]
                    for row in rows.records[::step]
                ]
            )
        except DataError as error:
            return f"a prompt cannot be written: {error}"
    return kept[key]


def voice_of(case: Case, model: str) -> Voice | None:
    """How a model writes conversations; None until its tokenizer is here."""
    identity = case.identity(case.root(model))
    for voice in voices(case):
        if case.identity(case.root(_node(case, voice.name))) == identity:
            return voice
    return None


def _node(case: Case, name: str) -> str:
    return name if name in case.nodes else f"{name}:source"


def _context_of(case: Case, model: str) -> int:
    directory = case.directory(model)
    if directory is None:
        return 0
    config = dict(read_config(directory))
    return int({**config, **config.get("text_config", {})}.get("max_position_embeddings") or 0)
