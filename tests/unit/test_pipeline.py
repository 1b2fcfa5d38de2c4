"""Plan and run, with fake stages: what is made, what is kept, and what is told.

The stages are fakes (a file of one line each), put in place of `pipeline._run_stage`; identities,
locks, folders, manifests and messages are the real ones. The real stages run in `tests/e2e`.
"""

import contextlib
import errno
import json
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tutelage import pipeline
from tutelage.cli.app import main
from tutelage.core import files
from tutelage.core.artifact import Artifact, WorkDir, verify
from tutelage.core.errors import (
    ArtifactError,
    DataError,
    EngineError,
    ModelError,
    RecipeError,
    TutelageError,
)
from tutelage.core.lock import file_lock
from tutelage.core.progress import Reporter
from tutelage.estimate import estimate
from tutelage.recipe.base import Step
from tutelage.recipe.load import load
from tutelage.recipe.tables import Runtime
from tutelage.store import Store

RECIPE = """
name = "fake"
seed = 1
[models.m]
source = "./model"
[models.other]
source = "./other"
[steps.rows]
stage = "data"
sources = [{ source = "./rows.jsonl" }]
[steps.tuned]
stage = "sft"
model = "m"
data = "rows"
lr = 1e-5
[steps.answers]
stage = "rollout"
model = "tuned"
prompts = "rows"
mode = "fast"
[steps.targets]
stage = "score"
teacher = "m"
rollouts = "answers"
[steps.distilled]
stage = "distill"
model = "tuned"
targets = "targets"
"""
STEPS = ["rows", "tuned", "answers", "targets", "distilled"]
QUIET = Reporter(quiet=True)


def write_model(folder: Path, *, ids: int = 6, padded: int = 0, first: str = "a") -> Path:
    """A model by its headers alone: configuration, tokenizer, and weights of zeros."""
    rows = padded or ids
    folder.mkdir()
    shape = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 8,
        "num_attention_heads": 2, "vocab_size": rows,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape))
    vocabulary = {chr(ord(first) + i): i for i in range(ids)}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        )
    )
    size = rows * 4 * 2
    tensors = {
        "model.embed_tokens.weight": {"dtype": "F16", "shape": [rows, 4], "data_offsets": [0, size]}
    }
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(size)
    )
    return folder


class Project:
    """A recipe, its files and its store in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "fake.toml"
        self.recipe.write_text(RECIPE)
        self.store = Store(folder / "store")
        self.calls: list[str] = []
        self.fault: Callable[[Step, WorkDir], None] = lambda step, work: None
        (folder / "rows.jsonl").write_text('{"prompt": "Hi"}\n')
        write_model(folder / "model")
        write_model(folder / "other")

    def stage(self, step: Step, inputs: Mapping[str, Artifact], work: WorkDir) -> Mapping[str, int]:
        """The fake stage: reads its inputs' lines and writes one of its own."""
        self.calls.append(step.stage)
        files.write_text(work.path / "part-00000.txt", f"{step.stage}\n")
        work.commit("part-00000", seconds=0.5, tokens={"trained": 3})
        self.fault(step, work)
        return {"rows": len(inputs)}

    def run(self, *overrides: str, until: str = "") -> pipeline.Result:
        return pipeline.run(load(self.recipe, overrides), self.store, until=until, reporter=QUIET)

    def plan(self, *overrides: str, until: str = "") -> dict[str, pipeline.Planned]:
        found = pipeline.plan(load(self.recipe, overrides), self.store, until=until)
        return {p.node.name: p for p in found}

    def status(self, *overrides: str) -> dict[str, str]:
        return {n: p.status for n, p in self.plan(*overrides).items() if p.status != "outside"}

    def edit(self, old: str, new: str) -> None:
        text = self.recipe.read_text()
        assert text.count(old) == 1, old
        self.recipe.write_text(text.replace(old, new))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path)
    monkeypatch.setattr(pipeline, "_run_stage", made.stage)
    monkeypatch.setattr(files, "fsync", lambda path: None)  # 2,000 of them; test_files.py has it
    return made


def test_a_first_run_makes_every_step_and_a_second_makes_none(project: Project) -> None:
    assert set(project.status().values()) == {"run"}
    first = project.run()
    assert list(first.made) == STEPS
    assert project.calls == ["data", "sft", "rollout", "score", "distill"]
    assert set(project.status().values()) == {"cached"}
    second = project.run()
    assert second.made == ()
    assert len(project.calls) == 5
    assert {n: a.path for n, a in first.artifacts.items()} == {
        n: a.path for n, a in second.artifacts.items()
    }


