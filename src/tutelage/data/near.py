"""Rows that say the same: exact and near duplicates, and which row of them stays.

Owns the rule: a row is dropped if an *earlier kept* row is its duplicate, earlier in the order in
which the texts are given (sources as the recipe lists them, rows as a source has them). Exact
duplicates have the same words and signs (`text.words`); near duplicates a Jaccard similarity of
their 3-word shingles of at least a threshold. Knows nothing of rows, sources or files: texts in,
indices out. The work by row (`sketch`) is pure and can be cut into chunks at will; `find` decides.

Shapes: N rows, S shingles of all rows, P pairs of rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from tutelage.text.words import WORD_HALVES, Words, chunks, shingles, split

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

SHINGLE_WORDS = 3
"""A replaced word changes 3 of a row's L + 2 shingles, so e of them leave
`J = (L + 2 - 3 e) / (L + 2 + 3 e)`: short prompts of one template are told apart."""
THRESHOLD = 0.64
"""Just lets 3 replaced words in 39 count as the same (J = 32 / 50), and 1 word in 12, not in 11."""
MAX_SHINGLES = 512
"""Of a longer row the smallest hashes stand for it; the error of J = 0.6 is then 0.02 (1 sigma)."""
MAX_PAIRS = 128
"""Comparisons a row, rarest shared shingle first, so that a million rows of one template end."""

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_COUNT_CELLS = 1 << 24
_ROWS_AT_ONCE = 1 << 14
_PAIRS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Sketches:
    """What is remembered of N rows: 16 bytes, and 4 for each of at most `MAX_SHINGLES` shingles."""

    digests_N2: U64
    """blake2b-128 of the words; of the text itself where it has none."""
    numbers_N: U64
    """Hash of the numbers in it, whatever their order."""
    shingles_S: U32
    """Hashes of a row's distinct shingles, ascending: all, or the `MAX_SHINGLES` smallest."""
    offsets_N1: I64


@dataclass(frozen=True)
class Duplicates:
    """For each of N rows, which earlier row makes it superfluous."""

    of_N: I64
    """The kept row it duplicates, the most similar one (the earliest of equals); -1: it stays."""
    similarity_N: npt.NDArray[np.float32]
    """In [threshold, 1]; 1 for an exact duplicate, 0 for a row that stays."""
    num_cut: int
    """Rows that shared rare shingles with over `MAX_PAIRS` rows, and were not held to them all."""


def sketch(texts: Sequence[str]) -> Sketches:
    """Digest and shingles of each text; a row's part depends on its own text alone."""
    return join([_sketch(chunk) for chunk in chunks(texts)])


