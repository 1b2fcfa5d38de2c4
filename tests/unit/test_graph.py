"""The graph of steps: order, references, cycles and identities."""

from pathlib import Path
from typing import Any

import pytest

from tutelage.core.errors import RecipeError
from tutelage.core.fingerprint import fingerprint
from tutelage.graph import Node, build, identities
from tutelage.recipe.load import Variant, load

RECIPE = """
name = "r"
[models.m]
source = "owner/name"
[models.small]
source = "owner/name"
drop_layers = 2
[steps.distilled]
stage = "distill"
model = "tuned"
targets = "targets"
[steps.targets]
stage = "score"
teacher = "m"
rollouts = "answers"
[steps.answers]
stage = "rollout"
model = "tuned"
prompts = "rows"
mode = "fast"
[steps.tuned]
stage = "sft"
model = "small"
data = "rows"
[steps.rows]
stage = "data"
sources = [{ source = "bundled:prompts" }]
[steps.page]
stage = "report"
steps = ["distilled"]
"""


def variants(
    folder: Path, *edits: tuple[str, str], overrides: tuple[str, ...] = ()
) -> list[Variant]:
    text = RECIPE
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "r.toml").write_text(text)
    return load(folder / "r.toml", overrides)


def refusal(folder: Path, *edits: tuple[str, str], until: str = "") -> str:
    with pytest.raises(RecipeError) as caught:
        build(variants(folder, *edits), until=until)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def known(nodes: list[Node]) -> dict[str, dict[str, Any]]:
    return identities(
        nodes, lambda node: {"sha256": node.source and node.source.source},
        lambda step: {"sha256": "rows"} if step.stage == "data" else None,
    )  # fmt: skip


def test_each_step_comes_after_what_it_reads_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    order = [node.name for node in build(variants(tmp_path))]
    assert set(order) == {
        "m", "small:source", "small", "rows", "tuned", "answers", "targets", "distilled", "page",
    }  # fmt: skip
    for node in build(variants(tmp_path)):
        for needed in node.inputs.values():
            assert order.index(needed) < order.index(node.name)


def test_a_cut_model_is_a_step_of_its_own(tmp_path: Path) -> None:
    by_name = {node.name: node for node in build(variants(tmp_path))}
    assert by_name["small"].stage == "prune"
    assert by_name["small"].inputs == {"model": "small:source"}
    assert by_name["small:source"].stage == "external"


