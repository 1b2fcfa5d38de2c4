"""Faults around the store of targets end in one clear line and exit code 2, at the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import run_command
from safetensors.torch import load_file, save_file
from tiny import write_model

from tutelage import pipeline
from tutelage.core.progress import Reporter
from tutelage.recipe.load import load
from tutelage.store import Store
from tutelage.targets import writer as writer_module
from tutelage.targets.reader import TargetReader

RECIPE = """
name = "faults"
seed = 3
[models.teacher]
source = "{teacher}"
[models.student]
source = "{student}"
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts", limit = 12 }}]
limit = 6
[steps.rollouts]
stage = "rollout"
model = "student"
prompts = "prompts"
mode = "fast"
max_tokens = 6
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
[steps.distilled]
stage = "distill"
model = "student"
targets = "targets"
batch_tokens = 128
pack_tokens = 128
"""
SETTINGS: dict[str, Any] = {
    "d": 320, "k": 2, "exact_k": 2, "exact_dtype": "float16", "residual_bins": [],
    "delta_encoding": False,
}  # fmt: skip
COLUMNS: dict[str, list[Any]] = {
    "input_ids": [[1, 2, 3], [4, 5, 6]],
    "compressed_logprobs": [[[0, 184, 0, 188]] * 2, [[0, 184, 0, 188]] * 2],  # -0.5 and -1
    "bytepacked_indices": [[[1, 0, 192]] * 2, [[1, 0, 192]] * 2],
}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student that fit each other."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "teacher", layers=1)
    write_model(folder / "student", layers=1, seed=1)
    return folder


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with finished targets in row groups of a few rows, and its recipe."""
    folder = tmp_path_factory.mktemp("made")
    text = RECIPE.format(teacher=models / "teacher", student=models / "student")
    (folder / "r.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "ROW_GROUP_TOKENS", 100)
        quiet = Reporter(quiet=True)
        pipeline.run(load(folder / "r.toml"), Store(folder / "store"), until="targets",
                     reporter=quiet)  # fmt: skip
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "project"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; with `code` 2 the one error line is returned, else what it printed."""

    def run(*words: object, code: int = 2) -> str:
        return run_command(monkeypatch, capsys, *words, code=code)

    return run


def shard(project: Path) -> Path:
    (path,) = (project / "store").glob("artifacts/score/*/part-00000.parquet")
    return path


# A store that does not fit


def test_a_student_with_another_template_is_refused(
    command: Run, project: Path, models: Path, tmp_path: Path
) -> None:
    """Only `distill` reads it: the targets were scored for a student that fits."""
    other = Path(shutil.copytree(models / "student", tmp_path / "other"))
    template = (other / "chat_template.jinja").read_text()
    changed = template.replace("'<|im_end|>'", "' <|im_end|>'")
    assert changed != template
    (other / "chat_template.jinja").write_text(changed)
    recipe = project / "r.toml"
    text = recipe.read_text().replace(
        'stage = "distill"\nmodel = "student"', 'stage = "distill"\nmodel = "other"'
    )
    recipe.write_text(text + f'[models.other]\nsource = "{other}"\n')
    line = command("run", recipe, "--store", project / "store")
    assert "step 'distilled': targets do not fit the model: chat_template is" in line
    assert "score again" in line


def test_a_student_with_another_vocabulary_is_refused_before_anything_runs(
    command: Run, project: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", vocab=330, layers=1)
    recipe = project / "r.toml"
    text = recipe.read_text().replace(
        'stage = "distill"\nmodel = "student"', 'stage = "distill"\nmodel = "other"'
    )
    recipe.write_text(text + f'[models.other]\nsource = "{other}"\n')
    line = command("run", recipe, "--store", project / "store")
    assert "steps.distilled: other and its teacher teacher have different vocabularies" in line


def test_a_flipped_bit_stops_the_training_and_names_the_row_group(
    command: Run, project: Path
) -> None:
    path = shard(project)
    group = TargetReader([path])._groups[1].info
    data = bytearray(path.read_bytes())
    data[group.offset + group.bytes // 2] ^= 1
    path.write_bytes(data)
    line = command("run", project / "r.toml", "--store", project / "store")
    assert "step 'distilled': " in line
    assert "part-00000.parquet: row group 1" in line
    assert "is damaged (its checksum differs)" in line
    said = command(
        "targets", "show", "targets", "--skip-damaged", "--json", "--store", project / "store",
        code=0,
    )  # fmt: skip
    assert json.loads(said)["rows"] == 6 - group.rows


def test_a_store_that_was_cut_short_is_named_before_it_is_read(command: Run, project: Path) -> None:
    path = shard(project)
    path.write_bytes(path.read_bytes()[:-8])
    line = command("run", project / "r.toml", "--store", project / "store")
    assert "part-00000.parquet has" in line
    assert "verify --repair" in line


# A teacher or a setting that cannot be


def test_a_teacher_that_is_not_finite_stops_its_step_and_leaves_no_targets(
    command: Run, project: Path, models: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(models / "teacher", tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][300] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = project / "r.toml"
    recipe.write_text(recipe.read_text().replace(str(models / "teacher"), str(broken)))
    line = command("run", recipe, "--store", project / "store")
    assert "step 'targets': row en-" in line
    assert "teacher logits are not finite" in line
    assert len(list((project / "store").glob("artifacts/score/*/manifest.json"))) == 1  # the first


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["targets.tau=0"], "steps.targets.tau: Input should be greater than 0, got 0"),
        (["targets.tau=1.5"], "steps.targets.tau: Input should be less than or equal to 1"),
        (["targets.tau=0.1", "targets.budget=20"], "tau and budget exclude each other"),
        (["targets.head=4"], "head is a setting of estimator = 'fixed'"),
        (["targets.budget=1"], "step 'targets': budget of 1.0 bytes a token is under the least"),
        (["targets.estimator=fixed", "targets.head=400"], "a head of 400 ids from a vocabulary"),
        (["targets.estimator=fixed", "distilled.outside=unbiased"],
         "step 'distilled': outside = unbiased, but the targets are of the estimator top-12"),
        (["distilled.ce_on=teacher"], "and text go together"),
        (["distilled.ce_on=none"], "step 'distilled': ce_on is none with lam 0.9"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(
    command: Run, project: Path, settings: list[str], said: str
) -> None:
    words = [word for value in settings for word in ("--set", f"steps.{value}")]
    assert said in command("run", project / "r.toml", "--store", project / "store", *words)


# A capture of DistillKit


def capture(folder: Path, columns: dict[str, list[Any]], settings: Any = SETTINGS) -> Path:
    folder.mkdir()
    kinds = {
        "input_ids": pa.list_(pa.uint64()), "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
        "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
    }  # fmt: skip
    table = {name: pa.array(values, kinds[name]) for name, values in columns.items()}
    pq.write_table(pa.table(table), folder / "data.parquet")
    if settings is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "data.parquet"


def conversion(source: Path, models: Path, store: Path) -> tuple[object, ...]:
    """The words that convert it for the student."""
    return ("targets", "convert", source, "--model", models / "student", "--store", store)


def test_a_capture_becomes_a_store_once(command: Run, models: Path, tmp_path: Path) -> None:
    path = capture(tmp_path / "c", COLUMNS)
    words = conversion(path, models, tmp_path / "s")
    assert "1 step made" in command(*words, code=0)
    assert "nothing to do" in command(*words, code=0)
    shown = json.loads(
        command("targets", "show", "targets", "--row", 1, "--json", "--store", tmp_path / "s",
                code=0)
    )  # fmt: skip
    assert [token["token"] for token in shown["tokens"]] == [5, 6]
    assert [token["head_ids"] for token in shown["tokens"]] == [2, 2]


def test_a_pattern_of_files_is_converted_as_the_help_says(
    command: Run, models: Path, tmp_path: Path
) -> None:
    path = capture(tmp_path / "c", COLUMNS).with_name("*.parquet")
    words = conversion(path, models, tmp_path / "s")
    assert "1 step made" in command(*words, code=0)


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        ({"bytepacked_indices": None}, SETTINGS,
         "data.parquet has no column 'bytepacked_indices'; it has"),
        ({}, None, "compression_config.yaml is not there"),
        ({}, {**SETTINGS, "d": 400}, "the capture has 400 ids and the model 320"),
        ({}, {"k": 2, "polynomial_degree": 1}, "legacy format"),
        ({}, {**SETTINGS, "exact_dtype": "float32"}, "row 0: a token has 4 bytes"),
        ({"compressed_logprobs": [COLUMNS["compressed_logprobs"][0], [[0, 184, 0, 188], [0, 184]]]},
         SETTINGS, "row 1: tokens of 2 and of 4 bytes in one row"),
        ({"input_ids": [[1, 2, 3], [4]]}, SETTINGS, "row 1: 1 tokens, but 2 log-probabilities"),
    ],
)  # fmt: skip
def test_a_capture_that_cannot_be_read_is_one_line(
    command: Run, models: Path, tmp_path: Path, change: dict[str, Any], settings: Any, said: str
) -> None:
    columns = {name: v for name, v in {**COLUMNS, **change}.items() if v is not None}
    path = capture(tmp_path / "c", columns, settings)
    words = conversion(path, models, tmp_path / "s")
    line = command(*words)
    assert said in line
    assert "step 'targets': " in line
    assert not list((tmp_path / "s").glob("artifacts/convert/*/manifest.json"))


def test_a_capture_or_a_model_that_is_not_there_is_one_line(
    command: Run, models: Path, tmp_path: Path
) -> None:
    line = command(*conversion(tmp_path / "no.parquet", models, tmp_path / "s"))
    assert "no.parquet: no such file" in line
    path = capture(tmp_path / "c", COLUMNS)
    line = command(*conversion(path, tmp_path / "nowhere", tmp_path / "s"))
    assert "nowhere/student" in line
