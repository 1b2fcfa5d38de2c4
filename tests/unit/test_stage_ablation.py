"""The ablation over handmade cells of known truth: arms found, verdicts right, the page honest."""

import io
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import QUIET, Lab, verdicts
from rich.console import Console

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ArtifactError, DataError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.recipe.evaluation import Ablation
from tutelage.stages.ablation import run

ITEMS = 120
RATES = {"start": 0.5, "off": 0.62, "on": 0.74, "online": 0.9, "control": 0.5, "teacher": 0.95}
MARKUP = '<script>alert(1)</script> & "q" {{ 7*7 }} $x$'

ARMS: dict[str, dict[str, str]] = {
    "start": {"label": "Start"},
    "off": {"label": "Off-policy KD", "group": "KD", "start": "start"},
    "on": {"label": "Offline on-policy KD", "group": "KD", "start": "start"},
    "online": {"label": "Online", "group": "KD", "start": "start"},
    "control": {"label": "KD from itself", "group": "KD", "start": "start"},
    "teacher": {"label": "Teacher"},
}
CLAIMS: list[dict[str, Any]] = [
    {"text": "On-policy beats off-policy", "better": "on", "than": "off", "source": "2509.26497"},
    {"text": "Offline wins much of online's gain", "better": "on", "than": "start",
     "share_of": "online"},
    {"text": "Off-policy beats online", "better": "off", "than": "online"},
    {"text": "A control wins nothing", "better": "control", "than": "start", "expect": "equal",
     "margin": 0.1},
    {"text": "Who knows", "better": "online", "than": "on", "expect": "open"},
]  # fmt: skip


def config(**more: Any) -> Ablation:
    return Ablation(
        **{"stage": "ablation", "scores": ("scores",), "arms": ARMS, "claims": CLAIMS,
           "title": "Lab", "bootstrap": 300, **more}
    )  # fmt: skip


def cell(lab: Lab, seed: int, *, name: str | None = None, trained: int = 40) -> None:
    """One repetition: data and teacher are shared by all cells, the rest is its own."""
    at: dict[str, Any] = {"cell": f"seed={seed}" if name is None else name}
    rng = np.random.default_rng(seed)
    model: dict[str, Any] = {**at, "parameters": 100}
    kd: dict[str, Any] = {**model, "seconds": 8.0, "tokens": {"trained": trained}}
    kd["summary"] = {"steps": 5, "examples": 10}
    lab.step("maze", "data", setting="maze", **at)
    lab.step("teacher", "sft", {"data.0": "maze"}, setting="teacher", parameters=1000, **at,
             tokens={"trained": 500}, summary={"steps": 9, "examples": 99})  # fmt: skip
    lab.step("start", "sft", {"data.0": "maze"}, tokens={"trained": 50}, seconds=4.0, **model,
             summary={"steps": 3, "examples": 12})  # fmt: skip
    lab.step("answers", "synthesize", {"teacher": "teacher", "prompts": "maze"}, **at,
             tokens={"teacher_decoded": 60})  # fmt: skip
    lab.step("rollouts", "rollout", {"model": "start"}, tokens={"student_decoded": 30}, **at)
    for targets, teacher in (("targets", "teacher"), ("own-targets", "start")):
        lab.step(targets, "score", {"teacher": teacher, "rollouts": "rollouts"}, **at,
                 tokens={"teacher_prefilled": 35 + seed})  # fmt: skip
    lab.step("off", "sft", {"model": "start", "data.0": "answers"}, **kd)
    lab.step("on", "distill", {"model": "start", "targets": "targets"}, **kd)
    lab.step("control", "distill", {"model": "start", "targets": "own-targets"}, **kd)
    lab.step("online", "online", {"model": "start", "teacher": "teacher"}, **model, seconds=30.0,
             tokens={"trained": 40, "student_decoded": 40, "teacher_prefilled": 50},
             summary={"steps": 5, "examples": 10})  # fmt: skip
    rows = []
    for arm in RATES:
        made = lab.made[f"{arm}@{at['cell']}" if at["cell"] else arm]
        for mode in ("fast", "reasoning"):
            rows += verdicts(made, graded(arm, rng), mode=mode, tokens=20 + seed,
                             thinking="chain" if mode == "reasoning" else None)  # fmt: skip
    lab.step("scores", "evaluate", {f"models.{i}": arm for i, arm in enumerate(RATES)}, rows=rows,
             **at)  # fmt: skip


def graded(arm: str, rng: np.random.Generator) -> list[float]:
    """A shared teacher answers alike in every cell, as one result does."""
    if arm == "teacher":
        return [1.0] * 114 + [0.0] * 6
    hard = np.random.default_rng(1).normal(0, 0.15, ITEMS)
    return (rng.random(ITEMS) < RATES[arm] + hard).astype(float).tolist()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = Lab(tmp_path_factory.mktemp("lab"))
    for seed in (10, *range(1, 10)):
        cell(made, seed)
    return made


