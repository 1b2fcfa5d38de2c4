"""`tutelage run`: what it refuses before anything is made."""

from pathlib import Path

import pytest
from commands import run_command

from tutelage.cli.app import main
from tutelage.core.progress import Reporter

RECIPE = """
name = "r"
[runtime]
sandbox = "none"
[steps.rows]
stage = "data"
sources = [{ source = "task:gridwalk", limit = 3 }]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("jobs", [1, 2])
def test_programs_without_walls_are_refused_unless_confirmed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    store = recipe.parent / "store"
    words = ("run", recipe, "--store", store, "--set", f"runtime.jobs={jobs}")
    said = run_command(monkeypatch, capsys, *words, code=2)
    assert 'runtime.sandbox = "none" runs generated programs as you' in said
    assert "add --allow-unsandboxed if you mean it" in said
    assert not store.exists()


def test_an_override_cannot_take_the_walls_away_unseen(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace('sandbox = "none"', ""))
    words = ("run", recipe, "--store", recipe.parent / "store", "--set", "runtime.sandbox=none")
    assert "--allow-unsandboxed" in run_command(monkeypatch, capsys, *words, code=2)


def test_what_was_confirmed_runs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Reporter, "say", lambda *_, **__: None)
    words = ("run", recipe, "--store", recipe.parent / "store", "--allow-unsandboxed")
    assert "r: 1 step" in run_command(monkeypatch, capsys, *words, code=0)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:  # the fault is injected
        raise KeyboardInterrupt

    monkeypatch.setattr("tutelage.cli.app.load", interrupted)
    monkeypatch.setattr("sys.argv", ["tutelage", "plan", str(tmp_path / "a.toml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert "interrupted; run the same command again to go on" in capsys.readouterr().err
