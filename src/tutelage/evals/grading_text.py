"""Where in an answer the final answer stands, and the graders that compare it as text or letter.

Owns the marks ("####", a LaTeX box, "the answer is", 答案是) shared by all graders; knows nothing
of numbers, formulas or tasks.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCD"
RAISED = "grader raised"
"""How the reason of a verdict begins that is a fault of the grader, not of the answer."""
OUTER = " \t\r\n\v\f\u3000\"'`*_,;:!?，。、；：！？“”‘’«»「」『』"
"""Stripped from both ends of a text; a full stop at the end only, since ".5" is a number."""

MARK = re.compile(
    r"""
      (?P<hash>\#{4})(?=\s*[^\s\w\#]{0,3}\s*[\d.])             # GSM8K; "#### Step" is a heading
    | (?P<is>\banswer\b[^\n\d.:：=]{0,60}?\bis\b:?(?!\s+not\b))
    | (?P<colon>\banswer\b[^\n\d.:：=]{0,60}?[:：=])
    | (?P<other>
        答案\s*(?:是|为|為|[:：=])|答え\s*(?:は|[:：=])|正解\s*(?:は|[:：=])
      | \bantwort\s*(?:ist|lautet|:)|\brespuesta\s*(?:final\s*)?(?:es|:)|\bréponse\s*(?:est|:)
      )
    """,
    re.IGNORECASE | re.VERBOSE,
)
BOX = re.compile(r"\\f?boxed\s*\{")
TAG = re.compile(r"<answer>(?P<content>[^<]*)</answer>", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|[。！？；\n]")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and in a few words why: "72 = 72", "no answer found"."""

    correct: bool
    reason: str


@dataclass(frozen=True)
class Final:
    """The text after (or inside) the last mark of an answer.

    `loose`: after a colon, which may as well open a whole solution ("Answer: First ...").
    """

    text: str
    loose: bool


def final(answer: str) -> Final | None:
    """What follows the last mark, or stands in the last box or tag; None without a mark."""
    last: re.Match[str] | None = None  # only it is cut out: thousands of marks stay cheap
    for pattern in (MARK, BOX, TAG):
        for match in pattern.finditer(answer):
            last = match if last is None or match.start() > last.start() else last
    if last is None:
        return None
    if last.re is BOX:
        return Final(_braced(answer, last.end()), loose=False)
    if last.re is TAG:
        return Final(last["content"], loose=False)
    return Final(answer[last.end() :], loose=last["colon"] is not None)


def first_sentence(text: str) -> str:
    """Up to the first end of a sentence or line, after leading blank space and asterisks."""
    return SENTENCE_END.split(text.lstrip(" \t\r\n*"), maxsplit=1)[0]


def short(text: str, *, width: int = 40) -> str:
    """The text on one line, cut to `width` characters: for reasons."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def plain(text: str) -> str:
    """NFKC, case folded, blank space made single, without outer punctuation and blanks.

    A text of nothing but punctuation keeps it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = " ".join(folded.split())
    return folded.lstrip(OUTER).rstrip(OUTER + ".") or folded


def exact(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    """The whole answer is the gold answer, by `plain`. No search inside a longer text."""
    ours, theirs = plain(answer), plain(gold)
    sign = "=" if ours == theirs else "is not"
    return Verdict(ours == theirs, f"{short(ours)!r} {sign} {short(theirs)!r}")


_LETTER = r"\(?(?P<letter>[A-D])\)?(?![A-Za-z\d'’])"
_MARKED = r"\(?(?P<letter>[A-D](?![A-Za-z\d'’])|[a-d](?=[)*}\s]*(?:[.,。，]|$)))\)?"
_NOT_SEVERAL = r"(?!\s*(?:or\b|and\b|[或和、/,&])\s*\(?[A-D]\)?(?![A-Za-z]))"
AFTER_MARK = re.compile(
    rf"[\s*\"'“(]*(?:[Oo]ption|[Cc]hoice|选项|選項)?[\s*\"'“(]*{_MARKED}{_NOT_SEVERAL}"
)
ALONE = re.compile(rf"[\s*\"'“]*{_LETTER}[\s*\"'”.。,:：)]*", re.I)
LEADING = re.compile(rf"[\s*]*{_LETTER}{_NOT_SEVERAL}(?:\*\*)?(?:[.:：、。，\n]|(?<=\))|\s*$)")
STANDING = re.compile(
    r"(?<![A-Za-z\d'’.])(?<!not )(?<!not \()(?<!不是)(?<!不选)(?<!不選)"
    r"(?P<letter>[A-D])(?![A-Za-z\d'’])(?!(?<=A) (?!or\b|and\b|is\b)[a-z])"  # "A dog": the article
)


def choice(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    """The option an answer names, A to D, against the gold's.

    In this order: the answer is the letter and nothing else ("(b)", "B."); after the last mark
    ("answer: B", 答案是B, a box); a letter that opens the answer ("B. Paris"); the one letter that
    stands by itself anywhere. Several different ones are no answer, as in "A or B".

    Raises ValueError for a gold that names no option.
    """
    wanted = chosen(gold)
    if wanted is None:
        raise ValueError(f"the gold answer {short(gold)!r} names no option of {LETTERS}")
    ours = chosen(answer)
    if ours is None:
        return Verdict(False, "no answer found")
    return Verdict(ours == wanted, f"{ours} {'=' if ours == wanted else 'is not'} {wanted}")


def chosen(text: str) -> str | None:
    """The letter A to D a text settles on (see `choice`), or None."""
    text = unicodedata.normalize("NFKC", text)
    if match := ALONE.fullmatch(text):
        return match["letter"].upper()
    if marked := final(text):
        if match := AFTER_MARK.match(marked.text.replace("\\text{", "").replace("\\mathrm{", "")):
            return match["letter"].upper()
    elif match := LEADING.match(text):
        return match["letter"]
    standing = {match["letter"] for match in STANDING.finditer(text)}
    return standing.pop() if len(standing) == 1 else None


def _braced(text: str, start: int) -> str:
    """From `start` to the brace that closes the one before it; to the end where none does."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : start + match.start()]
    return text[start:]
