"""Who wrote what the student learns: one teacher all along, and prompts not known by heart."""

from collections.abc import Iterator

from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.recipe.curation import Data
from tutelage.recipe.tables import Rollout, Synthesize
from tutelage.recipe.training import Sft, Training

MANY_PASSES = 10
"""Times a prompt is learnt from which a small model is taken to know its answer by heart."""
FAR_LONGER = 4
"""Times the longest answer taught; a rollout of that length is nothing the student ever saw."""
FILES = "files"


def check(case: Case) -> list[Finding]:
    """Every check of this file."""
    found = []
    for pair in case.taught():
        found += [_consistent(case, pair.step, pair.student), _by_heart(case, pair.step)]
    found += _longer(case)
    return list(dict.fromkeys(one for one in found if one is not None))


def sft_steps(case: Case, model: str) -> Iterator[tuple[str, Sft]]:
    """The sft steps that a model has behind it, the last one first."""
    while True:
        step = case.nodes[model].step
        if isinstance(step, Sft):
            yield model, step
        if not isinstance(step, Training):
            return
        model = case.inputs(model)["model"]


def makers(case: Case, name: str) -> dict[str, str]:
    """What wrote the answers of a conversations step: {model, or `files`: the step of it}."""
    step = case.nodes[name].step
    if isinstance(step, Synthesize):
        return {case.inputs(name)["teacher"]: name}
    if isinstance(step, Data):
        return {FILES: name}
    found: dict[str, str] = {}
    for role, to in case.inputs(name).items():
        if role.partition(".")[0] == "data":
            found |= makers(case, to)
    return found


def prompts_of(case: Case, name: str) -> set[str]:
    """The data and magpie steps whose prompts a conversations step has, by identity."""
    below = [
        to for role, to in case.inputs(name).items()
        if role.partition(".")[0] in ("data", "prompts")
    ]  # fmt: skip
    if not below:
        return {case.identity(name)}
    return {identity for to in below for identity in prompts_of(case, to)}


def _consistent(case: Case, step: str, student: str) -> Finding:
    name = f"one teacher for {student}"
    scoring = {case.identity(teacher): teacher for teacher in case.teachers(step)}
    wrote: dict[str, str] = {}
    for sft, _ in sft_steps(case, student):
        for role, to in case.inputs(sft).items():
            if role.startswith("data."):
                wrote |= makers(case, to)
    if not scoring:
        return unchecked(name, "its targets were captured elsewhere: nobody says by whom")
    if case.identity(student) in scoring:
        return ok(name, f"{student} teaches itself")
    teachers = " and ".join(scoring.values())
    if not wrote:
        return ok(name, f"{teachers} scores; no sft step before it taught another's style")
    strangers = {
        who: where for who, where in wrote.items()
        if who != FILES and case.identity(who) not in scoring
    }  # fmt: skip
    if strangers:
        who, where = next(iter(strangers.items()))
        all_strange = len(strangers) == len(wrote)
        return (against if all_strange else warn)(
            name, f"{where} is written by {who}, and {teachers} scores: two teachers pull in two "
            "directions (5 to 7 points in arXiv 2604.13010; 41.5 in our lab)",
            f"let {teachers} write the sft answers too, or let {who} score",
        )  # fmt: skip
    if FILES in wrote:
        return unchecked(
            name, f"the answers of {wrote[FILES]} come from outside: who wrote them is not known",
            f"if it was not {teachers}, have their prompts answered again in a synthesize step",
        )  # fmt: skip
    return ok(name, f"{teachers} wrote the sft answers and scores")


def _by_heart(case: Case, step: str) -> Finding | None:
    """On-policy answers to prompts that were learnt by heart teach nothing about others."""
    source = case.asking(step)
    if "prompts" not in case.inputs(source):
        return None
    writer = case.inputs(source)["model"]
    asked = prompts_of(case, case.inputs(source)["prompts"])
    passes = 0.0
    for sft, config in sft_steps(case, writer):
        for role, to in case.inputs(sft).items():
            if role.startswith("data.") and prompts_of(case, to) & asked:
                passes += _passes(case, config, to)
    name = f"fresh prompts for {source}"
    if not passes:
        return ok(name, "none of them was in the sft data")
    if passes >= MANY_PASSES:
        return warn(
            name, f"{writer} has learnt answers to these prompts {passes:.0f} times: a model that "
            "knows them by heart is a poor writer of its own training answers (29 points lost "
            "to off-policy answers in our lab)",
            "ask other prompts in the rollouts, or fewer epochs of sft",
        )  # fmt: skip
    return ok(name, f"the sft data has the same ones, seen {passes:.0f} times")


def _passes(case: Case, config: Sft, data: str) -> float:
    rows = case.rows(data)
    if config.max_steps and config.batch_examples and rows and not rows.note and rows.records:
        seen = config.max_steps * config.batch_examples / len(rows.records)
        return min(seen, config.epochs)
    return config.epochs


def _longer(case: Case) -> Iterator[Finding]:
    for name, rollout in case.steps(Rollout):
        longest = [
            step.max_tokens + (step.max_think_tokens if step.mode == "reasoning" else 0)
            for sft, _ in sft_steps(case, case.inputs(name)["model"])
            for role, to in case.inputs(sft).items()
            if role.startswith("data.")
            and isinstance(step := case.nodes[to].step, Synthesize)
            and step.mode == rollout.mode
        ]
        if longest and rollout.max_tokens >= FAR_LONGER * max(longest):
            yield warn(
                f"length of {name}", f"up to {rollout.max_tokens} tokens, and the longest answer "
                f"that sft taught had {max(longest)}: far out its text is loops and noise",
                f"max_tokens = {2 * max(longest)}, or longer answers in sft",
            )  # fmt: skip
