"""Conversations as ids and targets: what `sft`, and `distill` beside its rollouts, learn from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.core.errors import DataError
from tutelage.records import read_rows
from tutelage.text.chat import ChatFormat
from tutelage.train.batches import Example


@dataclass(frozen=True)
class Rendered:
    """A conversation ready to be packed."""

    example: Example
    id: str
    mode: str


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
            yield Rendered(example, row["id"], row["mode"])
