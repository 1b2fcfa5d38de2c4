"""Ids: one vocabulary for student and teacher, where an answer ends, and what think markers are."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tutelage.core.errors import DataError, ModelError
from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.doctor.template import Voice, voices
from tutelage.models.inspect import read_config
from tutelage.recipe.base import Step
from tutelage.text.tokenizer import tokenizer_digest, vocab_size

MARKER = re.compile(r"\s*(<[^<>\s]+>|\[/?[A-Z_]+\])")
"""How a marker that ends a turn is mostly written."""
CHAIN, ANSWER = "First this,\nthen that: 3 < 4.", "So it is **so**."


def check(case: Case) -> list[Finding]:
    """Every check of this file."""
    found = list(_vocabularies(case))
    for voice in voices(case):
        found += [_eos(voice), _end_of_turn(voice), _think(case, voice)]
    return found


def _vocabularies(case: Case) -> Iterator[Finding]:
    seen = set()
    for pair in case.taught():
        roots = case.root(pair.student), case.root(pair.teacher)
        if roots in seen:
            continue
        seen.add(roots)
        yield _vocabulary(case, *roots)
    if case.mismatch and not seen:
        yield against("vocabulary", case.refusal, "take models of one family")


def _vocabulary(case: Case, student: str, teacher: str) -> Finding:
    name = "vocabulary"
    if student == teacher:
        return ok(name, f"student and teacher both have the tokenizer of {student}")
    found = {model: case.directory(model) for model in (student, teacher)}
    folders = [folder for folder in found.values() if folder]
    if len(folders) < 2:
        missing = next(model for model, folder in found.items() if folder is None)
        return unchecked(name, f"{missing} is not on this machine yet")
    sizes = [vocab_size(folder) for folder in folders]
    if tokenizer_digest(folders[0]) != tokenizer_digest(folders[1]):
        return against(
            name, f"{student} and {teacher} have other ids for the same text ({sizes[0]:,} and "
            f"{sizes[1]:,} ids): a token of one means nothing to the other",
            "take a teacher of the student's family, or learn from its text (sft)",
        )  # fmt: skip
    logits = [_config(folder).get("vocab_size") for folder in folders]
    if logits[0] != logits[1]:
        return against(
            name, f"{student} and {teacher} have the same {sizes[0]:,} ids, but {logits[0]:,} and "
            f"{logits[1]:,} logits: one of them is padded",
            "resize the embeddings of one of them to the other's size",
        )  # fmt: skip
    return ok(name, f"{student} and {teacher} share {sizes[0]:,} ids and {logits[0]:,} logits")


def _eos(voice: Voice) -> Finding:
    """The ids at which other runtimes stop are those that the tokenizer means."""
    name = f"eos of {voice.name}"
    eos = voice.eos
    if eos is None:
        return warn(
            name, "the tokenizer names no EOS token", "set eos_token in tokenizer_config.json"
        )
    said = {file: ids for file, ids in _stops(voice.directory).items() if ids}
    wrong = [file for file, ids in said.items() if eos not in ids]
    if not wrong:
        return ok(name, f"{voice.text(eos)} ({eos}) in the tokenizer and in {' and '.join(said)}")
    text = f"the tokenizer's is {voice.text(eos)} ({eos}), " + ", ".join(
        f"{file} says {', '.join(f'{voice.text(i)} ({i})' for i in said[file])}" for file in wrong
    )
    do = f"write {eos} as eos_token_id into {' and '.join(wrong)}"
    return (against if len(wrong) == len(said) else warn)(name, text, do)


def _end_of_turn(voice: Voice) -> Finding:
    """The classic length explosion: what ends a turn is not what stops an answer."""
    name = f"end of turn of {voice.name}"
    if voice.chat is None:
        return unchecked(name, "its chat template cannot be used")
    chat = voice.chat
    after = voice.render([*voice.question, {"role": "assistant", "content": "Yes."}])
    spelled = MARKER.match(after.rpartition("Yes.")[2])
    added = {token.content for token in voice.tokenizer.added_tokens_decoder.values()}
    if spelled and spelled[1] not in added:
        pieces = len(voice.tokenizer.encode(spelled[1], add_special_tokens=False))
        return against(
            name, f"the template ends a turn with {spelled[1]!r}, which is {pieces} tokens of text "
            "and stops nothing: answers run on to their limit",
            f"add {spelled[1]} to the tokenizer as a special token, or end turns with EOS",
        )  # fmt: skip
    end = chat.end_of_turn_id
    stops = {i for ids in _stops(voice.directory).values() for i in ids}
    stops |= set() if voice.eos is None else {voice.eos}
    if end not in stops:
        return against(
            name, f"{voice.text(end)} ({end}) ends a turn, but neither EOS nor generation_config "
            f"stops there ({', '.join(str(i) for i in sorted(stops))}): the exported "
            "model answers to its limit",
            f"add {end} to eos_token_id in generation_config.json and config.json",
        )  # fmt: skip
    return ok(name, f"{voice.text(end)} ({end}), one token, and an answer stops there")


def _think(case: Case, voice: Voice) -> Finding:
    name = f"think markers of {voice.name}"
    if voice.chat is None:
        return unchecked(name, "its chat template cannot be used")
    markers = voice.chat.markers
    counts = {
        marker: len(voice.tokenizer.encode(marker, add_special_tokens=False))
        for marker in (markers.opening, markers.closing)
    }
    message: Any = {"role": "assistant", "content": ANSWER, "thinking": CHAIN}
    try:
        ids = voice.chat.response_ids(message)
        back = voice.chat.decode_response(ids, "reasoning")
    except DataError as error:
        return against(name, f"a reasoning answer cannot be written: {error}", "change the model")
    if back != (CHAIN, ANSWER):
        return against(
            name, f"a reasoning answer does not come back as it was written: {back!r}",
            "the tokenizer changes text; take another model, or fast mode only",
        )  # fmt: skip
    said = ", ".join(f"{marker} is {count} tokens" for marker, count in counts.items())
    if set(counts.values()) == {1}:
        return ok(name, "single tokens; a reasoning answer comes back as it was written")
    reasons = any(getattr(step, "mode", "fast") == "reasoning" for _, step in case.steps(Step))
    if 1 in counts.values():
        return against(name, f"{said}: one is a token and the other text", "add both to it")
    if reasons:
        return warn(
            name, f"{said}: text, which the student must learn to write in pieces; a reasoning "
            "answer comes back as it was written",
            "expect some unclosed chains; a model with the markers as tokens learns them sooner",
        )  # fmt: skip
    return ok(name, f"{said}, which matters little: no step reasons")


def _stops(directory: Path) -> dict[str, list[int]]:
    """Ids at which the files say to stop, by file."""
    generation = directory / "generation_config.json"
    found = {"config.json": _config(directory).get("eos_token_id")}
    if generation.exists():
        try:
            found[generation.name] = json.loads(generation.read_text()).get("eos_token_id")
        except ValueError as error:
            raise ModelError(f"{generation} is not JSON ({error}); fetch it again") from None
    return {
        file: list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
        for file, ids in found.items()
    }


def _config(directory: Path) -> dict[str, Any]:
    config = dict(read_config(directory))
    return {**config, **config.get("text_config", {})}