def made_of(
    lab: Lab | Mapping[str, Artifact], folder: Path, settings: Ablation | None = None,
    reporter: Reporter = QUIET,
) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:  # fmt: skip
    """(`ablation.json`, the page, the summary)."""
    work = WorkDir.open(folder, reporter=reporter, device="cpu")
    summary = run(settings or config(), lab.made if isinstance(lab, Lab) else lab, work)
    record = json.loads((folder / "ablation.json").read_text())
    return record, (folder / "index.html").read_text(), summary


@pytest.fixture(scope="module")
def made(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:
    return made_of(lab, tmp_path_factory.mktemp("page"))


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)


def text_of(page: str) -> str:
    parser = _Words()
    parser.feed(page)
    return re.sub(r"\s+", " ", " ".join(parser.words))


def test_each_claim_gets_the_verdict_that_is_true(made: Any) -> None:
    record, _, summary = made
    assert [claim["verdict"] for claim in record["claims"]] == [
        "holds", "holds", "reversed", "holds", "higher"
    ]  # fmt: skip
    assert (summary["holds"], summary["reversed"], summary["not_seen"]) == (3, 1, 0)


def test_cells_are_read_in_the_order_of_their_numbers(made: Any) -> None:
    assert made[0]["cells"] == [f"seed={seed}" for seed in range(1, 11)]


def test_an_arm_is_known_in_each_cell_by_its_own_fingerprint(made: Any, lab: Lab) -> None:
    fast = next(c for c in made[0]["conditions"] if c["mode"] == "fast")
    marks = {lab.made[f"on@seed={s}"].fingerprint for s in range(1, 11)}
    assert len(marks) == 10
    assert len(set(fast["arms"]["on"]["seed_means"])) > 1
    assert set(fast["arms"]["teacher"]["seed_means"]) == {114 / 120}  # one result, in every cell


def test_the_share_of_onlines_gain_has_its_interval(made: Any) -> None:
    share = made[0]["claims"][1]["share"]
    assert share["low"] < (0.74 - 0.5) / (0.9 - 0.5) < share["high"]


def test_modes_are_told_apart(made: Any) -> None:
    shares = {
        c["mode"]: c["arms"]["on"]["thinking_share"]["estimate"] for c in made[0]["conditions"]
    }
    assert shares == {"fast": 0.0, "reasoning": 1.0}


def test_costs_count_from_the_start_and_by_stage(made: Any) -> None:
    arm = made[0]["arms"]["on"]
    assert arm["costs"]["seed=3"]["flops"] == {
        "rollout": 2 * 100 * 30, "score": 2 * 1000 * 38, "distill": 6 * 100 * 40,
    }  # fmt: skip
    assert arm["costs"]["seed=3"]["seconds"] == 1 + 1 + 8


def test_flops_are_told_relative_to_the_arm_whose_gain_is_shared(made: Any) -> None:
    arms = made[0]["arms"]
    online = 6 * 100 * 40 + 2 * 100 * 40 + 2 * 1000 * 50
    assert (arms["on"]["flops_of"], arms["online"]["flops"]) == ("online", online)
    assert arms["on"]["flops_relative"] == pytest.approx(arms["on"]["flops"] / online)


def test_the_page_says_every_verdict_in_words(made: Any) -> None:
    words = text_of(made[1])
    for claim in made[0]["claims"]:
        assert claim["text"] in words
        assert claim["verdict"] in words
    assert "What is not seen, or seen otherwise" in words
    assert "the run contradicts the claim" in words


def test_the_page_shows_differences_in_points_with_their_interval(made: Any) -> None:
    record, page, _ = made
    found = record["claims"][0]["difference"]
    shown = f"[+{100 * found['low']:.1f}, +{100 * found['high']:.1f}]"
    assert shown in page
    assert f'<data value="{found["estimate"]}">+{100 * found["estimate"]:.1f}</data>' in page


def test_the_page_names_controls_and_teachers(made: Any) -> None:
    words = text_of(made[1])
    assert "Negative control: KD from itself was taught by its own ancestor (Start)" in words
    assert "Matched: all arms of “KD” that train" in words


def test_an_arm_with_another_teacher_is_named(lab: Lab, tmp_path: Path) -> None:
    other = Lab(tmp_path / "lab", dict(lab.made))
    for seed in range(1, 11):
        at: dict[str, Any] = {"cell": f"seed={seed}"}
        other.step("rival", "sft", {"data.0": "maze"}, parameters=1000, **at)
        other.step("online", "online", {"model": "start", "teacher": "rival"}, parameters=100,
                   summary={"steps": 5, "examples": 10}, **at)  # fmt: skip
        rows = [
            row
            for arm in RATES
            for row in verdicts(other.made[f"{arm}@seed={seed}"], [1.0, 0.0, 1.0])
        ]
        other.step("scores", "evaluate", {"models.0": "online"}, rows=rows, **at)
    words = text_of(made_of(other, tmp_path / "page")[1])
    assert "most arms were taught by Teacher, but Online by rival." in words


