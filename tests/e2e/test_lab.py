"""A whole lab on the command line: new models, every way to train them, two seeds, one page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARMS = ["start", "more", "on", "online", "teacher"]
TRAIN = "lr = 5e-3\nepochs = 9\nmax_steps = {steps}\nbatch_examples = 16\npack_tokens = 48\n"
DATA = '[{ source = "task:gridwalk", limit = %d, task_config = { fold = %s, prompts_only = %s } }]'
RECIPE = f"""
name = "lab"
[runtime]
jobs = 2
threads = 1
device = "cpu"
[models.teacher-blank]
source = "new"
new = {{ layers = 2, hidden_size = 32, tokenizer = "characters", data = ["rows"], seed = 0 }}
[models.blank]
source = "new"
new = {{ layers = 1, hidden_size = 16, tokenizer = "characters", data = ["rows"] }}
[steps.rows]
stage = "data"
seed = 0
sources = {DATA % (200, "[[0, 1, 2, 3, 4, 5, 6], 8]", "false")}
[steps.test]
stage = "data"
seed = 0
sources = {DATA % (12, "[7, 8]", "true")}
[steps.prompts]
stage = "data"
sources = {DATA % (32, "[[0, 1, 2, 3, 4, 5, 6], 8]", "true")}
[steps.teacher]
stage = "sft"
model = "teacher-blank"
data = "rows"
seed = 0
{TRAIN.format(steps=6)}
[steps.start]
stage = "sft"
model = "blank"
data = "rows"
{TRAIN.format(steps=4)}
[steps.more]
stage = "sft"
model = "start"
data = "rows"
{TRAIN.format(steps=3)}
[steps.answers]
stage = "rollout"
model = "start"
prompts = "prompts"
mode = "fast"
max_tokens = 8
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "answers"
[steps.on]
stage = "distill"
model = "start"
targets = "targets"
{TRAIN.format(steps=3)}
[steps.online]
stage = "online"
model = "start"
teacher = "teacher"
prompts = "prompts"
mode = "fast"
max_tokens = 8
prompts_a_step = 16
{TRAIN.format(steps=3)}
[steps.scores]
stage = "evaluate"
models = {json.dumps(ARMS)}
tests = ["test"]
max_tokens = 8
bootstrap = 50
[steps.page]
stage = "ablation"
title = "A tiny lab"
scores = ["scores"]
bootstrap = 200
arms.start = {{ label = "the start" }}
arms.more = {{ label = "SFT for longer", group = "after", start = "start" }}
arms.on = {{ label = "offline", group = "after", start = "start" }}
arms.online = {{ label = "online", group = "after", start = "start" }}
arms.teacher = {{ label = "the teacher" }}
[[steps.page.claims]]
text = "Offline beats longer SFT"
better = "on"
than = "more"
source = "arXiv 2509.26497"
[[steps.page.claims]]
text = "How much of online's gain"
better = "on"
than = "start"
share_of = "online"
expect = "open"
[matrix]
seed = [1, 2]
"""
SHARED = ("rows", "test", "teacher-blank", "teacher")
"""Of one seed for all: made once for both cells."""
OWN = ("blank", "prompts", "start", "more", "answers", "targets", "on", "online", "scores")


def tutelage(folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tutelage", *words, "--store", str(folder / "store")],
        capture_output=True, text=True, timeout=300, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what the run said."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "lab.toml").write_text(RECIPE)
    return folder, tutelage(folder, "run", "lab.toml").stderr


def made(folder: Path, step: str) -> Path:
    entry = json.loads((folder / "store/runs/lab/run.json").read_text())["steps"][step]
    return folder / "store" / "artifacts" / entry["stage"] / entry["fingerprint"]


@pytest.fixture(scope="module")
def record(lab: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((made(lab[0], "page") / "ablation.json").read_text())


@pytest.mark.slow
def test_every_step_of_every_cell_is_made_once(lab: tuple[Path, str]) -> None:
    folder, said = lab
    finished = re.findall(r"^(\S+) \([\w-]+\) done in", said, re.MULTILINE)
    cells = [f"{name}@seed={seed}" for name in OWN for seed in (1, 2)]
    shared = [name.partition("@")[0] for name in finished if name.partition("@")[0] in SHARED]
    assert sorted(shared) == sorted(SHARED)
    own = [name for name in finished if name.partition("@")[0] not in SHARED]
    assert sorted(own) == sorted([*cells, "page"])
    assert len(list((folder / "store/artifacts").glob("*/*/manifest.json"))) == len(finished)


@pytest.mark.slow
def test_the_last_lines_are_those_of_the_page_under_its_own_name(lab: tuple[Path, str]) -> None:
    told = [line for line in lab[1].splitlines() if line.startswith("page")]
    assert told[0].startswith("page: 2 seeds, 5 arms; of 2 claims: ")
    assert told[-1].startswith("page (ablation) done in ")


@pytest.mark.slow
def test_the_page_names_every_arm_and_says_that_two_seeds_are_too_few(
    lab: tuple[Path, str], record: dict[str, Any]
) -> None:
    assert record["cells"] == ["seed=1", "seed=2"]
    assert list(record["arms"]) == ARMS
    assert record["least_p"] == 0.5  # 2 of 2^2 flips of the signs
    beats, share = record["claims"]
    assert (beats["verdict"], share["expect"]) == ("not seen", "open")
    page = (made(lab[0], "page") / "index.html").read_text()
    for said in (
        *(arm["label"] for arm in record["arms"].values()), "Offline beats longer SFT",
        "With 2 seeds no p can be under 0.5", "Take 6 seeds or more",
    ):  # fmt: skip
        assert said in page


@pytest.mark.slow
def test_arms_of_one_group_took_equal_steps_and_paid_in_their_own_kind_of_token(
    record: dict[str, Any],
) -> None:
    (group,) = record["groups"]
    assert (group["arms"], group["unmatched"]) == (["more", "on", "online"], {})
    for cell in record["cells"]:
        cost = {name: arm["costs"][cell] for name, arm in record["arms"].items()}
        for name in group["arms"]:
            assert (cost[name]["steps"], cost[name]["examples"]) == (3, 48)
        assert set(cost["on"]["flops"]) == {"rollout", "score", "distill"}
        assert set(cost["online"]["flops"]) == {"online"}
        assert set(cost["more"]["flops"]) == {"sft"}
        tokens = {name: cost[name]["tokens"] for name in group["arms"]}
        assert not any(tokens["more"][kind] for kind in ("student_decoded", "teacher_prefilled"))
        # online pays for an answer in each of 48 examples, offline for 32 answers once
        for kind in ("student_decoded", "teacher_prefilled"):
            assert 0 < tokens["on"][kind] < tokens["online"][kind]
        assert tokens["online"]["trained"] == tokens["online"]["teacher_prefilled"]


@pytest.mark.slow
def test_a_second_run_makes_nothing(lab: tuple[Path, str]) -> None:
    folder, _ = lab
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    said = tutelage(folder, "run", "lab.toml").stderr
    assert "done in" not in said
    assert "at a time" not in said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == before
