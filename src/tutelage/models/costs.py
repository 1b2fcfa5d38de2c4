"""What an arm of an experiment cost beyond its start: seconds, tokens by kind, FLOPs by stage.

Read from manifests alone. Knows which model did which tokens; no torch.

FLOPs are the usual estimate, P being the parameters of the model that did it, embeddings included:
6 P a trained token, 2 P a decoded or prefilled one (arXiv 2001.08361). Prompts that a model reads
before it decodes are in no count; attention is left out, a further `context / 12 d` of it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tutelage.core.artifact import TOKEN_KINDS, Artifact
from tutelage.core.errors import ArtifactError
from tutelage.models.inspect import describe

TRAINED_FLOPS, READ_FLOPS = 6, 2
"""FLOPs a parameter and token: forward and backward; forward alone."""
TRAINING = ("sft", "distill", "online")
GIVEN = ("teacher", "judge", "tokenizer", "tokenizer_of")
"""Inputs that a step uses but does not pay for: a teacher is there before the experiment begins."""


@dataclass(frozen=True)
class Costs:
    """What was spent on an arm in one cell, each step behind it once."""

    seconds: float
    tokens: Mapping[str, int]
    flops: Mapping[str, float]
    """By stage; stages that cost none are left out."""
    steps: int
    """Optimizer steps."""
    examples: int | None
    """Sequences trained on, repeats included; None where a step did not record it."""
    given_flops: float
    """What making its teachers took, where that was part of the run; in no other figure here."""
    teachers: tuple[str, ...]
    """Fingerprints of the models that taught it beyond its start."""
    own_lineage: bool
    """A teacher is one of the arm's own ancestors: a control that should win nothing."""


def costs(arm: Artifact, start: Artifact | None, known: Mapping[str, Artifact]) -> Costs:
    """The costs of `arm` beyond `start` (and all behind that); without a start, of everything.

    `known` holds every artifact behind them by fingerprint. A step is counted once, however often
    the arm reads it. Raises ArtifactError where one is not among `known`.
    """
    paid = _behind(arm, known, given=False)
    spared = _behind(start, known, given=True) if start else {}
    own = {mark: artifact for mark, artifact in paid.items() if mark not in spared}
    given = {
        mark: artifact
        for mark, artifact in _behind(arm, known, given=True).items()
        if mark not in paid and mark not in spared
    }
    trained = [artifact for artifact in own.values() if artifact.stage in TRAINING]
    counts = [artifact.summary.get("examples") for artifact in trained]
    taught = dict.fromkeys(
        entry["fingerprint"]
        for artifact in own.values()
        for role, entry in artifact.manifest["inputs"].items()
        if role == "teacher"
    )
    return Costs(
        seconds=sum(artifact.manifest["seconds"] for artifact in own.values()),
        tokens={
            kind: sum(_by_writer(a, kind, taught) for a in own.values()) for kind in TOKEN_KINDS
        },
        flops=_by_stage(own, known),
        steps=sum(int(artifact.summary.get("steps", 0)) for artifact in trained),
        examples=None if None in counts else sum(int(count or 0) for count in counts),
        given_flops=sum(_by_stage(given, known).values()),
        teachers=tuple(taught),
        own_lineage=any(mark in paid for mark in taught),
    )


def unmatched(group: Mapping[str, Sequence[Costs]]) -> dict[str, str]:
    """Arms that trained on another budget than most of their group, and how they differ.

    One `Costs` a cell for each arm. Arms that do not train are left out of the comparison. Steps
    and sequences must agree in every cell, with what most arms of the group have; where as many
    have another budget, with the first of them.
    """
    budgets = {
        name: tuple((cost.steps, cost.examples) for cost in cells)
        for name, cells in group.items()
        if any(cost.steps for cost in cells)
    }
    if not budgets:
        return {}
    usual = Counter(budgets.values()).most_common(1)[0][0]
    odd = {name: _told(mine, usual) for name, mine in budgets.items() if mine != usual}
    unknown = {name for name, mine in budgets.items() if any(count is None for _, count in mine)}
    return {**odd, **dict.fromkeys(sorted(unknown), "its number of sequences was not recorded")}


