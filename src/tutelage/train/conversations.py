"""Conversations as ids and targets: what `sft`, and `distill` beside its rollouts, learn from."""

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.core.errors import DataError
from tutelage.records import count_rows, read_rows
from tutelage.text.chat import ChatFormat
from tutelage.train.batches import Example


@dataclass(frozen=True)
class Rendered:
    """A conversation ready to be packed."""

    example: Example
    id: str
    mode: str
    difficulty: float
    """NaN where nobody scored it."""


def rendered_rows(chat: ChatFormat, paths: Sequence[Path], limit: int) -> Iterator[Rendered]:
    """The conversations of Parquet files, cut to `limit` tokens; those left without a target are
    left out.

    Raises DataError for a row that is a prompt only.
    """
    for row in read_rows(paths):
        if row["messages"][-1]["role"] != "assistant":
            raise DataError(
                f"row {row['id']} ends with the user's message: a prompt cannot be learnt from; "
                "let a synthesize step answer it first"
            )
        rendered = chat.render(row["messages"])
        example = Example(rendered.ids, rendered.mask)
        if not row["complete"]:  # cut off: the end of turn that was rendered was never written
            end = int(np.flatnonzero(example.mask_L)[-1])
            example = Example(example.ids_L[:end], example.mask_L[:end])
        example = Example(example.ids_L[:limit], example.mask_L[:limit])
        if example.mask_L.any():
            difficulty = np.nan if row["difficulty"] is None else row["difficulty"]
            yield Rendered(example, row["id"], row["mode"], difficulty)


@dataclass(frozen=True)
class Conversations:
    """Rendered conversations of several sources in memory, end to end: values and offsets.

    Five bytes a token and 140 a row, where objects of two arrays took 780 (rows of 150 tokens).
    Legend: N conversations, T tokens of all.
    """

    ids_T: np.ndarray
    """int32 token ids."""
    mask_T: np.ndarray
    """bool; True where the token is a target."""
    starts: np.ndarray
    """int64 [N + 1], where each conversation begins in T, and the last one's end."""
    names: list[str]
    """Ids of the rows."""
    modes: list[str]
    difficulty_N: np.ndarray
    """float64; NaN where nobody scored it."""
    counts: tuple[int, ...]
    """Conversations of each source; they sum to N."""
    left_out: int
    """Rows of the sources without a target within the limit."""

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each."""
        return np.diff(self.starts)

    def example(self, index: int) -> Example:
        """One conversation, as views."""
        tokens = slice(self.starts[index], self.starts[index + 1])
        return Example(self.ids_T[tokens], self.mask_T[tokens])


def load_conversations(
    chat: ChatFormat, sources: Sequence[Sequence[Path]], limit: int
) -> Conversations:
    """Render the conversations of each source's Parquet files, as `rendered_rows` does."""
    # These grow in place: lists of arrays would need everything twice when they are joined.
    ids, mask, starts, difficulty = array("i"), bytearray(), array("q", [0]), array("d")
    names: list[str] = []
    modes: list[str] = []
    ends = [0]
    for paths in sources:
        for row in rendered_rows(chat, paths, limit):
            ids.frombytes(row.example.ids_L.astype(np.int32, copy=False).tobytes())
            mask += row.example.mask_L.tobytes()
            starts.append(len(ids))
            difficulty.append(row.difficulty)
            names.append(row.id)
            modes.append(sys.intern(row.mode))
        ends.append(len(names))
    return Conversations(
        np.frombuffer(ids, np.int32), np.frombuffer(mask, np.bool_),
        np.frombuffer(starts, np.int64), names, modes, np.frombuffer(difficulty, np.float64),
        tuple(np.diff(ends).tolist()), sum(map(count_rows, sources)) - len(names),
    )  # fmt: skip
