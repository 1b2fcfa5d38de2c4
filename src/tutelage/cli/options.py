"""Options that several verbs share, written once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

STORE = Path("work")
StorePath = Annotated[
    Path, typer.Option("--store", envvar="TUTELAGE_STORE", help="Where artifacts and runs live.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
RunName = Annotated[
    str, typer.Option("--run", metavar="NAME", help="Which run; the latest when left out.")
]


def print_json(value: Any) -> None:
    """What `--json` prints."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