def _told(mine: Sequence[tuple[int, int | None]], usual: Sequence[tuple[int, int | None]]) -> str:
    """The first cell that differs."""
    (steps, examples), (others, sequences) = next(
        (a, b) for a, b in zip(mine, usual, strict=True) if a != b
    )
    if steps != others:
        return f"{steps:,} optimizer steps instead of {others:,}"
    return f"{examples or 0:,} sequences instead of {sequences or 0:,}"


def flops(artifact: Artifact, known: Mapping[str, Artifact]) -> float:
    """FLOPs of one step: `6 P trained + 2 P (decoded + prefilled)`, P of the model that did each.

    What trains is the step's own model, `model` decodes as the student (in an online step that is
    the same size), `teacher` decodes and reads; a judge's tokens are counted as the teacher's.
    """
    spent = 0.0
    for kind in TOKEN_KINDS:
        if tokens := _tokens(artifact, kind):
            each = TRAINED_FLOPS if kind == "trained" else READ_FLOPS
            spent += each * tokens * parameters(_worker(artifact, kind, known))
    return spent


def parameters(artifact: Artifact) -> int:
    """Of a model's artifact, by the headers of its weights."""
    path = artifact.path
    return _parameters(path if artifact.stage == "external" else path / "model")


@cache
def _parameters(path: Path) -> int:
    return describe(path).parameters


def _worker(artifact: Artifact, kind: str, known: Mapping[str, Artifact]) -> Artifact:
    """The model that did the tokens of this kind."""
    if kind == "trained":
        return artifact
    role = "model" if kind == "student_decoded" else "teacher"
    entry = artifact.manifest["inputs"].get(role)
    if entry is None:
        raise ArtifactError(
            f"{artifact.path}: it counts {kind} tokens but has no input {role!r} that did them"
        )
    return _found(entry["fingerprint"], artifact, role, known)


def _by_stage(artifacts: Mapping[str, Artifact], known: Mapping[str, Artifact]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for artifact in artifacts.values():
        found[artifact.stage] += flops(artifact, known)
    return {stage: found[stage] for stage in sorted(found) if found[stage]}


def _behind(
    artifact: Artifact, known: Mapping[str, Artifact], *, given: bool
) -> dict[str, Artifact]:
    """The artifact and all it came from, by fingerprint; past GIVEN inputs only if asked for."""
    seen: dict[str, Artifact] = {}
    waiting = [artifact]
    while waiting:
        now = waiting.pop()
        if now.fingerprint not in seen:
            seen[now.fingerprint] = now
            waiting += _read(now, known, given=given)
    return seen


def _read(artifact: Artifact, known: Mapping[str, Artifact], *, given: bool) -> Iterator[Artifact]:
    for role, entry in artifact.manifest["inputs"].items():
        if given or role not in GIVEN:
            yield _found(entry["fingerprint"], artifact, role, known)


def _found(mark: str, reader: Artifact, role: str, known: Mapping[str, Artifact]) -> Artifact:
    if mark not in known:
        raise ArtifactError(
            f"{reader.path}: its input {role!r} ({mark[:12]}) is not among the steps given; "
            "its costs cannot be told"
        )
    return known[mark]


def _by_writer(artifact: Artifact, kind: str, taught: Mapping[str, None]) -> int:
    """Tokens of a kind; what a teacher decoded in a rollout step (off-policy) is the teacher's."""
    writer = artifact.manifest["inputs"].get("model", {}).get("fingerprint")
    if artifact.stage == "rollout" and writer in taught and kind.endswith("_decoded"):
        return _tokens(artifact, "student_decoded") if kind == "teacher_decoded" else 0
    return _tokens(artifact, kind)


def _tokens(artifact: Artifact, kind: str) -> int:
    return artifact.manifest["tokens"].get(kind, 0)