def join(parts: Sequence[Sketches]) -> Sketches:
    """The rows of all parts, in their order."""
    ends = np.cumsum([0, *(len(part.shingles_S) for part in parts)])
    offsets = [part.offsets_N1[1:] + start for part, start in zip(parts, ends, strict=False)]
    return Sketches(
        np.concatenate([np.zeros((0, 2), np.uint64), *(part.digests_N2 for part in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(part.numbers_N for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.shingles_S for part in parts)]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
    )


def find(
    sketches: Sketches, *, threshold: float = THRESHOLD, same_numbers: bool = False
) -> Duplicates:
    """Which rows to drop, so that no two kept rows are duplicates.

    `J = |A & B| / |A | B|` of the sets of shingles; for rows over `MAX_SHINGLES` its unbiased
    estimate over the smallest hashes. A pair with J >= threshold (in (0, 1]) is found for certain,
    unless the row is among `num_cut`. With `same_numbers` two rows with other numbers are never
    near duplicates: problems from a template, told apart by their figures alone, then stay.

    Candidates: order all shingles from rare to common. Two sets with J >= t share one of the
    `|A| - ceil(t |A|) + 1` rarest of each, so only rows with a rare shingle in common are compared.
    Honest rows of one template share common shingles, duplicates share rare ones; banded MinHash
    (128 hashes, 32 bands) is blind to this and names 3 times the candidates at 200,000 rows,
    growing faster, for each of which this exact comparison is needed just the same.
    Source: prefix filter of Bayardo, Ma, Srikant 2007 (All-Pairs); bottom-k sketch of Broder 1997.
    """
    first_N = _first_equal(sketches.digests_N2)
    salts_N = sketches.numbers_N >> _HIGH if same_numbers else np.zeros_like(sketches.numbers_N)
    later_P, earlier_P, similarity_P, num_cut = _similar(
        sketches, first_N == np.arange(len(first_N)), threshold, salts_N
    )
    of_N = np.full(len(first_N), -1, np.int64)
    similarity_N = np.zeros(len(first_N), np.float32)
    for later, earlier, similarity in zip(  # by later row, then by earlier row
        later_P.tolist(), earlier_P.tolist(), similarity_P, strict=True
    ):
        if of_N[earlier] < 0 and similarity > similarity_N[later]:
            of_N[later], similarity_N[later] = earlier, similarity
    copies = np.flatnonzero(first_N != np.arange(len(first_N)))
    firsts = first_N[copies]
    of_N[copies] = np.where(of_N[firsts] < 0, firsts, of_N[firsts])
    similarity_N[copies] = np.where(of_N[firsts] < 0, 1, similarity_N[firsts])
    return Duplicates(of_N, similarity_N, num_cut)


def _sketch(texts: Sequence[str]) -> Sketches:
    words = split(texts, signs=True)
    hashes, rows = shingles(words, halves=WORD_HALVES * SHINGLE_WORDS)
    distinct = _distinct((rows.astype(np.uint64) << _HIGH) | (hashes >> _HIGH))
    counts = np.bincount((distinct >> _HIGH).astype(np.int64), minlength=len(texts))
    kept = _places(counts) < MAX_SHINGLES
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(np.minimum(counts, MAX_SHINGLES))))
    shingles_S = (distinct[kept] & _LOW).astype(np.uint32)
    return Sketches(_digests(texts, words), _numbers(words), shingles_S, offsets)


def _digests(texts: Sequence[str], words: Words) -> U64:
    ends = words.offsets_N1.tolist()
    raw = words.hashes_T.tobytes()
    contents = [
        raw[8 * start : 8 * end] if end > start else text.encode("utf-8", "surrogatepass")
        for text, start, end in zip(texts, ends, ends[1:], strict=False)
    ]
    digests = b"".join(blake2b(content, digest_size=16).digest() for content in contents)
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def _numbers(words: Words) -> U64:
    hashes_T = np.where(words.digits_T, words.hashes_T, 0)
    total = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashes_T, dtype=np.uint64)))
    return total[words.offsets_N1[1:]] - total[words.offsets_N1[:-1]]