def test_a_result_tells_where_it_came_from(project: Project) -> None:
    made = project.run().artifacts
    manifest = made["tuned"].manifest
    assert manifest["inputs"]["data.0"]["fingerprint"] == made["rows"].fingerprint
    assert manifest["inputs"]["data.0"]["content"] == made["rows"].manifest["content"]
    assert manifest["identity"]["config"]["lr"] == 1e-5
    assert manifest["summary"] == {"rows": 2}
    assert manifest["peak_memory_bytes"] > 1_000_000
    assert manifest["provenance"]["tutelage"]
    assert all(verify(made[name]) == [] for name in STEPS)


def test_a_run_keeps_its_map_of_steps_and_its_resolved_recipe(project: Project) -> None:
    made = project.run("steps.tuned.lr=3e-5")
    recorded = project.store.read_run("fake")
    assert {n: e["fingerprint"] for n, e in recorded.items()} == {
        n: made.artifacts[n].fingerprint for n in STEPS
    }
    resolved = json.loads((project.store.run_folder("fake") / "recipe.json").read_text())
    assert resolved["fake"]["steps"]["tuned"]["lr"] == 3e-5


def test_only_what_a_changed_setting_touches_is_made_again(project: Project) -> None:
    project.run()
    again = project.run("steps.answers.temperature=0.5")
    assert list(again.made) == ["answers", "targets", "distilled"]
    assert project.run().made == ()  # and the first results are still there


def test_reasons_are_fields_in_the_words_of_the_recipe(project: Project) -> None:
    assert project.plan()["tuned"].reasons == ("never run",)
    project.run()
    planned = project.plan("steps.tuned.lr=2e-5")
    assert planned["rows"].status == "cached"
    assert planned["tuned"].reasons == ("steps.tuned.lr: 1e-05 -> 2e-05",)
    assert planned["answers"].reasons == ("input model (tuned) changed",)


def test_a_changed_source_file_is_a_reason(project: Project) -> None:
    project.run()
    (project.folder / "rows.jsonl").write_text('{"prompt": "Ho"}\n')
    (reason,) = project.plan()["rows"].reasons
    assert reason.startswith("source changed: 0.sha256[0]: ")
    assert project.run().made == tuple(STEPS)


def test_changed_weights_make_new_steps(project: Project) -> None:
    project.run()
    path = project.folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert project.plan()["tuned"].reasons == ("input model (m) changed",)
    assert project.status()["rows"] == "cached"


