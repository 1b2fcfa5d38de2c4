"""The models themselves, on a few of the recipe's own prompts: what a student could learn, and how
it answers.

A model that is not made yet is stood in for by the nearest one it comes from; a pruned one is cut
in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import psutil

from tutelage.core.artifact import Artifact, Site
from tutelage.core.errors import TutelageError
from tutelage.data.screening import find_loop
from tutelage.doctor.case import MOST_ROWS, Case, Pair
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.doctor.room import gigabytes
from tutelage.recipe.engines import HERE, EngineTable, Transformers
from tutelage.recipe.screening import Screen
from tutelage.recipe.tables import New, Prune, Rollout
from tutelage.recipe.training import Online
from tutelage.records import prompt_messages, read_rows

if TYPE_CHECKING:
    from tutelage.engines.base import Completion
    from tutelage.evals.compare import SequenceComparison
    from tutelage.models.load import Loaded

ANSWERS = 12
TOKENS = 64
PAIRS = 3
"""At most so many pairs are run: a recipe of many arms asks the same of each."""
CHUNK_BYTES = 64 * 2**20
SAME = 0.95
FAR = 5.0
"""Nats a token: the student does not speak the teacher's language yet."""
CUT_WARN, LOOP_WARN, LOOP_AGAINST = 0.2, 0.1, 0.5
NO_ROOM = 16
"""max_tokens under which an answer that does not end says nothing at all."""
LOOP = Screen.model_fields
COLD = "teach it first: an sft step on the teacher's answers"


@dataclass(frozen=True)
class Stand:
    """Who is run in a model's place."""

    model: str
    """The recipe's name."""
    by: str
    """The name of the one that is there."""
    artifact: Artifact | None
    cut: Prune | None = None
    """How it is pruned first, in memory."""

    @property
    def note(self) -> str:
        """Behind a figure: whose it is."""
        if self.model == self.by:
            return ""
        return f" (of {self.by}: {self.model} is not made yet)"


@dataclass(frozen=True)
class Answers:
    """What a model said to the recipe's own prompts."""

    prompt_ids: Sequence[Sequence[int]]
    done: "Sequence[Completion]"
    most: int
    """Tokens it was allowed here."""


def check(case: Case, *, quick: bool) -> list[Finding]:
    """Every check of this file; `quick` leaves out all that runs a model."""
    found = list(_finished_rollouts(case))
    pairs = case.taught()
    if quick and pairs:
        return [*found, unchecked("something to learn", "left out by --quick: it runs the models")]
    for pair in pairs[:PAIRS]:
        try:
            found += _pair(case, pair)
        except (TutelageError, MemoryError) as error:
            found.append(unchecked(_name(pair), str(error) or "out of memory"))
    if left := pairs[PAIRS:]:
        rest = ", ".join(f"{pair.student} and {pair.teacher}" for pair in left)
        found.append(unchecked("something to learn", f"only {PAIRS} pairs are run; left: {rest}"))
    return found


def stand_in(case: Case, model: str) -> Stand:
    """The model, or who is run in its place."""
    name = model
    while (artifact := case.artifact(name)) is None and "model" in case.inputs(name):
        step, below = case.nodes[name].step, case.inputs(name)["model"]
        if isinstance(step, Prune) and (source := case.artifact(below)):
            return Stand(model, name, source, step)
        name = below
    return Stand(model, name, artifact)


def looping_share(answers: Sequence[Sequence[int]]) -> float:
    """Share of answers whose tail is one run of tokens over and over, as `screen` has it."""
    loops = [
        find_loop(
            ids, period=LOOP["loop_period"].default, repeats=LOOP["loop_repeats"].default,
            tokens=LOOP["loop_tokens"].default, same=LOOP["loop_same"].default,
        )
        for ids in answers
    ]  # fmt: skip
    return sum(loop is not None for loop in loops) / max(1, len(loops))


def _name(pair: Pair) -> str:
    return f"something to learn for {pair.student}"


def _pair(case: Case, pair: Pair) -> Iterator[Finding]:
    student, teacher = stand_in(case, pair.student), stand_in(case, pair.teacher)
    for stand in (student, teacher):
        if stand.artifact is None:
            why = "trained from nothing" if _is_new(case, stand.by) else "not on this machine"
            yield unchecked(_name(pair), f"{stand.by} is {why}: there is nothing to run yet")
            return
    if case.mismatch:
        yield unchecked(_name(pair), "the two have other vocabularies")
        return
    table = _table(case, pair.teacher)
    if isinstance(table, Transformers) and student.cut is None and teacher.cut is None:
        same = student.artifact.fingerprint == teacher.artifact.fingerprint  # type: ignore[union-attr]
        if same:
            yield _same_model(case, pair, student)
    asked = _asked(case, pair)
    if isinstance(asked, str):
        yield unchecked(_name(pair), asked)
        return
    needed = sum(_bytes(stand) for stand in (student, teacher)) * 1.3
    if needed > (free := psutil.virtual_memory().available):
        why = f"both models need {gigabytes(needed)} and {gigabytes(free)} are free"
        yield unchecked(_name(pair), why)
        return
    yield from _measured(case, pair, student, teacher, table, asked)


