"""`[engines.*]` and `served:` in a recipe: what is refused, what changes an identity, what a plan
says. No engine is opened and no weights are needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

from tutelage.core.errors import RecipeError
from tutelage.estimate import estimate
from tutelage.graph import build
from tutelage.pipeline import Planned, plan
from tutelage.recipe.load import load
from tutelage.store import Store

RECIPE = """
name = "e"
seed = 1
[models.teacher]
source = "./teacher"
[models.student]
source = "./student"
[models.far]
source = "served:big"
tokenizer = "./lent"
[engines.far]
kind = "server"
url = "http://there:8000"
[steps.rows]
stage = "data"
sources = [{ source = "./rows.jsonl" }]
[steps.answers]
stage = "synthesize"
teacher = "far"
prompts = "rows"
mode = "fast"
[steps.tuned]
stage = "sft"
model = "student"
data = "answers"
lr = 1e-5
[steps.rollouts]
stage = "rollout"
model = "tuned"
prompts = "rows"
mode = "fast"
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
[steps.distilled]
stage = "distill"
model = "tuned"
targets = "targets"
[steps.scores]
stage = "evaluate"
models = ["tuned"]
teacher = "teacher"
prompts = "rows"
[steps.edge]
stage = "export"
model = "tuned"
prompts = "rows"
"""
SERVER = 'engines.teacher={kind="server", url="http://x"}'
VLLM = 'engines.teacher={kind="vllm"}'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student", "lent")):
        write_model(folder / name, layers=1, seed=seed)
    (folder / "lent" / "model.safetensors").unlink()
    (folder / "rows.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "You"}\n')
    return folder


@pytest.fixture
def recipe(tmp_path: Path, models: Path) -> Path:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "e.toml"
    path.write_text(RECIPE)
    return path


def planned(recipe: Path, *overrides: str) -> dict[str, Planned]:
    found = plan(load(recipe, overrides), Store(recipe.parent / "store"))
    return {one.node.name: one for one in found}


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(recipe, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


# What is refused


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engines.far.urll=x", "engines.far.urll: unknown key; did you mean 'url'?"),
        ("engines.far.kind=servr", "engines.far.kind: no kind 'servr'; did you mean 'server'?"),
        ("engines.teacher.dtype=float32", "engines.teacher: an engine needs a kind, one of trans"),
        ('engines.teacher={kind="server"}', "engines.teacher.url: is required"),
        ("engines.far.url=there:8000", "engines.far: url begins with http://"),
        ("engines.far.url=http://me:pw@there", "url holds a password"),
        ("engines.far.api=tgi", "engines.far.api: "),
        ("engines.far.top=0", "engines.far.top: "),
        ("engines.far.retries=-1", "engines.far.retries: "),
        ('engines.teachr={kind="transformers"}', "engines.teachr: no model or step that makes on"
         "e; did you mean 'teacher'?"),
        ('engines.rows={kind="transformers"}', "engines.rows: no model or step that makes one"),
        ('engines.far={kind="transformers"}', "models.far: a served model needs [engines.far]"),
        ('engines.far={kind="vllm"}', "models.far: a served model needs [engines.far]"),
        ("models.far.tokenizer=", "tokenizer go together"),
        ("models.teacher.tokenizer=./lent", "tokenizer go together"),
        ("models.far.drop_layers=2", "a served model is not pruned"),
        ("steps.tuned.model=far", "steps.tuned.model: 'far' is served elsewhere"),
        ("steps.distilled.model=far", "steps.distilled.model: 'far' is served elsewhere"),
        ('steps.scores.models=["far"]',
         "steps.scores.models: 'far' is served elsewhere"),
        ("steps.scores.teacher=far",
         "steps.scores.teacher: 'far' is served elsewhere"),
        ("steps.edge.model=far",
         "steps.edge.model: 'far' is served elsewhere"),
        ('steps.targets.routes=[{teacher="student", values=["a"], key="b"}]',
         "steps.targets.routes.0.key: unknown key; known: by, teacher, values"),
    ],
)  # fmt: skip
def test_engines_that_cannot_be_are_one_line(recipe: Path, override: str, said: str) -> None:
    assert said in refusal(recipe, override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["steps.targets.budget=9.0"], "steps.targets: a budget asks for more than the 20 likeli"),
        (["steps.targets.temperature=0.7"], "steps.targets: temperature = 0.7 needs whole distr"),
        (["steps.targets.estimator=fixed", "steps.targets.head=21"], "head = 21 and draws = 0"),
        (["steps.targets.estimator=fixed", "steps.targets.draws=2"], "head = 12 and draws = 2"),
        (["steps.distilled.outside=unbiased"], "steps.distilled.outside: unbiased needs sampled"),
    ],
)
@pytest.mark.parametrize("engine", [SERVER, VLLM], ids=["server", "vllm"])
def test_a_plan_refuses_targets_that_an_engine_cannot_give(
    recipe: Path, engine: str, overrides: list[str], said: str
) -> None:
    assert said in refusal(recipe, engine, *overrides)


def test_a_server_that_only_answers_scores_nothing(recipe: Path) -> None:
    said = refusal(recipe, SERVER[:-1] + ', api="llama.cpp"}')
    assert said.startswith("steps.targets: the engine only answers, it cannot read")
    planned(recipe, "engines.far.api=llama.cpp")  # there it only answers


def test_one_limited_engine_among_routes_limits_the_step(recipe: Path) -> None:
    route = 'steps.targets.routes=[{teacher="far", values=["a"]}]'
    assert "a budget asks" in refusal(recipe, route, "steps.targets.budget=9.0")
    assert planned(recipe, route)["targets"].notes


def test_the_matrix_cannot_hide_an_engine_of_no_model(recipe: Path) -> None:
    recipe.write_text('matrix = { "engines.far.top" = [5, 0] }\n' + RECIPE)
    assert "engines.far.top" in refusal(recipe)


# What a plan says


@pytest.mark.parametrize("engine", [SERVER, VLLM], ids=["server", "vllm"])
def test_a_plan_says_what_an_engine_cannot_give_and_what_the_loss_makes_of_it(
    recipe: Path, engine: str
) -> None:
    found = planned(recipe, engine)
    assert found["targets"].notes == (
        "the engine gives the 20 likeliest ids: top-20 targets, without a tail",
    )
    assert "one bucket" in found["distilled"].notes[0]
    assert not any(one.notes for one in planned(recipe).values())
    fixed = ["steps.targets.estimator=fixed", "steps.targets.head=6"]
    assert "top-6" in planned(recipe, engine, *fixed)["targets"].notes[0]


def test_a_served_teacher_is_planned_and_estimated_by_its_tokenizer_alone(recipe: Path) -> None:
    """From another folder than the recipe's: the tokenizer's path is the recipe's affair."""
    found = planned(recipe, "steps.targets.teacher=far")
    assert found["far"].status == "outside"
    costs = estimate(list(found.values()), Store(recipe.parent / "store"))
    assert costs["answers"].rows == 2
    assert costs["answers"].minutes is None
    assert costs["targets"].minutes is None
    assert costs["rollouts"].minutes is not None


