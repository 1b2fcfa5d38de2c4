"""Graders that lean on other libraries, each behind a process of its own: `math`, `reasoning-gym`.

Owns the processes and what is sent to them; how they judge is `grading_child`'s affair. Limits of
time work from any thread, since nothing here waits for a signal.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from tutelage.core.errors import DataError, EngineError
from tutelage.evals.grading_numeric import final_number, is_number, same
from tutelage.evals.grading_text import RAISED, Verdict, final, first_sentence, short

CPU_SECONDS = 5.0
"""Of one answer. CPU time, not the clock: a verdict does not depend on what else runs."""
WALL_SECONDS = 120.0
"""A process that does not answer for so long sleeps or swaps."""
REPLY_WIDTH = 120
SCORER_TOLERANCE = Fraction(5, 1000)
"""Relative, for what is no whole number: wider than any scorer's own (three digits)."""
ENTRY_KEY = "reasoning_gym"
"""Of a row's meta: {"config": the settings of the task, "entry": {"question", "answer",
"metadata"}}, as reasoning-gym made it; its scorers need `metadata`."""


class Worker:
    """One process of `grading_child`, started when first asked and again after it died."""

    def __init__(self, kind: str, *, cpu_seconds: float = CPU_SECONDS) -> None:
        self.kind = kind
        self.cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> Verdict:
        """The verdict on one request; a scorer that raised, overran or died is a wrong answer."""
        line = json.dumps(request).encode("ascii") + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(WALL_SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            finally:
                timer.cancel()
            if not answer:
                return Verdict(False, self._ended())
        reply = json.loads(answer)
        if "error" in reply:
            return Verdict(False, f"{RAISED} {reply['error']}")
        return Verdict(reply["correct"], short(reply["reason"], width=REPLY_WIDTH))

    def close(self) -> None:
        """End the process, if it runs."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._ended()

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork the pipes belong to the parent: two askers on them would mix their replies.
        if self._process is None or self._owner != os.getpid():
            child = Path(__file__).with_name("grading_child.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(child), self.kind, str(self.cpu_seconds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self._owner = os.getpid()
            assert self._process.stdout is not None
            if not self._process.stdout.readline():
                raise EngineError(
                    f"the process of grader {self.kind!r} does not start ({self._ended()}): "
                    f"run python {child} {self.kind} 5 to see why"
                )
        return self._process

    def _ended(self) -> str:
        """Reap the dead process; why it died."""
        assert self._process is not None
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what it never read
                    pipe.close()
        code = process.wait()
        return "grader took too long" if code == -signal.SIGPROF else f"grader died ({code})"


_WORKERS = {kind: Worker(kind) for kind in ("math", "reasoning-gym")}
for _worker in _WORKERS.values():
    atexit.register(_worker.close)


def by_math_verify(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    r"""The answer's final formula equals the gold's, by math-verify 0.9: \frac{2}{4} is 1/2.

    Equal texts are right without it. The gold is LaTeX, with or without dollar signs.
    Raises DataError where math-verify is not installed.
    """
    _require("math_verify", name="math", package="math-verify")
    marked = final(answer)
    if _bare(gold) in (_bare(answer), _bare(marked.text) if marked else None):
        return Verdict(True, f"{short(gold)} = {short(gold)}")
    return _WORKERS["math"].ask({"gold": gold, "answer": answer})


def by_reasoning_gym(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    """The own scorer of the row's task gives 1.0; anything below, or a crash, is wrong.

    The scorers want the bare answer, so the whole answer is tried, then what stands after its last
    mark, then for a numeric gold its final number. For such a gold the final number must also be
    near it: gsm_symbolic's scorer takes "-574" for 574, coin_flip's 4e-05 for 3e-05.

    Needs the row's `task`, and in its meta `ENTRY_KEY`. Raises ValueError for a row without them,
    DataError without the library.
    """
    _require("reasoning_gym", name="reasoning-gym", package="reasoning-gym")
    meta = json.loads(row.get("meta") or "{}")
    kept = meta.get(ENTRY_KEY)
    if not isinstance(row.get("task"), str) or not isinstance(kept, dict):
        raise ValueError(f"the row has no task with its entry in meta[{ENTRY_KEY!r}]")
    answers = [answer, answer.strip()]
    if marked := final(answer):
        answers += [marked.text.strip(), first_sentence(marked.text).strip()]
    if is_number(gold) and (wanted := final_number(gold, language=None)):
        ours = final_number(answer, language=None)
        if ours is None or not same(ours, wanted, tolerance=SCORER_TOLERANCE):
            return Verdict(False, f"{short(ours.text) if ours else 'no number'} is not {gold}")
        # "1.5, 2" is two roots, not a 2; "6 + 2 = 8" is an 8
        if "=" in answer or any(char.isalpha() for char in answer):
            answers.append(ours.text)
    return _WORKERS["reasoning-gym"].ask(
        {
            "task": row["task"],
            "config": kept.get("config") or {},
            "entry": kept["entry"],
            "answers": list(dict.fromkeys(answers)),
        }
    )


def _bare(formula: str) -> str:
    return formula.strip(" \t\r\n$.")


def _require(module: str, *, name: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(f'grader {name!r} needs {package}: pip install "tutelage[tasks]"')
