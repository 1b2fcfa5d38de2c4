"""The grader of our own lab tasks: a row's meta says which task made it and what of."""

import json
from collections.abc import Mapping
from typing import Any

from tutelage.evals.grading_text import Verdict
from tutelage.tasks import LAB_KEY, TASKS


def by_lab_task(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    """The verdict of the task's own verifier, on the whole answer; the gold is not looked at.

    Raises ValueError for a row whose meta has no entry of a known task.
    """
    kept = json.loads(row.get("meta") or "{}").get(LAB_KEY)
    if not isinstance(kept, dict) or kept.get("name") not in TASKS:
        raise ValueError(f"the row has no lab task in meta[{LAB_KEY!r}]")
    return Verdict(*TASKS[kept["name"]].verify(answer, kept["meta"]))
