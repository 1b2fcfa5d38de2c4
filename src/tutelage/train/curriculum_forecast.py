"""What a curriculum will take of each mode, told before it runs: bytes of text stand for tokens.

Knows the data's Parquet files, no tokenizer and no torch: `tutelage plan` answers in a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tutelage.recipe.training import CurriculumStage
from tutelage.train.curriculum import mode_shares

if TYPE_CHECKING:
    import pyarrow as pa

TOKEN_BYTES = 4
"""UTF-8 bytes of a token, about: English has 4 characters to one, and Chinese, of 3 bytes a
character, 1 to 2."""
SAMPLED_GROUPS = 8
"""Row groups that are read, evenly spread: at most 32,768 rows, 0.1 s where they have 1.5 kB."""
ANY_MODE = ""
"""The mode of rows of which it is not known yet."""


@dataclass(frozen=True)
class Text:
    """How much text rows hold."""

    rows: float
    tokens: float

    def scaled(self, factor: float) -> "Text":
        """The same for so many times the rows."""
        return Text(self.rows * factor, self.tokens * factor)


@dataclass(frozen=True)
class ForecastPart:
    """What a training will about take of one mode in one stage."""

    stage: int
    """From 1."""
    stages: int
    """How many there are."""
    stage_share: float
    """Of the training's examples."""
    mode: str
    share: float
    """Of the stage's examples."""
    examples: int
    tokens: int | None
    """None where no row of the mode was found."""


def forecast(
    stages: Sequence[CurriculumStage], texts: Mapping[str, Text], *, epochs: int
) -> tuple[ForecastPart, ...]:
    """The parts of a training over rows that hold `texts` by mode, `max_steps` left aside.

    Examples are drawn alike from a mode's rows, so each costs the mode's mean.
    Raises RecipeError as `mode_shares`.
    """
    total = epochs * sum(text.rows for text in texts.values())
    parts = []
    for number, shares in enumerate(mode_shares(stages)):
        for mode, share in shares.items():
            examples = total * stages[number].share * share
            text = texts.get(mode) or texts.get(ANY_MODE)
            tokens = round(examples * text.tokens / text.rows) if text and text.rows else None
            parts.append(
                ForecastPart(
                    number + 1, len(stages), stages[number].share, mode, share, round(examples),
                    tokens,
                )
            )  # fmt: skip
    return tuple(parts)


def together(texts: Sequence[Mapping[str, Text]]) -> dict[str, Text]:
    """The texts of several steps in one."""
    found: dict[str, Text] = {}
    for by_mode in texts:
        for mode, text in by_mode.items():
            seen = found.get(mode, Text(0, 0))
            found[mode] = Text(seen.rows + text.rows, seen.tokens + text.tokens)
    return found


def sampled_texts(paths: Sequence[Path]) -> dict[str, Text]:
    """Rows and tokens by mode of a sample of conversations: of all, where they are few."""
    import pyarrow.parquet as pq  # here: most plans need no row

    files = _spread(range(len(paths)), SAMPLED_GROUPS)
    found = []
    for path in (paths[number] for number in files):
        with pq.ParquetFile(path) as file:
            for group in _spread(range(file.num_row_groups), SAMPLED_GROUPS // len(files)):
                found.append(_texts(file.read_row_group(group, columns=["mode", "messages"])))
    return together(found)


def _texts(table: "pa.Table") -> dict[str, Text]:
    import pyarrow.compute as pc

    messages = table["messages"].combine_chunks()
    turns, row_of_turn = messages.flatten(), messages.value_parent_indices()
    bytes_N = np.zeros(len(table))
    for part in ("content", "thinking"):
        lengths = pc.call_function("binary_length", [turns.field(part)]).fill_null(0)
        bytes_N += np.bincount(row_of_turn, weights=lengths, minlength=len(table))
    modes = table["mode"].combine_chunks().dictionary_encode()
    rows = np.bincount(modes.indices, minlength=len(modes.dictionary))
    tokens = np.bincount(modes.indices, weights=bytes_N, minlength=len(rows)) / TOKEN_BYTES
    names = modes.dictionary.to_pylist()
    return {name: Text(float(rows[code]), float(tokens[code])) for code, name in enumerate(names)}


def _spread(numbers: range, count: int) -> list[int]:
    """At most `count` of the numbers, evenly spread."""
    count = min(count, len(numbers))
    return [numbers[index * len(numbers) // count] for index in range(count)]
