"""Stage `score`: the teacher reads the rollouts once, by prefill; sparse targets are stored."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.core.artifact import Artifact, Site, WorkDir
from tutelage.core.errors import DataError, EngineError
from tutelage.core.files import write_json
from tutelage.core.shards import MakeShard, OnTokens, Shard, run_shards, shards
from tutelage.data.hints import Hints, hint_rows
from tutelage.data.screening import student_of
from tutelage.engines.base import Engine, Scorable
from tutelage.engines.opening import opened
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import directory_of, load_tokenizer
from tutelage.recipe.engines import HERE, EngineTable
from tutelage.recipe.tables import Score
from tutelage.records import RowFiles
from tutelage.targets.calibrate import tau_for_budget
from tutelage.targets.estimator import Fixed, Threshold
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets
from tutelage.targets.writer import write_shard
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest

CALIBRATION = "calibration.json"
CALIBRATION_TOKENS = 512
CALIBRATION_ROWS = 32
COUNTS = "counts"  # in scratch, a file a shard: what a resumed run must still know
DEFAULT = "teacher"
"""The role of the teacher that reads what no route takes."""


def run(config: Score, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, Any]:
    """Score every rollout; returns counts, ids and bytes a token, and how near the teacher is.

    An empty rollout has no token to score and is left out, and counted. With several teachers the
    rows of one stand together, so that one teacher is in memory at a time.
    """
    rollouts = RowFiles(inputs["rollouts"].shards())
    responses = rollouts.lengths("response_ids")
    if not any(responses):
        raise DataError("every rollout is empty: the student ends its turn at once")
    routed = _routed(config, rollouts)
    site = work.site()
    if config.budget:  # once, by whoever holds a teacher: tau is in a file for all shards
        measure = partial(_calibrating, config, inputs, site)
        run_shards(
            work, [Shard(0, range(1), "calibration")], measure, label="budget", tokens_each=1
        )
        tau = json.loads((work.path / CALIBRATION).read_text())["tau"]
        work.reporter.say(f"  tau {tau:.4f} buys {config.budget} {config.budget_unit} a token")
    run_shards(
        work, routed.shards(config.shard_rows), partial(_reading, config, inputs, site),
        label="teacher reads", tokens_each=max(responses),
    )  # fmt: skip
    return {**_summary(config, work), "empty": responses.count(0), **routed.counts()}


@dataclass(frozen=True)
class _Routed:
    """The rollouts' numbers in the order they are read, and who reads each stretch of them."""

    order: Sequence[int]
    stretches: Mapping[str, range]
    """Role of the teacher -> places in `order`."""

    def shards(self, rows: int) -> list[Shard]:
        """Shards of one teacher each."""
        found: list[Shard] = []
        for places in self.stretches.values():
            for shard in shards(len(places), rows):
                items = range(places.start + shard.items.start, places.start + shard.items.stop)
                found.append(Shard(len(found), items))
        return found

    def role(self, place: int) -> str:
        """Who reads the rollout at this place."""
        return next(role for role, places in self.stretches.items() if place in places)

    def counts(self) -> dict[str, int]:
        """Rows of each teacher, where there are several."""
        if len(self.stretches) == 1:
            return {}
        return {f"rows of {role.removesuffix('.teacher')}": len(places)
                for role, places in self.stretches.items()}  # fmt: skip


def _routed(config: Score, rollouts: RowFiles) -> _Routed:
    if not config.routes:
        return _Routed(range(len(rollouts)), {DEFAULT: range(len(rollouts))})
    values: dict[str, list[Any]] = {route.by: [] for route in config.routes}
    for table in rollouts.tables(range(len(rollouts))):
        for name, found in values.items():
            found += table[name].to_pylist()
    roles: dict[str, list[int]] = {f"routes.{i}.teacher": [] for i in range(len(config.routes))}
    roles = {DEFAULT: [], **roles}
    for number in range(len(rollouts)):
        fit = (i for i, r in enumerate(config.routes) if values[r.by][number] in r.values)
        first = next(fit, None)
        roles[DEFAULT if first is None else f"routes.{first}.teacher"].append(number)
    for index, route in enumerate(config.routes):
        if not roles[f"routes.{index}.teacher"]:
            there = sorted({str(value) for value in values[route.by]})
            taken = "; routes before it take them all" if set(there) & set(route.values) else ""
            raise DataError(
                f"routes.{index}: no rollout whose {route.by} is {' or '.join(route.values)} is "
                f"left for it{taken}; there are {', '.join(there[:8])}"
            )
    order: list[int] = []
    stretches: dict[str, range] = {}
    for role, numbers in roles.items():
        if numbers:
            stretches[role] = range(len(order), len(order) + len(numbers))
            order += numbers
    return _Routed(order, stretches)


