"""Stage `score` with several teachers, with hints, and with an engine that gives a top-k only.

And the test of the base: log-probabilities stored at sampling are what a scorer reads.
"""

import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model
from transformers import AutoTokenizer

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.progress import Reporter
from tutelage.engines import sampler as sampling
from tutelage.engines import scorer as scoring
from tutelage.engines.base import Scorable
from tutelage.engines.opening import opened
from tutelage.engines.scorer import TransformersScorer
from tutelage.recipe.engines import Server
from tutelage.recipe.tables import Rollout, Score
from tutelage.recipe.training import Distill
from tutelage.records import CONVERSATIONS, ROLLOUTS, read_rows, write_rows
from tutelage.stages import rollout as rollout_stage
from tutelage.stages import score
from tutelage.targets.estimator import Fixed
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow
from tutelage.text.chat import ChatFormat
from tutelage.train.objectives import loss_spec

Row = dict[str, Any]
SCALE = 12.0
"""Of the tied embedding: a random model's logits then spread like a language model's."""
HEED = 200.0
"""Of what attention adds, so that a hint changes what comes after it."""
EOS = 303
NAMES = ("teacher", "coder", "linguist")


def write_teacher(folder: Path, seed: int) -> Path:
    write_model(folder, layers=1, seed=seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"].mul_(SCALE)
    for name, tensor in tensors.items():  # or what was said before would hardly matter
        if name.endswith("o_proj.weight"):
            tensor.mul_(HEED)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: write_teacher(folder / name, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def chat(teachers: dict[str, Path]) -> ChatFormat:
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(teachers["teacher"]))


SOURCES = ("prose", "code", "poems")
LANGUAGES = ("en", "zh", None)


def asked(index: int) -> list[Any]:
    return [{"role": "user", "content": f"question {index}", "thinking": None}]


def rollouts(chat: ChatFormat, count: int) -> list[Row]:
    rng = np.random.default_rng(count)
    return [
        {
            "id": f"q{n}/fast/0", "prompt_id": f"q{n}", "source": SOURCES[n % 3], "mode": "fast",
            "prompt_ids": chat.prompt_ids(asked(n), "fast"),
            "response_ids": [*rng.integers(0, 256, 6 + n % 4).tolist(), EOS] if n != 4 else [],
            "student_logp": [-1.5] * (7 + n % 4) if n != 4 else [], "finish_reason": "stop",
            "text": "", "task": "sums" if n % 2 else None, "language": LANGUAGES[n // 3 % 3],
            "verdict": ("correct", "wrong", None)[n % 3],
        }
        for n in range(count)
    ]  # fmt: skip


class Stage:
    """The stage over given rollouts; the work folder of each run is its own unless given."""

    def __init__(self, folder: Path, teachers: Mapping[str, Path]) -> None:
        self.folder, self.teachers = folder, teachers
        self.hints: Sequence[Row] = ()
        self.engines: dict[str, Any] = {}
        self.runs = 0

    def run(
        self, rows: Sequence[Row], *, teacher: str = "teacher", into: Path | None = None,
        screened: bool = False, **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        self.runs += 1
        self.work = into or self.folder / f"work{self.runs}"
        config = Score.model_validate(
            {"stage": "score", "teacher": teacher, "rollouts": "r", "seed": 3, "shard_rows": 4}
            | settings
        )
        source = self.folder / f"rollouts{self.runs}"
        write_rows(source / "part-00000.parquet", rows, ROLLOUTS)
        made_by: dict[str, Any] = {"inputs": {"model": {"fingerprint": "student"}}}
        if screened:
            made_by = {"inputs": {"rollouts": {}}, "summary": {"student": "screened-student"}}
        inputs = {"rollouts": Artifact(source, made_by), "teacher": self._external(teacher)}
        for index, route in enumerate(config.routes):
            inputs[f"routes.{index}.teacher"] = self._external(route.teacher)
        if config.hints:
            hints = self.folder / f"hints{self.runs}"
            write_rows(hints / "part-00000.parquet", self.hints, CONVERSATIONS)
            inputs["hints"] = Artifact(hints, {})
        work = WorkDir.open(
            self.work, reporter=Reporter(quiet=True), device="cpu", engines=self.engines
        )
        summary = score.run(config, inputs, work)
        self.tokens = work.tokens()
        return summary

    def _external(self, name: str) -> Artifact:
        outside = {"stage": "external", "fingerprint": name, "identity": {}}
        return Artifact(self.teachers[name], outside)

    @property
    def paths(self) -> list[Path]:
        return sorted(self.work.glob("part-*.parquet"))

    @property
    def rows(self) -> list[TargetRow]:
        return list(TargetReader(self.paths))

    @property
    def meta(self) -> StoreMeta:
        return TargetReader(self.paths).meta


@pytest.fixture
def stage(tmp_path: Path, teachers: dict[str, Path]) -> Stage:
    return Stage(tmp_path, teachers)


def same(one: TargetRow, other: TargetRow) -> bool:
    arrays = ("head_counts_N", "head_ids_M", "head_logq_M", "tail_counts_N", "tail_ids_T",
              "label_logp_N", "entropy_N")  # fmt: skip
    return one.id == other.id and all(
        np.array_equal(getattr(one.targets, name), getattr(other.targets, name)) for name in arrays
    )


# Several teachers


ROUTES = [
    {"teacher": "coder", "by": "source", "values": ["code"]},
    {"teacher": "linguist", "by": "language", "values": ["zh", "und"]},
]


def test_each_teacher_reads_its_rows_and_the_bits_are_those_of_a_run_of_its_own(
    stage: Stage, chat: ChatFormat
) -> None:
    """A code row in Chinese goes to the first route that fits it."""
    rows = rollouts(chat, 14)
    rows[1]["language"] = rows[4]["language"] = "zh"
    rows[2]["language"] = rows[5]["language"] = "zh"
    # Of equal lengths: a batch's shape then is the same in both runs, and so is its float noise.
    rows = [{**r, "response_ids": [7, 8, 9, n, EOS], "student_logp": [-1.0] * 5,
             "prompt_ids": rows[0]["prompt_ids"]} for n, r in enumerate(rows)]  # fmt: skip
    summary = stage.run(rows, routes=ROUTES, tau=0.05)
    routed = {row.id: row for row in stage.rows}
    order = [row.id for row in stage.rows]
    alone: dict[str, dict[str, TargetRow]] = {}
    for name in NAMES:
        stage.run(rows, teacher=name, tau=0.05)
        alone[name] = {row.id: row for row in stage.rows}
    readers = {}
    for row in rows:
        mine = [name for name in NAMES if same(routed[row["id"]], alone[name][row["id"]])]
        assert len(mine) == 1, row["id"]
        readers[row["id"]] = mine[0]
        wanted = "coder" if row["source"] == "code" else (
            "linguist" if row["language"] == "zh" else "teacher")  # fmt: skip
        assert mine == [wanted]
    stretches = [readers[name] for name in order]
    assert stretches == sorted(stretches, key=NAMES.index)  # of old: teacher, coder, linguist
    counted = {name: stretches.count(name) for name in NAMES}
    assert [summary[f"rows of {role}"] for role in ("teacher", "routes.0", "routes.1")] == list(
        counted.values()
    )


@pytest.mark.parametrize(("by", "value", "count"), [
    ("source", "code", 5), ("task", "sums", 7), ("language", "zh", 5),
])  # fmt: skip
def test_any_of_the_columns_may_decide(
    stage: Stage, chat: ChatFormat, by: str, value: str, count: int
) -> None:
    route = {"teacher": "coder", "by": by, "values": [value]}
    rows = rollouts(chat, 14)
    assert stage.run(rows, routes=[route], tau=0.05)["rows of routes.0"] == count
    assert stage.meta.teacher == "teacher+coder"
    assert stage.meta.dtype == "several"


def test_a_route_that_takes_nothing_is_told_with_what_there_is(
    stage: Stage, chat: ChatFormat
) -> None:
    route = {"teacher": "coder", "by": "language", "values": ["fr", "it"]}
    with pytest.raises(
        DataError, match=r"routes\.0: .* language is fr or it is left for it; there are en, zh"
    ):
        stage.run(rollouts(chat, 6), routes=[route])


def test_the_default_teacher_may_have_nothing_to_read(stage: Stage, chat: ChatFormat) -> None:
    route = {"teacher": "coder", "by": "mode", "values": ["fast"]}
    stage.run(rollouts(chat, 6), routes=[route], tau=0.05)
    routed = stage.rows
    stage.run(rollouts(chat, 6), teacher="coder", tau=0.05)
    assert all(same(a, b) for a, b in zip(routed, stage.rows, strict=True))


@pytest.mark.parametrize("settings", [{"tau": 0.05}, {"budget": 8.0, "budget_unit": "ids"}])
def test_one_teacher_is_in_memory_at_a_time(
    stage: Stage, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    alive: list[weakref.ref[Any]] = []
    roles: list[str] = []

    @contextlib.contextmanager
    def watched(role: str, *arguments: Any) -> Any:
        gc.collect()
        assert [one for one in alive if one() is not None] == []
        with opened(role, *arguments) as engine:
            alive.append(weakref.ref(engine.loaded.model))  # type: ignore[attr-defined]
            roles.append(role)
            yield engine

    monkeypatch.setattr(score, "opened", watched)
    stage.run(rollouts(chat, 14), routes=ROUTES, **settings)
    each = ["teacher", "routes.0.teacher", "routes.1.teacher"]
    assert roles == each * (2 if "budget" in settings else 1)


def test_a_budget_holds_over_all_teachers_together(stage: Stage, chat: ChatFormat) -> None:
    rows = rollouts(chat, 60)
    summary = stage.run(rows, routes=ROUTES, budget=8.0, budget_unit="ids", shard_rows=16)
    assert summary["ids_per_token"] == pytest.approx(8.0, rel=0.15)
    assert stage.meta.tau == summary["tau"]


def test_a_killed_step_with_routes_and_hints_goes_on_and_its_bytes_are_the_same(
    stage: Stage, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rollouts(chat, 14)
    stage.hints = [hint_row(n) for n in range(0, 14, 2)]
    settings = {"routes": ROUTES, "hints": "h", "hint": "It is {answer}.", "budget": 8.0,
                "budget_unit": "ids", "shard_rows": 2}  # fmt: skip
    told = stage.run(rows, **settings)
    whole = [path.read_bytes() for path in stage.paths]
    write, written = score.write_shard, []

    def killed(path: Path, *arguments: Any, **options: Any) -> Any:
        if len(written) == 4:  # in the middle of a route
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *arguments, **options)

    into = stage.folder / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(score, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.run(rows, into=into, **settings)
    assert stage.run(rows, into=into, **settings) == told
    assert told["unhinted"] == 7  # of 13 that say something
    assert [path.read_bytes() for path in stage.paths] == whole


def test_verdicts_pass_through_to_the_store(stage: Stage, chat: ChatFormat) -> None:
    rows = rollouts(chat, 8)
    stage.run(rows, routes=ROUTES[:1], tau=0.05)
    wanted = {row["id"]: row["verdict"] for row in rows if row["response_ids"]}
    assert {row.id: row.verdict for row in stage.rows} == wanted


def test_screened_rollouts_say_who_wrote_them(stage: Stage, chat: ChatFormat) -> None:
    stage.run(rollouts(chat, 4), tau=0.05)
    assert stage.meta.student == "student"
    stage.run(rollouts(chat, 4), tau=0.05, screened=True)
    assert stage.meta.student == "screened-student"


# Hints


def hint_row(index: int, **columns: Any) -> Row:
    row = {
        "id": f"q{index}", "source": "lab", "language": None, "mode": "fast", "complete": True,
        "messages": asked(index), "answer": f"gold {index}", "task": None, "difficulty": None,
        "meta": None,
    }  # fmt: skip
    return {**row, **columns}


def label_logps(stage: Stage, sequences: Sequence[Scorable]) -> list[np.ndarray]:
    inputs = {"teacher": stage._external("teacher")}
    site = WorkDir.open(stage.folder / "reading", reporter=Reporter(quiet=True), device="cpu")
    with opened("teacher", inputs, site.site()) as engine:
        return engine.scorer(chunk_bytes=2**20).label_logps(sequences, on_tokens=lambda n: None)


def test_targets_are_the_teachers_behind_the_hint_and_stored_for_the_students_own_prompt(
    stage: Stage, chat: ChatFormat
) -> None:
    rows = rollouts(chat, 4)
    stage.hints = [hint_row(0), hint_row(2), hint_row(3, answer=None)]
    summary = stage.run(rows, hints="h", hint="It is {answer}.", tau=0.05)
    assert summary["unhinted"] == 2
    hinted = stage.rows
    seen = stage.tokens["teacher_prefilled"]
    prompts = []
    for n, row in enumerate(rows):
        told = asked(n)
        if n in (0, 2):
            told[0]["content"] += f"\n\nIt is gold {n}."
        prompts.append(chat.prompt_ids(told, "fast"))
        assert hinted[n].prompt_ids.tolist() == row["prompt_ids"]
        assert hinted[n].response_ids.tolist() == row["response_ids"]
    read = [Scorable(p, r["response_ids"]) for p, r in zip(prompts, rows, strict=True)]
    for row, wanted in zip(hinted, label_logps(stage, read), strict=True):
        np.testing.assert_allclose(row.targets.label_logp_N, wanted, atol=0.1)  # as it is stored
    assert seen == sum(len(one.prompt_ids) + len(one.response_ids) for one in read)
    stage.run(rows, tau=0.05)
    differs = [not same(a, b) for a, b in zip(hinted, stage.rows, strict=True)]
    assert differs == [True, False, True, False]
    changed = np.abs(hinted[0].targets.label_logp_N - stage.rows[0].targets.label_logp_N)
    assert changed.mean() > 0.2  # far more than the store rounds


def test_a_chain_is_read_before_the_students_fast_answer(stage: Stage, chat: ChatFormat) -> None:
    rows = rollouts(chat, 2)
    answer = {"role": "assistant", "content": "x", "thinking": "First this."}
    stage.hints = [
        hint_row(n, id=f"q{n}/reasoning/0", mode="reasoning", messages=[*asked(n), answer])
        for n in range(2)
    ]
    assert stage.run(rows, hints="h", hint_chain=True, tau=0.05)["unhinted"] == 0
    prompts = [chat.prompt_ids(asked(n), "reasoning") + chat.chain_ids("First this.")
               for n in range(2)]  # fmt: skip
    read = [Scorable(p, r["response_ids"]) for p, r in zip(prompts, rows, strict=True)]
    for row, wanted in zip(stage.rows, label_logps(stage, read), strict=True):
        np.testing.assert_allclose(row.targets.label_logp_N, wanted, atol=0.1)


def test_hints_of_other_prompts_stop_the_step_before_a_teacher_is_loaded(
    stage: Stage, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a teacher was opened")

    monkeypatch.setattr(score, "opened", never)
    stage.hints = [hint_row(77)]
    with pytest.raises(DataError, match="hints hold none of the 4 prompts"):
        stage.run(rollouts(chat, 4), hints="h", hint="{answer}", tau=0.05)


def test_a_budget_is_found_on_what_the_teacher_reads_with_its_hints(
    stage: Stage, chat: ChatFormat
) -> None:
    rows = rollouts(chat, 24)
    stage.hints = [hint_row(n) for n in range(24)]
    budget = {"budget": 8.0, "budget_unit": "ids"}
    summary = stage.run(rows, hints="h", hint="It is {answer}.", **budget)
    assert summary["ids_per_token"] == pytest.approx(8.0, rel=0.15)
    assert summary["tau"] != stage.run(rows, **budget)["tau"]


# An engine that gives a top-k only


class TopScorer:
    """Stands for a server's scorer: of a distribution it gives the likeliest ids, no more."""

    def __init__(self, inner: TransformersScorer, top: int) -> None:
        self.inner, self.top = inner, top

    def score(self, sequences: Any, *, estimator: Any, **more: Any) -> Any:
        assert isinstance(estimator, Fixed)
        assert (estimator.draws, estimator.temperature) == (0, 1.0)
        assert estimator.head <= self.top
        return self.inner.score(sequences, estimator=estimator, **more)


class TopEngine:
    """An engine that is no transformers': its scorer is a `TopScorer`."""

    def __init__(self, inner: Any, top: int) -> None:
        self.inner, self.top, self.name = inner, top, "server"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def scorer(self, *, chunk_bytes: int) -> TopScorer:
        return TopScorer(self.inner.scorer(chunk_bytes=chunk_bytes), self.top)


@pytest.mark.parametrize(
    ("top", "settings", "name"),
    [(20, {}, "top-20"), (8, {}, "top-8"), (20, {"estimator": "fixed", "head": 6}, "top-6")],
)
def test_a_top_k_engine_says_so_in_the_store_and_the_loss_is_a_bucket(
    stage: Stage, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, top: int,
    settings: dict[str, Any], name: str,
) -> None:  # fmt: skip
    @contextlib.contextmanager
    def served(role: str, inputs: Any, site: Any) -> Any:
        with opened(role, inputs, replace(site, engines={})) as engine:
            yield TopEngine(engine, top)

    monkeypatch.setattr(score, "opened", served)
    stage.engines = {"teacher": Server(kind="server", url="http://there", top=top)}
    stage.run(rollouts(chat, 5), **settings)
    assert (stage.meta.estimator, stage.meta.engine, stage.meta.tau) == (name, "server", None)
    assert not stage.meta.has_tail
    width = int(name.partition("-")[2])
    assert all(set(row.targets.head_counts_N.tolist()) == {width} for row in stage.rows)
    config = Distill(stage="distill", model="m", targets="t", seed=0)
    assert [term.treatment for term in loss_spec(config, stage.meta).terms] == ["bucket"]


def test_with_several_engines_all_are_held_to_what_the_least_can_give(
    stage: Stage, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def served(role: str, inputs: Any, site: Any) -> Any:
        with opened(role, inputs, replace(site, engines={})) as engine:
            yield TopEngine(engine, 5) if role == "routes.0.teacher" else engine

    monkeypatch.setattr(score, "opened", served)
    stage.engines = {"routes.0.teacher": Server(kind="server", url="http://there", top=5)}
    stage.run(rollouts(chat, 8), routes=ROUTES[:1])
    assert (stage.meta.estimator, stage.meta.engine) == ("top-5", "transformers+server")
    assert all(set(row.targets.head_counts_N.tolist()) == {5} for row in stage.rows)


# What was sampled is what is read


@pytest.fixture(scope="module")
def speaker(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with a likelier end of turn, so that some of its answers end."""
    folder = tmp_path_factory.mktemp("speaker") / "model"
    shutil.copytree(teachers["teacher"], folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][EOS].mul_(6.0)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def sampled(folder: Path, model: Path, temperature: float) -> list[Row]:
    """Rollouts as the stage stores them; some end by themselves."""
    rows = [hint_row(n) for n in range(24)]
    write_rows(folder / "prompts" / "part-00000.parquet", rows, CONVERSATIONS)
    config = Rollout(
        stage="rollout", model="m", prompts="p", mode="fast", max_tokens=40, seed=1,
        temperature=temperature, batch_rows=7, shard_rows=10, samples=2,
    )  # fmt: skip
    outside = {"stage": "external", "fingerprint": "s", "identity": {}}
    inputs = {"model": Artifact(model, outside), "prompts": Artifact(folder / "prompts", {})}
    work = WorkDir.open(folder / "work", reporter=Reporter(quiet=True), device="cpu")
    rollout_stage.run(config, inputs, work)
    return list(read_rows(sorted(work.path.glob("part-*.parquet"))))


def check_against_a_scorer(rows: Sequence[Row], stage: Stage, model: Path) -> None:
    """Each token's log-probability within 1e-3, and a stopped answer ends on what stopped it."""
    read = [Scorable(row["prompt_ids"], row["response_ids"]) for row in rows]
    stage.teachers = {"teacher": model}
    for row, logps_N in zip(rows, label_logps(stage, read), strict=True):
        assert len(row["student_logp"]) == len(logps_N)
        assert (row["response_ids"][-1] == EOS) == (row["finish_reason"] == "stop")
        np.testing.assert_allclose(row["student_logp"], logps_N, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_stored_at_sampling_are_those_a_scorer_reads(
    stage: Stage, tmp_path: Path, speaker: Path, temperature: float
) -> None:
    rows = sampled(tmp_path, speaker, temperature)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    check_against_a_scorer(rows, stage, speaker)


FAULTS = ("off by one", "wrong temperature", "dropped end of turn")


@pytest.mark.parametrize("fault", FAULTS)
def test_that_test_fails_for_each_mistake_it_is_there_for(
    stage: Stage, tmp_path: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Injected: a scorer that reads the position before; a sampler that stores what its own
    temperature gave; one that forgets the token that ended an answer, and its log-probability."""
    whole, draw, completion = (
        TransformersScorer._response_hidden, sampling.draw, sampling._completion,
    )  # fmt: skip

    def before(self: TransformersScorer, chosen: Sequence[Scorable]) -> torch.Tensor:
        return whole(self, [Scorable(one.prompt_ids[:-1], [one.prompt_ids[-1],
                                     *one.response_ids[:-1]]) for one in chosen])  # fmt: skip

    def tempered(logits_BV: torch.Tensor, *, temperature: float, uniforms_B: Any) -> Any:
        ids_B, _ = draw(logits_BV, temperature=temperature, uniforms_B=uniforms_B)
        logp_BV = (logits_BV / temperature).log_softmax(-1)
        return ids_B, logp_BV.gather(-1, torch.as_tensor(ids_B)[:, None])[:, 0].numpy()

    def dropped(row: Any) -> Any:
        made = completion(row)
        if made.finish_reason == "length":
            return made
        return replace(made, response_ids=made.response_ids[:-1], logps=made.logps[:-1])

    if fault == "off by one":
        monkeypatch.setattr(scoring.TransformersScorer, "_response_hidden", before)
    elif fault == "wrong temperature":
        monkeypatch.setattr(sampling, "draw", tempered)
    else:
        monkeypatch.setattr(sampling, "_completion", dropped)
    rows = [row for row in sampled(tmp_path, speaker, 0.7) if row["response_ids"]]
    with pytest.raises(AssertionError):
        check_against_a_scorer(rows, stage, speaker)


def test_a_calibration_is_kept_for_a_resumed_run(stage: Stage, chat: ChatFormat) -> None:
    stage.run(rollouts(chat, 14), routes=ROUTES, budget=8.0, budget_unit="ids")
    found = json.loads((stage.work / "calibration.json").read_text())
    assert found["tau"] == stage.meta.tau
