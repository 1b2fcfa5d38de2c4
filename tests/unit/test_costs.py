"""What an arm cost beyond its start, from manifests: each step once, each token by its model."""

from pathlib import Path

import pytest
from lab import Lab

from tutelage.core.artifact import Artifact
from tutelage.core.errors import ArtifactError
from tutelage.models.costs import Costs, costs, flops, parameters, unmatched

STUDENT, TEACHER = 100, 1000


def experiment(root: Path) -> Lab:
    """A start by SFT, a teacher trained in the run, an offline arm and an online one."""
    lab = Lab(root)
    lab.step("data", "data", seconds=1)
    lab.step("new", "new", {"data.0": "data"}, parameters=STUDENT, seconds=2)
    lab.step("start", "sft", {"model": "new", "data.0": "data"}, parameters=STUDENT, seconds=4,
             tokens={"trained": 50}, summary={"steps": 3, "examples": 12})  # fmt: skip
    lab.step("teacher", "sft", {"model": "new", "data.0": "data"}, parameters=TEACHER,
             seconds=8, tokens={"trained": 9}, summary={"steps": 1, "examples": 1})  # fmt: skip
    lab.step("rollouts", "rollout", {"model": "start", "prompts": "data"}, seconds=16,
             tokens={"student_decoded": 20})  # fmt: skip
    lab.step("targets", "score", {"teacher": "teacher", "rollouts": "rollouts"}, seconds=32,
             tokens={"teacher_prefilled": 30})  # fmt: skip
    lab.step("offline", "distill", {"model": "start", "targets": "targets"}, parameters=STUDENT,
             seconds=64, tokens={"trained": 40}, summary={"steps": 5, "examples": 10})  # fmt: skip
    lab.step(
        "online", "online", {"model": "start", "teacher": "teacher", "prompts": "data"},
        parameters=STUDENT, seconds=128, summary={"steps": 5, "examples": 10},
        tokens={"trained": 40, "student_decoded": 20, "teacher_prefilled": 30},
    )  # fmt: skip
    return lab


def known(lab: Lab) -> dict[str, Artifact]:
    return {artifact.fingerprint: artifact for artifact in lab.made.values()}


def of(lab: Lab, arm: str, start: str = "") -> Costs:
    return costs(lab.made[arm], lab.made[start] if start else None, known(lab))


def test_flops_are_six_a_trained_and_two_a_read_token_of_the_model_that_did_it(
    tmp_path: Path,
) -> None:
    lab = experiment(tmp_path)
    found = of(lab, "offline", "start")
    assert found.flops == {
        "rollout": 2 * STUDENT * 20, "score": 2 * TEACHER * 30, "distill": 6 * STUDENT * 40,
    }  # fmt: skip


def test_answers_that_the_teacher_wrote_are_decoded_by_the_teacher(tmp_path: Path) -> None:
    lab = experiment(tmp_path)
    lab.step("theirs", "rollout", {"model": "teacher", "prompts": "data"}, seconds=1,
             tokens={"student_decoded": 20})  # fmt: skip
    lab.step("their-targets", "score", {"teacher": "teacher", "rollouts": "theirs"}, seconds=1,
             tokens={"teacher_prefilled": 30})  # fmt: skip
    lab.step("off", "distill", {"model": "start", "targets": "their-targets"}, parameters=STUDENT,
             seconds=1, tokens={"trained": 40})  # fmt: skip
    own, theirs = of(lab, "offline", "start").tokens, of(lab, "off", "start").tokens
    assert (own["student_decoded"], own["teacher_decoded"]) == (20, 0)
    assert (theirs["student_decoded"], theirs["teacher_decoded"]) == (0, 20)


def test_an_online_step_decodes_as_the_student_and_reads_with_the_teacher(
    tmp_path: Path,
) -> None:
    lab = experiment(tmp_path)
    expected = 6 * STUDENT * 40 + 2 * STUDENT * 20 + 2 * TEACHER * 30
    assert flops(lab.made["online"], known(lab)) == expected


