"""Rows that hold text of an evaluation, found by long n-grams they have in common.

Owns the rule: a row is contaminated if a run of 13 words of it (26 characters of Chinese, Japanese
and their like) stands in an evaluation item too. Knows nothing of rows, tasks or files: texts in,
matches out, a text's match depending on that text and the index alone.

Shapes: I items, G n-grams of some rows, E pairs of an n-gram and an item that has it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tutelage.text.words import WORD_HALVES, Grams, Words, chunks, grams, split, widths

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

NGRAM_WORDS = 13
"""As GPT-3's filter has it (arXiv 2005.14165, appendix C)."""
SHORTEST_WORDS = 8
"""An item of 8 to 12 words counts wherever it stands in a row; a shorter one, `What is 3 + 4?`,
would be met by chance and counts only where it is all there is."""
MAX_ITEMS = 10
"""An n-gram of more items than this is an instruction they share, not one of them."""


FILTER_CELLS = 16
"""Cells of the filter an n-gram: 1 in 16 of the others passes it, at 16 bytes an n-gram."""


@dataclass(frozen=True)
class Match:
    """What a row has in common with the evaluation item of which it holds the largest share."""

    item: int
    """Index of the item; the first of equals."""
    share: float
    """n-grams of the item that stand in the row, over all of them that count: in (0, 1]."""
    text: str
    """The longest run of words in common, without case and punctuation."""


@dataclass(frozen=True)
class Index:
    """The n-grams of the evaluation items."""

    tables: "tuple[_Table, ...]"
    num_grams_I: I64
    """Distinct n-grams of each item that count. 0: the item is never found, as it has no words,
    says the same as one before it, or is nothing but what over `MAX_ITEMS` items have."""

    @classmethod
    def build(cls, items: Sequence[str]) -> "Index":
        """The index of these texts. Equal ones count once, as the first of them."""
        parts = list(_parts(items))
        hashes = np.concatenate([np.zeros(0, np.uint64), *(part[0] for part in parts)])
        owners = np.concatenate([np.zeros(0, np.int64), *(part[1] for part in parts)])
        widths_I = np.concatenate([np.zeros(0, np.int64), *(part[2] for part in parts)])
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        kept = np.ones(len(hashes), bool)  # each n-gram once an item
        kept[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        hashes, owners = hashes[kept], owners[kept]
        shared = np.searchsorted(hashes, hashes, side="right") - np.searchsorted(hashes, hashes)
        hashes, owners = hashes[shared <= MAX_ITEMS], owners[shared <= MAX_ITEMS]
        width_E = widths_I[owners]
        tables = [
            _table(halves, hashes[width_E == halves], owners[width_E == halves])
            for halves in sorted(set(width_E.tolist()))
        ]
        return cls(tuple(tables), np.bincount(owners, minlength=len(items)))

    def find(self, text: str) -> Match | None:
        """`find_all` of one text: 0.3 ms, where many at once take 10 us each."""
        return self.find_all([text])[0]

    def find_all(self, texts: Sequence[str]) -> list[Match | None]:
        """For each text the item it shares most with, or None where it has no n-gram of any."""
        return [match for chunk in chunks(texts) for match in self._find_chunk(chunk)]

    def _find_chunk(self, texts: Sequence[str]) -> list[Match | None]:
        words = split(texts, signs=False)
        hits = [_hits(table, grams(words, halves=table.halves)) for table in self.tables]
        hits = np.concatenate([np.zeros(0, _HIT), *hits])
        hits = hits[np.argsort(hits["start"], kind="stable")]
        bounds = np.searchsorted(hits["start"], words.offsets_N1)
        matches: list[Match | None] = [None] * len(texts)
        for row in np.flatnonzero(np.diff(bounds)):
            matches[row] = self._match(words, hits[bounds[row] : bounds[row + 1]])
        return matches

    def _match(self, words: Words, hits: npt.NDArray[np.void]) -> Match:
        """The best item of one row's hits."""
        met = {(int(hit["item"]), int(hit["hash"])) for hit in hits}
        counts = Counter(item for item, _ in met)
        shares = {item: count / int(self.num_grams_I[item]) for item, count in counts.items()}
        item = min(shares, key=lambda item: (-shares[item], item))
        start, end = _longest_run(hits[hits["item"] == item])
        return Match(item, shares[item], " ".join(words.between(start, end)))


@dataclass(frozen=True)
class _Table:
    """The n-grams of one width; an item narrower than `halves` is there as a whole."""

    halves: int
    filter: npt.NDArray[np.bool_]
    """`filter[hash % len]` is False where no n-gram has the hash."""
    hashes_E: U64
    """Ascending, then by item."""
    items_E: I64


_HIT = np.dtype([("start", np.int64), ("end", np.int64), ("item", np.int64), ("hash", np.uint64)])
"""An n-gram of a row, by its words, that is an item's too."""


def _halves(num_words: int) -> int:
    return WORD_HALVES * num_words


def _table(halves: int, hashes_E: U64, items_E: I64) -> _Table:
    cells = 1 << (FILTER_CELLS * len(hashes_E)).bit_length()
    known = np.zeros(cells, bool)
    known[hashes_E % cells] = True
    return _Table(halves, known, hashes_E, items_E)


def _hits(table: _Table, row_grams: Grams) -> npt.NDArray[np.void]:
    """One record for each n-gram of the rows and each item that has it."""
    likely = np.flatnonzero(table.filter[row_grams.hashes_G % len(table.filter)])
    hashes = row_grams.hashes_G[likely]
    first = np.searchsorted(table.hashes_E, hashes)
    counts = np.searchsorted(table.hashes_E, hashes, side="right") - first
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    gram = np.repeat(likely, counts)
    hits = np.empty(len(gram), _HIT)
    hits["start"], hits["end"] = row_grams.starts_G[gram], row_grams.ends_G[gram]
    hits["item"] = table.items_E[np.repeat(first, counts) + places]
    hits["hash"] = row_grams.hashes_G[gram]
    return hits


def _longest_run(hits: npt.NDArray[np.void]) -> tuple[int, int]:
    """The longest stretch of words that overlapping n-grams cover; the first of equals."""
    runs: list[tuple[int, int]] = []
    for start, end in zip(hits["start"].tolist(), hits["end"].tolist(), strict=True):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((start, end))
    return max(runs, key=lambda run: run[1] - run[0])


def _parts(items: Sequence[str]) -> Iterator[tuple[U64, I64, I64]]:
    """n-grams of the items, whose they are, and the items' widths within the tables' range.

    An item with the words of one before it has no n-grams.
    """
    seen: set[bytes] = set()
    first_item = 0
    for texts in chunks(items):
        words = split(texts, signs=False)
        found = grams(words, halves=_halves(NGRAM_WORDS))
        new = np.zeros(len(texts), bool)
        for text, (start, end) in enumerate(pairwise(words.offsets_N1.tolist())):
            content = blake2b(words.hashes_T[start:end].tobytes(), digest_size=16).digest()
            new[text] = content not in seen
            seen.add(content)
        item_G = np.repeat(np.arange(len(texts)), np.diff(found.offsets_N1))
        kept = new[item_G]
        within = np.clip(widths(words), _halves(SHORTEST_WORDS), _halves(NGRAM_WORDS))
        yield found.hashes_G[kept], item_G[kept] + first_item, within
        first_item += len(texts)