def test_a_new_version_or_stage_of_a_step_is_a_reason(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.run()
    with monkeypatch.context() as patch:
        patch.setattr("tutelage.recipe.tables.Score.version", 99)
        (reason,) = project.plan()["targets"].reasons
        assert reason.startswith("score stage: version")
        assert reason.endswith("-> 99")
    project.edit(
        'stage = "sft"\nmodel = "m"\ndata = "rows"\nlr = 1e-5', 'stage = "prune"\nmodel = "m"'
    )
    assert project.plan()["tuned"].reasons == ("steps.tuned.stage: sft -> prune",)


def test_the_runtime_table_never_changes_an_identity(project: Project) -> None:
    project.run()
    planned = project.status("runtime.device=cpu", "runtime.threads=1")
    assert set(planned.values()) == {"cached"}


def test_until_makes_a_step_and_what_it_needs(project: Project) -> None:
    assert list(project.run(until="answers").made) == ["rows", "tuned", "answers"]
    assert set(project.plan(until="tuned")) == {"m", "rows", "tuned"}
    assert list(project.run().made) == ["targets", "distilled"]


def test_equal_steps_are_made_once_and_the_plan_says_so(project: Project) -> None:
    text = project.recipe.read_text()
    project.recipe.write_text(text + '[steps.twin]\nstage = "sft"\nmodel = "m"\ndata = "rows"\n')
    twin = project.plan("steps.tuned.lr=1e-5")["twin"]
    assert (twin.status, twin.reasons) == ("same", ("same as tuned",))
    result = project.run()
    assert "twin" not in result.made
    assert result.artifacts["twin"].path == result.artifacts["tuned"].path
    assert project.calls.count("sft") == 1


def test_a_matrix_expands_and_shares_equal_steps(project: Project) -> None:
    project.edit("sources = [", "seed = 5\nsources = [")
    text = project.recipe.read_text()
    project.recipe.write_text(text + "[matrix]\nseed = [1, 2, 3]\n")
    status = project.status()
    assert len(status) == 15
    assert [status[f"rows@seed={n}"] for n in (1, 2, 3)] == ["run", "same", "same"]
    result = project.run()
    assert Counter(project.calls) == {"data": 1, "sft": 3, "rollout": 3, "score": 3, "distill": 3}
    fingerprints = {result.artifacts[f"distilled@seed={n}"].fingerprint for n in (1, 2, 3)}
    assert len(fingerprints) == 3
    assert set(project.status().values()) <= {"cached", "same"}


def test_an_interrupted_step_is_planned_as_resume_and_keeps_its_parts(project: Project) -> None:
    def interrupted(step: Step, work: WorkDir) -> None:
        if step.stage == "sft":
            raise KeyboardInterrupt

    project.fault = interrupted
    with pytest.raises(KeyboardInterrupt):
        project.run()
    assert project.status()["tuned"] == "resume"
    assert project.status()["rows"] == "cached"
    kept: list[bool] = []
    project.fault = lambda step, work: None
    stage = project.stage

    def again(step: Step, inputs: Mapping[str, Artifact], work: WorkDir) -> Mapping[str, int]:
        kept.append(work.done("part-00000"))
        return stage(step, inputs, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_run_stage", again)
        assert list(project.run().made) == ["tuned", "answers", "targets", "distilled"]
    assert kept == [True, False, False, False]


def test_a_removed_result_is_made_again(project: Project) -> None:
    made = project.run().artifacts["tuned"]
    project.store.remove(made.path)
    assert project.plan()["tuned"].reasons == ("result was removed",)
    assert list(project.run().made) == ["tuned"]


def test_a_damaged_result_stops_the_plan_instead_of_being_used(project: Project) -> None:
    made = project.run().artifacts["tuned"]
    (made.path / "part-00000.txt").write_text("s")
    with pytest.raises(ArtifactError, match="--repair"):
        project.plan()


def fails(error: Exception, stage: str = "sft") -> Callable[[Step, WorkDir], None]:
    def fault(step: Step, work: WorkDir) -> None:
        if step.stage == stage:
            raise error

    return fault


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ArtifactError, "the disk is full"),
        (RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
         ArtifactError, "the disk is full"),
        (MemoryError(), EngineError, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
         EngineError, "out of memory"),
        (DataError("no row is left"), DataError, "no row is left"),
    ],
)  # fmt: skip
def test_a_fault_becomes_one_line_with_its_steps_name_and_nothing_is_accepted(
    project: Project, error: Exception, kind: type[TutelageError], said: str
) -> None:
    project.fault = fails(error)
    with pytest.raises(kind) as caught:
        project.run()
    text = str(caught.value)
    assert text.startswith("step 'tuned': ")
    assert said in text
    assert "\n" not in text
    planned = project.plan()["tuned"]
    assert project.store.find("sft", planned.fingerprint) is None
    assert planned.status == "resume"
    project.fault = lambda step, work: None
    assert list(project.run().made) == ["tuned", "answers", "targets", "distilled"]


def test_a_bug_keeps_its_type_and_says_in_which_step(project: Project) -> None:
    project.fault = fails(ZeroDivisionError("oh"))
    with pytest.raises(ZeroDivisionError, match="oh") as caught:
        project.run()
    assert caught.value.__notes__ == ["in step 'tuned'"]


def full_after(allowed: int) -> Callable[[Path], Any]:
    """A fake disk that takes so many atomic files and is full then."""
    count = [0]
    write = files.atomic_path

    @contextlib.contextmanager
    def atomic_path(path: Path) -> Any:
        count[0] += 1
        if count[0] > allowed:
            raise OSError(errno.ENOSPC, "No space left on device")
        with write(path) as temporary:
            yield temporary

    return atomic_path


