"""Runs a recipe and, as an injected fault, kills its own process at the n-th rename.

usage: killed_run.py RECIPE STORE N; N > 0 dies just after the rename, N < 0 just before, 0 never.
Prints the number of renames.
"""

import os
import signal
import sys
from pathlib import Path

from tutelage import pipeline
from tutelage.recipe.load import load
from tutelage.store import Store

renames = 0
replace = os.replace
kill_at = int(sys.argv[3])


def counted(*arguments: object, **options: object) -> None:
    global renames
    renames += 1
    if -renames == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments, **options)  # type: ignore[arg-type]
    if renames == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


os.replace = counted  # type: ignore[assignment]
pipeline.run(load(Path(sys.argv[1])), Store(Path(sys.argv[2])))
print(renames)
