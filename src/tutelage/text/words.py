"""Words of any script, and their n-grams as 64-bit hashes, for many texts at once.

Owns how texts are compared with case, spacing and sentence punctuation out of the way: what a word
is, and when two runs of words are the same. Knows nothing of rows, duplicates or evaluations.

Shapes: N texts, C characters of all of them, T words, G n-grams. Ragged data is flat values and
offsets: text i owns `values[offsets[i] : offsets[i + 1]]`.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""First words of the Unicode names of letters of scripts that put no space between words."""
WORD_HALVES = 2
"""Width of a word; one character of an unspaced script has width 1. A Chinese or Japanese word is
1.5 to 2 characters long, so n words and 2n such characters say about as much."""
SIGNS = frozenset("-*/%&#@\\_(){}[]")
"""Punctuation that carries meaning in formulas and code, beside the symbols (`+ = < $ ^` ...):
without it `3 - 4`, `3 * 4` and `3 / 4` would be one text, and so would `(1 + 2) * 3` and
`1 + (2 * 3)`."""

CHUNK_CHARS = 1 << 18
"""Some 1,000 short rows: larger is no faster, and one character takes about 60 bytes meanwhile."""

_SEPARATOR, _LETTER, _MARK, _UNSPACED, _SIGN = range(5)
_LAST_NAMED = 0x323B0  # letters, marks and symbols end below it; above are tags and private use
_CHAR_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_WORD_BASE = 0xD1342543DE82EF95
_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Words:
    """The words of N texts in reading order."""

    folded: str
    """The texts after `fold`, each ended by a line break."""
    starts_T: I64
    """Where a word begins in `folded`."""
    ends_T: I64
    """Where it ends (exclusive)."""
    hashes_T: U64
    halves_T: U8
    """Widths: 2 for a word or a sign, 1 for a character of an unspaced script."""
    digits_T: Bools
    """Whether it begins with a digit 0 to 9 (NFKC makes full-width ones so)."""
    offsets_N1: I64

    def of(self, text: int) -> list[str]:
        """The words of one text."""
        return self.between(*self.offsets_N1[text : text + 2])

    def between(self, first: int, last: int) -> list[str]:
        """Words `first` to `last` (exclusive) of all T."""
        spans = zip(self.starts_T[first:last], self.ends_T[first:last], strict=True)
        return [self.folded[start:end] for start, end in spans]


@dataclass(frozen=True)
class Grams:
    """n-grams of N texts in reading order."""

    hashes_G: U64
    starts_G: I64
    """Its first word, as an index into all T."""
    ends_G: I64
    """The word after its last."""
    offsets_N1: I64


def chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts in order, a few at a time, so that the arrays of `split` stay small.

    A chunk ends at `CHUNK_CHARS` characters; a longer text is alone in its chunk.
    """
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > CHUNK_CHARS:
            yield texts[start:index]
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def normalise(text: str) -> str:
    """The words of a text with one space between: without case, punctuation and layout.

    Idempotent. Signs (see `SIGNS`) are dropped too.
    """
    return " ".join(split([text], signs=False).of(0))


def fold(text: str) -> str:
    """NFKC, case folding, and NFKC again (folding may undo it)."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def split(texts: Sequence[str], *, signs: bool) -> Words:
    """Words of spaced scripts; single characters of Chinese, Japanese, Thai and their like.

    A word is a run of letters, digits and their combining marks (so that vowel signs do not cut
    Hindi words). With `signs` each symbol and each character of `SIGNS` is a word of its own;
    everything else only separates. Hashes depend on a word's characters alone: equal in every
    process and wherever the word stands. About 5 us for a text of 50 words.
    """
    rows = [fold(text) for text in texts]
    folded = "\n".join([*rows, ""])
    codes_C = np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds_C, marks_C = _kinds(codes_C, signs=signs)
    previous_C = np.zeros_like(kinds_C)
    previous_C[1:] = kinds_C[:-1]
    single_C = ((kinds_C == _UNSPACED) | (kinds_C == _SIGN)) & ~marks_C
    opens_C = single_C | ((kinds_C == _LETTER) & (previous_C != _LETTER))
    starts_T = np.flatnonzero(opens_C)
    # A word ends where the next one opens or a separator stands, whichever is first.
    stops_C = opens_C | ((kinds_C == _SEPARATOR) & (previous_C != _SEPARATOR))
    stops = np.flatnonzero(stops_C)
    ends_T = stops[np.flatnonzero(opens_C[stops]) + 1] if len(starts_T) else starts_T
    lengths = np.fromiter((len(row) + 1 for row in rows), np.int64, len(rows))
    row_ends = np.cumsum(lengths)
    offsets_N1 = np.concatenate((np.zeros(1, np.int64), np.searchsorted(starts_T, row_ends)))
    halves_T = np.where(kinds_C[starts_T] == _UNSPACED, 1, WORD_HALVES).astype(np.uint8)
    hashes_T = _runs(codes_C.astype(np.uint64), starts_T, ends_T, base=_CHAR_BASE)
    digits_T = (codes_C[starts_T] >= ord("0")) & (codes_C[starts_T] <= ord("9"))
    return Words(folded, starts_T, ends_T, hashes_T, halves_T, digits_T, offsets_N1)


