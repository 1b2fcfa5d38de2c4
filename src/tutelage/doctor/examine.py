"""All checks of a recipe, in the order in which a person wants to hear of them. Begin here."""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tutelage.core.progress import Reporter
from tutelage.doctor import engines, lengths, lineage, overlap, room, sampling, template, tokens
from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, unchecked
from tutelage.recipe.load import Variant
from tutelage.store import Store


def examine(
    variants: Sequence[Variant], store: Store, *, quick: bool = False,
    reporter: Reporter | None = None,
) -> list[Finding]:  # fmt: skip
    """What speaks for and against the recipe; of a matrix, its first cell.

    `quick` runs no model. Nothing is written but hashes into the store's memory of them. Raises
    TutelageError for a recipe that `tutelage plan` refuses, other than for its models.
    """
    with tempfile.TemporaryDirectory(prefix="tutelage-doctor-") as folder:
        case = Case.open(
            variants, store, reporter=reporter or Reporter(quiet=True), scratch=Path(folder)
        )
        checks: list[Callable[[Case], list[Finding]]] = [
            tokens.check, template.check, lineage.check, lengths.check, overlap.check, room.check,
            engines.check, partial(sampling.check, quick=quick),
        ]  # fmt: skip
        found = [finding for check in checks for finding in check(case)]
    found += [
        against(f"rows of {name}", problem, "mend the step's sources; `tutelage data` shows them")
        for name, problem in case.problems.items()
    ]
    if case.refusal and not any(finding.verdict == "against" for finding in found):
        found.insert(0, against("plan", case.refusal, "mend it: `tutelage run` would say the same"))
    if len(variants) > 1:
        found.append(unchecked("matrix", f"one of {len(variants)} cells was looked at"))
    return found
