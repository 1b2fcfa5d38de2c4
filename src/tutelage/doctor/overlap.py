"""What is trained on and asked again in the judgement: held-out prompts, tests, tasks' files."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tutelage.core.errors import TutelageError
from tutelage.data.contamination import Index
from tutelage.data.evaluation import evaluation_texts
from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.recipe.curation import DataSource
from tutelage.recipe.evaluation import Evaluate

FIGURES = re.compile(r"[0-9+*/=<>^%-]")
MUCH = 0.05
"""Share of the questions of an exam, known beforehand, from which its result says nothing."""
LEAST_SHARE = 0.5
"""Of a question's n-grams that stand in a training prompt: half of it is a coincidence no more."""


def check(case: Case) -> list[Finding]:
    """Every check of this file: each exam against what the models that sit it have learnt."""
    found: list[Finding] = []
    for name, step in case.steps(Evaluate):
        trained: dict[str, list[str]] = {}
        notes = []
        for data in _learnt(case, name):
            rows = case.rows(data)
            if rows is None:
                notes.append(f"{data} is not here yet")
                continue
            trained[data] = [_asked(row) for row in rows.records]
            notes += [f"{data}: {rows.note}"] if rows.note else []
        for exam, items in _exams(case, name, step):
            found.append(_compared(exam, items, trained, notes))
    return list(dict.fromkeys(found)) or [
        unchecked("contamination", "the recipe judges nothing: it has no evaluate step")
    ]


def _compared(
    exam: str, items: list[str] | str, trained: Mapping[str, list[str]], notes: list[str]
) -> Finding:
    name = f"contamination of {exam}"
    if isinstance(items, str) or not trained:
        return unchecked(name, items if isinstance(items, str) else "; ".join(notes))
    index, exact = Index.build(items), {" ".join(text.split()) for text in items}
    known: dict[str, str] = {}
    for step, texts in trained.items():
        for text, match in zip(texts, index.find_all(texts), strict=True):
            if (plain := " ".join(text.split())) in exact:
                known.setdefault(plain, step)
            elif match and match.share >= LEAST_SHARE and _same_figures(items[match.item], text):
                known.setdefault(" ".join(items[match.item].split()), step)
    if not known:
        looked = sum(map(len, trained.values()))
        more = f" ({'; '.join(dict.fromkeys(notes))})" if notes else ""
        return ok(name, f"none of {len(items):,} items is among {looked:,} training rows{more}")
    share = len(known) / len(exact)
    text, step = next(iter(known.items()))
    return (against if share > MUCH else warn)(
        name, f"{len(known)} of {len(exact):,} items are trained on in {step}, such as "
        f"{text[:60]!r}: what is measured there is memory",
        f"decontaminate {step}, or take part = 'train' and 'holdout' of the same sources",
    )  # fmt: skip


def _exams(case: Case, name: str, step: Evaluate) -> Iterator[tuple[str, list[str] | str]]:
    for role, to in case.inputs(name).items():
        if role == "prompts" or role.startswith("tests."):
            rows = case.rows(to)
            yield to, [_asked(row) for row in rows.records] if rows else f"{to} is not here yet"
    for task in step.tasks:
        if not task.source:
            yield task.name, "its rows are on the Hub and are not fetched for this"
            continue
        try:
            yield task.name, list(evaluation_texts([DataSource(source=task.source)], seed=0))
        except TutelageError as error:
            yield task.name, str(error)


def _learnt(case: Case, name: str) -> list[str]:
    """Conversations whose prompts the judged models learn answers to, on all the way to them."""
    found: dict[str, None] = {}
    for role, model in case.inputs(name).items():
        while role.startswith("models.") and "model" in (inputs := case.inputs(model)):
            wanted = [to for role, to in inputs.items() if role.partition(".")[0] == "data"]
            wanted += [inputs["prompts"]] if "prompts" in inputs else []
            if "targets" in inputs and "prompts" in (asked := case.inputs(case.asking(model))):
                wanted.append(asked["prompts"])
            found |= dict.fromkeys(wanted)
            model = inputs["model"]
    return list(found)


def _asked(row: Mapping[str, Any]) -> str:
    return "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")


def _same_figures(item: str, text: str) -> bool:
    """Whether the numbers and signs of an item stand in the text as they are.

    The n-grams leave signs out, and 5-4-3 is another question than 5+4*3.
    """
    inner, outer = ("".join(FIGURES.findall(one)) for one in (item, text))
    return inner in outer
