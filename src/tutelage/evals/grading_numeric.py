"""The number an answer gives, in the ways people and models write one, against the gold number.

Owns how a number is read (separators, currency, percent, fractions, powers of ten, Chinese
numerals); knows no formulas (`math` does). Values are exact fractions, so that 0.1 is a tenth.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tutelage.evals.grading_text import Verdict, final, first_sentence, short

RELATIVE_TOLERANCE = Fraction(1, 10**6)
MAX_DIGITS = 300
"""A longer run of digits is not an answer; it also bounds what an exponent can ask for."""
LOOSE_LINE = 40
"""Characters: "Answer:" before a longer sentence opens a solution, whose last number counts."""
DECIMAL_COMMA = frozenset(
    ("de", "es", "fr", "it", "pt", "nl", "ru", "uk", "pl", "cs", "ro", "hu", "el", "tr", "id", "vi",
     "sv", "da", "nb", "no", "fi")
)  # fmt: skip
"""Languages that write 1.234,5 for 1,234.5."""
SCALES = {
    "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "百万": 10**6, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_POINT = r"(?>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_COMMA = (
    r"(?>\d{1,3}(?:[. ]\d{3})+(?!\d)(?:,\d+)?|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"
    r"|\d+(?:[.,]\d+)?|[.,]\d+)"
)


def _pattern(core: str) -> re.Pattern[str]:
    return re.compile(
        rf"""
        (?<![A-Za-z\d_^])                                    # not the 2 of CO2, x_2 or m^2
        (?P<per_hundred>百分之)?
        (?P<minus>(?<!\))[-−–]|负|負|minus\s|negative\s)?
        (?:(?:US|HK|A|C)?[$€£¥￥₩₹₽฿]\s?|(?:USD|EUR|GBP|CNY|RMB|JPY|Rs\.?)\s?)?
        (?P<minus_after>[-−–])?
        (?:(?P<whole>\d{{1,9}})\s+(?=\d+\s?[/⁄]))?           # 3 1/2
        (?P<number>{core})
        (?:\s?[/⁄]\s?(?P<divisor>{core}))?
        (?:[eE](?P<exponent>[-+]?\d{{1,3}})(?![\w.])
          |\s?(?:[×x*·∙]|\\times|\\cdot)\s?10(?:\^|\*\*)(?P<power>[-+]?\d{{1,3}})(?!\d))?
        (?!\^|\*\*\s?\d|\s?(?:π|√|\\pi\b)|(?:st|nd|rd|th)\b)  # formulas; a place in a row
        (?:\s?(?P<scale>thousand|million|billion|trillion|百万|[万萬亿億]))?
        (?:\s?(?P<percent>%|％|percent\b|per\ cent\b|Prozent\b|por\ ciento\b))?
        """,
        re.VERBOSE | re.IGNORECASE,
    )


WITH_POINT, WITH_COMMA = _pattern(_POINT), _pattern(_COMMA)
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(\d{1,99})\s*\}\s*\{\s*(\d{1,99})\s*\}|(\d)\s*(\d))")
NUMERALS = dict(zip("零〇一二三四五六七八九两兩", (0, *range(10), 2, 2), strict=True))
UNITS = {"十": 10, "百": 100, "千": 1000}
MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_SPELT = rf"[{''.join((*NUMERALS, *UNITS, *MYRIADS))}]{{1,40}}"
SPELT = re.compile(
    rf"(?P<minus>[负負])?(?:(?P<divisor>{_SPELT})分之)?(?P<number>{_SPELT})"
    rf"(?:[点點](?P<decimals>[{''.join(NUMERALS)}]{{1,20}}))?"
)


@dataclass(frozen=True)
class Number:
    """A number as written, and what it may mean: "1.234" in German is 1234 or 1.234."""

    text: str
    values: tuple[Fraction, ...]
    percent: bool


def numeric(answer: str, gold: str, *, row: Mapping[str, Any]) -> Verdict:
    """The answer's final number equals the gold's: whole numbers exactly, others within 1e-6.

    The number after the last mark ("####", a box, "the answer is", 答案是), else the text's last
    one. Units behind it are not looked at. The gold may be of GSM8K's form, "... #### 72".

    Two readings are right where writers differ: 50% is 0.5, and 50 against a number without the
    sign (GSM8K's gold answers leave it out); 5 million is 5,000,000, and 5 (the unit asked for).
    In languages of the decimal comma (`row["language"]`) a lone "1.234" is 1234 or 1.234.

    Raises ValueError for a gold without a number.
    """
    wanted = final_number(gold, language=None)
    if wanted is None:
        raise ValueError(f"the gold answer {short(gold)!r} has no number")
    language = row.get("language")
    ours = final_number(answer, language=language if isinstance(language, str) else None)
    if ours is None:
        return Verdict(False, "no number found")
    correct = same(ours, wanted)
    return Verdict(correct, f"{short(ours.text)} {'=' if correct else 'is not'} {wanted.text}")


def final_number(text: str, *, language: str | None) -> Number | None:
    """The number a text ends on or marks as its answer (see `numeric`), or None."""
    text = cleaned(text)
    comma = language is not None and re.split("[-_]", language)[0].casefold() in DECIMAL_COMMA
    if (marked := final(text)) is None:
        return _last(numbers(text, comma=comma))
    sentence = first_sentence(marked.text)
    if not marked.loose or len(sentence) <= LOOSE_LINE:
        found = numbers(sentence.rpartition("=")[2], comma=comma) or numbers(sentence, comma=comma)
        if found:
            return found[0]
    return _last(numbers(marked.text, comma=comma))


def is_number(text: str) -> bool:
    """Whether the whole text is one number, as a gold answer would write it."""
    match = WITH_POINT.fullmatch(cleaned(text).strip())
    return match is not None and _read(match, comma=False) is not None


def same(ours: Number, gold: Number, *, tolerance: Fraction = RELATIVE_TOLERANCE) -> bool:
    """Whether any reading of one is any reading of the other (see `numeric`)."""
    left, right = ours.values, gold.values
    if ours.percent and not gold.percent:
        left += tuple(value / 100 for value in left)
    if gold.percent and not ours.percent:
        right += tuple(value / 100 for value in right)
    return any(_near(a, b, tolerance) for a in left for b in right)


def _near(a: Fraction, b: Fraction, tolerance: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b  # 70000001 is within 1e-6 of 70000000, and wrong
    return abs(a - b) <= tolerance * max(abs(a), abs(b))


def cleaned(text: str) -> str:
    """The text with one way of writing digits, fractions, powers and LaTeX's numbers."""
    text = re.sub(
        "[⁰¹²³⁴-⁹⁻]+", lambda found: f"^{found[0].translate(_SUPERSCRIPTS)}", text
    )  # before NFKC, which makes 5² a 52
    text = re.sub("[¼-¾⅐-⅞]", lambda found: f" {found[0]}", text)  # and 3½ a 31/2
    text = unicodedata.normalize("NFKC", text.replace("\\!", "").replace("{,}", ","))
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|[\u202f\u2009])(?=\d{3})", ",", text)
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"(?<=\d)(?=\\[dtc]?frac)", " ", text)
    text = FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)
    text = re.sub(r"\\sqrt(?:\[[^\]]{0,9}\])?\s*(?:\{[^{}]{0,99}\}|\d)|√\s*\d+", "√", text)
    return re.sub(r"\^\s?\{\s*([-+]?\d{1,9})\s*\}", r"^\1", text)