@pytest.mark.parametrize("allowed", range(0, 12, 2))
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_run_goes_on_later(
    project: Project, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_path", full_after(allowed))
        with pytest.raises(ArtifactError, match="the disk is full") as caught:
            project.run()
    assert "\n" not in str(caught.value)
    result = project.run()
    assert all(verify(result.artifacts[name]) == [] for name in STEPS)


def test_a_full_disk_at_the_command_line_is_one_line_and_exit_code_2(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.fault = fails(OSError(errno.ENOSPC, "No space left on device"), "data")
    words = ["tutelage", "run", str(project.recipe), "--store", str(project.store.root)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        "error: step 'rows': the disk is full; make room and run again: finished parts are kept"
    ]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (('teacher = "m"', 'teacher = "other"'),
         "steps.targets: m and its teacher other have different vocabularies (6 and 7 ids)"),
        # scored for its own student, then trained into one of another family
        (('stage = "distill"\nmodel = "tuned"', 'stage = "distill"\nmodel = "other"'),
         "steps.distilled: other and its teacher m have different vocabularies (7 and 6 ids)"),
    ],
)  # fmt: skip
def test_a_teacher_and_a_student_of_different_vocabularies_are_refused_in_the_plan(
    project: Project, edit: tuple[str, str], said: str
) -> None:
    project.edit(*edit)
    project.plan()  # two models of one vocabulary are a pair
    (project.folder / "other").rename(project.folder / "old")
    write_model(project.folder / "other", ids=7)
    with pytest.raises(ModelError) as caught:
        project.plan()
    assert str(caught.value).startswith(said)
    assert project.calls == []


def test_equal_tokenizers_with_other_numbers_of_logits_are_refused(project: Project) -> None:
    project.edit('teacher = "m"', 'teacher = "other"')
    (project.folder / "other").rename(project.folder / "old")
    write_model(project.folder / "other", padded=8)
    with pytest.raises(ModelError, match=r"\(6 and 8 ids\)"):
        project.plan()


def test_an_online_student_must_share_its_teachers_vocabulary(project: Project) -> None:
    (project.folder / "other").rename(project.folder / "old")
    write_model(project.folder / "other", ids=7)
    text = project.recipe.read_text()
    project.recipe.write_text(
        text + '[steps.fresh]\nstage = "online"\nmodel = "tuned"\nteacher = "other"\n'
        'prompts = "rows"\nmode = "fast"\n'
    )
    with pytest.raises(ModelError, match=r"steps\.fresh: m and its teacher other have different"):
        project.plan()


EVALUATED = """
[steps.fresh]
stage = "online"
model = "tuned"
teacher = "m"
prompts = "rows"
mode = "fast"
max_tokens = 100
prompts_a_step = 2
[steps.scores]
stage = "evaluate"
models = ["m", "tuned", "fresh"]
tests = ["rows"]
max_tokens = 100
temperatures = [0.0, 0.8]
samples = 3
tasks = [
  { name = "gsm8k", source = "./sums.jsonl" },
  { name = "mgsm_en", source = "./sums.jsonl", limit = 2, max_tokens = 10 },
]
[steps.table]
stage = "ablation"
scores = ["scores"]
arms = { fresh = { label = "Online", start = "tuned" } }
"""


@pytest.fixture
def evaluated(project: Project) -> Project:
    pytest.importorskip("lm_eval", reason="pip install tutelage[evals]")
    project.recipe.write_text(project.recipe.read_text() + EVALUATED)
    (project.folder / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 5)
    return project


def test_a_plan_tells_what_tests_tasks_and_online_steps_would_cost(evaluated: Project) -> None:
    found = estimate(list(evaluated.plan().values()), evaluated.store)
    scores = found["scores"]
    assert scores.rows == 1 + 5 + 2
    # three models, 0.7 of max_tokens: one row once greedy and three times sampled, then the tasks
    assert scores.decoded == int(3 * (1 * 4 * 100 + 5 * 100 + 2 * 10) * 0.7)
    assert scores.read == 3 * (5 + 2) * 64
    assert scores.memory_bytes > 0
    online = found["fresh"]
    assert (online.rows, online.decoded) == (1, 140)  # one step of two answers
    assert online.read == online.trained == 140 + 2 * 64
    assert found["table"].minutes == 0.0


def test_a_plan_with_tasks_imports_no_torch(evaluated: Project) -> None:
    script = (
        "import sys; from pathlib import Path; from tutelage import pipeline\n"
        "from tutelage.estimate import estimate; from tutelage.recipe.load import load\n"
        "from tutelage.store import Store\n"
        f"store = Store(Path({str(evaluated.store.root)!r}))\n"
        f"estimate(pipeline.plan(load(Path({str(evaluated.recipe)!r})), store), store)\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_rows_of_a_task_are_another_evaluation(evaluated: Project) -> None:
    evaluated.run()
    path = evaluated.folder / "sums.jsonl"
    path.write_text(path.read_text().replace("1 + 1", "1 + 2"))
    planned = evaluated.plan()
    assert planned["scores"].status == planned["table"].status == "run"
    assert planned["fresh"].status == "cached"
    assert any("gsm8k.source" in reason for reason in planned["scores"].reasons)


def test_another_lm_eval_is_another_evaluation(
    evaluated: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluated.plan()["scores"].fingerprint
    monkeypatch.setattr("tutelage.data.identity._version", lambda package: "9.9")
    assert evaluated.plan()["scores"].fingerprint != before


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ('"gsm8k"', '"gsm8kk"', RecipeError,
         "steps.scores.tasks: there is no task 'gsm8kk'; did you mean 'gsm8k'?"),
        ('"gsm8k", source = "./sums', '"gsm8k", source = "./gone', DataError, "no such file"),
    ],
)  # fmt: skip
def test_a_wrong_task_is_told_in_the_plan(
    evaluated: Project, old: str, new: str, error: type[TutelageError], said: str
) -> None:
    evaluated.edit(old, new)
    with pytest.raises(error) as caught:
        evaluated.plan()
    assert said in str(caught.value)