def _measured(
    case: Case, pair: Pair, student: Stand, teacher: Stand, table: EngineTable,
    asked: tuple[str, Any, Sequence[Any]],
) -> Iterator[Finding]:  # fmt: skip
    step_name, step, messages = asked
    case.reporter.say(f"{student.by}: {len(messages)} answers of at most {TOKENS} tokens")
    loaded = _loaded(case, student, messages)
    answers = _sample(loaded, step, messages)
    yield from _how_it_answers(step_name, step, student, answers)
    case.reporter.say(f"{teacher.by}: reads them")
    if isinstance(table, Transformers):
        yield _distance(pair, student, _compare(case, loaded, teacher, messages, answers))
    else:
        yield _gap_only(case, pair, student, teacher, table, answers)


def _same_model(case: Case, pair: Pair, student: Stand) -> Finding:
    name = f"two models for {pair.student}"
    source = case.inputs(pair.step).get("targets", pair.step)
    if getattr(case.nodes[source].step, "hints", ""):
        return ok(name, "student and teacher are one model; the teacher reads hints as well")
    if student.note:
        return warn(
            name, f"the start of {pair.student} is {pair.teacher} itself: what it can learn is "
            "what sft takes from it",
            "ask again once it is trained; or take a larger teacher",
        )  # fmt: skip
    return against(
        name, f"{pair.student} and {pair.teacher} are the same model: every target says what the "
        "student says already, and the loss is 0",
        "take a better teacher, or give this one hints (score.hints)",
    )  # fmt: skip


def _distance(pair: Pair, student: Stand, compared: "Sequence[SequenceComparison]") -> Finding:
    tokens = sum(one.tokens for one in compared)

    def mean(measure: str) -> float:
        return sum(getattr(one, measure) for one in compared) / tokens

    kl, same = mean("forward_kl"), mean("top1_agreement")
    text = (
        f"KL {kl:.2f} nats a token, log q - log p {mean('label_gap'):+.2f}, the same likeliest "
        f"token at {same:.0%}, {mean('topk_overlap'):.0%} of the likeliest ten shared, on "
        f"{tokens:,} tokens{student.note}"
    )
    if same > SAME:
        return warn(
            _name(pair), f"{text}: they agree nearly everywhere", "a better teacher, or other "
            "prompts: those on which the student fails",
        )  # fmt: skip
    if kl > FAR:
        return warn(_name(pair), f"{text}: they are far apart", COLD)
    return ok(_name(pair), text)


def _gap_only(
    case: Case, pair: Pair, student: Stand, teacher: Stand, table: EngineTable, answers: Answers
) -> Finding:
    """Of a teacher that is run elsewhere: what it thinks of the student's tokens, and no more."""
    from tutelage.engines.base import Scorable
    from tutelage.engines.opening import opened

    assert teacher.artifact is not None
    update = {"retries": 0} if "retries" in type(table).model_fields else {}
    site = Site(case.scratch, engines={"teacher": table.model_copy(update=update)})
    with opened("teacher", {"teacher": teacher.artifact}, site) as engine:
        sequences = [
            Scorable(ids, one.response_ids)
            for ids, one in zip(answers.prompt_ids, answers.done, strict=True)
        ]
        read = engine.scorer(chunk_bytes=CHUNK_BYTES).label_logps(
            sequences, on_tokens=lambda count: None
        )
    tokens = sum(len(one.response_ids) for one in answers.done)
    gap = sum(float(q.sum()) - sum(one.logps) for q, one in zip(read, answers.done, strict=True))
    text = f"log q - log p {gap / tokens:+.2f} on {tokens:,} tokens{student.note}"
    if gap / tokens < -FAR:
        return warn(_name(pair), f"{text}: the teacher would never say this", COLD)
    return ok(_name(pair), f"{text}; no more is known of a teacher run by {table.kind}")


def _how_it_answers(
    step_name: str, step: Any, student: Stand, answers: Answers
) -> Iterator[Finding]:
    lengths = [len(one.response_ids) for one in answers.done]
    cut = sum(one.finish_reason == "length" for one in answers.done) / len(lengths)
    whole = answers.most == step.max_tokens
    name = f"answers of {step_name}"
    text = (
        f"{cut:.0%} of {len(lengths)} are cut off at {answers.most} tokens, mean "
        f"{sum(lengths) / len(lengths):.0f}{student.note}"
    )
    if whole and cut == 1 and step.max_tokens < NO_ROOM:
        yield against(name, f"{text}: no answer has room to say anything", "raise max_tokens")
    elif whole and cut > CUT_WARN:
        yield warn(name, f"{text}: the student never sees its answers end there", _longer(step))
    elif cut > CUT_WARN:
        yield unchecked(name, f"{text}; up to {step.max_tokens} are allowed, more is not tried")
    else:
        yield ok(name, text)
    loops = looping_share([_said(one.response_ids, one.finish_reason) for one in answers.done])
    yield _looping(f"loops in {step_name}", loops, len(lengths), student.note)


