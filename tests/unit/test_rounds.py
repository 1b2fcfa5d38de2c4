"""`rounds = R` of a distill step: the steps it becomes, and what cannot be made into rounds."""

from pathlib import Path
from typing import Any

import pytest

from tutelage.core.errors import RecipeError
from tutelage.graph import build, identities
from tutelage.recipe.load import Variant, load, parse
from tutelage.recipe.rounds import SEED_STRIDE
from tutelage.recipe.tables import settings

TOML = """
name = "r"
seed = 4
models.m = { source = "./m" }
models.q = { source = "./q" }
[steps.prompts]
stage = "data"
sources = [{ source = "bundled:prompts" }]
[steps.answers]
stage = "rollout"
model = "m"
prompts = "prompts"
mode = "fast"
[steps.targets]
stage = "score"
teacher = "q"
rollouts = "answers"
[steps.d]
stage = "distill"
model = "m"
targets = "targets"
epochs = 6
max_steps = 12
"""


def raw(**changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `changes` to its steps; a step that is not there is made."""
    steps: dict[str, dict[str, Any]] = {
        "prompts": {"stage": "data", "sources": [{"source": "bundled:prompts"}]},
        "answers": {"stage": "rollout", "model": "m", "prompts": "prompts", "mode": "fast"},
        "targets": {"stage": "score", "teacher": "q", "rollouts": "answers"},
        "d": {"stage": "distill", "model": "m", "targets": "targets", "epochs": 6},
    }
    for name, change in changes.items():
        steps[name.replace("_", "-")] = {**steps.get(name, {}), **change}
    return {
        "name": "r", "seed": 4, "models": {"m": {"source": "./m"}, "q": {"source": "./q"}},
        "steps": steps,
    }  # fmt: skip


def steps_of(**changes: dict[str, Any]) -> dict[str, Any]:
    return dict(parse(raw(**changes), "recipe.toml").recipe.steps)


def known(variant: Variant) -> dict[str, Any]:
    return identities(build([variant]), lambda node: {"of": node.name}, lambda step: None)


def test_two_rounds_are_these_steps() -> None:
    steps = steps_of(d={"rounds": 2, "max_steps": 12, "lr": 3e-5})
    assert list(steps) == [
        "prompts", "answers", "targets", "d-round1", "d-round2-answers", "d-round2-targets", "d",
    ]  # fmt: skip
    first, last = steps["d-round1"], steps["d"]
    assert (first.model, first.targets, first.schedule) == ("m", "targets", (0.0, 0.5))
    assert (last.model, last.targets) == ("d-round1", "d-round2-targets")
    assert last.schedule == (0.5, 1.0)
    for step in (first, last):
        assert (step.epochs, step.max_steps, step.lr, step.rounds) == (3, 6, 3e-5, 1)
        assert step.seed == 4  # the order of rows is that of one training
    again = steps["d-round2-answers"]
    assert (again.model, again.seed) == ("d-round1", 4 + SEED_STRIDE)
    scored = steps["d-round2-targets"]
    assert (scored.rollouts, scored.teacher) == ("d-round2-answers", "q")
    assert scored.seed == 4 + SEED_STRIDE


def test_the_first_round_takes_what_is_stored_of_one_round() -> None:
    once, twice = (known(parse(raw(d={"rounds": n}), "r.toml")) for n in (1, 2))
    for name in ("answers", "targets"):
        assert once[name] == twice[name]
    assert once["d"] != twice["d"]


def test_rounds_are_not_part_of_an_identity_but_the_steps_they_become() -> None:
    by_hand = raw(
        d={"model": "h", "targets": "t2", "epochs": 3, "schedule": [0.5, 1.0]},
        h={"stage": "distill", "model": "m", "targets": "targets", "epochs": 3,
           "schedule": [0.0, 0.5]},
        r2={"stage": "rollout", "model": "h", "prompts": "prompts", "mode": "fast",
            "seed": 4 + SEED_STRIDE},
        t2={"stage": "score", "teacher": "q", "rollouts": "r2", "seed": 4 + SEED_STRIDE},
    )  # fmt: skip
    sugar = parse(raw(d={"rounds": 2}), "r.toml")
    assert known(sugar)["d"] == known(parse(by_hand, "r.toml"))["d"]
    assert settings(sugar.recipe.steps["d"])["rounds"] == 1


def test_rounds_lie_end_to_end_in_the_part_of_the_schedule_that_is_theirs() -> None:
    steps = steps_of(d={"rounds": 3, "schedule": [0.25, 1.0]})
    parts = [steps[name].schedule for name in ("d-round1", "d-round2", "d")]
    assert parts == [
        (0.25, pytest.approx(0.5)), (pytest.approx(0.5), pytest.approx(0.75)),
        (pytest.approx(0.75), 1.0),
    ]  # fmt: skip
    assert steps["d-round3-answers"].model == "d-round2"
    assert len({steps[n].seed for n in steps if n.endswith("answers")}) == 3


def test_a_screen_between_is_repeated_with_the_student_of_the_round() -> None:
    steps = steps_of(
        screened={"stage": "screen", "rollouts": "answers", "student": "m", "teacher": "q",
                  "delta_ifd": [0.0, 0.8]},
        targets={"rollouts": "screened"},
        d={"rounds": 2},
    )  # fmt: skip
    again = steps["d-round2-screened"]
    assert (again.rollouts, again.student, again.teacher) == ("d-round2-answers", "d-round1", "q")
    assert steps["d-round2-targets"].rollouts == "d-round2-screened"
    assert steps["screened"].student == "m"


def test_a_student_that_scores_itself_stays_the_teacher_it_was() -> None:
    steps = steps_of(targets={"teacher": "m"}, d={"rounds": 2})
    assert steps["d-round2-targets"].teacher == "m"
    assert steps["d-round2-answers"].model == "d-round1"


def test_two_distill_steps_of_one_store_have_rounds_of_their_own() -> None:
    steps = steps_of(
        d={"rounds": 2},
        e={"stage": "distill", "model": "m", "targets": "targets", "epochs": 2, "rounds": 2},
    )
    assert steps["e-round2-answers"].model == "e-round1"
    assert steps["d-round2-answers"].model == "d-round1"


@pytest.mark.parametrize("how", ["set", "matrix", "table"])
def test_rounds_may_be_set_from_outside(tmp_path: Path, how: str) -> None:
    path = tmp_path / "r.toml"
    text = TOML
    if how == "matrix":
        text += '[matrix]\n"steps.d.rounds" = [1, 2]\n'
    elif how == "table":
        text += "rounds = 2\n"
    path.write_text(text)
    variants = load(path, ["steps.d.rounds=2"] if how == "set" else [])
    names = {node.name for node in build(variants)}
    suffix = "@rounds=2" if how == "matrix" else ""
    assert f"d-round2-targets{suffix}" in names
    assert "d-round1@rounds=1" not in names
    only = [node.name for node in build(variants, until="d-round1")]
    assert only[-1] == f"d-round1{suffix}"
    assert not any("round2" in name for name in only)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d": {"epochs": 3}}, r"steps\.d\.epochs: 3 cannot be shared by 2 rounds; take 4"),
        ({"d": {"max_steps": 7}}, r"steps\.d\.max_steps: 7 cannot be shared .* take 8"),
        ({"d": {"targets": "nowhere"}}, "'nowhere' is no step"),
        ({"d": {"targets": "prompts"}}, "'prompts' is of stage data"),
        (
            {"got": {"stage": "convert", "source": "x", "model": "m"}, "d": {"targets": "got"}},
            "'got' is of stage convert",
        ),
        ({"answers": {"model": "q"}}, "'answers' is answered by 'q', but the model in training"),
        ({"targets": {"rollouts": "targets"}}, "read each other in a circle"),
        (
            {"d_round1": {"stage": "score", "teacher": "q", "rollouts": "answers"}},
            r"steps\.d-round1: the rounds of 'd' make a step of this name",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_rounds_is_one_line(changes: dict[str, Any], said: str) -> None:
    rounds = {"rounds": 2}
    given = {**changes, "d": {**changes.get("d", {}), **rounds}}
    with pytest.raises(RecipeError, match=said) as caught:
        steps_of(**given)
    assert "\n" not in str(caught.value)


def test_a_model_may_hold_no_name_that_a_round_takes() -> None:
    recipe = raw(d={"rounds": 2})
    recipe["models"]["d-round2-answers"] = {"source": "./x"}
    with pytest.raises(RecipeError, match="d-round2-answers: the rounds of 'd'"):
        parse(recipe, "recipe.toml")


def test_the_student_of_a_round_answers_by_the_engine_of_the_first() -> None:
    given = {**raw(d={"rounds": 2}), "engines": {"m": {"kind": "vllm", "top": 7}}}
    nodes = {node.name: node for node in build([parse(given, "recipe.toml")])}
    assert nodes["d-round2-answers"].engines == {"model": nodes["answers"].engines["model"]}
    assert nodes["d-round2-targets"].engines == {}
    # What the recipe says of the round's own student comes first.
    own = {**given, "engines": {**given["engines"], "d-round1": {"kind": "vllm", "top": 9}}}
    nodes = {node.name: node for node in build([parse(own, "recipe.toml")])}
    assert nodes["d-round2-answers"].engines["model"].meaning()["top"] == 9


def test_a_server_that_has_the_first_student_cannot_have_the_next() -> None:
    given = {
        **raw(d={"rounds": 2}), "engines": {"m": {"kind": "server", "url": "http://a:1"}},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"steps\.d\.rounds: 'm' answers behind a server"):
        parse(given, "recipe.toml")
