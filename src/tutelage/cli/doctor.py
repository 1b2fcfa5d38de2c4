"""`tutelage doctor`: this machine, or a recipe before it is paid for; and how the answer looks."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelage.cli.options import STORE, AsJson, StorePath, print_json
from tutelage.core.progress import Reporter
from tutelage.recipe.load import load
from tutelage.store import Store

if TYPE_CHECKING:
    from tutelage.doctor.findings import Finding

EXIT_AGAINST = 3
STYLES = {"ok": "green", "warn": "yellow", "against": "bold red", "not checked": "dim"}


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe (TOML); left out: this machine.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override one value of the recipe; repeatable."
        ),
    ] = [],  # noqa: B006 - typer copies it
    store: StorePath = STORE,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run no model: seconds instead of a minute.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe before it is paid for, or this machine; exits 3 when advised against."""
    from tutelage.doctor import examine, machine  # both import torch
    from tutelage.doctor.findings import worst

    started = time.monotonic()
    if recipe is None:
        found = machine.examine(Store(store))
    else:
        variants = load(recipe, overrides)
        found = examine.examine(variants, Store(store), quick=quick, reporter=Reporter())
    verdict = worst(found)
    if as_json:
        print_json(
            {
                "recipe": str(recipe) if recipe else None,
                "verdict": verdict,
                "seconds": round(time.monotonic() - started, 1),
                "findings": [asdict(finding) for finding in found],
            }
        )
    else:
        findings_table(Console(), found, seconds=time.monotonic() - started)
    if verdict == "against":
        raise typer.Exit(EXIT_AGAINST)


def findings_table(console: Console, found: "Sequence[Finding]", *, seconds: float) -> None:
    """One row a check, what to do below it, and how many there were of each verdict."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(max_width=34)
    table.add_column(ratio=1, overflow="fold")
    for finding in found:
        style = STYLES[finding.verdict]
        text = escape(finding.text)
        if finding.do:
            text += f"\n[bold]do:[/bold] {escape(finding.do)}"
        table.add_row(f"[{style}]{finding.verdict}", escape(finding.check), text)
    console.print(table)
    counts = Counter(finding.verdict for finding in found)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in STYLES if counts[verdict])
    console.print(f"\n{said}; {seconds:.0f} s", highlight=False)