def test_what_the_start_already_paid_is_in_no_arm(tmp_path: Path) -> None:
    found = of(experiment(tmp_path), "offline", "start")
    assert found.seconds == 16 + 32 + 64
    assert found.tokens == {
        "student_decoded": 20, "teacher_decoded": 0, "teacher_prefilled": 30, "trained": 40,
    }  # fmt: skip
    assert (found.steps, found.examples) == (5, 10)


def test_without_a_start_everything_is_paid_once(tmp_path: Path) -> None:
    found = of(experiment(tmp_path), "offline")
    assert found.seconds == 1 + 2 + 4 + 16 + 32 + 64  # data, new and start are read more than once
    assert (found.steps, found.examples) == (8, 22)


def test_a_teacher_is_given_and_its_making_told_apart(tmp_path: Path) -> None:
    lab = experiment(tmp_path)
    found = of(lab, "offline", "start")
    assert found.given_flops == 6 * TEACHER * 9
    assert found.teachers == (lab.made["teacher"].fingerprint,)
    assert of(lab, "teacher").flops == {"sft": 6 * TEACHER * 9}  # as an arm it pays for itself


def test_an_arm_that_is_its_own_start_costs_nothing(tmp_path: Path) -> None:
    found = of(experiment(tmp_path), "start", "start")
    assert (found.seconds, found.flops, found.steps, found.examples) == (0, {}, 0, 0)


def test_a_teacher_of_the_students_own_lineage_is_noticed(tmp_path: Path) -> None:
    lab = experiment(tmp_path)
    lab.step("own", "score", {"teacher": "start", "rollouts": "rollouts"},
             tokens={"teacher_prefilled": 30})  # fmt: skip
    lab.step("control", "distill", {"model": "start", "targets": "own"}, parameters=STUDENT,
             tokens={"trained": 40}, summary={"steps": 5, "examples": 10})  # fmt: skip
    assert of(lab, "control", "start").own_lineage
    assert not of(lab, "offline", "start").own_lineage


def test_sequences_that_were_not_recorded_are_not_guessed(tmp_path: Path) -> None:
    lab = experiment(tmp_path)
    lab.step("old", "distill", {"model": "start", "targets": "targets"}, parameters=STUDENT,
             tokens={"trained": 40}, summary={"steps": 5})  # fmt: skip
    assert of(lab, "old", "start").examples is None


def test_a_step_that_is_not_there_is_named(tmp_path: Path) -> None:
    lab = experiment(tmp_path)
    without = {m: a for m, a in known(lab).items() if a is not lab.made["rollouts"]}
    with pytest.raises(ArtifactError, match="'rollouts'.*not among the steps"):
        costs(lab.made["offline"], lab.made["start"], without)


def test_parameters_are_counted_in_the_headers(tmp_path: Path) -> None:
    lab = experiment(tmp_path)
    assert parameters(lab.made["teacher"]) == TEACHER


def budget(steps: int, examples: int | None) -> Costs:
    return Costs(1.0, {}, {}, steps, examples, 0.0, (), False)


def test_arms_of_another_budget_than_their_group_are_named() -> None:
    usual = [budget(5, 10), budget(5, 10)]
    found = unmatched(
        {"a": usual, "b": usual, "longer": [budget(5, 10), budget(6, 10)],
         "more": [budget(5, 12), budget(5, 12)], "untrained": [budget(0, 0), budget(0, 0)],
         "old": [budget(5, None), budget(5, None)]}
    )  # fmt: skip
    assert found == {
        "longer": "6 optimizer steps instead of 5", "more": "12 sequences instead of 10",
        "old": "its number of sequences was not recorded",
    }  # fmt: skip


def test_a_group_of_one_budget_is_matched() -> None:
    assert unmatched({"a": [budget(5, 10)], "b": [budget(5, 10)]}) == {}
    assert unmatched({"only": [budget(0, 0)]}) == {}
