"""Reading a recipe: what is written arrives typed, and what is wrong is told in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tutelage.core.errors import RecipeError
from tutelage.recipe.curation import Data
from tutelage.recipe.load import Variant, load
from tutelage.recipe.tables import Rollout, Score, references, settings
from tutelage.recipe.training import Distill, Sft

RECIPE = """
name = "r"
seed = 17
[models.m]
source = "owner/name"
[steps.rows]
stage = "data"
sources = [{ source = "bundled:prompts", columns = { prompt = "prompt" } }]
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
seed = 4
[steps.targets]
stage = "score"
teacher = "m"
rollouts = "answers"
[steps.distilled]
stage = "distill"
model = "tuned"
targets = "targets"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


def steps(path: Path, *overrides: str) -> dict[str, Any]:
    (variant,) = load(path, overrides)
    return variant.recipe.steps


def refusal(path: Path, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return path


def test_a_recipe_arrives_as_typed_steps_in_its_own_order(path: Path) -> None:
    found = steps(path)
    assert list(found) == ["rows", "tuned", "answers", "targets", "distilled"]
    assert [type(step) for step in found.values()] == [Data, Sft, Rollout, Score, Distill]
    assert found["tuned"].lr == 1e-5


def test_the_recipes_seed_is_the_default_of_each_step_that_has_one(path: Path) -> None:
    found = steps(path, "seed=5")
    assert [found[name].seed for name in ("rows", "tuned", "answers")] == [5, 5, 4]


def test_a_step_without_a_seed_is_given_none(path: Path) -> None:
    page = '[steps.page]\nstage = "report"\nsteps = ["rows"]\n'
    path.write_text(path.read_text() + page)
    assert "seed" not in type(steps(path)["page"]).model_fields


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 1e-5", "lrr = 1e-5", "steps.tuned.lrr: unknown key; did you mean 'lr'?"),
        ("lr = 1e-5", "qqqq = 1",
         "steps.tuned.qqqq: unknown key; known: average_every, average_last, "),
        ("seed = 17", "sead = 17", "sead: unknown key; did you mean 'seed'?"),
        ('source = "owner/name"', 'sourse = "owner/name"',
         "models.m.sourse: unknown key; did you mean 'source'?"),
        ("columns = { prompt =", "columns = { promt =",
         "steps.rows.sources.0.columns.promt: unknown key; did you mean 'prompt'?"),
        (", columns =", ", colums =",
         "steps.rows.sources.0.colums: unknown key; did you mean 'columns'?"),
        ("seed = 17", "seed = 17\n[runtime]\ndevise = 'cpu'",
         "runtime.devise: unknown key; did you mean 'device'?"),
        ('stage = "sft"', 'stage = "sfft"', "steps.tuned.stage: no stage 'sfft'; did you mean"),
        ('stage = "sft"', "", "steps.tuned: a step needs a stage, one of prune, data,"),
        ('stage = "sft"', 'stage = ["sft"]', "steps.tuned"),
        ('teacher = "m"', "", "steps.targets.teacher: is required"),
        ('name = "r"', "", "name: is required"),
        ("lr = 1e-5", 'lr = "fast"', "steps.tuned.lr: Input should be a valid number"),
        ("lr = 1e-5", "lr = -1.0", "steps.tuned.lr: Input should be greater than 0, got -1.0"),
        ("lr = 1e-5", "lr = nan", "steps.tuned.lr: Input should be"),
        ("lr = 1e-5", "epochs = 1.5", "steps.tuned.epochs: Input should be a valid integer"),
        ("seed = 17", "seed = -1", "seed: Input should be greater than or equal to 0"),
        ('mode = "fast"', 'mode = "slow"', "steps.answers.mode: Input should be 'reasoning' or"),
        ('data = "rows"', 'data = ["rows"]\nmixture = [0.5, 0.5]',
         "steps.tuned: mixture has 2 weights for 1 data steps"),
        ('source = "owner/name"', 'source = "owner/name"\ntrust_remote_code = true',
         "models.m: trust_remote_code = true needs a pinned revision"),
        ('source = "owner/name"', 'source = "o/n"\ndrop_layers = 1\nkeep_layers = [0]',
         "models.m: drop_layers and keep_layers exclude each other"),
        ("[steps.answers]", '[steps.e]\nstage = "evaluate"\nmodels = ["m"]\n'
         'tasks = [{ name = "gsm8k", sauce = "x" }]\n[steps.answers]',
         "steps.e.tasks.0.sauce: unknown key; did you mean 'source'?"),
        ("[steps.answers]", '[steps.e]\nstage = "ablation"\nscores = ["s"]\n'
         '[steps.e.arms.tuned]\nlabel = "Tuned"\nstrat = "m"\n[steps.answers]',
         "steps.e.arms.tuned.strat: unknown key; did you mean 'start'?"),
        ("[steps.answers]", '[steps.e]\nstage = "ablation"\nscores = ["s"]\narms = {}\n'
         '[[steps.e.claims]]\ntext = "t"\nbeter = "tuned"\n[steps.answers]',
         "steps.e.claims.0.beter: unknown key; did you mean 'better'?"),
        ('name = "r"', 'name = "../r"', "name: String should match pattern"),
        ('name = "r"', "name = ", "not TOML"),
        ("seed = 17", "seed = 17\n[matrix]\nseed = 3", "[matrix] maps keys to lists"),
        ("seed = 17", "seed = 17\n[matrix]\nseed = []", "[matrix] maps keys to lists"),
        ("seed = 17", "seed = 17\n[matrix]\n'steps.tunde.lr' = [1]",
         "[matrix] steps.tunde.lr: no step named 'tunde'; did you mean 'tuned'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(path: Path, old: str, new: str, said: str) -> None:
    text = refusal(changed(path, old, new))
    assert said in text
    assert text.startswith(str(path))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps.tunde.lr=1", "no step named 'tunde'; did you mean 'tuned'?"),
        ("models.n.source=x", "no model named 'n'"),
        ("steps.tuned.lrr=1", "steps.tuned.lrr: unknown key; did you mean 'lr'?"),
        ("runtme.threads=1", "runtme: unknown key; did you mean 'runtime'?"),
        ("steps.tuned.lr=fast", "steps.tuned.lr: Input should be a valid number"),
        ("steps.tuned.lr.x=1", "lr is not a table"),
        ("seed.x=1", "seed is not a table"),
        ("steps.tuned.lr", "expected KEY=VALUE"),
        ("=3", "an empty key"),
    ],
)
def test_a_wrong_override_is_told(path: Path, override: str, said: str) -> None:
    assert said in refusal(path, override)


