"""ZIP selection: of many texts, those that together compress worst, so repeat each other least.

Knows texts and deflate only; not what a row is. Source: arXiv 2407.06645, whose three stages a
round (global pool, local pool, greedy addition) are kept, with two bounds of our own:

- *The window.* Deflate sees 32 KB back, so the selected texts are held as one deflate stream, and a
  text's cost against them is what it would add to that stream. A cost is thus O(its length),
  whatever was selected before, where compressing the whole set again is O(the set).
- *Lazy costs.* What a text adds shrinks as the set grows (of an ideal compressor; of deflate but
  for a few bytes), so its lowest cost so far stands for it until it comes up for choice. A text
  once seen to repeat the set stays cheap, so redundant, also when its twin has left the window.

A repeat of something more than 32 KB back that was never measured near it is not seen: remove near
duplicates first. Text that is hard to compress because it is damaged wins here: filter it first.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from tutelage.core.errors import DataError

LEVEL = 6
RAW_DEFLATE = -15
"""No header and no checksum: for a text of 50 bytes those would be a tenth of its cost."""


def zip_select(
    texts: Sequence[str], *, count: int, pool: int = 5000, shortlist: int = 1000, batch: int = 50
) -> list[int]:
    """The indices of `count` texts, in the order taken, whose compression ratio stays lowest.

    With B and C the bytes of the selected set before and after compression, and b and c what a text
    would add to them, its redundancy is the ratio the set would come to: `(B + b) / (C + c)`. A
    round costs the `pool` least redundant texts anew, keeps the `shortlist` least redundant of
    those, and takes `batch` of them one by one, each the least redundant given all before it.

    The shortlist must be many times the batch: at 200 and 100, of 10,000 texts of which 7,000 came
    from 20 templates, 453 of 1,000 taken repeated another one, since half of a shortlist of such
    siblings is taken whatever they repeat; as set here none did.

    Ties go to the earlier text. Work: one cost a text, then `pool / batch` costs a text taken and
    those few that settle which is first; 10,000 texts of 300 bytes to 1,000 take 4 s on one core,
    and no longer list or pool changed the ratio by 1 %.
    Raises DataError for more than there are; ValueError unless pool >= shortlist >= batch >= 1.
    Source: arXiv 2407.06645 (K1 = pool, K2 = shortlist, K3 = batch).
    """
    if not pool >= shortlist >= batch >= 1:
        raise ValueError(
            f"zip: pool {pool} >= shortlist {shortlist} >= batch {batch} >= 1 does not hold"
        )
    if count > len(texts):
        raise DataError(f"zip: {count} rows asked for, {len(texts)} there: lower the count")
    state = _State(texts)
    while len(state.taken) < count:
        pooled = state.least(np.flatnonzero(state.open_N), pool)
        state.refresh(pooled)
        listed = state.least(pooled, shortlist)
        for _ in range(min(batch, count - len(state.taken), len(listed))):
            listed = state.take_least(listed)
    return state.taken


class _State:
    """The selected set as an open deflate stream, and what each text would add to it."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.bytes_N = [text.encode("utf-8", "surrogatepass") + b"\n" for text in texts]
        self.size_N = np.array([len(raw) for raw in self.bytes_N], np.int64)
        self.stream = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW_DEFLATE)
        self.cost_N = np.array([self._cost(index) for index in range(len(texts))], np.int64)
        self.open_N = np.ones(len(texts), bool)
        self.taken: list[int] = []
        self.size = self.cost = 0

    def least(self, indices: np.ndarray, count: int) -> np.ndarray:
        """The `count` least redundant of `indices` by the costs known; ascending, as those are.

        A cut at the value of the last place, not a sort: that is linear in the texts, and the
        earlier of equals stays in on every machine.
        """
        if len(indices) <= count:
            return indices
        values = self._redundancy(indices)
        last = np.partition(values, count - 1)[count - 1]
        kept = values < last
        kept[np.flatnonzero(values == last)[: count - int(kept.sum())]] = True
        return indices[kept]

    def refresh(self, indices: np.ndarray) -> None:
        for index in indices:
            self.cost_N[index] = min(self.cost_N[index], self._cost(index))

    def take_least(self, listed: np.ndarray) -> np.ndarray:
        """Take the least redundant of `listed`; what is left of it.

        A cost known from before is an upper bound, so a text that stays first when its cost is new
        is first of all: 4.6 costs a step, where costing the whole list is 1,000.
        """
        fresh: set[int] = set()
        while True:
            place = int(np.argmin(self._redundancy(listed)))
            index = int(listed[place])
            if index in fresh:
                break
            self.refresh(listed[place : place + 1])
            fresh.add(index)
        self.taken.append(index)
        self.open_N[index] = False
        self.size += int(self.size_N[index])
        self.cost += int(self.cost_N[index])
        self.stream.compress(self.bytes_N[index])
        self.stream.flush(zlib.Z_SYNC_FLUSH)  # ends the block: probes then cost only their own text
        return np.delete(listed, place)

    def _redundancy(self, indices: np.ndarray) -> np.ndarray:
        return (self.size + self.size_N[indices]) / (self.cost + self.cost_N[indices])

    def _cost(self, index: int) -> int:
        probe = self.stream.copy()
        return len(probe.compress(self.bytes_N[index])) + len(probe.flush())
