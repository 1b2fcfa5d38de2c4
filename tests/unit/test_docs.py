"""Every `tutelage` command that README and docs show is one the command line takes."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from tutelage.cli.app import app, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, shlex.split(line, comments=True)[1:])
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("tutelage ")
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(c[1]) for c in COMMANDS])
def test_a_shown_command_is_understood(page: str, words: list[str]) -> None:
    command = typer.main.get_command(app)
    context = click.Context(command)  # type: ignore[arg-type]
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)  # type: ignore[union-attr]
        assert command is not None, f"{page}: no verb {name}"
        context = click.Context(command, parent=context)  # type: ignore[arg-type]
    command.parse_args(context, list(words))  # type: ignore[union-attr]  # raises on an option


def test_the_pages_show_commands() -> None:
    assert len(COMMANDS) >= 8


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_init_then_plan_work_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["init", "my.toml"], ["plan", "my.toml"]):
        monkeypatch.setattr("sys.argv", ["tutelage", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
    assert "13 of 15 to run" in capsys.readouterr().out