@contextlib.contextmanager
def _reading(config: Score, inputs: Mapping[str, Artifact], site: Site) -> Iterator[MakeShard]:
    rollouts = RowFiles(inputs["rollouts"].shards())
    routed = _routed(config, rollouts)
    estimator = _estimator(config, site)
    origin = _origin(config, inputs, site, estimator)
    with _Teachers(config, inputs, site, rollouts) as teachers:

        def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
            numbers = [routed.order[place] for place in shard.items]
            engine, hints = teachers.of(routed.role(shard.items.start))
            scorer = engine.scorer(chunk_bytes=config.logit_chunk_mb * 2**20)
            numbered = zip(numbers, _rows(rollouts, numbers), strict=True)
            kept = [(key, row) for key, row in numbered if row["response_ids"]]
            rows = [row for _, row in kept]
            known = [hints.prompt_ids(row) if hints else None for row in rows]
            read = [_scorable(row, ids) for row, ids in zip(rows, known, strict=True)]
            # The key is the row's own number: neither routes nor workers change what is drawn.
            scored = scorer.score(
                read, estimator=estimator, seed=config.seed, keys=[key for key, _ in kept],
                on_tokens=on_tokens,
            )  # fmt: skip
            targets = [_row(row, target) for row, target in zip(rows, scored, strict=True)]
            meta = replace(
                origin, vocab_size=engine.vocab_size,
                dtype="several" if config.routes else engine.dtype,
            )  # fmt: skip
            write_shard(site.path / f"{shard.name}.parquet", targets, meta=meta)
            if config.hints:
                unhinted = sum(ids is None for ids in known)
                write_json(site.scratch(COUNTS) / f"{shard.name}.json", {"unhinted": unhinted})
            seen = sum(len(one.prompt_ids) + len(one.response_ids) for one in read)
            return {"teacher_prefilled": seen}

        yield make


class _Teachers:
    """One engine in memory at a time: the last one is let go of before another one is opened."""

    def __init__(
        self, config: Score, inputs: Mapping[str, Artifact], site: Site, rollouts: RowFiles
    ) -> None:
        self._config, self._inputs, self._site = config, inputs, site
        self._role = ""
        self._now: tuple[Engine, Hints | None] | None = None
        self._stack = contextlib.ExitStack()
        self._rows: Mapping[str, Mapping[str, Any]] = {}
        if config.hints:
            wanted = {
                name
                for table in rollouts.tables(range(len(rollouts)))
                for name in table["prompt_id"].to_pylist()
            }
            self._rows = hint_rows(inputs["hints"].shards(), wanted)

    def of(self, role: str) -> tuple[Engine, Hints | None]:
        """The engine of a teacher, and what it may know; do not hold on to another one's."""
        if self._now is None or role != self._role:
            self._now = None  # its weights go now, not when the next ones are there
            self._stack.close()
            engine = self._stack.enter_context(opened(role, self._inputs, self._site))
            self._role, self._now = role, (engine, self._hinting(engine))
        return self._now

    def _hinting(self, engine: Engine) -> Hints | None:
        if not self._config.hints:
            return None
        return Hints(
            ChatFormat.from_tokenizer(engine.tokenizer), self._rows, text=self._config.hint,
            chain=self._config.hint_chain, context=engine.context,
        )  # fmt: skip

    def __enter__(self) -> "_Teachers":
        return self

    def __exit__(self, *_: object) -> None:
        self._now = None
        self._stack.close()