def test_a_served_teacher_of_another_tokenizer_is_refused(recipe: Path) -> None:
    write_model(recipe.parent / "other", layers=1, vocab=330)
    with pytest.raises(Exception, match="different vocabularies"):
        planned(recipe, "steps.targets.teacher=far", "models.far.tokenizer=./other")


# What changes an identity


def marks(recipe: Path, *overrides: str) -> dict[str, str]:
    return {name: one.fingerprint for name, one in planned(recipe, *overrides).items()}


@pytest.mark.parametrize("override", [
    "engines.far.url=https://elsewhere/v1", "engines.far.concurrency=2",
    "engines.far.timeout_seconds=5", "engines.far.retries=0", "engines.far.key_env=KEY",
    "engines.far.model=name",
    'engines.teacher={kind="transformers"}',
    'engines.tuned={kind="transformers", dtype="auto"}',
])  # fmt: skip
def test_where_and_how_fast_a_model_runs_changes_no_identity(recipe: Path, override: str) -> None:
    assert marks(recipe, override) == marks(recipe)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("engines.far.api=sglang", "answers"),
        ("engines.far.top=5", "answers"),
        (SERVER, "targets"),
        (VLLM, "targets"),
        ('engines.teacher={kind="transformers", dtype="bfloat16"}', "targets"),
        ('engines.tuned={kind="transformers", dtype="bfloat16"}', "rollouts"),
    ],
)
def test_what_may_change_a_result_changes_the_step_that_runs_it_and_those_after(
    recipe: Path, override: str, changed: str
) -> None:
    before, after = marks(recipe), marks(recipe, override)
    order = ["rows", "answers", "tuned", "rollouts", "targets", "distilled"]
    at = order.index(changed)
    assert [before[name] == after[name] for name in order] == [n < at for n in range(len(order))]


def test_a_step_without_engines_has_the_identity_it_always_had(recipe: Path) -> None:
    found = planned(recipe)
    with_engine = {name for name, one in found.items() if "engines" in one.identity}
    assert with_engine == {"answers"}
    meaning = found["answers"].identity["engines"]
    assert meaning == {"teacher": {"kind": "server", "api": "vllm", "top": 20}}
    assert "there" not in json.dumps({n: dict(one.identity) for n, one in found.items()})


def test_an_engine_is_that_of_the_role_and_no_step_that_trains_has_one(recipe: Path) -> None:
    nodes = {node.name: node for node in build(load(recipe, ['engines.tuned={kind="vllm"}']))}
    assert {n: sorted(node.engines) for n, node in nodes.items() if node.engines} == {
        "answers": ["teacher"], "rollouts": ["model"],
    }  # fmt: skip


def test_in_a_matrix_each_cell_has_its_engine(recipe: Path) -> None:
    recipe.write_text('matrix = { "engines.far.top" = [5, 9], seed = [1, 2] }\n' + RECIPE)
    nodes = {node.name: node for node in build(load(recipe))}
    tops: dict[str, Any] = {
        name: node.engines["teacher"].meaning()["top"]
        for name, node in nodes.items() if name.startswith("answers@")
    }  # fmt: skip
    assert tops == {f"answers@top={top},seed={seed}": top for top in (5, 9) for seed in (1, 2)}


def test_an_address_may_be_set_on_the_command_line(recipe: Path) -> None:
    variants = load(recipe, ["engines.far.url=http://here:1/v1"])
    assert variants[0].recipe.engines["far"].model_dump()["url"] == "http://here:1/v1"