def test_vocabularies_of_one_size_with_other_tokens_are_refused(project: Project) -> None:
    project.edit('teacher = "m"', 'teacher = "other"')
    (project.folder / "other").rename(project.folder / "old")
    write_model(project.folder / "other", first="k")
    with pytest.raises(ModelError, match=r"different vocabularies"):
        project.plan()


def test_an_evaluated_model_must_share_its_teachers_vocabulary(project: Project) -> None:
    (project.folder / "other").rename(project.folder / "old")
    write_model(project.folder / "other", ids=7)
    project.plan()  # nobody compares the two yet
    text = project.recipe.read_text()
    project.recipe.write_text(
        text + '[steps.scores]\nstage = "evaluate"\nmodels = ["tuned", "other"]\n'
        'teacher = "m"\nprompts = "rows"\n'
    )
    with pytest.raises(ModelError, match=r"steps\.scores: other and its teacher m"):
        project.plan()


def test_a_missing_source_is_told_before_anything_runs(project: Project) -> None:
    (project.folder / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file"):
        project.run()
    assert project.calls == []


def test_a_plan_can_be_priced_before_and_after(project: Project) -> None:
    planned = project.plan()
    before = estimate(list(planned.values()), project.store)
    assert before["rows"].rows == 1
    assert before["answers"].decoded == int(512 * 0.7)
    assert before["distilled"].minutes is not None
    assert before["distilled"].minutes > 0
    project.run()
    after = estimate(list(project.plan().values()), project.store)
    assert {after[name].minutes for name in STEPS} == {0.0}


def test_a_step_that_another_process_makes_is_waited_for_not_made_twice(
    project: Project,
) -> None:
    planned = project.plan()
    rows = planned["rows"]
    with file_lock(project.store.lock("data", rows.fingerprint), wait=False) as held:
        assert held
        state = pipeline._Run("fake", project.store, QUIET, Runtime(device="cpu"), planned)
        assert not pipeline._try(state, "rows", wait=False)
        assert project.calls == []
    assert pipeline._try(state, "rows", wait=False)
    assert project.calls == ["data"]


RUN = """
import json, os, sys, time
from pathlib import Path
from tutelage import pipeline
from tutelage.core import files
from tutelage.core.progress import Reporter
from tutelage.recipe.load import load
from tutelage.store import Store
def stage(step, inputs, work):  # a fake: it takes a while and tells that it ran
    with open(sys.argv[3], "a") as log:
        log.write(f"{step.stage}-{getattr(step, 'seed', 0)}\\n")
    time.sleep(0.05)
    files.write_text(work.path / "part-00000.txt", step.stage)
    work.commit("part-00000", seconds=0.05, tokens={})
    return {}
pipeline._run_stage = stage
recipe, store = Path(sys.argv[1]), Store(Path(sys.argv[2]))
result = pipeline.run(load(recipe), store, reporter=Reporter(quiet=True))
print(json.dumps({name: str(a.path) for name, a in result.artifacts.items()}))
"""


def test_two_runs_at_once_on_one_store_make_each_step_once(project: Project) -> None:
    text = project.recipe.read_text()
    project.recipe.write_text(text + "[matrix]\nseed = [1, 2]\n")
    log = project.folder / "log"
    command = [sys.executable, "-c", RUN, str(project.recipe), str(project.store.root), str(log)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert json.loads(said[0][0]) == json.loads(said[1][0])
    stages = ("data", "sft", "rollout", "score", "distill")
    assert sorted(log.read_text().split()) == sorted(f"{s}-{n}" for s in stages for n in (1, 2))
    assert len(project.store.read_run("fake")) == 10
    assert set(project.status().values()) == {"cached"}