def grams(words: Words, *, halves: int) -> Grams:
    """Every shortest run of words at least `halves` wide, one starting at each word.

    With `halves = 2 n` these are the n-grams of words of a spaced script, and the 2n-grams of
    characters of an unspaced one. A text that is narrower is one gram as a whole; a text without
    words has none.
    """
    text_T, ends_T, full_T = _windows(words, halves)
    first_T = np.ones(len(text_T), bool)
    first_T[1:] = text_T[1:] != text_T[:-1]
    starts_G = np.flatnonzero(full_T | first_T)
    ends_G = ends_T[starts_G]
    hashes_G = _runs(words.hashes_T, starts_G, ends_G, base=_WORD_BASE)
    return Grams(hashes_G, starts_G, ends_G, np.searchsorted(starts_G, words.offsets_N1))


def shingles(words: Words, *, halves: int) -> tuple[U64, I64]:
    """Hashes of `grams` and of the shorter runs at both edges of a text; the text of each.

    The edges are as if a text stood between marks: each word, the first and last too, is in as
    many runs as any other, n of them; a text of L words has L + n - 1 (of one word, 2).
    """
    text_T, ends_T, _ = _windows(words, halves)
    hashes_T = _runs(words.hashes_T, np.arange(len(text_T)), ends_T, base=_WORD_BASE)
    wide_T = words.halves_T.astype(np.int64)
    through_T = np.cumsum(wide_T)
    first_T = words.offsets_N1[text_T]
    opening = np.flatnonzero(through_T - (through_T - wide_T)[first_T] < halves)
    openings = _runs(words.hashes_T, first_T[opening], opening + 1, base=_WORD_BASE)
    # An opening is another shingle than the same words at the end.
    return (
        np.concatenate((hashes_T, openings ^ np.uint64(_CHAR_BASE))),
        np.concatenate((text_T, text_T[opening])),
    )


def _windows(words: Words, halves: int) -> tuple[I64, I64, Bools]:
    """For each word its text, where the run from it ends, and whether that is `halves` wide."""
    count = len(words.hashes_T)
    sizes_N = np.diff(words.offsets_N1)
    text_T = np.repeat(np.arange(len(sizes_N)), sizes_N)
    text_end_T = np.repeat(words.offsets_N1[1:], sizes_N)
    wide_T = words.halves_T.astype(np.int64)
    word_at_half = np.repeat(np.arange(count), wide_T)
    last_half_T = np.cumsum(wide_T) - wide_T + (halves - 1)  # halves are counted over all texts
    ends_T = np.full(count, count + 1)
    inside_T = last_half_T < len(word_at_half)
    ends_T[inside_T] = word_at_half[last_half_T[inside_T]] + 1
    return text_T, np.minimum(ends_T, text_end_T), ends_T <= text_end_T


def widths(words: Words) -> I64:
    """Width of each of the N texts, in halves."""
    total = np.concatenate((np.zeros(1, np.int64), np.cumsum(words.halves_T, dtype=np.int64)))
    return np.diff(total[words.offsets_N1])


def _kinds(codes_C: npt.NDArray[np.uint32], *, signs: bool) -> tuple[U8, Bools]:
    """Kinds of characters, a mark having the kind of what it stands on; and which are marks."""
    kinds_C = _table()[np.minimum(codes_C, _LAST_NAMED)]
    marks_C = kinds_C == _MARK
    if marks_C.any():
        kinds_C[0] *= kinds_C[0] != _MARK  # a mark that stands on nothing is no letter
        base_C = np.maximum.accumulate(np.where(kinds_C == _MARK, 0, np.arange(len(kinds_C))))
        kinds_C = kinds_C[base_C]
    if not signs:
        kinds_C[kinds_C == _SIGN] = _SEPARATOR
    return kinds_C, marks_C


@cache
def _table() -> U8:
    """Kind of every code point up to the last that has one; made once a process in 0.1 s."""
    return np.fromiter(map(_kind, map(chr, range(_LAST_NAMED + 1))), np.uint8, _LAST_NAMED + 1)


def _kind(char: str) -> int:
    category = unicodedata.category(char)[0]
    if category == "M":
        return _MARK
    if category == "S" or char in SIGNS:
        return _SIGN
    if category not in "LN":
        return _SEPARATOR
    return _UNSPACED if unicodedata.name(char, "").startswith(UNSPACED) else _LETTER


def _runs(values: U64, starts: I64, ends: I64, *, base: int) -> U64:
    """A hash of each run `values[start:end]`, the same wherever the run stands.

    With P the prefix sums of `values[k] base^k` (all modulo 2^64), a run's polynomial is
    `(P[end] - P[start]) base^-start`; its bits are then mixed by the finaliser of SplitMix64
    (Steele, Lea, Flood 2014), which makes low bits as good as high ones.
    """
    powers, inverses = _powers(base, 1 << max(10, len(values).bit_length()))
    prefix = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=prefix[1:])
    hashes = (prefix[ends] - prefix[starts]) * inverses[starts]
    hashes ^= hashes >> np.uint64(30)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(27)
    hashes *= np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


@cache
def _powers(base: int, count: int) -> tuple[U64, U64]:
    """`base^k` and `base^-k` modulo 2^64 for k below `count`, a power of two."""
    inverse = pow(base, -1, _ALL_BITS + 1)
    return tuple(
        np.cumprod(np.concatenate((np.ones(1, np.uint64), np.full(count - 1, root, np.uint64))))
        for root in (base, inverse)
    )  # pyright: ignore[reportReturnType]  # two roots, two arrays