def _first_equal(digests_N2: U64) -> I64:
    """The earliest row with the same digest, for each row."""
    order = np.lexsort((np.arange(len(digests_N2)), digests_N2[:, 1], digests_N2[:, 0]))
    ordered = digests_N2[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first_N = np.empty(len(order), np.int64)
    first_N[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return first_N


def _similar(
    sketches: Sketches, distinct_N: npt.NDArray[np.bool_], threshold: float, salts_N: U64
) -> tuple[I64, I64, npt.NDArray[np.float32], int]:
    """Pairs (later row, earlier row) and their similarity, ascending; rows cut at `MAX_PAIRS`.

    Only rows with the same salt (32 bits) are compared.
    """
    rows, firsts, counts, group, num_cut = _candidates(sketches, distinct_N, threshold, salts_N)
    bitmaps_N4 = _bitmaps(sketches)
    found: list[tuple[U64, npt.NDArray[np.float32]]] = []
    for block in _blocks(rows, counts):
        earlier = group[np.repeat(firsts[block], counts[block]) + _places(counts[block])]
        pairs = _distinct((np.repeat(rows[block], counts[block]) << _HIGH) | earlier)
        later, earlier = (pairs >> _HIGH).astype(np.int64), (pairs & _LOW).astype(np.int64)
        likely = _may_be_similar(sketches, bitmaps_N4, later, earlier, threshold)
        likely &= salts_N[later] == salts_N[earlier]
        similarity = _jaccard(sketches, later[likely], earlier[likely])
        near = similarity >= threshold
        found.append((pairs[likely][near], similarity[near].astype(np.float32)))
    pairs = np.concatenate([np.zeros(0, np.uint64), *(pairs for pairs, _ in found)])
    similarity_P = np.concatenate([np.zeros(0, np.float32), *(values for _, values in found)])
    later_P, earlier_P = (pairs >> _HIGH).astype(np.int64), (pairs & _LOW).astype(np.int64)
    return later_P, earlier_P, similarity_P, num_cut


def _candidates(
    sketches: Sketches, distinct_N: npt.NDArray[np.bool_], threshold: float, salts_N: U64
) -> tuple[U64, I64, I64, U64, int]:
    """Which rows to compare with which: row `rows[k]` with `group[firsts[k] : + counts[k]]`."""
    rare = _rare(sketches, distinct_N, threshold)
    entries = np.concatenate([np.zeros(0, np.uint64), *rare])
    entries = np.sort(entries ^ (salts_N[entries & _LOW] << _HIGH))
    group = entries & _LOW
    new = np.ones(len(entries), bool)
    new[1:] = (entries[1:] >> _HIGH) != (entries[:-1] >> _HIGH)
    firsts = np.flatnonzero(new)[np.cumsum(new) - 1]
    counts = np.arange(len(entries)) - firsts  # rows before this one that have its shingle
    shared = np.flatnonzero(counts)
    order = shared[np.lexsort((firsts[shared], counts[shared], group[shared]))]
    rows, firsts, counts = group[order], firsts[order], counts[order]
    before = np.cumsum(counts) - counts
    opens = np.ones(len(rows), bool)
    opens[1:] = rows[1:] != rows[:-1]
    spent = before - before[np.flatnonzero(opens)][np.cumsum(opens) - 1] if len(rows) else before
    allowed = np.clip(MAX_PAIRS - spent, 0, counts)
    num_cut = len(np.unique(rows[allowed < counts]))
    return rows, firsts, allowed, group, num_cut


def _rare(sketches: Sketches, distinct_N: npt.NDArray[np.bool_], threshold: float) -> Iterator[U64]:
    """The rarest shingles of each row as `hash << 32 | row`, without those no other row has."""
    seen = _counts(sketches.shingles_S)
    for start in range(0, len(distinct_N), _ROWS_AT_ONCE):
        offsets = sketches.offsets_N1[start : start + _ROWS_AT_ONCE + 1]
        sizes = np.diff(offsets)
        hashes = sketches.shingles_S[offsets[0] : offsets[-1]].astype(np.uint64)
        # One word to sort by: 14 bits of row, 18 of how often seen, 32 of hash to break ties.
        often = np.minimum(seen[hashes % len(seen)], (1 << 18) - 1).astype(np.uint64)
        row = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
        keys = np.sort((row << np.uint64(50)) | (often << _HIGH) | hashes)
        # What J >= t leaves out; the small term keeps 0.7 * 10 from rounding up to 8.
        prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
        kept = (_places(sizes) < np.repeat(prefix, sizes)) & np.repeat(
            distinct_N[start : start + _ROWS_AT_ONCE], sizes
        )
        kept &= (keys >> _HIGH) % (1 << 18) > 1
        yield ((keys[kept] & _LOW) << _HIGH) | (row[kept] + np.uint64(start))


def _counts(shingles_S: U32) -> npt.NDArray[np.uint32]:
    """How often each hash occurs, at least: hashes that share a cell are counted together.

    Any order of shingles gives the same pairs; a truer one gives fewer candidates.
    """
    cells = min(_COUNT_CELLS, 1 << (4 * len(shingles_S)).bit_length())
    seen = np.zeros(cells, np.uint32)
    for start in range(0, len(shingles_S), _COUNT_CELLS):
        block = shingles_S[start : start + _COUNT_CELLS] % cells
        seen += np.bincount(block, minlength=cells).astype(np.uint32)
    return seen


def _blocks(rows: U64, counts: I64) -> Iterator[slice]:
    """Slices of whole rows, of about `_PAIRS_AT_ONCE` pairs each."""
    total = np.cumsum(counts)
    start = 0
    while start < len(rows):
        done = total[start - 1] if start else 0
        end = int(np.searchsorted(total, done + _PAIRS_AT_ONCE, side="right"))
        end = int(np.searchsorted(rows, rows[min(max(end, start), len(rows) - 1)], side="right"))
        yield slice(start, end)
        start = end


def _bitmaps(sketches: Sketches) -> U64:
    """256 bits a row: bit `hash % 256` of each of its shingles."""
    num_rows = len(sketches.offsets_N1) - 1
    bitmaps_N4 = np.empty((num_rows, 4), np.uint64)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        offsets = sketches.offsets_N1[start : start + _ROWS_AT_ONCE + 1]
        hashes = sketches.shingles_S[offsets[0] : offsets[-1]]
        bits = np.zeros((len(offsets) - 1, 256), bool)
        bits[np.repeat(np.arange(len(bits)), np.diff(offsets)), hashes % 256] = True
        bitmaps_N4[start : start + len(bits)] = np.packbits(bits, axis=1).view(np.uint64)
    return bitmaps_N4


def _may_be_similar(
    sketches: Sketches, bitmaps_N4: U64, later: I64, earlier: I64, threshold: float
) -> npt.NDArray[np.bool_]:
    """False only where J < threshold for certain; 0.2 us a pair instead of 4.

    J >= t needs `|A & B| >= t / (1 + t) (|A| + |B|)`; of rows that are cut, of which one counts
    whole, `t max(|A|, |B|)`. Each bit of A's map that B's lacks is a shingle of A outside B.
    """
    sizes_N = np.diff(sketches.offsets_N1)
    sizes_1, sizes_2 = sizes_N[later], sizes_N[earlier]
    larger = np.maximum(sizes_1, sizes_2)
    share = threshold / (1 + threshold)
    needed = np.where(larger < MAX_SHINGLES, share * (sizes_1 + sizes_2), threshold * larger)
    map_1, map_2 = bitmaps_N4[later], bitmaps_N4[earlier]
    only_1 = np.bitwise_count(map_1 & ~map_2).sum(axis=1, dtype=np.int64)
    only_2 = np.bitwise_count(map_2 & ~map_1).sum(axis=1, dtype=np.int64)
    return np.minimum(sizes_1 - only_1, sizes_2 - only_2) >= needed - 1e-9


def _jaccard(sketches: Sketches, later: I64, earlier: I64) -> npt.NDArray[np.float64]:
    """J of each pair; below the largest hash that both rows know of, where one is cut."""
    parts = [
        _jaccard_part(sketches, later[start : start + 8192], earlier[start : start + 8192])
        for start in range(0, len(later), 8192)
    ]
    return np.concatenate([np.zeros(0), *parts])


def _jaccard_part(sketches: Sketches, later: I64, earlier: I64) -> npt.NDArray[np.float64]:
    pair_rows = np.concatenate((later, earlier))
    begins, sizes = sketches.offsets_N1[pair_rows], np.diff(sketches.offsets_N1)[pair_rows]
    hashes = sketches.shingles_S[np.repeat(begins, sizes) + _places(sizes)].astype(np.uint64)
    pair = np.repeat(np.tile(np.arange(len(later)), 2), sizes)
    largest = sketches.shingles_S[begins + sizes - 1]
    known = np.where(sizes == MAX_SHINGLES, largest, np.uint32(_LOW))
    known_P = np.minimum(known[: len(later)], known[len(later) :])
    inside = hashes <= known_P[pair]
    keys = np.sort((pair[inside].astype(np.uint64) << _HIGH) | hashes[inside])
    twice = keys[1:][keys[1:] == keys[:-1]] >> _HIGH
    both = np.bincount(twice.astype(np.int64), minlength=len(later))
    return both / (np.bincount(pair[inside], minlength=len(later)) - both)


def _places(counts: I64) -> I64:
    """0, 1, 2 ... within each run of `counts` items."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _distinct(keys: U64) -> U64:
    """Ascending, each once; 10 times as fast as numpy's `unique`, which hashes integers."""
    ordered = np.sort(keys)
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]