def _looping(name: str, share: float, count: int, note: str) -> Finding:
    text = f"{share:.0%} of {count} answers end in one run of tokens over and over{note}"
    if share > LOOP_AGAINST:
        return (warn if note else against)(
            name, f"{text}: that is what it would be trained on", "sft first, then a screen step"
        )
    if share > LOOP_WARN:
        return warn(name, text, "put a screen step behind the rollouts: looping = 'drop'")
    return ok(name, text)


def _finished_rollouts(case: Case) -> Iterator[Finding]:
    for name, step in case.steps(Rollout):
        if (artifact := case.artifact(name)) is None:
            continue
        rows = list(islice(read_rows(artifact.shards()), MOST_ROWS))
        cut = sum(row["finish_reason"] == "length" for row in rows) / max(1, len(rows))
        text = f"{cut:.0%} of {len(rows):,} finished answers are cut off at {step.max_tokens}"
        check = f"finished {name}"
        if cut == 1 and step.max_tokens < NO_ROOM:
            yield against(check, f"{text}: none has room to say anything", "raise max_tokens")
        elif cut > CUT_WARN:
            yield warn(check, text, _longer(step))
        else:
            yield ok(check, text)
        said = [_said(row["response_ids"], row["finish_reason"]) for row in rows]
        yield _looping(f"loops in finished {name}", looping_share(said), len(rows), "")


def _longer(step: Any) -> str:
    return f"raise max_tokens (now {step.max_tokens}), or ask for short answers"


def _said(ids: Sequence[int], finish_reason: str) -> Sequence[int]:
    return ids[:-1] if finish_reason == "stop" else ids


def _asked(case: Case, pair: Pair) -> tuple[str, Any, Sequence[Any]] | str:
    """(The step whose prompts are asked, its table, the first prompts), or why there are none."""
    source = case.asking(pair.step)
    step = case.nodes[source].step
    if not isinstance(step, Rollout | Online):
        return "its targets were captured elsewhere: there are no prompts to ask"
    rows = case.rows(prompts := case.inputs(source)["prompts"])
    if rows is None or not rows.records:
        return f"the rows of {prompts} are not here yet"
    return source, step, [prompt_messages(row) for row in rows.records[:ANSWERS]]


def _table(case: Case, model: str) -> EngineTable:
    return case.recipe.engines.get(model, HERE)


def _is_new(case: Case, name: str) -> bool:
    return isinstance(case.nodes[name].step, New)


def _bytes(stand: Stand) -> int:
    assert stand.artifact is not None
    place = stand.artifact.path
    place = place if stand.artifact.stage == "external" else place / "model"
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))


def _loaded(case: Case, stand: Stand, messages: Sequence[Any]) -> "Loaded":
    """The model in memory, cut as its recipe says: layers by their influence on these prompts."""
    import torch

    from tutelage.models.load import load_for_inference
    from tutelage.models.prune import prune_layers, prune_least_influential
    from tutelage.text.chat import ChatFormat

    assert stand.artifact is not None
    loaded = load_for_inference(stand.artifact, device=case.recipe.runtime.device)
    if stand.cut is None:
        return loaded
    if stand.cut.keep_layers:
        return replace(loaded, model=prune_layers(loaded.model, stand.cut.keep_layers))
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    batches = (
        torch.tensor([chat.prompt_ids(prompt, "fast")], device=loaded.device) for prompt in messages
    )
    pruned = prune_least_influential(loaded.model, stand.cut.drop_layers, batches)
    return replace(loaded, model=pruned.model)


def _sample(loaded: "Loaded", step: Any, messages: Sequence[Any]) -> Answers:
    from tutelage.engines.base import SamplingParams
    from tutelage.engines.sampler import TransformersSampler
    from tutelage.text.chat import ChatFormat

    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    ids = [chat.prompt_ids(prompt, step.mode) for prompt in messages]
    sampler = TransformersSampler(loaded.model, batch_size=len(ids), device=str(loaded.device))
    most = min(TOKENS, step.max_tokens)
    params = SamplingParams(most, getattr(step, "temperature", 1.0), step.seed, chat.stop_ids)
    done = sampler.sample(ids, params, keys=range(len(ids)), on_tokens=lambda count: None)
    return Answers(ids, done, most)


def _compare(
    case: Case, student: "Loaded", teacher: Stand, messages: Sequence[Any], answers: Answers
) -> "Sequence[SequenceComparison]":
    from tutelage.evals.compare import TokenSequence, compare_models

    sequences = [
        TokenSequence(ids, one.response_ids)
        for ids, one in zip(answers.prompt_ids, answers.done, strict=True)
    ]
    return compare_models(student.model, _loaded(case, teacher, messages).model, sequences)
