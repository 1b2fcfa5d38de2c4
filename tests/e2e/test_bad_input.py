"""What a user does wrong ends in one clear line and exit code 2, through the real command line."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_command
from tiny import write_model, write_recipe

from tutelage import pipeline
from tutelage.cli.app import main
from tutelage.core.progress import Reporter
from tutelage.recipe.load import load
from tutelage.records import read_rows
from tutelage.stages import data as data_stage
from tutelage.store import Store

Run = Callable[..., str]
DATA = """
name = "d"
[models.m]
source = "{model}"
[steps.rows]
stage = "data"
sources = [{{ source = "{file}" }}]
{more}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run the command line; it must exit 2 with one line on stderr, which is returned."""

    def run(*words: object) -> str:
        return run_command(monkeypatch, capsys, *words, "--store", tmp_path / "store", code=2)

    return run


def edited(recipe: Path, tmp_path: Path, old: str, new: str) -> Path:
    text = recipe.read_text()
    assert old in text
    path = tmp_path / "edited.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def data_recipe(tmp_path: Path, recipe: Path, content: bytes, more: str = "") -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    path = tmp_path / "data.toml"
    path.write_text(DATA.format(model=recipe.parent / "teacher", file=file, more=more))
    return path


def test_an_unknown_key_names_the_nearest(refused: Run, recipe: Path, tmp_path: Path) -> None:
    path = edited(recipe, tmp_path, "pack_tokens", "pack_token")
    assert "did you mean 'pack_tokens'?" in refused("plan", path)


def test_an_unknown_step_names_the_nearest(refused: Run, recipe: Path, tmp_path: Path) -> None:
    path = edited(recipe, tmp_path, 'rollouts = "rollouts"', 'rollouts = "rolouts"')
    assert "did you mean 'rollouts'?" in refused("plan", path)


def test_an_unknown_override_names_the_nearest(refused: Run, recipe: Path) -> None:
    assert "did you mean 'distilled'?" in refused("plan", recipe, "--set", "steps.distiled.lr=1e-5")


def test_a_cycle_is_shown_as_a_path(refused: Run, recipe: Path, tmp_path: Path) -> None:
    path = edited(recipe, tmp_path, 'model = "student"\ndata', 'model = "distilled"\ndata')
    assert "distilled -> " in refused("plan", path)


def test_a_missing_recipe_and_a_missing_file_are_named(
    refused: Run, recipe: Path, tmp_path: Path
) -> None:
    assert "no such recipe" in refused("plan", tmp_path / "none.toml")
    path = tmp_path / "gone.toml"
    path.write_text(DATA.format(model=recipe.parent / "teacher", file="./gone.jsonl", more=""))
    assert "gone.jsonl: no such file" in refused("plan", path)


def test_an_empty_data_set_is_refused(refused: Run, recipe: Path, tmp_path: Path) -> None:
    assert "no rows at all" in refused("run", data_recipe(tmp_path, recipe, b"\n"))


def test_a_malformed_row_is_told_by_file_and_line(
    refused: Run, recipe: Path, tmp_path: Path
) -> None:
    content = b'{"prompt": "hello"}\n{"prompt": \n'
    line = refused("run", data_recipe(tmp_path, recipe, content))
    assert "step 'rows'" in line
    assert "rows.jsonl:2: not JSON" in line


def test_a_tokenizer_without_an_end_is_refused(refused: Run, recipe: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "no-eos")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    path = edited(
        recipe, tmp_path, f'source = "{recipe.parent / "teacher"}"\ndrop_layers = 1',
        f'source = "{folder}"',
    )  # fmt: skip
    line = refused("run", path, "--until", "rollouts", "--set", "steps.rollouts.model=student")
    assert "step 'rollouts'" in line
    assert "EOS" in line


def test_another_vocabulary_is_refused_in_the_plan(
    refused: Run, recipe: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", vocab=330)
    path = edited(
        recipe, tmp_path, f'[models.student]\nsource = "{recipe.parent / "teacher"}"',
        f'[models.student]\nsource = "{other}"',
    )  # fmt: skip
    assert "different vocabularies (330 and 320 ids)" in refused("plan", path)


def test_a_truncated_artifact_is_named_and_not_used(
    refused: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = str(tmp_path / "store")
    words = ["tutelage", "run", str(recipe), "--until", "prompts", "--store", store]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    (made,) = (tmp_path / "store/artifacts/data").glob("*/conversations.parquet")
    made.write_bytes(made.read_bytes()[:-7])
    assert "conversations.parquet has" in refused("run", recipe, "--until", "prompts")
    monkeypatch.setattr("sys.argv", ["tutelage", "verify", "--repair", "--store", store])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().out
    assert stop.value.code == 2
    assert "prompts: damaged" in said
    assert "conversations.parquet" in said
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0  # repaired: it was made again


def test_a_full_disk_is_one_line_and_leaves_nothing_to_be_accepted(
    refused: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:  # a fake: the fault is injected
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tutelage.data.funnel.write", full)
    line = refused("run", recipe, "--until", "prompts")
    assert "step 'prompts': the disk is full" in line
    assert not list((tmp_path / "store/artifacts/data").glob("*/manifest.json"))


def test_a_source_that_changes_while_it_is_read_is_not_taken(
    refused: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result would lie for ever under the identity of what was there before."""
    path = data_recipe(tmp_path, recipe, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    whole = data_stage.run

    def changing(*arguments: Any) -> Any:
        found = whole(*arguments)
        with (tmp_path / "rows.jsonl").open("ab") as stream:
            stream.write(b'{"prompt": "c"}\n')
        return found

    monkeypatch.setattr("tutelage.stages.data.run", changing)
    line = refused("run", path, "--until", "rows")
    assert "step 'rows': a source changed while it was read" in line
    assert not list((tmp_path / "store/artifacts/data").glob("*/manifest.json"))


def test_rows_with_a_byte_order_mark_nul_bytes_huge_text_and_other_columns_are_told_apart(
    recipe: Path, tmp_path: Path
) -> None:
    rows = [
        b'\xef\xbb\xbf{"prompt": "with a mark"}',
        json.dumps({"prompt": "nul \u0000 inside"}).encode(),
        json.dumps({"prompt": "x " * 2_000_000}).encode(),
        json.dumps({"question": "another schema"}).encode(),
        json.dumps({"messages": [{"role": "user", "content": "messages"}]}).encode(),
        b'{"prompt": 3.5}',
        b'{"id": 7, "neither": "prompt nor messages"}',
    ]
    more = 'max_bad_share = 0.2\nfilters = [{ name = "encoding" }, { name = "repetition" }]'
    path = data_recipe(tmp_path, recipe, b"\n".join(rows) + b"\n", more)
    store, quiet = Store(tmp_path / "store"), Reporter(quiet=True)
    pipeline.run(load(path), store, until="rows", reporter=quiet)
    (folder,) = (tmp_path / "store/artifacts/data").glob("*")
    kept = [row["messages"][0]["content"] for row in read_rows([folder / "conversations.parquet"])]
    assert sorted(kept) == ["3.5", "another schema", "messages", "with a mark"]
    aside = {
        path.stem: [json.loads(line)["place"] for line in path.read_text().splitlines()]
        for path in (folder / "quarantine").glob("*.jsonl")
    }
    assert aside == {
        "encoding": ["rows.jsonl:2"],
        "repetition": ["rows.jsonl:3"],
        "unreadable": ["rows.jsonl:7"],
    }