def test_an_override_below_something_that_is_no_table_is_told(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\nmodels = {}\nsteps = 3')
    assert "steps is not a table" in refusal(path, "steps.x.lr=1")
    assert "steps: Input should be a valid dictionary" in refusal(path)


def test_overrides_are_toml_values_and_bare_words_are_text(path: Path) -> None:
    (variant,) = load(
        path, ["steps.tuned.lr=2e-5", "runtime.device=cpu", 'steps.tuned.data=["rows"]', "name=q"]
    )
    assert variant.recipe.steps["tuned"].lr == 2e-5  # type: ignore[union-attr]
    assert variant.recipe.runtime.device == "cpu"
    assert variant.recipe.name == "q"


def test_the_last_override_of_a_key_wins(path: Path) -> None:
    assert steps(path, "steps.tuned.lr=1", "steps.tuned.lr=2")["tuned"].lr == 2


def test_a_matrix_makes_a_variant_of_each_cell(path: Path) -> None:
    variants = load(path, ["matrix.seed=[1, 2]"])
    assert [v.label for v in variants] == ["seed=1", "seed=2"]
    assert [v.recipe.steps["tuned"].seed for v in variants] == [1, 2]  # type: ignore[union-attr]
    assert [v.recipe.steps["answers"].seed for v in variants] == [4, 4]  # type: ignore[union-attr]


def test_a_matrix_of_two_keys_is_their_product(path: Path) -> None:
    matrix = "seed = 17\n[matrix]\nseed = [1, 2]\n'steps.tuned.lr' = [1e-5, 2e-5]"
    variants = load(changed(path, "seed = 17", matrix))
    assert [v.label for v in variants] == [
        "seed=1,lr=1e-05", "seed=1,lr=2e-05", "seed=2,lr=1e-05", "seed=2,lr=2e-05",
    ]  # fmt: skip
    assert all(isinstance(v, Variant) for v in variants)


def test_a_missing_recipe_says_how_to_make_one(tmp_path: Path) -> None:
    assert "`tutelage init" in refusal(tmp_path / "no.toml")


def test_a_folder_or_another_encoding_is_no_recipe(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    assert "not TOML" in refusal(tmp_path / "latin.toml")


@pytest.mark.parametrize("source", ["rows.jsonl", "./later.jsonl", "data/*.jsonl", "../up.jsonl"])
def test_relative_sources_are_taken_from_the_recipes_folder(path: Path, source: str) -> None:
    (path.parent / "rows.jsonl").write_text("{}")
    found = steps(changed(path, "bundled:prompts", source))["rows"].sources[0].source
    assert found == str(path.parent / source)


def test_the_files_of_tasks_and_of_what_must_not_be_learnt_are_beside_the_recipe(
    path: Path,
) -> None:
    path.write_text(
        path.read_text()
        + '[steps.e]\nstage = "evaluate"\nmodels = ["m"]\n'
        + 'tasks = [{ name = "gsm8k", source = "./a.jsonl", shots_source = "b/*.jsonl" }, "drop"]\n'
        + '[steps.c]\nstage = "curate"\ndata = ["rows"]\n'
        + 'decontaminate = [{ source = "./a.jsonl" }]\n'
    )
    found = steps(path)
    own, hub = found["e"].tasks
    assert own.source == found["c"].decontaminate[0].source == str(path.parent / "a.jsonl")
    assert own.shots_source == str(path.parent / "b/*.jsonl")
    assert (hub.source, hub.shots_source) == ("", "")


def test_a_new_model_is_not_taken_for_a_folder_of_that_name(path: Path) -> None:
    (path.parent / "new").mkdir()
    table = 'source = "new"\nnew = { data = ["rows"] }'
    assert load(changed(path, 'source = "owner/name"', table))[0].recipe.models["m"].source == "new"


@pytest.mark.parametrize("source", ["bundled:prompts", "hub:owner/name", "task:chain_sum"])
def test_sources_that_are_no_paths_stay_as_they_are(path: Path, source: str) -> None:
    found = steps(changed(path, "bundled:prompts", source))
    assert found["rows"].sources[0].source == source


def test_a_home_directory_is_expanded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    found = steps(changed(path, "bundled:prompts", "~/rows.jsonl"))
    assert found["rows"].sources[0].source == "/home/ada/rows.jsonl"


def test_a_models_path_is_taken_from_the_recipes_folder_and_a_hub_id_is_not(path: Path) -> None:
    assert load(path)[0].recipe.models["m"].source == "owner/name"
    (path.parent / "owner" / "name").mkdir(parents=True)
    assert load(path)[0].recipe.models["m"].source == str(path.parent / "owner/name")


def test_inputs_are_references_and_not_settings(path: Path) -> None:
    found = steps(path)
    assert list(references(found["tuned"])) == [
        ("model", "model", "m"),
        ("data.0", "conversations", "rows"),
    ]
    assert {"stage", "model", "data"}.isdisjoint(settings(found["tuned"]))
    assert settings(found["tuned"])["lr"] == 1e-5
    assert {"teacher", "rollouts"}.isdisjoint(settings(found["targets"]))


def test_a_plan_and_its_command_line_import_no_heavy_library() -> None:
    script = (
        "import sys, tutelage.cli.app, tutelage.pipeline, tutelage.estimate\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_matrix_over_the_runtime_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\n[models]\n[steps]\n[matrix]\n"runtime.threads" = [1, 2]\n')
    with pytest.raises(RecipeError, match=r"\[matrix\] cannot vary \[runtime\]"):
        load(path)
