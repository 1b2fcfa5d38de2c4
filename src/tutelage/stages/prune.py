"""Stage `prune`: a depth-pruned start, by measured block influence or by named layers."""

import time
from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.files import write_json
from tutelage.data.rows import conversation
from tutelage.data.sources import UnreadableRow, read_source
from tutelage.models.load import Loaded, load_for_training, save_student
from tutelage.models.prune import check_keep, layers_of, prune_layers, prune_least_influential
from tutelage.recipe.curation import DataSource
from tutelage.recipe.tables import Prune
from tutelage.text.chat import ChatFormat

CALIBRATION = DataSource(source="bundled:prompts")


def run(config: Prune, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, int | str]:
    """Cut the model; `influence.json` keeps what was measured of every layer."""
    started = time.monotonic()
    loaded = load_for_training(inputs["model"], device=work.device)
    before = len(layers_of(loaded.model))
    if config.keep_layers:
        check_keep(config.keep_layers, before)
        kept, influence = config.keep_layers, ()
        model = prune_layers(loaded.model, kept)
    else:
        pruned = prune_least_influential(
            loaded.model, config.drop_layers, _calibration(config, loaded)
        )
        model, kept, influence = pruned.model, pruned.keep, pruned.influence
    save_student(
        Loaded(model, loaded.tokenizer, loaded.directory, loaded.device), work.path / "model"
    )
    dropped = [layer for layer in range(before) if layer not in kept]
    write_json(
        work.path / "influence.json",
        {"influence": list(influence), "kept": list(kept), "dropped": dropped},
    )
    work.commit("prune", seconds=time.monotonic() - started, tokens={})
    return {
        "layers": len(kept),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dropped": ", ".join(map(str, dropped)),
    }


def _calibration(config: Prune, loaded: Loaded) -> Iterator[Tensor]:
    """Bundled prompts in the model's own chat format, one [1, T] batch each."""
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    for place, row in islice(read_source(CALIBRATION, seed=0), config.calibration_rows):
        assert not isinstance(row, UnreadableRow), place  # the bundled file is tested
        record = conversation(row, CALIBRATION, place=place, name=CALIBRATION.source)
        ids = chat.prompt_ids(record["messages"], "fast")
        yield torch.tensor([ids], device=loaded.device)