def test_the_page_acts_on_nothing_and_fetches_nothing(lab: Lab, tmp_path: Path) -> None:
    arms = {**ARMS, "on": {"label": MARKUP, "group": MARKUP, "start": "start"}}
    claims = [{**CLAIMS[0], "text": MARKUP, "source": MARKUP}]
    told = config(arms=arms, claims=claims, title=MARKUP, description=MARKUP)
    _, page, _ = made_of(lab, tmp_path, told)
    parser = _Words()
    parser.feed(page)
    assert "script" not in parser.tags
    assert MARKUP in text_of(page)
    assert not re.search(r'(?:src|href|action)="(?!#|data:)|@import|url\((?!#|&quot;#)', page)


def test_the_same_inputs_give_the_same_bytes(made: Any, lab: Lab, tmp_path: Path) -> None:
    backwards = dict(reversed(lab.made.items()))
    record, page, _ = made_of(backwards, tmp_path)
    assert record == made[0]
    assert page == made[1]


def test_the_verdicts_are_said_one_line_each(lab: Lab, tmp_path: Path) -> None:
    stream = io.StringIO()
    made_of(lab, tmp_path, reporter=Reporter(Console(file=stream, width=200)))
    said = stream.getvalue().splitlines()
    assert said[0].strip() == "10 seeds, 6 arms; of 5 claims: 3 hold, 1 reversed, 1 higher."
    assert re.match(
        r"  ✓ holds +On-policy beats off-policy: \+[\d.]+ \[\+[\d.]+, \+[\d.]+\] points; "
        r"\d+ of 10 seeds; Holm p", said[1],
    )  # fmt: skip
    assert len(said) == 1 + len(CLAIMS)


def test_a_matrix_is_not_needed_but_its_absence_is_said(tmp_path: Path) -> None:
    alone = Lab(tmp_path / "lab")
    cell(alone, 3, name="")
    record, page, _ = made_of(alone, tmp_path / "page")
    assert record["cells"] == [""]
    assert record["claims"][0]["p_test"] == "McNemar"
    assert "Seeds are missing" in page


def test_too_few_seeds_are_told_with_how_many_it_takes(tmp_path: Path) -> None:
    few = Lab(tmp_path / "lab")
    for seed in (1, 2, 3):
        cell(few, seed)
    record, page, _ = made_of(few, tmp_path / "page")
    assert "holds" not in [c["verdict"] for c in record["claims"] if c["expect"] == "better"]
    assert "With 3 seeds no p can be under 0.25" in page
    assert "Take 8 seeds or more" in page  # 4 claims: 4 x 2 / 2^8 = 0.03


def test_an_arm_of_another_budget_is_flagged(lab: Lab, tmp_path: Path) -> None:
    more = Lab(tmp_path / "lab", dict(lab.made))
    for seed in range(1, 11):
        more.step("on", "distill", {"model": "start", "targets": "targets"}, cell=f"seed={seed}",
                  parameters=100, summary={"steps": 6, "examples": 10})  # fmt: skip
        rows = [
            row
            for arm in RATES
            for row in verdicts(more.made[f"{arm}@seed={seed}"], [1.0, 0.0, 1.0])
        ]
        more.step("scores", "evaluate", {"models.0": "on"}, cell=f"seed={seed}", rows=rows)
    record, page, _ = made_of(more, tmp_path / "page")
    assert record["groups"][0]["unmatched"] == {"on": "6 optimizer steps instead of 5"}
    assert "not matched" in page


def changed(lab: Lab, folder: Path, name: str, rows: Any) -> Lab:
    """The same cells, but seed 4 evaluated otherwise."""
    other = Lab(folder, dict(lab.made))
    other.step(name, "evaluate", {"models.0": "on"}, cell="seed=4", rows=rows)
    return other


def rows_of(lab: Lab, **more: Any) -> list[dict[str, Any]]:
    return [
        row
        for arm in RATES
        for mode in ("fast", "reasoning")
        for row in verdicts(
            lab.made[f"{arm}@seed=4"], [1.0] * ITEMS, **{"mode": mode, **more}
        )
    ]  # fmt: skip


def test_a_cell_that_lacks_an_arm_is_named(lab: Lab, tmp_path: Path) -> None:
    mark = lab.made["on@seed=4"].fingerprint
    rows = [row for row in rows_of(lab) if row["model"] != mark]
    with pytest.raises(ArtifactError, match="cell seed=4 has no graded answer of 'on'"):
        made_of(changed(lab, tmp_path / "lab", "scores", rows), tmp_path / "page")


