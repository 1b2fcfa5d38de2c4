"""Stage `new`: a model with random weights, and a tokenizer trained on data or another model's."""

import time
from collections.abc import Mapping
from pathlib import Path

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.models.inspect import describe
from tutelage.models.load import copy_tokenizer, directory_of, load_tokenizer, save_weights
from tutelage.models.new import new_model
from tutelage.recipe.tables import New
from tutelage.records import read_rows
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import vocab_size
from tutelage.text.train_tokenizer import texts_of, train_tokenizer, write_tokenizer


def run(config: New, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int]:
    """Write tokenizer and weights; returns what the model measures."""
    started = time.monotonic()
    directory = work.path / "model"
    ids = _tokenizer(config, inputs, directory)
    chat = ChatFormat.from_tokenizer(load_tokenizer(directory))
    model = new_model(config, vocab_size=ids, end_id=chat.end_of_turn_id)
    save_weights(model, directory, dtype="float32")
    work.commit("model", seconds=time.monotonic() - started, tokens={})
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": ids,
        "layers": config.layers,
        "hidden_size": config.hidden_size,
    }


def _tokenizer(config: New, inputs: Mapping[str, Artifact], directory: Path) -> int:
    """The tokenizer's files in `directory`; returns how many logits go with them."""
    if config.tokenizer_of:
        source = directory_of(inputs["tokenizer_of"])
        directory.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(source, directory)
        # Its own number, padding included: targets of one are compared with logits of the other
        return describe(source).vocab_size
    paths = [path for artifact in several(inputs, "data") for path in artifact.shards()]
    tokenizer = train_tokenizer(
        texts_of(read_rows(paths)), kind=config.tokenizer, vocab_size=config.vocab_size
    )
    write_tokenizer(tokenizer, directory)
    return vocab_size(directory)
