"""Lab tasks as data: rows repeat by seed, folds share nothing, verdicts never raise."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.errors import DataError
from tutelage.data.identity import data_identity
from tutelage.data.rows import conversation
from tutelage.data.sources import read_source
from tutelage.evals.graders import GRADERS, grade, grader_for
from tutelage.recipe.curation import Data, DataSource
from tutelage.tasks import TASKS, Item, base

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("gridwalk", {}),
    ("gridwalk", {"size": 5, "walls": 5, "order": "columns-first"}),
    ("gridwalk", {"distance": [4, 9], "slack": 0, "fold": [[0, 1, 2], 4]}),
    ("modchain", {}),
    ("modchain", {"fast": "final", "modulus": 7, "operands": [0, 6], "steps": [3, 5]}),
    ("modchain", {"language": "zh", "reasoning": True, "show_from": 1}),
    ("modchain", {"language": "en", "operations": "*", "modulus": 97, "operands": [2, 96]}),
    ("codeout", {}),
    ("codeout", {"lines": [3, 4], "loops": [0, 0], "ifs": [0, 0], "operands": [0, 2]}),
    ("codeout", {"lines": [11, 12], "loops": [2, 2], "ifs": [2, 2], "largest": 99}),
]


def items(name: str, config: dict[str, Any], *, seed: int = 0, count: int = 200) -> list[Item]:
    task = TASKS[name]
    return list(task.items(task.configure(config), seed=seed, count=count))


def rows(name: str, count: int, *, seed: int = 0, **config: Any) -> list[dict[str, Any]]:
    """As the data stage stores them."""
    source = DataSource(source=f"task:{name}", limit=count, task_config=config)
    made = []
    for place, row in read_source(source, seed=seed):
        assert isinstance(row, dict)
        made.append(conversation(row, source, place=place, name=source.source))
    return made


# --- items ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_gold_is_right_and_nothing_is_wrong_on_a_thousand_items(
    name: str, config: dict[str, Any]
) -> None:
    for item in items(name, config, count=1000):
        meta = json.loads(json.dumps(item.meta))
        for right in (item.answer, item.response, f" {item.response}\n"):
            assert TASKS[name].verify(right, meta)[0]
        for wrong in ("", " \n", item.response + item.response, item.response + "\n0", "x"):
            assert not TASKS[name].verify(wrong, meta)[0]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_items_repeat_by_seed_and_differ_without_it(name: str, config: dict[str, Any]) -> None:
    assert items(name, config) == items(name, config)
    assert items(name, config) != items(name, config, seed=1)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_fewer_items_are_the_first_of_more(name: str, config: dict[str, Any]) -> None:
    assert items(name, config, count=50) == items(name, config)[:50]


@pytest.mark.parametrize("name", TASKS)
def test_no_prompt_comes_twice(name: str) -> None:
    assert len({item.prompt for item in items(name, {}, count=2000)}) == 2000


def test_copies_repeat_each_prompt_with_a_gold_drawn_anew() -> None:
    found = items("gridwalk", {"copies": 3, "distance": [6, 12]}, count=300)
    assert set(Counter(item.prompt for item in found).values()) == {3}
    assert [item.prompt for item in found[:4]] == [found[0].prompt] * 3 + [found[3].prompt]
    assert len({item.response for item in found[:3]}) > 1


@pytest.mark.parametrize("name", TASKS)
def test_folds_share_no_prompt_and_together_are_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At most 126 prompts: one is missed in 4,000 draws with a probability of exp(-31).
    monkeypatch.setattr(base, "MOST_DRAWS", 4000)
    sizes = {
        "gridwalk": {"size": 3},
        "modchain": {"modulus": 3, "operands": [1, 2], "steps": [1, 2]},
        "codeout": {"lines": [2, 2], "loops": [0, 0], "ifs": [0, 0], "operands": [0, 99]},
    }
    count = {"gridwalk": 72, "modchain": 3 * 6 + 3 * 36, "codeout": 100}[name]
    whole = {item.prompt for item in items(name, sizes[name], count=count)}
    parts: list[set[str]] = []
    for fold in ([0, 3], [[1, 2], 3]):
        config = {**sizes[name], "fold": fold}
        with pytest.raises(DataError, match="has only") as error:
            items(name, config, count=count)
        size = int(str(error.value).split("has only ")[1].split()[0])
        parts.append({item.prompt for item in items(name, config, count=size)})
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]


def test_a_space_used_up_says_how_many_prompts_there_are() -> None:
    with pytest.raises(DataError, match="only 72 different prompts with this config, not 73"):
        items("gridwalk", {"size": 3}, count=73)


def test_an_empty_fold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MOST_DRAWS", 1000)
    task = TASKS["gridwalk"]
    config = task.configure({"size": 2, "fold": [5, 999_983]})
    with pytest.raises(DataError, match="found no problem in fold"):
        task.make(np.random.default_rng(0), config)


def test_one_item_can_be_made_alone() -> None:
    task = TASKS["modchain"]
    config = task.configure({"fold": [1, 2]})
    item = task.make(np.random.default_rng(0), config)
    assert item == task.make(np.random.default_rng(0), config)
    assert task.verify(item.answer, item.meta)[0]


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("gridwalk", {"distanse": [1, 2]}, "distanse: unknown key; did you mean 'distance'"),
        ("gridwalk", {"zzzz": 1}, "zzzz: unknown key; copies, detours, distance, fold"),
        ("gridwalk", {"distance": [3, 2]}, "distance: the lower end of a range comes first"),
        ("gridwalk", {"distance": [0, 0]}, "distance: start and goal are different cells"),
        ("gridwalk", {"distance": [13, 14]}, "distance: the farthest cells are 12 apart"),
        ("gridwalk", {"size": 11}, "size: .*less than or equal to 10, got 11"),
        ("gridwalk", {"walls": 17}, "walls: at most a third of the cells, 16"),
        ("gridwalk", {"order": "snake"}, "order: Input should be 'random'"),
        ("gridwalk", {"fold": [5, 5]}, r"fold: \[k, n\] or"),
        ("gridwalk", {"fold": [[], 5]}, r"fold: \[k, n\] or"),
        ("modchain", {"operation": "+"}, "operation: unknown key; did you mean 'operations'"),
        ("modchain", {"operations": "+/"}, "operations: String should match"),
        ("modchain", {"steps": [0, 2]}, "steps: a chain has at least one"),
        ("modchain", {"modulus": 7}, "operands: they stay below the modulus, 7"),
        ("modchain", {"show_from": 1}, "show_from cuts a chain: set reasoning = true"),
        ("modchain", {"language": "de"}, "language: Input should be '', 'en' or 'zh'"),
        ("codeout", {"lines": [5, 8]}, "lines: 1 loops and 1 ifs .* need 6 at least"),
        ("codeout", {"operands": [0, 1000]}, "operands: they may not be larger than largest"),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"^task:{name} cannot be made: {reason}"):
        TASKS[name].configure(config)


# --- rows and grades ----------------------------------------------------------------------------


def test_a_row_has_its_chain_only_when_asked_and_no_answer_when_asked() -> None:
    fast, reasoning, prompts = (
        rows("modchain", 5, **config)
        for config in ({}, {"reasoning": True}, {"prompts_only": True, "reasoning": True})
    )
    assert {row["mode"] for row in fast} == {"fast"}
    assert {row["mode"] for row in reasoning} == {"reasoning"}
    assert [len(row["messages"]) for row in prompts] == [1] * 5
    assert [row["answer"] for row in prompts] == [row["answer"] for row in fast]


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_both_modes_ask_the_same_row_by_row(name: str) -> None:
    fast, reasoning = (rows(name, 20, reasoning=on) for on in (False, True))
    assert [row["messages"][0] for row in fast] == [row["messages"][0] for row in reasoning]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_a_stored_row_is_graded_by_its_own_task(name: str, config: dict[str, Any]) -> None:
    first, second = rows(name, 2, **config)
    assert (first["task"], grader_for(first)) == (name, "task")
    assert grade("auto", first["messages"][-1]["content"], first["answer"], row=first).correct
    assert not grade("auto", second["answer"] + "0", first["answer"], row=first).correct


def test_a_lab_task_needs_a_limit_and_its_misspelt_name_is_told() -> None:
    with pytest.raises(DataError, match="task:gridwalk has no end of its own: set limit"):
        rows("gridwalk", 0)
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match=r"cannot be made: .*did you mean task:gridwalk\?"):
        rows("gridwalks", 1)


@pytest.mark.parametrize("meta", [None, "{}", "[]", '{"lab_task": {"name": "chess"}}', "{"])
def test_a_row_without_a_lab_task_counts_as_wrong_and_says_so(meta: str | None) -> None:
    verdict = grade("task", "R", "R", row={"task": "gridwalk", "meta": meta})
    assert not verdict.correct
    assert verdict.reason.startswith("grader raised")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CONFIGS[::3]), st.text(max_size=40))
def test_no_answer_stops_a_verifier(case: tuple[str, dict[str, Any]], answer: str) -> None:
    name, config = case
    (row,) = rows(name, 1, **config)
    verdict = GRADERS["task"](answer, row["answer"], row=row)
    assert verdict.correct in (True, False)
    assert len(verdict.reason) < 200


def test_our_tasks_are_known_by_a_version_of_ours(tmp_path: Path) -> None:
    sources = tuple(DataSource(source=f"task:{n}", limit=1) for n in ("codeout", "chain_sum"))
    step = Data(stage="data", seed=0, sources=sources)
    ours, gym = data_identity(step, memo=tmp_path / "hashes.json").values()
    assert ours == {"task": "task:codeout", "version": TASKS["codeout"].version}
    assert set(gym) == {"task", "reasoning_gym", "rows"}


# --- reasoning-gym --------------------------------------------------------------------------------

GYM = ("gsm_symbolic", "chain_sum", "gcd", "simple_equations")


@pytest.mark.parametrize("name", GYM)
def test_reasoning_gyms_answer_is_the_response_and_near_misses_are_wrong(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    for row in rows(name, 15):
        gold = row["messages"][1]["content"]
        assert (gold, row["mode"]) == (row["answer"], "fast")
        assert grade("auto", gold, gold, row=row).correct
        near = [str(int(gold) + by) for by in (-1, 1, 10)]
        for wrong in ("", *near, gold + gold, gold[:-1], "[]", "nan", "9" * 400, "1/0", "x\x00"):
            assert not grade("auto", wrong, gold, row=row).correct


def test_reasoning_gyms_worked_solution_is_the_chain_when_asked() -> None:
    pytest.importorskip("reasoning_gym")
    for row in rows("gsm_symbolic", 5, reasoning=True):
        assert row["mode"] == "reasoning"
        assert row["answer"] in row["messages"][1]["thinking"]
        assert json.loads(row["meta"])["reasoning_gym"]["config"] == {}
    assert [len(row["messages"]) for row in rows("gsm_symbolic", 2, prompts_only=True)] == [1, 1]


def test_a_task_without_worked_solutions_says_so_when_asked_for_them() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="task:gcd has no worked solutions: .*gsm_symbolic have"):
        rows("gcd", 1, reasoning=True)
    with pytest.raises(DataError, match="reasoning is true or false, not 'yes'"):
        rows("gsm_symbolic", 1, reasoning="yes")
