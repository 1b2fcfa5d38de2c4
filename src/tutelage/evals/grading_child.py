"""The process in which other people's scorers run: one JSON line in, one JSON line out.

Run by `grading_worker` as a script, so that a formula that never ends can be killed from any
thread and a scorer that fills the memory takes only itself down. Imports nothing of Tutelage, to
start fast. It is no sandbox: text that a scorer would evaluate as Python is checked against
`ALPHABETS` first.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

MEMORY_BYTES = 4 << 30

REFUSED = {
    "codeio": "it runs the generated program inside the scoring process",
    "game_of_life_halting": "its scorer gives 1.0 to any text",
    "composite": "its items belong to other tasks: name those as sources",
}
_LITERAL = r"[\w\s\[\],'\"-]*"
_ARITHMETIC = r"(?:[\d+*/().\s-])*"
_ALGEBRA = (
    r"(?:\d++(?:\.\d*+)?|(?<![A-Za-z])(?:a?sinh?|a?cosh?|a?tanh?|sqrt|exp|log|ln|pi|[A-Za-z])"
    r"(?![A-Za-z_])|[+*/^(),\s-])*"
)
_INTEGERS = r"[\da-fA-Fx+*<>&|^~()\s-]*"
ALPHABETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "string_insertion": (_LITERAL, ("answer",)),
    "spiral_matrix": (_LITERAL, ("answer",)),
    "binary_matrix": (_LITERAL, ("answer",)),
    "n_queens": (_LITERAL, ("answer",)),
    "number_sorting": (r"[\d\s\[\],.'\"eE+-]*", ("answer", "gold")),
    "countdown": (_ARITHMETIC, ("answer",)),
    "puzzle24": (_ARITHMETIC, ("answer",)),
    "polynomial_multiplication": (_ALGEBRA, ("answer", "gold")),
    "simple_integration": (_ALGEBRA, ("answer", "integrand")),
    "intermediate_integration": (_ALGEBRA, ("answer", "integrand")),
    "bitwise_arithmetic": (_INTEGERS, ("problem",)),
}
"""Scorers of reasoning-gym 0.1.25 that pass text to `eval` or to sympy's parser (which does), what
the text may be made of, and where such text stands. Lists have no dots, calls or operators;
formulas no attributes, quotes or names but single letters and functions of calculus. That leaves
out sympy's unsolved `Integral(...)`, which a tenth of intermediate_integration's gold answers are:
the scorer would take it as an answer to anything."""
TUPLES = ("arc_agi", "rearc")
"""Their scorers compare grids as tuples, which JSON makes lists."""

Request = Mapping[str, Any]
Judge = Callable[[Request], tuple[bool, str]]


def judge_math(request: Request) -> tuple[bool, str]:
    """Whether the answer's last formula is the gold's, by math-verify."""
    from math_verify import parse, verify

    def parsed(text: str) -> list[Any]:
        return parse(text, parsing_timeout=0)  # pyright: ignore[reportArgumentType]

    gold, answer = request["gold"], request["answer"]
    marked = "$" in gold or "boxed" in gold
    wanted = parsed(gold if marked else f"${gold}$") or parsed(gold)
    if not wanted:
        raise ValueError("the gold answer cannot be read as a formula")
    # An answer that is nothing but a formula may stand without dollar signs.
    words = re.search(r"[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", answer))
    bare = not words and "\n" not in answer.strip() and not re.search(r"\$|boxed|\\[\[(]", answer)
    ours = (parsed(f"${answer.strip()}$") if bare else []) or parsed(answer)
    if not ours:
        return False, "no formula found"
    correct = verify(wanted, ours, timeout_seconds=0)
    return correct, f"{ours[0]} {'=' if correct else 'is not'} {wanted[0]}"


def judge_task(request: Request) -> tuple[bool, str]:
    """Whether reasoning-gym's own scorer gives the answer, or its final part, a full 1.0."""
    task, entry = request["task"], request["entry"]
    if task in REFUSED:
        raise ValueError(f"task {task!r} is refused: {REFUSED[task]}")
    scorer = _scorer(task, json.dumps(request["config"], sort_keys=True))
    if task in TUPLES:
        entry = {**entry, "metadata": _as_tuples(entry["metadata"])}
    best, fault = 0.0, None
    for answer in request["answers"]:
        try:
            _check_alphabet(task, answer, entry)
            score = float(scorer.score_answer(answer, entry))
            best = max(best, score if _strict(task, answer, entry) else 0.0)
        except Exception as error:  # the whole answer may crash what its final part does not
            fault = error
    if best == 0.0 and fault is not None:
        raise fault
    return best >= 1.0, f"{task} scores {best:.3g}"


def _strict(task: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """What two scorers of 0.1.25 leave out: 24 from the *given* numbers, and lists equal by value.

    `number_sorting` lets each number differ by 1; `puzzle24` takes any four numbers in range.
    """
    if task == "puzzle24":
        used = sorted(int(number) for number in re.findall(r"\d+", answer))
        return used == sorted(entry["metadata"]["numbers"])
    if task == "number_sorting":
        return _floats(answer) == _floats(entry["answer"])
    return True


def _floats(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+\d.eE]+", text)]


def _check_alphabet(task: str, answer: str, entry: Mapping[str, Any]) -> None:
    alphabet, places = ALPHABETS.get(task, ("", ()))
    texts = {**entry["metadata"], "answer": answer, "gold": entry["answer"]}
    for place in places:
        if len(texts[place]) > 10_000 or not re.fullmatch(alphabet, texts[place], re.ASCII):
            raise ValueError(f"the {place} has what no {task} has: not evaluated")


@lru_cache(maxsize=64)
def _scorer(task: str, config: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, **{**json.loads(config), "seed": 0, "size": 1})


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def main(judge: Judge, *, cpu_seconds: float) -> None:
    """Answer requests until the other side closes, each within `cpu_seconds`.

    What a library prints goes nowhere.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)
    replies.write("ready\n")
    for line in sys.stdin.buffer:
        # Unhandled, SIGPROF ends the process, also inside a loop of C code.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            correct, reason = judge(json.loads(line))
            reply = {"correct": correct, "reason": reason}
        except Exception as error:  # any fault of a scorer is a verdict, not an end
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "math":
        import math_verify  # noqa: F401  # its second of import is not the first answer's

        main(judge_math, cpu_seconds=float(sys.argv[2]))
    else:
        import reasoning_gym  # noqa: F401

        main(judge_task, cpu_seconds=float(sys.argv[2]))
