"""From a model's answer to the program in it, and from a row to the tests that program must pass.

Owns the two forms rows come in (HumanEval's and MBPP's, in `meta`) and how code is found in text.
Only reads the programs; they run in `sandbox`, and many at once by way of `grading`.
"""

import ast
import builtins
import json
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.errors import DataError
from tutelage.evals.grading_text import Verdict, short
from tutelage.evals.sandbox import Job, Limits, Sandbox, SandboxVerdict
from tutelage.records import prompt_messages

MAX_CHARS = 20_000
"""Of an answer that is read for code; the longest gold program of HumanEval and MBPP has 2,000."""
MAX_CUTS = 20
"""Of a text's end, each at the line of a syntax error: after the first, heads without a body."""
REASON_WIDTH = 200
PYTHON = re.compile(r"(?:py.*)?")
"""What a fence may be labelled with to hold Python; other blocks are not looked at."""

FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[ \t]*(?P<language>[\w+#.-]*)[^\n]*\n"
    r"(?P<code>.*?)(?:^(?P<end>[ \t]*(?P=fence))[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
OPENING = re.compile(
    r"^(?:from\s|import\s|def\s|class\s|async\s+def\s|try:|@\w|[A-Za-z_]\w*\s*=(?!=))", re.MULTILINE
)
"""The first line of code; not the first that is Python, since "Here is it" is."""
FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+[\w, \t]+$", re.MULTILINE)
BEGIN, DONE = "[BEGIN]", "[DONE]"
"""Around the solved examples that MBPP's few-shot prompt shows, so models write them too."""


@dataclass(frozen=True, kw_only=True)
class CodeTests:
    """What a row says of the program that is asked for."""

    tests: str
    entry_point: str | None
    """The function the tests are about; None where they name none."""
    stub: str
    """What an answer may continue: imports, helpers and the head of the function; or empty."""
    gold: str | None
    """The row's own solution, as an answer would give it."""


def code_tests(row: Mapping[str, Any]) -> CodeTests | None:
    """The tests in a row's `meta`, or None where there are none.

    HumanEval's form (arXiv 2107.03374): `test` that defines `check(candidate)`, `entry_point`,
    `canonical_solution`, and the prompt, in `meta` or as the user's message. MBPP's (arXiv
    2108.07732): `test_list`, statements; `test_setup_code` (or `test_imports`) in front of them;
    `code`. There the entry point is the first function that the tests call and Python does not
    have.
    """
    meta = _meta(row)
    if _is_humaneval(meta):
        entry = meta["entry_point"]
        return CodeTests(
            tests=meta["test"].replace("\r\n", "\n"), entry_point=entry,
            stub=_stub(_prompt(row, meta), entry), gold=_gold(row, meta, "canonical_solution"),
        )  # fmt: skip
    if _is_mbpp(meta):
        setup = [*_texts(meta.get("test_imports")), *_texts(meta.get("test_setup_code"))]
        return CodeTests(
            tests="\n".join([*setup, *meta["test_list"]]).replace("\r\n", "\n"), stub="",
            entry_point=_first_called(meta["test_list"]), gold=_gold(row, meta, "code"),
        )  # fmt: skip
    return None


def has_tests(row: Mapping[str, Any]) -> bool:
    """Whether the row has tests that an answer's program can be run against."""
    meta = row.get("meta")
    if not isinstance(meta, str) or '"test' not in meta:  # most rows, without parsing
        return False
    meta = _meta(row)
    return _is_humaneval(meta) or _is_mbpp(meta)


def job_for(answer: str, row: Mapping[str, Any]) -> Job:
    """The program in an answer with the row's tests. Raises DataError for a row without tests."""
    found = code_tests(row)
    if found is None:
        raise DataError(
            f"row {row.get('id')!r} has no tests to grade by: give it the columns `test` and "
            "`entry_point`, or `test_list`"
        )
    return Job(
        program=program_in(answer, entry_point=found.entry_point, stub=found.stub),
        tests=found.tests, entry_point=found.entry_point,
    )  # fmt: skip


def verdict_of(judged: SandboxVerdict) -> Verdict:
    """A sandbox's verdict as a grader's; its reason may quote the program, so it is made plain."""
    reason = "".join(char if char.isprintable() else "?" for char in judged.reason)
    return Verdict(judged.passed, short(reason, width=REASON_WIDTH))


def by_code(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    """The program in the answer passes the row's tests, in a sandbox started for it alone.

    For many answers `grading.Grading` keeps sandboxes ready, which is 5 times as fast. The gold is
    not looked at. Raises DataError for a row without tests, EngineError without bubblewrap.
    """
    job = job_for(answer, row)
    with Sandbox(Limits(), 1) as pool:
        return verdict_of(next(pool.map([job])))


def program_in(answer: str, *, entry_point: str | None, stub: str = "") -> str:
    """The program that an answer gives, to be run as it stands.

    Looked at: each fenced block of Python, as it stands; and where no fence closes, the text, from
    its first definition to the line on which it stops being Python. Of those that define the entry
    point the last counts, since models correct themselves. It stands behind the `stub`, whose
    imports and helpers it may use; code that does not define the entry point continues the stub, as
    HumanEval's completions do, and ends where the function ends. Where none will do, the last is
    returned, so that the verdict says what is wrong with it.
    """
    answer = answer[:MAX_CHARS].replace("\r\n", "\n")
    found = list(_snippets(answer))
    starts_inside = stub and found[-1].text.lstrip("\n").startswith((" ", "\t"))
    for form in (_continued, _whole) if starts_inside else (_whole, _continued):
        for snippet in reversed(found):
            if program := form(snippet, entry_point, stub):
                return program
    return _behind(stub, found[-1].text)


def _meta(row: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = row.get("meta")
    if not isinstance(meta, str):
        return {}
    try:
        found = json.loads(meta)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _prompt(row: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    if isinstance(meta.get("prompt"), str):
        return meta["prompt"]
    return prompt_messages(row)[-1]["content"] if row.get("messages") else ""


def _is_humaneval(meta: Mapping[str, Any]) -> bool:
    return bool(_texts(meta.get("test")) and _texts(meta.get("entry_point")))


def _is_mbpp(meta: Mapping[str, Any]) -> bool:
    listed = meta.get("test_list")
    return isinstance(listed, list) and len(_texts(listed)) == len(listed) > 0


def _gold(row: Mapping[str, Any], meta: Mapping[str, Any], column: str) -> str | None:
    return next(iter(_texts([meta.get(column), row.get("answer")])), None)


def _texts(value: object) -> list[str]:
    """A text, or those in a list, that are not blank."""
    values = value if isinstance(value, list) else [value]
    return [part for part in values if isinstance(part, str) and part.strip()]


def _first_called(tests: Sequence[str]) -> str | None:
    """The function the tests are about: MBPP/126 is about a `sum`, so a built-in may be it."""
    calls = [
        (node.lineno, node.col_offset, node.func.id)
        for node in ast.walk(_tree("\n".join(tests)) or ast.Module([], []))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    named = [name for *_, name in sorted(calls)]
    theirs = [name for name in named if not hasattr(builtins, name)]
    return next(iter(theirs or named), None)


def _stub(prompt: str, entry_point: str) -> str:
    """The prompt, or a block in it, if it is code that begins the function."""
    prompt = prompt.replace("\r\n", "\n")
    for text in (prompt, *(block for block, *_ in _blocks(prompt))):
        tree = _tree(text)
        if tree and _bindings(tree, entry_point):
            return text if text.endswith("\n") else f"{text}\n"
    return ""


# --- where code stands in a text ------------------------------------------------------------------


@dataclass(frozen=True)
class _Snippet:
    text: str
    open: bool
    """No fence closes it: prose may follow, or it was cut off."""


def _snippets(answer: str) -> Iterator[_Snippet]:
    """Where a program may stand, best last.

    The text before an unlabelled fence counts, because a prompt may have opened the fence that it
    closes.
    """
    answer = answer.rpartition(BEGIN)[2].partition(DONE)[0]
    found = [
        _Snippet(code, open=is_open)
        for code, language, is_open in _blocks(answer)
        if PYTHON.fullmatch(language) and code.strip()
    ]
    first = FENCE.search(answer)
    if first and not first["language"]:
        found.insert(0, _Snippet(answer[: first.start()], open=True))
    yield from found or [_Snippet(FENCE.sub("", answer), open=True)]


def _blocks(text: str) -> Iterator[tuple[str, str, bool]]:
    """Each fenced block's code and label, and whether it is left open."""
    for match in FENCE.finditer(text):
        code = textwrap.dedent(match["code"]) if match["indent"] else match["code"]
        yield code, match["language"].lower(), match["end"] is None


# --- from such a text to a program ----------------------------------------------------------------


def _whole(snippet: _Snippet, entry_point: str | None, stub: str) -> str | None:
    """A snippet that defines the entry point itself, without prose before and after it."""
    opening = OPENING.search(snippet.text) if snippet.open else None
    for start in dict.fromkeys((opening.start() if opening else 0, 0)):
        code, tree = _compiling(snippet.text[start:], cut=snippet.open)
        bindings = _bindings(tree, entry_point) if entry_point else tree.body
        if bindings and not _is_stub(bindings[-1]):
            return _behind(stub, code)
    return None


def _continued(snippet: _Snippet, entry_point: str | None, stub: str) -> str | None:
    """The stub with the snippet as the rest of its function, in the indentation that keeps most."""
    if not stub or not entry_point:
        return None
    body = snippet.text.strip("\n")
    best, kept = None, 0
    for form in (body, f"    {body}", textwrap.indent(textwrap.dedent(body), "    ")):
        code, tree = _compiling(stub + form, cut=snippet.open)
        bindings = _bindings(tree, entry_point)
        if bindings and not _is_stub(bindings[0]) and (bindings[0].end_lineno or 0) > kept:
            kept = bindings[0].end_lineno or 0
            best = "\n".join(code.split("\n")[:kept]) + "\n"
    return best


def _behind(stub: str, code: str) -> str:
    """The code behind the stub, which has a docstring for a body; `__future__` stays in front."""
    if not stub:
        return code
    future = "".join(f"{line}\n" for line in FUTURE.findall(code))
    return f"{future}{stub.rstrip()}\n\n{FUTURE.sub('', code)}"


def _compiling(text: str, *, cut: bool) -> tuple[str, ast.Module]:
    """The text and its tree; with `cut`, up to the line on which it stops being Python.

    Both are empty where that leaves nothing.
    """
    lines = text.split("\n")
    for _ in range(MAX_CUTS if cut else 1):
        text = "\n".join(lines)
        try:
            return text, _parsed(text)
        except SyntaxError as error:
            lines = lines[: min((error.lineno or 1) - 1, len(lines) - 1)]
        except (ValueError, RecursionError, MemoryError):  # a NUL, or too deep for the parser
            break
    return "", ast.Module([], [])


def _tree(text: str) -> ast.Module | None:
    try:
        return _parsed(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parsed(text: str) -> ast.Module:
    """The tree of a program that compiles: `ast.parse` alone lets a `return` stand anywhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a program's text is its author's affair
        tree = ast.parse(text)
        compile(tree, "<answer>", "exec", dont_inherit=True)
    return tree


def _bindings(tree: ast.Module, name: str) -> list[ast.stmt]:
    """The statements at the top that give the name a meaning."""
    return [node for node in tree.body if name in _bound(node)]


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return []


def _is_stub(node: ast.stmt) -> bool:
    """A function of nothing but a docstring, `...` or `pass`."""
    body = getattr(node, "body", None)
    return isinstance(body, list) and all(
        isinstance(part, ast.Pass)
        or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
        for part in body
    )
