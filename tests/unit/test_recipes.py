"""Every shipped recipe, and the one `init` writes, parses and has a graph that can be run."""

from pathlib import Path

import pytest

from tutelage.cli.starter import write_starter
from tutelage.core.errors import RecipeError
from tutelage.graph import build
from tutelage.recipe.load import load

RECIPES = sorted(Path(__file__).parents[2].joinpath("recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_has_a_graph(path: Path) -> None:
    nodes = build(load(path))
    names = {node.name.partition("@")[0] for node in nodes}
    is_lab = path.stem.startswith("lab-")
    assert names >= ({"page"} if is_lab else {"distilled", "scores", "page"})
    assert {node.stage for node in nodes} >= {"evaluate", "ablation" if is_lab else "report"}


def test_the_starter_recipe_has_the_quickstarts_steps(tmp_path: Path) -> None:
    write_starter(tmp_path / "my first.toml", force=False)
    starter = {node.name for node in build(load(tmp_path / "my first.toml"))}
    quickstart = {node.name for node in build(load(Path(RECIPES[0].parent / "quickstart.toml")))}
    assert starter == quickstart


def test_the_starter_replaces_no_file_unasked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("mine")
    with pytest.raises(RecipeError, match="is there already"):
        write_starter(path, force=False)
    assert path.read_text() == "mine"