def _rows(rollouts: RowFiles, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for number in numbers:
        yield from rollouts.rows(range(number, number + 1))


def _tables(config: Score, site: Site) -> dict[str, EngineTable]:
    """How each teacher of the step is run."""
    roles = [DEFAULT, *(f"routes.{index}.teacher" for index in range(len(config.routes)))]
    return {role: site.engines.get(role, HERE) for role in roles}


def _estimator(config: Score, site: Site) -> Threshold | Fixed:
    if top := config.top(_tables(config, site).values()):
        return Fixed(top, 0)
    if config.estimator == "fixed":
        return Fixed(config.head, config.draws, config.temperature)
    if not config.budget:
        return Threshold(config.tau, config.temperature)
    found = json.loads((site.path / CALIBRATION).read_text())
    return Threshold(found["tau"], config.temperature)


@contextlib.contextmanager
def _calibrating(config: Score, inputs: Mapping[str, Artifact], site: Site) -> Iterator[MakeShard]:
    """tau for the budget, on tokens spread evenly over the rollouts, each read by its teacher."""
    rollouts = RowFiles(inputs["rollouts"].shards())
    routed = _routed(config, rollouts)

    def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
        responses = rollouts.lengths("response_ids")
        answered = [place for place, number in enumerate(routed.order) if responses[number]]
        spread = np.linspace(0, len(answered) - 1, min(CALIBRATION_ROWS, len(answered)))
        places = [answered[index] for index in spread.round().astype(int)]
        logits: list[Tensor] = []
        with _Teachers(config, inputs, site, rollouts) as teachers:
            for role in dict.fromkeys(routed.role(place) for place in places):
                numbers = [routed.order[p] for p in places if routed.role(p) == role]
                # As many tokens of each teacher as it has of the answers: tau is for them together.
                share = max(1, CALIBRATION_TOKENS * len(numbers) // len(places))
                logits.append(_logits(config, *teachers.of(role), _rows(rollouts, numbers), share))
        tau = tau_for_budget(
            torch.cat(logits), budget=config.budget, unit=config.budget_unit,
            temperature=config.temperature,
        )  # fmt: skip
        # Kept in a file: a resumed run must not find a hair another one.
        found = {"tau": tau, "budget": config.budget, "unit": config.budget_unit}
        write_json(site.path / CALIBRATION, found)
        return {}

    yield make


def _logits(
    config: Score, engine: Engine, hints: Hints | None, rows: Iterable[Mapping[str, Any]],
    count: int,
) -> Tensor:  # fmt: skip
    """Logits of `count` tokens, evenly over the answers, on the CPU."""
    read = [_scorable(row, hints.prompt_ids(row) if hints else None) for row in rows]
    scorer = engine.scorer(chunk_bytes=config.logit_chunk_mb * 2**20)
    if not isinstance(scorer, TransformersScorer):  # `Score.top` has refused others before
        raise EngineError(f"a budget needs the engine transformers, not {engine.name}")
    hidden_ND = scorer.hidden_states(read, on_tokens=lambda number: None)
    picked = torch.linspace(0, len(hidden_ND) - 1, min(count, len(hidden_ND))).long()
    with torch.inference_mode():
        return scorer.head.logits(hidden_ND[picked.to(hidden_ND.device)]).cpu()


def _scorable(rollout: Mapping[str, Any], prompt_ids: Sequence[int] | None) -> Scorable:
    read = rollout["prompt_ids"] if prompt_ids is None else prompt_ids
    return Scorable(tuple(read), tuple(rollout["response_ids"]), name=rollout["id"])


def _origin(
    config: Score, inputs: Mapping[str, Artifact], site: Site, estimator: Threshold | Fixed
) -> StoreMeta:  # fmt: skip
    """The same for all shards, whoever reads them: several teachers stand in one line, and the
    tokenizer is the default's. What only an engine knows is blank."""
    tables = _tables(config, site)
    directory = directory_of(inputs[DEFAULT])
    return StoreMeta(
        student=student_of(inputs["rollouts"]),
        teacher="+".join(dict.fromkeys(inputs[role].fingerprint for role in tables)),
        tokenizer=tokenizer_digest(directory),
        chat_template=ChatFormat.from_tokenizer(load_tokenizer(directory)).fingerprint,
        vocab_size=0,
        temperature=config.temperature,
        engine="+".join(dict.fromkeys(table.kind for table in tables.values())),
        dtype="",
        estimator=estimator.name,
        tau=estimator.tau,
    )


def _row(rollout: Mapping[str, Any], targets: TokenTargets) -> TargetRow:
    return TargetRow(
        id=rollout["id"], prompt_id=rollout["prompt_id"], source=rollout["source"],
        mode=rollout["mode"], finish_reason=rollout["finish_reason"],
        verdict=rollout["verdict"],
        prompt_ids=np.asarray(rollout["prompt_ids"], np.int32),
        response_ids=np.asarray(rollout["response_ids"], np.int32),
        student_logp_N=np.asarray(rollout["student_logp"], np.float32), targets=targets,
    )  # fmt: skip


def _summary(config: Score, work: WorkDir) -> dict[str, Any]:
    """Sums over row groups, so that no store need fit into memory."""
    paths = sorted(work.path.glob("part-*.parquet"))
    reader = TargetReader(paths)
    tokens = reader.num_tokens
    sums = dict.fromkeys(("ids_per_token", "head_mass", "teacher_entropy", "logq_minus_logp"), 0.0)
    for index in range(reader.num_groups):
        group = reader.group(index)
        targets = group.targets
        sums["ids_per_token"] += len(targets.head_ids_M) + len(targets.tail_ids_T)
        sums["head_mass"] += float(np.exp(targets.head_logq_M).sum())
        sums["teacher_entropy"] += float(targets.entropy_N.sum())
        # E_student[log q - log p]: minus this is the reverse KL; near 0 nothing is to be learnt.
        sums["logq_minus_logp"] += float((targets.label_logp_N - group.student_logp_N).sum())
    return {
        "rows": len(reader),
        "response_tokens": tokens,
        "bytes_per_token": sum(path.stat().st_size for path in paths) / tokens,
        **{name: value / tokens for name, value in sums.items()},
        **({} if reader.meta.tau is None else {"tau": reader.meta.tau}),
        **({"unhinted": _unhinted(work)} if config.hints else {}),
    }


def _unhinted(work: WorkDir) -> int:
    return sum(
        json.loads(path.read_text())["unhinted"] for path in work.scratch(COUNTS).glob("*.json")
    )
