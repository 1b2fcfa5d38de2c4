"""Stage `convert`: teacher targets that DistillKit captured become targets of our store.

A capture is a top-k of whole texts, so it has neither a student nor a prompt: the first token of a
text is the prompt, all others are its response, and `student_logp` repeats what is known of the
teacher's. Where a text's own token is outside the k ids its probability is lost; the store then
holds a bound of it, `min(rest, smallest of the k)`, and the estimator's name says so. The entropy
is that of the head and one bucket for the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.shards import Shard, run_shards, shards
from tutelage.data.identity import CAPTURE_SETTINGS, local_files
from tutelage.models.inspect import read_config
from tutelage.models.load import directory_of, load_tokenizer
from tutelage.recipe.tables import Convert
from tutelage.records import RowFiles
from tutelage.targets.distillkit import Settings, decode_ids, decode_logp
from tutelage.targets.schema import DISTILLKIT, StoreMeta, TargetRow, TokenTargets
from tutelage.targets.topk import targets_of_top_k
from tutelage.targets.writer import write_shard
from tutelage.text.chat import ChatFormat
from tutelage.text.tokenizer import tokenizer_digest


def run(config: Convert, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Convert every text; returns counts.

    Raises DataError for files of another format, settings that are not theirs, or a row whose
    columns do not fit together.
    """
    paths = [path for path in local_files(config.source) if path.suffix == ".parquet"]
    if not paths:
        raise DataError(f"{config.source}: no Parquet file")
    settings = _settings(config, paths[0])
    rows = RowFiles(paths)
    rows.check_lists({"input_ids": 1, "compressed_logprobs": 2, "bytepacked_indices": 2})
    if not len(rows):
        raise DataError(f"{config.source}: no row in any Parquet file")
    meta = _meta(settings, directory_of(inputs["model"]), Path(config.source).name)

    def make(shard: Shard, on_tokens: Callable[[int], None]) -> dict[str, int]:
        made = _rows(rows, shard.items, meta, settings, on_tokens)
        write_shard(work.path / f"{shard.name}.parquet", made, meta=meta)
        return {}

    lengths = rows.lengths("input_ids")
    run_shards(
        work, shards(len(rows), config.shard_rows), lambda: nullcontext(make), label="convert",
        tokens_each=max(lengths, default=1), here=True,
    )  # fmt: skip
    return {"rows": len(rows), "response_tokens": sum(max(0, n - 1) for n in lengths)}


def _settings(config: Convert, beside: Path) -> Settings:
    if config.settings:
        return Settings.parse(config.settings)
    path = beside.parent / CAPTURE_SETTINGS
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not there: give the capture's settings in the recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a mapping of settings")
    return Settings.parse(values)


def _meta(settings: Settings, model: Path, source: str) -> StoreMeta:
    tokenizer = load_tokenizer(model)
    vocab_size = int(read_config(model)["vocab_size"])
    if settings.d > vocab_size:
        raise DataError(
            f"the capture has {settings.d:,} ids and the model {vocab_size:,}: not one vocabulary"
        )
    return StoreMeta(
        student="", teacher=source, tokenizer=tokenizer_digest(model),
        chat_template=ChatFormat.from_tokenizer(tokenizer).fingerprint, vocab_size=vocab_size,
        temperature=1.0, engine="distillkit", dtype=settings.exact_dtype,
        estimator=f"{DISTILLKIT}-{settings.k}", tau=None,
    )  # fmt: skip


def _rows(
    files: RowFiles, wanted: range, meta: StoreMeta, settings: Settings,
    on_tokens: Callable[[int], None],
) -> Iterator[TargetRow]:  # fmt: skip
    number = wanted.start
    for table in files.tables(wanted):
        for index in range(len(table)):
            try:
                row = _row(table.slice(index, 1), f"{number:08d}", meta, settings)
            except DataError as error:
                raise DataError(f"row {number}: {error}") from None
            on_tokens(len(row.response_ids) + 1)
            yield row
            number += 1


def _row(table: pa.Table, name: str, meta: StoreMeta, settings: Settings) -> TargetRow:
    long_L = _list(table["input_ids"])
    if len(long_L) and not 0 <= int(long_L.min()) <= int(long_L.max()) < meta.vocab_size:
        raise DataError(f"input_ids outside the vocabulary of {meta.vocab_size}")
    ids_L = long_L.astype(np.int32)
    logp_NB = _rectangle(table["compressed_logprobs"])
    packed_NB = _rectangle(table["bytepacked_indices"])
    count = len(ids_L) - 1
    # Entry t says what follows token t. A capture of a whole text has none for its last token.
    if not len(logp_NB) == len(packed_NB) in (count, count + 1) or count < 0:
        raise DataError(
            f"{len(ids_L)} tokens, but {len(logp_NB)} log-probabilities and {len(packed_NB)} ids"
        )
    targets = TokenTargets.blank(0, None)
    if count:
        head_ids_NK = decode_ids(packed_NB[:count], settings)
        logp_NK = decode_logp(logp_NB[:count], settings)
        targets = targets_of_top_k(head_ids_NK, logp_NK, ids_L[1:])
    return TargetRow(
        id=name, prompt_id=name, source=meta.teacher, mode="fast", finish_reason="length",
        verdict=None, prompt_ids=ids_L[:1], response_ids=ids_L[1:],
        student_logp_N=targets.label_logp_N, targets=targets,
    )  # fmt: skip


def _list(column: pa.ChunkedArray) -> np.ndarray:
    """The one list of a one-row column."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _rectangle(column: pa.ChunkedArray) -> np.ndarray:
    """The one list of equally long lists of bytes, uint8 [N, B]."""
    inner = column.combine_chunks().flatten()
    sizes = np.unique(inner.value_lengths().to_numpy(zero_copy_only=False))
    if len(sizes) > 1:
        raise DataError(f"tokens of {sizes.min()} and of {sizes.max()} bytes in one row")
    flat = inner.flatten().to_numpy(zero_copy_only=False).astype(np.uint8)
    return flat.reshape(len(inner), -1) if len(inner) else flat.reshape(0, 0)
