"""Which rows are not worth learning from, and why: one pure function a filter.

Each takes a row of `records.CONVERSATIONS` and gives None to keep it, or the reason to drop it with
the figure that decided. Rows are never changed. Where rows come from, and what becomes of the
dropped ones, is not known here; nor is any judgement of what a text says.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np

from tutelage.core.errors import DataError, RecipeError
from tutelage.data.refusals import REFUSALS
from tutelage.recipe.filters import (
    AnswerMissingFilter,
    AnyFilter,
    EncodingFilter,
    LanguageFilter,
    LengthFilter,
    RefusalFilter,
    RepetitionFilter,
    ThinkMarkersFilter,
)
from tutelage.records import prompt_messages
from tutelage.text.markers import END_THINK, THINK

Row = Mapping[str, Any]


@dataclass(frozen=True)
class NamedFilter:
    """A filter of a recipe: its name, and the reason to drop a row or None."""

    name: str
    reason: Callable[[Row], str | None]


def build_filters(
    tables: Sequence[AnyFilter], *, count_tokens: Callable[[str], int] | None
) -> list[NamedFilter]:
    """The filters a recipe asks for, in its order.

    `count_tokens` gives the tokens of a text; only `length` calls it.

    Raises: RecipeError for `length` without it and for a language nobody knows; DataError where
    `language` is asked for and py3langid is not installed.
    """
    return [NamedFilter(table.name, _function(table, count_tokens)) for table in tables]


def apply_filters(filters: Sequence[NamedFilter], row: Row) -> tuple[str, str] | None:
    """(Name, reason) of the first filter that drops the row; None where all keep it."""
    for each in filters:
        if reason := each.reason(row):
            return each.name, reason
    return None


def _function(
    table: AnyFilter, count_tokens: Callable[[str], int] | None
) -> Callable[[Row], str | None]:
    match table:
        case LengthFilter():
            if count_tokens is None:
                raise RecipeError(
                    "filter length counts tokens and this step knows no tokenizer: name the model "
                    "whose tokens are meant, or leave the filter out"
                )
            return partial(length, table=table, count_tokens=count_tokens)
        case EncodingFilter():
            return encoding
        case RepetitionFilter():
            return partial(repetition, ngram=table.ngram, max_share=table.max_share)
        case ThinkMarkersFilter():
            return think_markers
        case AnswerMissingFilter():
            return answer_missing
        case RefusalFilter():
            return refusal
        case LanguageFilter():
            _identifier(_codes(table.keep))  # say now what cannot be, not at the first row
            return partial(language, table=table)


def _texts(row: Row) -> Iterator[tuple[int, str, str]]:
    """(Number of the message, "content" or "thinking", the text) of all that a row says."""
    for n, message in enumerate(row["messages"]):
        yield n, "content", message["content"]
        if chain := message.get("thinking"):
            yield n, "thinking", chain


_LONGEST_CODE_LINE = 200  # characters; a longer one is a paragraph, or a loop, that names code
_FENCED = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1", re.DOTALL | re.MULTILINE)
_CODE_LINE = re.compile(
    r"[;{}\[\]()=]\s*$|==|!=|<=|>=|->|=>|::|&&|\|\||[-+*]=|\w\(\w*[,)]|\w\[\w*\]|^\s*\w+ = "
    r"|^\s*(?:>>>|#include|import \w|from \S+ import|def \w|class \w|return\b|@\w|//|/\*|#!|--)"
    r"|^\s*(?:[}\])]|\"[^\"]*\":)"  # the last two are JSON
)


def _without_code(text: str) -> str:
    """The text without fenced blocks and without the lines that look like code."""
    unfenced = _FENCED.sub("\n", text) if "```" in text or "~~~" in text else text
    return "\n".join(
        line
        for line in unfenced.splitlines()
        if len(line) > _LONGEST_CODE_LINE or not _CODE_LINE.search(line)
    )


# ---------------------------------------------------------------------------------------- length


def length(row: Row, *, table: LengthFilter, count_tokens: Callable[[str], int]) -> str | None:
    """Drops by tokens of contents and chains; a limit of 0 is none, and the limits are inclusive.

    The prompt is all up to the last user message, the answer all behind it.
    """
    counts = [
        count_tokens(message["content"]) + count_tokens(message.get("thinking") or "")
        for message in row["messages"]
    ]
    total, prompt = sum(counts), sum(counts[: len(prompt_messages(row))])
    if total < table.min_tokens:
        return f"{total:,} tokens, under min_tokens {table.min_tokens:,}"
    for found, limit, of in (
        (total, "max_tokens", "tokens"),
        (prompt, "max_prompt_tokens", "tokens of prompt"),
        (total - prompt, "max_answer_tokens", "tokens of answer"),
    ):
        if 0 < getattr(table, limit) < found:
            return f"{found:,} {of}, over {limit} {getattr(table, limit):,}"
    return None


# -------------------------------------------------------------------------------------- encoding

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# U+FFFD, lone surrogates, C1 controls, private use in runs (one may be an icon font's), and what
# Unicode will never assign. Not "unassigned today": the emoji of next year are that, and the answer
# would hang on the Python that runs.
_NO_TEXT = re.compile(
    "[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    "\U00040000-\U000dffff]|[\ue000-\uf8ff\U000f0000-\U0010ffff]{2}"
)
# What the bytes 80-BF, which follow the first byte of a character in UTF-8, become in Windows-1252
_BYTES = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ\u00a0-¿"
_QUOTES = "‘’“”…–—»«›‹\u00a0"  # of these, those that also stand behind a capital at a word's end
_IN_A_WORD = r"(?:(?<=[a-zß-ÿ]){0}|(?<![A-ZÀ-Þ]){0}(?=[^\W\d_]))"
_MOJIBAKE = re.compile(
    "|".join(
        (
            f"[ÃÄÅ](?![{_QUOTES}²³¹±°·®™½¼¾])[{_BYTES}]",  # Ã© for é; 5 Å³ is a volume
            f"Â(?![{_QUOTES}])[\u00a0-¿]",  # Â° for °
            _IN_A_WORD.format(f"[ÃÄÅ][{_BYTES}]"),  # Ã– for Ö, but not a Portuguese IRMÃ…
            _IN_A_WORD.format("Â\u00a0") + "|(?<![«»A-ZÀ-Þ])Â[«»]",  # but not «Â»
            r"(?<![^\W\d_])Ã\u00a0",  # Ã and a space for à
            f"â€|ðŸ|ï¿½|ï»¿|â[œ†ˆ‰˜‚ƒŠŒŽ•„][{_BYTES}]",  # â€™ for ’, ðŸ˜€ for an emoji
            f"(?:[ÐÑ][{_BYTES}]){{2}}|(?:[ÎÏØÙÚÛ][{_BYTES}]){{2}}",  # Cyrillic, Greek, Arabic
            "(?:×[‘’“”•–—˜™š›œžŸ\u00a0-ª]){2}",  # Hebrew; ×½×½ is a product
            f"(?:[à-ï][{_BYTES}]{{2}}){{2}}",  # Chinese, Japanese and most others
            f"[ã-é][€‚ƒ„†‡ˆ‰•˜¡-¦¨¬¯´¶¸¿][{_BYTES}]",  # one sign of them
            "锟斤拷|(?:[縺繧繝].){3}",  # U+FFFD read as GBK, kana read as Shift-JIS
        )
    )
)
_MAY_BE_MOJIBAKE = re.compile(f"[Â-ÅÎ-Ñ×-Ûà-ð][{_BYTES}]|[锟縺繧繝]")
# looked for first: 13 us a question in Spanish, 80 without it


def encoding(row: Row) -> str | None:
    """Drops UTF-8 read as Windows-1252, GBK or Shift-JIS, U+FFFD, controls and what is no text.

    Tab, newline and carriage return are text; so is one private-use character by itself.
    """
    for n, field, text in _texts(row):
        if text.isascii():
            found = _CONTROL.search(text)
        else:
            found = _NO_TEXT.search(text)
            if found is None and _MAY_BE_MOJIBAKE.search(text):
                found = _MOJIBAKE.search(text)
        if found:
            shown = found[0] if found[0].isprintable() else f"U+{ord(found[0][0]):04X}"
            return f"{shown} at character {found.start():,} of message {n} ({field})"
    return None


# ------------------------------------------------------------------------------------ repetition

_UNSPACED = "々〇\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_A_WORD = re.compile(f"[^\\W\\d_]{{2}}|[{_UNSPACED}]")
_MARKUP = re.compile(r"<[^<>\n]{1,400}>|\\[A-Za-z]+")  # tags, and commands of LaTeX
_RUN = re.compile(r"(.)\1{39,}", re.DOTALL)
_LONGEST_RULE = 200  # signs: rules under headings and of wide tables are shorter
_LONGEST_BLANK = 1000  # white space: lines of MBPP's code end with 201
_LONGEST_GRID = 400  # n-grams of numbers and single letters: a board of 20 x 20 is no loop
_LONGEST_PERIOD = 16  # lines
_LEAST_LINES, _LEAST_TIMES = 10, 4  # an empty HTML table repeats its rows a few times


def repetition(row: Row, *, ngram: int, max_share: float) -> str | None:
    """Drops loops: by the share of n-grams that stood twice before, by lines, by one character.

    With c the count of each distinct n-gram of a text, `share = sum(max(0, c - 2)) / sum(c)`: that
    the first repeat is free lets the refrain of a song pass, which seq-rep-n (arXiv 1908.04319)
    does not. (A song whose verses grow, as The Twelve Days of Christmas, has 0.42 and goes.) Pieces
    are words, in Chinese and Japanese characters; code and markup are left out here, as their rows
    repeat by nature. Also dropped: lines that repeat in order five times and more over 10 lines,
    40 times the same letter, 200 times any other sign, 1,000 times the same white space.
    """
    for n, field, text in _texts(row):
        found = (
            _looped_words(text, ngram=ngram, max_share=max_share)
            or _looped_lines(text)
            or _looped_character(text)
        )
        if found:
            return f"{found}, in message {n} ({field})"
    return None


def _looped_words(text: str, *, ngram: int, max_share: float) -> str | None:
    if _looped_share(text, ngram=ngram) <= max_share:
        return None
    # Looked at again without what repeats by nature. Not before: it takes as long as all the rest
    share = _looped_share(_MARKUP.sub(" ", _without_code(text)), ngram=ngram)
    if share <= max_share:
        return None
    return f"{share:.0%} of its {ngram}-grams stood twice before, over max_share {max_share}"


def _looped_share(text: str, *, ngram: int) -> float:
    """Share of n-grams that stood twice before; 0 where they are too few to be a loop."""
    tokens = _TOKEN.findall(text)
    grams = len(tokens) - ngram + 1
    least = 2 * ngram  # so that "no no no no no" is not a loop
    if grams < least:
        return 0.0
    counts = Counter(zip(*(islice(tokens, start, None) for start in range(ngram)), strict=False))
    if grams - len(counts) < least:
        return 0.0
    looped = {gram: count - 2 for gram, count in counts.items() if count > 2}
    total = sum(looped.values())
    if total < _LONGEST_GRID:
        total = sum(times for gram, times in looped.items() if _A_WORD.search(" ".join(gram)))
    return total / grams if total >= least else 0.0


def _looped_lines(text: str) -> str | None:
    if text.count("\n") < _LEAST_LINES:
        return None
    lines = [line for line in map(str.strip, text.splitlines()) if _A_WORD.search(line)]
    if len(lines) - len(set(lines)) < _LEAST_LINES:
        return None
    for period in range(1, _LONGEST_PERIOD + 1):
        run = 0
        for line, earlier in zip(lines[period:], lines, strict=False):
            run = run + 1 if line == earlier else 0
            if run >= max(_LEAST_LINES, _LEAST_TIMES * period):
                return f"{line[:40]!r} comes back every {period} lines, {run} lines long"
    return None


def _looped_character(text: str) -> str | None:
    for run in _RUN.finditer(text):
        sign, times = run[1], len(run[0])
        limit = _LONGEST_BLANK if sign.isspace() else 0 if sign.isalpha() else _LONGEST_RULE
        if times >= limit:
            return f"{sign!r} {times:,} times in a row"
    return None


# --------------------------------------------------------------------------------- think markers

_MARKER = re.compile(f"{re.escape(THINK)}|{re.escape(END_THINK)}")


def think_markers(row: Row) -> str | None:
    """Drops what `text.chat` cannot teach: markers that do not pair up, nest, or stand in a chain.

    A pair inside a content is text about markers and stays, but not where an answer begins with it:
    that is a chain which was never parted from its answer.
    """
    for n, field, text in _texts(row):
        markers = _MARKER.findall(text)
        if not markers:
            continue
        what = f"message {n} ({field})"
        opened, closed = markers.count(THINK), markers.count(END_THINK)
        if field == "thinking":
            return f"{len(markers)} think markers inside the chain of message {n}"
        if markers != [THINK, END_THINK] * opened:
            return f"{opened} {THINK} and {closed} {END_THINK} do not pair up in {what}"
        if row["messages"][n]["role"] == "assistant" and text.lstrip().startswith(THINK):
            return f"{what} begins with {THINK}: its chain was not parted from it"
    return None


# --------------------------------------------------------------------------------- answer missing

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


def answer_missing(row: Row) -> str | None:
    """Drops a row whose last message is no answer, or one of white space and punctuation only.

    A sign such as + or an emoji is an answer: any letter, digit or symbol makes one.
    """
    last = row["messages"][-1]
    if last["role"] != "assistant":
        return f"ends with a message of the {last['role']}, not with an answer"
    text = last["content"]
    if _LETTER_OR_DIGIT.search(text) or any(unicodedata.category(c)[0] == "S" for c in text):
        return None
    return f"its answer of {len(text):,} characters has no letter, digit or symbol: {text[:20]!r}"


# --------------------------------------------------------------------------------------- refusal

_REFUSAL_HEAD = 240  # characters of an answer that are looked at


def refusal(row: Row) -> str | None:
    """Drops a row with an answer that begins like a stock refusal, in six languages.

    Only the beginning counts, so that a text which quotes or discusses refusals stays; and a
    refusal must say what stock ones say: "I'm sorry to hear that" and a letter that begins "I'm
    sorry, but I can't come" stay too.
    """
    for n, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        head = message["content"][:_REFUSAL_HEAD].lstrip(" \t\r\n*").lower().replace("’", "'")
        for code, pattern in REFUSALS.items():
            if found := pattern.match(head):
                return f"message {n} begins like a refusal ({code}): {found[0][:60]!r}"
    return None


# -------------------------------------------------------------------------------------- language

# What a text names and does not say: inline code, formulas, addresses, tags, and quotations, as
# those of `Put into English: "Der Hund schläft"`
_ASIDE = re.compile(
    r"`[^`\n]+`|\$[^$\n\d][^$\n]*\$|https?://\S+|<[^<>\n]{1,200}>|\"[^\"]{1,400}\"|“[^”]{1,400}”"
    r"|„[^“”]{1,400}[“”]|«[^»]{1,400}»|「[^」]{1,400}」|『[^』]{1,400}』"
)
_JUDGED = 250  # characters of prose: with 160, 1 of 250 questions in Spanish was misjudged
_SIDES = (
    ("question", "user", "content"),
    ("chain", "assistant", "thinking"),
    ("answer", "assistant", "content"),
)
_CHINESE = frozenset({"zh", "yue", "wuu"})
_NO_LANGUAGE = "zxx"  # py3langid's label of code, numbers and the like


def language(row: Row, *, table: LanguageFilter) -> str | None:
    """Drops a row whose questions, chains or answers are in a language outside `table.keep`.

    The three are judged apart, as an answer in the wrong language is no better for a good question.
    Judged is how their prose begins: without code, formulas, addresses and quotations. A side with
    fewer letters than `min_characters`, or with more code than prose, is left alone; so is one in
    which no language reaches `min_probability`. The languages are those py3langid has two letters
    for, and those of `keep`.
    """
    keep = _codes(table.keep)
    for side, role, field in _SIDES:
        prose = _prose(row, role, field)
        if sum(map(str.isalpha, prose)) < table.min_characters:
            continue
        found, probability = _identifier(keep).classify(prose)
        if probability >= table.min_probability and found not in keep | {_NO_LANGUAGE}:
            kept = ", ".join(table.keep)
            return f"{side} in {found} (probability {probability:.2f}), keep is {kept}"
    return None


def _prose(row: Row, role: str, field: str) -> str:
    """The beginning of the prose that a role writes in a field; "" where there is more code."""
    parts = [message.get(field) for message in row["messages"] if message["role"] == role]
    text = "\n".join(part for part in parts if part)
    prose = _without_code(text)
    return _ASIDE.sub(" ", prose[: 2 * _JUDGED])[:_JUDGED] if 2 * len(prose) >= len(text) else ""


@cache
def _codes(keep: tuple[str, ...]) -> frozenset[str]:
    """What py3langid calls these languages; regions and scripts (`zh-cn`) mean the language."""
    codes = {code.lower().replace("_", "-").split("-")[0] for code in keep}
    return frozenset(codes | (_CHINESE if codes & _CHINESE else set()))


@cache
def _identifier(keep: frozenset[str]) -> Any:
    """py3langid among the languages with a code of two letters, `keep`, and "no language".

    Its codes of three letters are small relatives of these (Wu, Naijá): short Chinese and English
    texts were taken for them, 4 of 455 of 20 to 60 characters.

    Raises: DataError where py3langid is missing; RecipeError for a code it does not know.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(
            'filter language needs py3langid: pip install "tutelage[data]", or leave it out'
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = set(identifier.labels)
    if unknown := sorted(keep - known):
        raise RecipeError(
            f"filter language: keep names {', '.join(unknown)}, which py3langid does not know; "
            f"it knows {' '.join(sorted(known))}"
        )
    identifier.set_languages({code for code in known if len(code) == 2} | keep | {_NO_LANGUAGE})
    # the cut leaves columns together; a text reads rows, twice as fast where they are
    identifier.nb_ptc = np.ascontiguousarray(identifier.nb_ptc)
    return identifier