def numbers(text: str, *, comma: bool) -> list[Number]:
    """All numbers of a cleaned text in order; Chinese numerals only where it has no digits.

    一样 (alike) and 一个 (one) are everywhere, so a numeral beside digits is not trusted.
    """
    pattern = WITH_COMMA if comma else WITH_POINT
    found = [number for m in pattern.finditer(text) if (number := _read(m, comma=comma))]
    if found or re.search(r"\d", text):
        return found
    return [number for m in SPELT.finditer(text) if (number := _read_spelt(m))]


def _last(found: list[Number]) -> Number | None:
    return found[-1] if found else None


def _read(match: re.Match[str], *, comma: bool) -> Number | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    values = _values(match["number"], comma=comma)
    if match["divisor"]:
        divisors = [value for value in _values(match["divisor"], comma=comma) if value]
        if not divisors:
            return None
        values = tuple(value / divisors[0] for value in values)
    if match["whole"]:
        values = tuple(int(match["whole"]) + value for value in values)
    if power := match["exponent"] or match["power"]:
        if abs(int(power)) > MAX_DIGITS:
            return None
        values = tuple(value * Fraction(10) ** int(power) for value in values)
    if match["scale"]:
        values += tuple(value * SCALES[match["scale"].casefold()] for value in values)
    text = match[0].strip()
    if match["minus"] and re.search(
        r"\d\s*\Z", match.string[max(0, match.start() - 9) : match.start()]
    ):
        text = text.removeprefix(match["minus"])  # "10 -3" subtracts
    elif match["minus"] or match["minus_after"]:
        values = tuple(-value for value in values)
    return Number(text, values, bool(match["percent"] or match["per_hundred"]))


def _values(text: str, *, comma: bool) -> tuple[Fraction, ...]:
    """The readings of digits with separators."""
    text = text.replace(" ", "")
    as_point = text.replace(",", "")
    if not comma:
        return (Fraction(as_point),)
    as_comma = text.replace(".", "").replace(",", ".")
    separators = [char for char in text if char in ".,"]
    if not separators or len(set(separators)) == 2:
        return (Fraction(as_comma if separators and separators[-1] == "," else as_point),)
    if len(separators) > 1:
        return (Fraction(text.replace(separators[0], "")),)
    if re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", text):
        return tuple(sorted({Fraction(as_point), Fraction(as_comma)}))
    return (Fraction(text.replace(",", ".")),)


def _read_spelt(match: re.Match[str]) -> Number | None:
    value = Fraction(_spelt(match["number"]))
    if match["decimals"]:
        digits = "".join(str(NUMERALS[char]) for char in match["decimals"])
        value += Fraction(f"0.{digits}")
    percent = match["divisor"] == "百"
    if match["divisor"] and not percent:
        divisor = _spelt(match["divisor"])
        if not divisor:
            return None
        value /= divisor
    return Number(match[0], (-value if match["minus"] else value,), percent)


def _spelt(text: str) -> int:
    """三百二十一 is 321, 两万五千 25000, 二〇二四 2024."""
    for units in ("亿億", "万萬"):
        if any(unit in text for unit in units):
            left, unit, right = re.split(f"([{units}])(?!.*[{units}])", text, maxsplit=1)
            return (_spelt(left) or 1) * MYRIADS[unit] + _spelt(right)
    if all(char in NUMERALS for char in text):
        return int("".join(str(NUMERALS[char]) for char in text) or 0)
    total, digit = 0, 0
    for char in text:
        if char in UNITS:
            total, digit = total + (digit or 1) * UNITS[char], 0
        else:
            digit = NUMERALS[char]
    return total + digit
