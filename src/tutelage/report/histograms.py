"""How many rows have which length, mode, language, difficulty and turns, a row group in memory.

Knows the columns of `records.CONVERSATIONS`, and not how a histogram is drawn.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tutelage.records import RowFiles
from tutelage.report.plain import plain

COLUMNS = ("messages", "mode", "language", "difficulty", "meta")
UNKNOWN, OTHER = "unknown", "other"
TOKENS = "tokens, of the rows that say them"
BANDS = 10  # of difficulty, equal parts of [0, 1]; what is not known stands in an eleventh
MAX_BARS = 12  # of a histogram: what fits under a funnel on one screen
MAX_NAMES = 1000
"""Different names told apart; a column with more holds no languages, and memory has its limit."""
QUANTILE = 0.99  # of the rows that bars of equal width cover; the rest share the last bar
POWERS = 10 ** np.arange(1, 19, dtype=np.int64)


@dataclass(frozen=True)
class Histogram:
    """How many rows have which value."""

    name: str
    unit: str
    """Of the labels; empty where they are names."""
    bars: tuple[tuple[str, int], ...]
    """(label, rows), low before high, or the most frequent name first."""
    mean: float | None = None
    most: int | None = None
    """The largest value."""

    @property
    def rows(self) -> int:
        """Rows of all bars."""
        return sum(count for _, count in self.bars)


def histograms(files: RowFiles) -> tuple[Histogram, ...]:
    """Length, mode, language, difficulty and turns of all rows, in this order.

    Length is in characters of all messages and chains; a second one is in tokens, over the rows
    whose meta holds `tokens`.
    """
    characters, turns, tokens = Tally(), Tally(), Tally()
    modes: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    bands_K = np.zeros(BANDS + 1, np.int64)
    for table in files.tables(range(len(files))):
        chars_N, turns_N = _sizes(table["messages"].combine_chunks())
        characters.add(chars_N)
        turns.add(turns_N)
        tokens.add(_tokens(table["meta"]))
        modes = _with_names(modes, table["mode"])
        languages = _with_names(languages, table["language"])
        bands_K += _bands(table["difficulty"])
    edges = [f"{band / BANDS:.1f} to {(band + 1) / BANDS:.1f}" for band in range(BANDS)]
    bands = zip([*edges, UNKNOWN], bands_K.tolist(), strict=True)
    known = bands_K[:-1].any()
    return (
        characters.histogram("length", "characters"),
        *([tokens.histogram("length", TOKENS)] if tokens.counts else []),
        Histogram("mode", "", _named(modes)),
        Histogram("language", "", _named(languages)),
        Histogram("difficulty", "", tuple((b, n) for b, n in bands if known or b == UNKNOWN)),
        turns.histogram("turns", "user messages"),
    )


class Tally:
    """Counts of whole numbers in constant memory: to two digits, 90 a power of ten."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self._total = self._most = 0

    def add(self, values_N: np.ndarray) -> None:
        """Count these."""
        quanta_N = np.concatenate([[1], POWERS])[
            np.maximum(np.searchsorted(POWERS, values_N, side="right") - 1, 0)
        ]
        floors, counts = np.unique(values_N // quanta_N * quanta_N, return_counts=True)
        self.counts.update(dict(zip(floors.tolist(), counts.tolist(), strict=True)))
        self._total += int(values_N.sum())
        self._most = max(self._most, int(values_N.max(initial=0)))

    def histogram(self, name: str, unit: str) -> Histogram:
        """Bars of one round width (1, 2 or 5 times a power of ten), the last one open.

        No edge cuts through a number of two digits, so the bars are exact.
        """
        rows = self.counts.total()
        step = _round_width(_quantile(self.counts, QUANTILE))
        bars = Counter[int]()
        for floor, count in self.counts.items():
            bars[min(floor // step, MAX_BARS)] += count
        shown = range(min(bars, default=0), max(bars, default=-1) + 1)
        return Histogram(
            name, unit, tuple((_span(bar, step), bars[bar]) for bar in shown),
            mean=self._total / rows if rows else None, most=self._most if rows else None,
        )  # fmt: skip


def _quantile(counts: Mapping[int, int], share: float) -> int:
    wanted, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return 0


def _round_width(covered: int) -> int:
    """The least round width of which MAX_BARS bars hold `covered`."""
    widths = (digit * 10**power for power in range(19) for digit in (1, 2, 5))
    return next(width for width in widths if width * MAX_BARS > covered)


def _span(bar: int, step: int) -> str:
    low = bar * step
    if bar == MAX_BARS:
        return f"{low:,} and more"
    return f"{low:,}" if step == 1 else f"{low:,} to {low + step - 1:,}"


def _sizes(messages: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Characters (chains included) and user messages of each of N rows, int64."""
    ends_N = np.cumsum(messages.value_lengths().to_numpy(zero_copy_only=False))
    said = messages.flatten()
    chars_M = sum(
        pc.call_function("utf8_length", [said.field(name).fill_null("")]).to_numpy()
        for name in ("content", "thinking")
    )
    roles = said.field("role")
    users_M = pc.call_function("equal", [roles, pa.scalar("user")]).to_numpy(zero_copy_only=False)
    totals = (np.concatenate([[0], np.cumsum(m, dtype=np.int64)]) for m in (chars_M, users_M))
    chars_N, turns_N = (np.diff(total[ends_N], prepend=0) for total in totals)
    return chars_N, turns_N


def _tokens(meta: pa.ChunkedArray) -> np.ndarray:
    """`tokens` of the rows whose meta says it."""
    holds = pc.MatchSubstringOptions('"tokens"')  # most rows need no reading of their JSON
    telling = meta.filter(pc.call_function("match_substring", [meta], holds))
    said = [json.loads(text) for text in telling.to_pylist()]
    found = [each.get("tokens") for each in said if isinstance(each, Mapping)]
    return np.array([count for count in found if type(count) is int and count >= 0], np.int64)


def _bands(difficulty: pa.ChunkedArray) -> np.ndarray:
    """Rows in each of BANDS, and at the end those of unknown difficulty."""
    values_N = difficulty.to_numpy().astype(np.float64)
    known_N = values_N[~np.isnan(values_N)]
    # Rounded: 1 - 9 / 10 is 0.09999999999999998 and belongs to the band from 0.1.
    bands_N = np.clip(np.floor(np.round(known_N * BANDS, 9)), 0, BANDS - 1).astype(np.int64)
    counts_K = np.bincount(bands_N, minlength=BANDS)
    return np.append(counts_K, len(values_N) - len(known_N))


def _with_names(counts: Counter[str], names: pa.ChunkedArray) -> Counter[str]:
    found = Counter(counts)
    for entry in names.value_counts().to_pylist():
        name = plain(entry["values"]) or UNKNOWN
        found[name if name in found or len(found) < MAX_NAMES else OTHER] += entry["counts"]
    return found


def _named(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    """The most frequent names; the rest as one bar."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) <= MAX_BARS:
        return tuple(ordered)
    rest = ordered[MAX_BARS - 1 :]
    return (*ordered[: MAX_BARS - 1], (f"{len(rest)} more", sum(count for _, count in rest)))
