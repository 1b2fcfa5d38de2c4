"""Stage `screen`: what falls and why, Delta-IFD against the models' own logits, resuming.

Models are tiny real ones; rollouts are written by hand, or sampled by the stage `rollout`.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, ModelError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.estimate import estimate
from tutelage.pipeline import plan
from tutelage.recipe.load import load
from tutelage.recipe.screening import Screen
from tutelage.records import CONVERSATIONS, ROLLOUTS, read_rows, write_rows
from tutelage.stages import screen
from tutelage.store import Store
from tutelage.text.chat import ChatFormat

Row = dict[str, Any]
MODELS = {"student": 1, "teacher": 2}
"""Role -> seed of its weights."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {role: write_model(folder / role, layers=2, seed=seed) for role, seed in MODELS.items()}


@pytest.fixture(scope="module")
def chat(models: dict[str, Path]) -> ChatFormat:
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(models["student"]))


class Stage:
    """The stage over given rollouts, each run in a folder of its own unless told otherwise."""

    def __init__(self, folder: Path, models: dict[str, Path], chat: ChatFormat) -> None:
        self.folder, self.models, self.chat = folder, models, chat
        self.runs = 0
        self.summary: dict[str, Any] = {}
        self.prompts: list[Row] = []

    def rollout(
        self, index: int, answer: str, *, cut: bool = False, mode: str = "fast",
        thinking: str = "", **columns: Any,
    ) -> Row:  # fmt: skip
        """An answer to `question INDEX`, as its ids; the log-probabilities are the student's."""
        message = {"role": "assistant", "content": answer, "thinking": thinking}
        ids = self.chat.response_ids(message)  # type: ignore[arg-type]
        ids = ids[:-1] if cut else ids
        asked = [{"role": "user", "content": f"question {index}"}]
        prompt = self.chat.prompt_ids(asked, mode)  # type: ignore[arg-type]
        row = {
            "id": f"q{index}/{mode}/0", "prompt_id": f"q{index}", "source": "lab", "mode": mode,
            "prompt_ids": prompt, "response_ids": ids, "student_logp": self.logps("student",
                                                                                  prompt, ids),
            "finish_reason": "length" if cut else "stop",
            "text": self.chat.tokenizer.decode(ids), "task": None, "language": "en",
            "verdict": None,
        }  # fmt: skip
        return {**row, **columns}

    def logps(self, role: str, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(self.models[role])
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
        logp_TV = logits_TV.log_softmax(-1)
        return [float(logp_TV[len(prompt) - 1 + j, token]) for j, token in enumerate(ids)]

    def nll(self, role: str, prompt: Sequence[int], ids: Sequence[int]) -> float:
        return -float(np.mean(self.logps(role, prompt, ids)))

    def delta(self, row: Row) -> float:
        """By the formula, from whole log-softmaxes."""
        alone = self.chat.prompt_ids([{"role": "user", "content": ""}], row["mode"])
        ids = row["response_ids"]
        ifd = {
            role: self.nll(role, row["prompt_ids"], ids) / self.nll(role, alone, ids)
            for role in MODELS
        }
        return ifd["teacher"] - ifd["student"]

    def golds(self, *golds: str | None) -> None:
        self.prompts = [
            {
                "id": f"q{n}", "source": "lab", "language": "en", "mode": "fast",
                "messages": [{"role": "user", "content": f"question {n}", "thinking": None}],
                "complete": True, "answer": gold, "task": None, "difficulty": None, "meta": None,
            }
            for n, gold in enumerate(golds)
        ]  # fmt: skip

    def run(
        self, rollouts: Sequence[Row], *, writer: str = "student", into: Path | None = None,
        **settings: Any,
    ) -> Path:  # fmt: skip
        """The work folder; give it again as `into` to go on in it."""
        self.runs += 1
        into = into or self.folder / f"work{self.runs}"
        config = Screen.model_validate({"stage": "screen", "rollouts": "r", **settings})
        source = self.folder / f"rollouts{self.runs}"
        write_rows(source / "part-00000.parquet", rollouts, ROLLOUTS)
        inputs = {"rollouts": Artifact(source, {"inputs": {"model": {"fingerprint": writer}}})}
        for role in MODELS:
            if getattr(config, role):
                outside = {"stage": "external", "fingerprint": role, "identity": {}}
                inputs[role] = Artifact(self.models[role], outside)
        if config.prompts:
            prompts = self.folder / f"prompts{self.runs}"
            write_rows(prompts / "part-00000.parquet", self.prompts, CONVERSATIONS)
            inputs["prompts"] = Artifact(prompts, {})
        work = WorkDir.open(into, reporter=Reporter(quiet=True), device="cpu")
        self.summary = screen.run(config, inputs, work)
        self.tokens = work.tokens()
        return into


@pytest.fixture
def stage(tmp_path: Path, models: dict[str, Path], chat: ChatFormat) -> Stage:
    return Stage(tmp_path, models, chat)


def rows_of(work: Path) -> list[Row]:
    return list(read_rows(sorted(work.glob("part-*.parquet"))))


def kept(work: Path) -> list[str]:
    return [row["prompt_id"] for row in rows_of(work)]


def aside(work: Path, name: str) -> list[Row]:
    path = work / "quarantine" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


LOOP = "again and " * 12


def test_only_empty_and_looping_answers_fall_unless_more_is_asked(stage: Stage) -> None:
    rollouts = [
        stage.rollout(0, "A fine answer."), stage.rollout(1, ""), stage.rollout(2, LOOP, cut=True),
        stage.rollout(3, "cut sho", cut=True), stage.rollout(4, " \n"),
    ]  # fmt: skip
    work = stage.run(rollouts, shard_rows=2)
    assert kept(work) == ["q0", "q3"]
    assert_same(rows_of(work), [rollouts[0], rollouts[3]])
    assert stage.summary == {
        "rows": 2, "read": 5, "dropped_empty": 2, "dropped_looping": 1, "truncated_share": 0.4,
        "looping_share": 0.2, "student": "student",
        "response_tokens": sum(len(rollouts[i]["response_ids"]) for i in (0, 3)),
    }  # fmt: skip
    assert [one["id"] for one in aside(work, "empty")] == ["q1/fast/0", "q4/fast/0"]
    (looped,) = aside(work, "looping")
    assert looped["reason"].startswith("its last ")
    assert looped["row"]["text"] == rollouts[2]["text"]
    assert "response_ids" not in looped["row"]


def assert_same(found: Sequence[Row], rows: Sequence[Row]) -> None:
    """Log-probabilities are stored as float32; all else is as it came in."""
    for one, other in zip(found, rows, strict=True):
        np.testing.assert_allclose(one["student_logp"], other["student_logp"], rtol=1e-6)
        assert {**one, "student_logp": 0} == {**other, "student_logp": 0}


def test_what_is_kept_is_told_all_the_same(stage: Stage) -> None:
    rollouts = [stage.rollout(0, "Fine."), stage.rollout(1, LOOP, cut=True)]
    assert kept(stage.run(rollouts, looping="keep")) == ["q0", "q1"]
    assert (stage.summary["looping_share"], stage.summary["truncated_share"]) == (0.5, 0.5)


def test_a_rollout_falls_by_the_first_filter_that_does_not_take_it(stage: Stage) -> None:
    """An empty answer that was cut off is empty; a loop that was cut off is truncated."""
    rollouts = [
        stage.rollout(0, "Fine."), stage.rollout(1, "\n", cut=True),
        stage.rollout(2, LOOP, cut=True), stage.rollout(3, LOOP),
    ]  # fmt: skip
    work = stage.run(rollouts, truncated="drop")
    assert kept(work) == ["q0"]
    assert [len(aside(work, name)) for name in ("empty", "truncated", "looping")] == [1, 1, 1]


def test_a_loop_that_was_ended_after_all_is_one(stage: Stage) -> None:
    work = stage.run([stage.rollout(0, "Fine."), stage.rollout(1, LOOP)], loop_same=1.0)
    assert kept(work) == ["q0"]


# Verdicts


def verdicts(stage: Stage, verdict: str, rollouts: Sequence[Row]) -> Path:
    return stage.run(
        rollouts, verdict=verdict, verifier="numeric", prompts="p", student="s", shard_rows=2
    )


def answers(stage: Stage) -> list[Row]:
    stage.golds("7", "8", None, "9", "ten")
    return [
        stage.rollout(0, "It is 7."), stage.rollout(1, "It is 7."), stage.rollout(2, "It is 7."),
        stage.rollout(3, "It is 9.", mode="reasoning", thinking="Not 8, not 7."),
        stage.rollout(4, "It is ten."),
    ]  # fmt: skip


def test_every_graded_rollout_has_its_verdict_and_all_stay(stage: Stage) -> None:
    work = verdicts(stage, "all", answers(stage))
    said = [row["verdict"] for row in rows_of(work)]
    assert said == ["correct", "wrong", None, "correct", None]
    counted = {name: stage.summary[name] for name in ("correct", "wrong", "ungradable")}
    assert counted == {"correct": 2, "wrong": 1, "ungradable": 2}


def test_only_correct_or_only_wrong_ones_stay_beside_those_that_cannot_be_graded(
    stage: Stage,
) -> None:
    rollouts = answers(stage)
    work = verdicts(stage, "correct", rollouts)
    assert kept(work) == ["q0", "q2", "q3", "q4"]
    (fell,) = aside(work, "verdict")
    assert (fell["id"], fell["verdict"]) == ("q1/fast/0", "wrong")
    assert fell["reason"].startswith("wrong: ")
    work = verdicts(stage, "wrong", rollouts)
    assert kept(work) == ["q1", "q2", "q4"]
    assert stage.summary["dropped_verdict"] == 2


def test_the_chain_is_no_part_of_what_is_graded(stage: Stage) -> None:
    """Its chain ends on the right number, its answer on a wrong one; and one never answers."""
    stage.golds("9", "9", "9")
    rollouts = [
        stage.rollout(0, "It is 4.", mode="reasoning", thinking="So it is 9."),
        stage.rollout(1, "It is 9.", mode="reasoning", thinking="So it is 4."),
    ]  # fmt: skip
    cut = stage.rollout(2, "9", mode="reasoning", thinking="It is 9", cut=True)
    cut = {**cut, "response_ids": cut["response_ids"][:4], "student_logp": [0.0] * 4}
    said = [row["verdict"] for row in rows_of(verdicts(stage, "all", [*rollouts, cut]))]
    assert said == ["wrong", "correct", "wrong"]


def test_a_verdict_of_before_stays_where_nothing_is_graded(stage: Stage) -> None:
    work = stage.run([stage.rollout(0, "Fine.", verdict="wrong")])
    assert rows_of(work)[0]["verdict"] == "wrong"


def test_a_verifier_that_can_judge_nothing_stops_the_step(stage: Stage) -> None:
    stage.golds("seven", None)
    rollouts = [stage.rollout(0, "seven"), stage.rollout(1, "x"), stage.rollout(5, "y")]
    with pytest.raises(DataError, match="'numeric' can judge none of 3 rollouts"):
        verdicts(stage, "all", rollouts)


def test_an_unknown_verifier_is_told_before_anything_is_read(stage: Stage) -> None:
    with pytest.raises(RecipeError, match="did you mean 'numeric'"):
        stage.run([stage.rollout(0, "a")], verifier="numerc", prompts="p", student="s")


# Delta-IFD


TEXTS = ["Roots drink.", "Plants do not think at all.", "a", "How?", "Write around it, then <b>."]


def delta(stage: Stage, rollouts: Sequence[Row], least: float, most: float, **more: Any) -> Path:
    settings = {"delta_ifd": [least, most], "teacher": "t", "student": "s", "shard_rows": 2}
    return stage.run(rollouts, **{**settings, **more})


def test_delta_ifd_is_the_models_own_and_the_range_decides(stage: Stage) -> None:
    rollouts = [stage.rollout(n, text, cut=n == 1) for n, text in enumerate(TEXTS)]
    rollouts.append(stage.rollout(5, "So.", mode="reasoning", thinking="I think."))
    wanted = {row["prompt_id"]: stage.delta(row) for row in rollouts}
    low, middle = sorted(wanted.values())[0], float(np.median(list(wanted.values())))
    work = delta(stage, rollouts, middle, 9.0)
    assert kept(work) == [name for name, value in wanted.items() if value >= middle]
    fell = {one["row"]["prompt_id"]: one["delta"] for one in aside(work, "delta_ifd")}
    assert fell == pytest.approx({n: v for n, v in wanted.items() if v < middle}, abs=1e-5)
    assert low in [pytest.approx(value, abs=1e-5) for value in fell.values()]
    assert stage.summary["mean_delta_ifd"] == pytest.approx(
        np.mean(list(wanted.values())), abs=1e-5
    )


def test_the_ends_of_the_range_belong_to_it() -> None:
    settings = {"delta_ifd": [0.0, 0.8], "teacher": "t", "student": "s"}
    config = Screen.model_validate({"stage": "screen", "rollouts": "r", **settings})
    falls = ["drop" in screen._by_delta(config, d, True) for d in (-1e-9, 0.0, 0.8, 0.8 + 1e-9)]
    assert falls == [True, False, False, True]


def test_the_students_own_nll_is_the_stored_one_and_is_not_read_again(stage: Stage) -> None:
    one = stage.rollout(0, TEXTS[0])
    doubled = {**one, "student_logp": [2 * value for value in one["student_logp"]]}
    delta(stage, [one], -9.0, 9.0)
    before = stage.summary["mean_delta_ifd"]
    delta(stage, [doubled], -9.0, 9.0)
    alone = stage.chat.prompt_ids([{"role": "user", "content": ""}], "fast")
    ids = one["response_ids"]
    ifd = stage.nll("student", one["prompt_ids"], ids) / stage.nll("student", alone, ids)
    assert before - stage.summary["mean_delta_ifd"] == pytest.approx(ifd, abs=1e-5)


def test_models_read_only_what_is_left_and_the_teachers_tokens_are_counted(stage: Stage) -> None:
    rollouts = [stage.rollout(0, TEXTS[0]), stage.rollout(1, LOOP), stage.rollout(2, TEXTS[1])]
    delta(stage, rollouts, -9.0, 9.0)
    alone = len(stage.chat.prompt_ids([{"role": "user", "content": ""}], "fast"))
    read = [rollouts[0], rollouts[2]]
    seen = sum(len(r["prompt_ids"]) + alone + 2 * len(r["response_ids"]) for r in read)
    assert stage.tokens["teacher_prefilled"] == seen
    assert stage.tokens["student_decoded"] == 0


def test_an_answer_longer_than_a_context_is_not_read_and_falls(stage: Stage) -> None:
    long = stage.rollout(0, "x")
    long = {**long, "response_ids": list(range(250)) * 2, "student_logp": [-1.0] * 500}
    work = delta(stage, [long, stage.rollout(1, TEXTS[0])], -9.0, 9.0, looping="keep")
    assert kept(work) == ["q1"]
    assert "context" in aside(work, "delta_ifd")[0]["reason"]


def test_one_engine_is_open_at_a_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    whole = screen.opened

    @contextlib.contextmanager
    def opened(role: str, *arguments: Any) -> Any:
        with whole(role, *arguments) as engine:
            seen.append(f"+{role}")
            yield engine
            seen.append(f"-{role}")

    monkeypatch.setattr(screen, "opened", opened)
    delta(stage, [stage.rollout(n, text) for n, text in enumerate(TEXTS)], -9.0, 9.0)
    assert seen == ["+teacher", "-teacher", "+student", "-student"]


@pytest.mark.parametrize("kind", ["look-00001", "teacher-00001", "student-00001"])
def test_a_killed_step_goes_on_and_its_bytes_are_the_same(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stage.golds(*["7"] * 5)
    rollouts = [stage.rollout(n, text) for n, text in enumerate([*TEXTS[:4], LOOP])]
    settings = {"verifier": "exact", "prompts": "p"}
    whole = delta(stage, rollouts, 0.0, 9.0, **settings)
    told = stage.summary
    write, into = screen.write_json, stage.folder / "killed"

    def killed(path: Path, value: Any) -> None:
        if path.stem == kind:
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(screen, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            delta(stage, rollouts, 0.0, 9.0, into=into, **settings)
    assert json.loads((into / "ledger.json").read_text())
    delta(stage, rollouts, 0.0, 9.0, into=into, **settings)
    assert stage.summary == told
    for pattern in ("part-*.parquet", "quarantine/*.jsonl"):
        made = [path.read_bytes() for path in sorted(into.glob(pattern))]
        assert made
        assert made == [path.read_bytes() for path in sorted(whole.glob(pattern))]


# What stops it


def test_another_student_than_the_writer_is_refused(stage: Stage) -> None:
    with pytest.raises(DataError, match="student is not the model that wrote the rollouts"):
        stage.run([stage.rollout(0, "a")], writer="other", student="s")


def test_nothing_left_names_what_took_them(stage: Stage) -> None:
    rollouts = [stage.rollout(0, ""), stage.rollout(1, LOOP), stage.rollout(2, LOOP)]
    with pytest.raises(DataError, match="no rollout is left of 3: 1 empty, 2 looping; see .*quar"):
        stage.run(rollouts)
    with pytest.raises(DataError, match="no rollout is left of 0"):
        stage.run([])


# In a recipe


RECIPE = """
name = "s"
[models.teacher]
source = "./teacher"
[models.student]
source = "./student"
[models.other]
source = "./other"
[steps.rows]
stage = "data"
sources = [{ source = "./rows.jsonl" }]
[steps.rollouts]
stage = "rollout"
model = "student"
prompts = "rows"
mode = "fast"
[steps.screened]
stage = "screen"
rollouts = "rollouts"
student = "student"
teacher = "teacher"
delta_ifd = [0.0, 0.8]
[steps.again]
stage = "screen"
rollouts = "screened"
truncated = "drop"
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "again"
[steps.distilled]
stage = "distill"
model = "student"
targets = "targets"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for seed, name in enumerate(("teacher", "student")):
        write_model(tmp_path / name, layers=1, seed=seed)
    write_model(tmp_path / "other", layers=1, vocab=330)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "You"}\n')
    path = tmp_path / "s.toml"
    path.write_text(RECIPE)
    return path


def planned(recipe: Path, *overrides: str) -> Any:
    return plan(load(recipe, overrides), Store(recipe.parent / "store"))


def test_rows_pass_through_an_estimate_and_the_teacher_reads_twice(recipe: Path) -> None:
    found = estimate(planned(recipe), Store(recipe.parent / "store"))
    assert [found[n].rows for n in ("rollouts", "screened", "again", "targets")] == [2, 2, 2, 2]
    assert found["targets"].decoded == found["rollouts"].decoded > 0
    assert found["screened"].read == 3 * (found["rollouts"].decoded + 2 * 64)
    assert found["again"].read == 0
    assert found["again"].memory_bytes == 0


def test_a_screen_knows_the_rollouts_writer_in_a_plan(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"steps\.screened\.student: .* 'student', not by 'teac"):
        planned(recipe, "steps.screened.student=teacher")


def test_vocabularies_are_compared_through_screens(recipe: Path) -> None:
    with pytest.raises(ModelError, match=r"steps\.targets: student and its teacher other"):
        planned(recipe, "steps.targets.teacher=other")
    with pytest.raises(ModelError, match=r"steps\.screened: student and its teacher other"):
        planned(recipe, "steps.screened.teacher=other")


def test_an_engine_that_cannot_read_is_refused_in_a_plan(recipe: Path) -> None:
    served = 'engines.teacher={kind="server", url="http://x", api="llama.cpp"}'
    with pytest.raises(RecipeError, match=r"steps\.screened\.teacher: its engine only answers"):
        planned(recipe, served)
