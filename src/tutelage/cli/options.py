"""Options that several verbs share, written once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.core.errors import RecipeError

STORE = Path("work")
StorePath = Annotated[
    Path, typer.Option("--store", envvar="TUTELAGE_STORE", help="Where artifacts and runs live.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
RunName = Annotated[
    str, typer.Option("--run", metavar="NAME", help="Which run; the latest when left out.")
]


AllowUnsandboxed = Annotated[
    bool,
    typer.Option(
        "--allow-unsandboxed",
        help='Confirm runtime.sandbox = "none": generated programs run as you, on this machine.',
    ),
]


def check_sandbox(sandbox: str, *, allowed: bool) -> None:
    """Raises RecipeError where programs would run without walls and nobody confirmed it."""
    if sandbox == "none" and not allowed:
        raise RecipeError(
            'runtime.sandbox = "none" runs generated programs as you, with your files and network; '
            "add --allow-unsandboxed if you mean it, or install bubblewrap and leave it out"
        )


def print_json(value: Any) -> None:
    """What `--json` prints."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
