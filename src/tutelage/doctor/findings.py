"""What a check says: a verdict, why, and one line what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "against", "not checked"]
WORST_FIRST: tuple[Verdict, ...] = ("against", "warn", "not checked", "ok")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    verdict: Verdict
    text: str
    """What was found; with `not checked`, why it was not."""
    do: str = ""
    """What to do about it; empty where there is nothing to do."""


def ok(check: str, text: str) -> Finding:
    """Nothing is wrong."""
    return Finding(check, "ok", text)


def warn(check: str, text: str, do: str) -> Finding:
    """It may work, and a person should know."""
    return Finding(check, "warn", text, do)


def against(check: str, text: str, do: str) -> Finding:
    """Money spent on this is most likely lost."""
    return Finding(check, "against", text, do)


def unchecked(check: str, why: str, do: str = "") -> Finding:
    """It was not looked at."""
    return Finding(check, "not checked", why, do)


def worst(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict among them; `ok` for none."""
    met = {finding.verdict for finding in findings}
    for verdict in WORST_FIRST:
        if verdict in met:
            return verdict
    return "ok"