def test_a_report_reads_everything_behind_the_steps_it_names(tmp_path: Path) -> None:
    page = next(node for node in build(variants(tmp_path)) if node.name == "page")
    assert set(page.inputs) == {
        "m", "small:source", "small", "rows", "tuned", "answers", "targets", "distilled",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('targets = "targets"', 'targets = "target"',
         "steps.distilled.targets: no step or model 'target'; did you mean 'targets'?"),
        ('data = "rows"', 'data = ["rows", "zzz"]',
         "steps.tuned.data: no step or model 'zzz'; known"),
        ('targets = "targets"', 'targets = "rows"',
         "steps.distilled.targets: needs targets (a score or convert step), but 'rows' is"),
        ('rollouts = "answers"', 'rollouts = "m"',
         "steps.targets.rollouts: needs a rollout or screen step, but 'm' is a model"),
        ('teacher = "m"', 'teacher = "answers"',
         "steps.targets.teacher: needs a model, but 'answers' is of stage rollout"),
        ('prompts = "rows"', 'prompts = "targets"',
         "steps.answers.prompts: needs conversations (a data or synthesize step), but"),
        ('model = "small"', 'model = "distilled"',
         "in a circle: distilled -> tuned -> distilled"),
        ('model = "small"', 'model = "tuned"', "in a circle: tuned -> tuned"),
        ("[models.small]", "[models.rows]", "'rows' names both a model and a step"),
    ],
)  # fmt: skip
def test_a_graph_that_cannot_be_is_told(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in refusal(tmp_path, (old, new))


def test_a_long_circle_is_shown_as_a_path(tmp_path: Path) -> None:
    said = refusal(tmp_path, ('model = "small"\ndata = "rows"', 'model = "small"\ndata = "more"'),
        ("[steps.rows]", '[steps.more]\nstage = "synthesize"\nteacher = "distilled"\n'
         'prompts = "rows"\nmode = "fast"\n[steps.rows]'))  # fmt: skip
    assert "distilled -> tuned -> more -> distilled" in said


def test_until_keeps_only_what_the_step_needs(tmp_path: Path) -> None:
    names = {node.name for node in build(variants(tmp_path), until="tuned")}
    assert names == {"small:source", "small", "rows", "tuned"}


def test_an_unknown_until_names_the_nearest_step(tmp_path: Path) -> None:
    assert "--until tunde: no such step; did you mean 'tuned'?" in refusal(tmp_path, until="tunde")


def test_a_matrix_gives_each_cell_its_own_graph_and_until_takes_all_of_them(tmp_path: Path) -> None:
    both = variants(tmp_path, overrides=("matrix.seed=[1, 2]",))
    names = [node.name for node in build(both, until="rows")]
    assert names == ["rows@seed=1", "rows@seed=2"]
    tuned = next(node for node in build(both) if node.name == "tuned@seed=2")
    assert tuned.inputs == {"model": "small@seed=2", "data.0": "rows@seed=2"}


def test_a_changed_setting_changes_the_step_and_all_behind_it_and_nothing_else(
    tmp_path: Path,
) -> None:
    before = known(build(variants(tmp_path)))
    after = known(build(variants(tmp_path, overrides=("steps.answers.temperature=0.5",))))
    changed = {name for name in before if fingerprint(before[name]) != fingerprint(after[name])}
    assert changed == {"answers", "targets", "distilled", "page"}


def test_neither_runtime_nor_names_are_part_of_an_identity(tmp_path: Path) -> None:
    before = known(build(variants(tmp_path)))
    moved = known(build(variants(tmp_path, overrides=("runtime.threads=7", "runtime.device=cpu"))))
    assert before == moved
    text = RECIPE.replace('"tuned"', '"first"').replace("steps.tuned", "steps.first")
    (tmp_path / "r.toml").write_text(text)
    renamed = known(build(load(tmp_path / "r.toml")))
    assert renamed["first"] == before["tuned"]
    assert renamed["distilled"] == before["distilled"]


def test_an_input_enters_by_its_identity(tmp_path: Path) -> None:
    found = known(build(variants(tmp_path)))
    assert found["tuned"]["inputs"]["data.0"] == fingerprint(found["rows"])
    assert found["rows"]["outside"] == {"sha256": "rows"}
    assert "outside" not in found["tuned"]


def test_the_order_of_a_list_of_inputs_counts(tmp_path: Path) -> None:
    more = ("[steps.rows]", '[steps.more]\nstage = "data"\nlimit = 3\n'
            'sources = [{ source = "bundled:prompts" }]\n[steps.rows]')  # fmt: skip
    first = known(build(variants(tmp_path, more, ('data = "rows"', 'data = ["rows", "more"]'))))
    second = known(build(variants(tmp_path, more, ('data = "rows"', 'data = ["more", "rows"]'))))
    assert fingerprint(first["tuned"]) != fingerprint(second["tuned"])


# A page over all cells of a matrix

LAB = """
[steps.more]
stage = "sft"
model = "tuned"
data = "rows"
[steps.scores]
stage = "evaluate"
models = ["tuned", "distilled"]
tests = ["rows"]
[steps.lab]
stage = "ablation"
scores = ["scores"]
arms.tuned = { label = "Tuned" }
arms.distilled = { label = "Distilled", start = "tuned" }
[steps.page]
"""
WITH_LAB = ("[steps.page]\n", LAB.lstrip())
CELL = {"m", "small:source", "small", "rows", "tuned", "answers", "targets", "distilled", "scores"}


def lab_of(nodes: list[Node]) -> Node:
    (found,) = [node for node in nodes if node.stage == "ablation"]
    return found


def test_an_ablation_stands_once_over_all_cells_and_reads_all_behind_their_scores(
    tmp_path: Path,
) -> None:
    both = variants(tmp_path, WITH_LAB, overrides=("matrix.seed=[1, 2]",))
    lab = lab_of(build(both))
    assert lab.name == "lab"
    assert set(lab.inputs) == {f"{name}@seed={seed}" for name in CELL for seed in (1, 2)}
    assert all(role == name for role, name in lab.inputs.items())


def test_an_ablation_comes_after_the_last_cell(tmp_path: Path) -> None:
    both = variants(tmp_path, WITH_LAB, overrides=("matrix.seed=[1, 2]",))
    nodes = build(both)
    order = [node.name for node in nodes]
    assert order.index("lab") > max(order.index(name) for name in lab_of(nodes).inputs)


def test_without_a_matrix_an_ablation_reads_the_one_cell_there_is(tmp_path: Path) -> None:
    assert set(lab_of(build(variants(tmp_path, WITH_LAB))).inputs) == CELL


def test_a_matrix_of_one_cell_gives_an_ablation_that_cell(tmp_path: Path) -> None:
    one = variants(tmp_path, WITH_LAB, overrides=("matrix.seed=[7]",))
    assert set(lab_of(build(one)).inputs) == {f"{name}@seed=7" for name in CELL}


def test_until_an_ablation_keeps_what_it_reads_in_every_cell_and_nothing_else(
    tmp_path: Path,
) -> None:
    both = variants(tmp_path, WITH_LAB, overrides=("matrix.seed=[1, 2]",))
    names = {node.name for node in build(both, until="lab")}
    assert names == {"lab"} | {f"{name}@seed={seed}" for name in CELL for seed in (1, 2)}


def test_until_one_cell_of_a_step_leaves_the_other_cells_out(tmp_path: Path) -> None:
    both = variants(tmp_path, WITH_LAB, overrides=("matrix.seed=[1, 2]",))
    names = {node.name for node in build(both, until="scores@seed=2")}
    assert names == {f"{name}@seed=2" for name in CELL}


def test_a_seed_changes_the_ablation_and_a_seed_more_does_too(tmp_path: Path) -> None:
    marks = set()
    for seeds in ("[1]", "[2]", "[1, 2]"):
        nodes = build(variants(tmp_path, WITH_LAB, overrides=(f"matrix.seed={seeds}",)))
        marks.add(fingerprint(known(nodes)["lab"]))
    assert len(marks) == 3


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("arms.distilled =", "arms.distiled =",
         "steps.lab.arms.distiled: no step or model 'distiled'; did you mean 'distilled'?"),
        ('start = "tuned"', 'start = "tunde"',
         "steps.lab.arms.distilled.start: no step or model 'tunde'; did you mean 'tuned'?"),
        ('scores = ["scores"]', 'scores = ["score"]',
         "steps.lab.scores: no step or model 'score'; did you mean 'scores'?"),
        ('scores = ["scores"]', 'scores = ["tuned"]',
         "steps.lab.scores: needs an evaluate step, but 'tuned' is of stage sft"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("matrix", [(), ("matrix.seed=[1, 2]",)])
def test_a_wrong_name_in_an_ablation_is_one_line_with_the_nearest(
    tmp_path: Path, old: str, new: str, said: str, matrix: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError) as caught:
        build(variants(tmp_path, (WITH_LAB[0], LAB.lstrip().replace(old, new)), overrides=matrix))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_circle_through_scored_models_is_told_as_such(tmp_path: Path) -> None:
    lab = LAB.lstrip().replace('model = "tuned"\ndata = "rows"', 'model = "more"\ndata = "rows"')
    assert "in a circle: more -> more" in refusal(tmp_path, (WITH_LAB[0], lab))
