"""What a funnel needs from outside its rows: the evaluation items, and whose tokens are counted."""

from collections.abc import Sequence
from pathlib import Path

from tutelage.core.artifact import Artifact
from tutelage.core.errors import DataError
from tutelage.data.rows import conversation
from tutelage.data.sources import UnreadableRow, read_source
from tutelage.recipe.curation import DataSource


def evaluation_texts(sources: Sequence[DataSource], *, seed: int) -> tuple[str, ...]:
    """The users' side of every evaluation item.

    Raises DataError for an item that cannot be read: one that is left out would not be looked for.
    """
    texts = []
    for source in sources:
        for place, row in read_source(source, seed=seed):
            if isinstance(row, UnreadableRow):
                raise DataError(f"decontaminate: {place}: {row}")
            try:
                record = conversation(row, source, place=place, name="")
            except DataError as error:
                raise DataError(f"decontaminate: {place}: {error}") from None
            said = [m["content"] for m in record["messages"] if m["role"] == "user"]
            texts.append("\n".join(said))
    return tuple(texts)


def tokenizer_file(model: Artifact | None) -> Path | None:
    """The `tokenizer.json` of a model. Raises DataError for a model without one."""
    if model is None:
        return None
    folder = model.path / "model" if model.stage != "external" else model.path
    path = folder / "tokenizer.json"
    if not path.exists():
        raise DataError(f"{folder} has no tokenizer.json to count tokens with")
    return path