def test_a_cell_that_lacks_an_evaluation_is_named(lab: Lab, tmp_path: Path) -> None:
    inputs = {role: a for role, a in lab.made.items() if role != "scores@seed=4"}
    with pytest.raises(ArtifactError, match="'scores@seed=4' is not there"):
        made_of(inputs, tmp_path)


def test_a_cell_that_lacks_an_arms_step_is_named(lab: Lab, tmp_path: Path) -> None:
    inputs = {role: a for role, a in lab.made.items() if role != "online@seed=4"}
    with pytest.raises(RecipeError, match="'online' is no step behind.*in cell seed=4"):
        made_of(inputs, tmp_path)


def test_an_arm_that_nobody_evaluated_is_named(lab: Lab, tmp_path: Path) -> None:
    arms = {**ARMS, "rollouts": {"label": "No model"}}
    with pytest.raises(ArtifactError, match="arm 'rollouts' has no graded answer in any cell"):
        made_of(lab, tmp_path, config(arms=arms))


def test_an_unknown_start_is_named(lab: Lab, tmp_path: Path) -> None:
    arms = {**ARMS, "on": {"label": "On", "start": "stard"}}
    with pytest.raises(RecipeError, match="'stard' is no step behind the evaluate steps"):
        made_of(lab, tmp_path, config(arms=arms))


def test_the_same_question_graded_twice_is_refused(lab: Lab, tmp_path: Path) -> None:
    twice = changed(lab, tmp_path / "lab", "more", rows_of(lab))
    for seed in (s for s in range(1, 11) if s != 4):
        twice.made[f"more@seed={seed}"] = lab.made[f"scores@seed={seed}"]
    with pytest.raises(DataError, match="two evaluate steps of cell seed=4.*which counts"):
        made_of(twice, tmp_path / "page", config(scores=("scores", "more")))


def test_prompts_of_one_name_but_another_text_are_not_shared(lab: Lab, tmp_path: Path) -> None:
    other = changed(lab, tmp_path / "lab", "scores", rows_of(lab, prompt="to {item}"))
    record, page, _ = made_of(other, tmp_path / "page")
    assert not record["conditions"][0]["shared_items"]
    assert "other ones in each seed" in page


def test_samples_of_an_item_count_as_one(lab: Lab, tmp_path: Path) -> None:
    rows = [*rows_of(lab), *(row | {"sample": 1, "correct": 0.0} for row in rows_of(lab))]
    record, _, _ = made_of(changed(lab, tmp_path / "lab", "scores", rows), tmp_path / "page")
    assert record["conditions"][0]["arms"]["on"]["seed_means"][3] == 0.5


def test_the_same_sample_twice_is_refused(lab: Lab, tmp_path: Path) -> None:
    rows = [*rows_of(lab), rows_of(lab)[0]]
    with pytest.raises(DataError, match="same sample of one model twice"):
        made_of(changed(lab, tmp_path / "lab", "scores", rows), tmp_path / "page")


def test_a_test_goes_by_its_steps_name_also_where_verdicts_hold_its_fingerprint(
    tmp_path: Path,
) -> None:
    lab = Lab(tmp_path / "lab")
    cell(lab, 1)
    cell(lab, 2)
    for seed in (1, 2):
        maze = lab.made[f"maze@seed={seed}"].fingerprint
        rows = [
            row
            for arm in RATES
            for row in verdicts(lab.made[f"{arm}@seed={seed}"], [1.0, 0.0, 1.0], test=maze)
        ]
        lab.step("scores", "evaluate", {"tests.0": "maze"}, cell=f"seed={seed}", rows=rows)
    record, _, _ = made_of(lab, tmp_path / "page")
    assert {condition["test"] for condition in record["conditions"]} == {"maze"}


def test_answers_cut_off_make_a_score_one_of_length(lab: Lab, tmp_path: Path) -> None:
    cut = Lab(tmp_path / "lab", dict(lab.made))
    for seed in range(1, 11):
        rows = [
            row
            for arm in RATES
            for row in verdicts(
                cut.made[f"{arm}@seed={seed}"], [1.0, 0.0, 1.0],
                finish_reason="length" if arm == "off" else "stop",
            )
        ]  # fmt: skip
        cut.step("scores", "evaluate", {"models.0": "on"}, cell=f"seed={seed}", rows=rows)
    words = text_of(made_of(cut, tmp_path / "page")[1])
    assert "so the score is one of length: Off-policy KD (maze, fast mode, greedy)." in words


def test_an_evaluation_without_tests_is_named(lab: Lab, tmp_path: Path) -> None:
    other = changed(lab, tmp_path / "lab", "scores", None)
    with pytest.raises(ArtifactError, match=r"verdicts\.parquet is not there"):
        made_of(other, tmp_path / "page")
