"""Reads a store of target shards: by row, in stored order, or shuffled with locality.

Owns the verification of what is on disk, the shuffle order and the cache of decoded row groups;
knows nothing of losses or batches.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.core.errors import ArtifactError
from tutelage.targets.codec import TEXT_LISTS, arrow_schema, from_table
from tutelage.targets.group import TargetGroup, starts
from tutelage.targets.schema import StoreMeta, TargetRow
from tutelage.targets.writer import GROUPS_KEY, META_KEY, RowGroup, checksum

WINDOW = 8
"""Row groups that are shuffled together and held decoded: at 17 ids a token about 60 MB."""

# What Arrow, JSON and numpy raise when the bytes are not what the format says.
FOREIGN = (pa.ArrowException, OSError, KeyError, ValueError, TypeError, IndexError)


@dataclass(frozen=True)
class Damage:
    """What a reading with `skip_damaged` leaves out."""

    path: Path
    row_group: int | None
    """None = the whole file: its footer cannot be read"""
    rows: int | None
    """None = not known"""
    reason: str


@dataclass(frozen=True)
class _Located:
    path: Path
    index: int
    info: RowGroup


@dataclass(frozen=True)
class _Footer:
    meta: StoreMeta
    groups: list[_Located]


class TargetReader:
    """The rows of one or more shards, numbered in the order of `paths`.

    A row group is checked against its checksum each time it is read from disk. Files are
    memory-mapped and closed again, so a store may have any number of shards.

    Args:
        paths: shards of one store.
        skip_damaged: check everything now and leave out what is damaged: it is listed in
            `damaged`, and neither counted by `len` nor part of an order.

    Raises:
        ArtifactError: no shard, or shards of differing origin; without `skip_damaged` also a file
            that is not a whole shard and, once read, a row group that is not as it was written.
    """

    def __init__(self, paths: Sequence[Path], *, skip_damaged: bool = False) -> None:
        self.damaged: list[Damage] = []
        self._cache: OrderedDict[int, TargetGroup] = OrderedDict()
        footers: dict[Path, _Footer] = {}
        for path in paths:
            try:
                footers[path] = _read_footer(path)
            except ArtifactError as error:
                if not skip_damaged:
                    raise
                self.damaged.append(Damage(path, None, None, str(error)))
        if not footers:
            raise ArtifactError(f"no readable target shard among {len(paths)} files")
        self.meta = _common(footers)
        groups = [group for footer in footers.values() for group in footer.groups]
        self._groups = self._sound(groups) if skip_damaged else groups
        self._row_starts = starts(np.array([g.info.rows for g in self._groups], np.int64))
        self.num_tokens = sum(group.info.tokens for group in self._groups)
        """Response tokens"""

    def _sound(self, groups: list[_Located]) -> list[_Located]:
        sound = []
        for group in groups:
            try:
                with _mapped(group) as source:
                    _verify(source, group, self.meta)
            except ArtifactError as error:
                damage = Damage(group.path, group.index, group.info.rows, str(error))
                self.damaged.append(damage)
            else:
                sound.append(group)
        return sound

    def __len__(self) -> int:
        return int(self._row_starts[-1])

    def __iter__(self) -> Iterator[TargetRow]:
        """Every row in stored order."""
        for index in range(self.num_groups):
            group = self.group(index)
            yield from (group.row(i) for i in range(len(group)))

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response tokens of each row (int32), in stored order."""
        parts = []
        for located in self._groups:
            with _mapped(located) as source:
                _verify(source, located, self.meta)
                table = pq.ParquetFile(source).read_row_group(
                    located.index, columns=list(TEXT_LISTS), use_threads=False
                )
            lists = [table[name].combine_chunks() for name in TEXT_LISTS]
            parts.append([column.value_lengths().to_numpy() for column in lists])
        if not parts:
            return np.zeros(0, np.int32), np.zeros(0, np.int32)
        prompts, responses = zip(*parts, strict=True)
        return np.concatenate(prompts), np.concatenate(responses)

    @property
    def num_groups(self) -> int:
        """Row groups over all shards."""
        return len(self._groups)

    def group(self, index: int) -> TargetGroup:
        """A whole row group as flat arrays; the last WINDOW that were used stay decoded."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        group = _load(self._groups[index], self.meta)
        self._cache[index] = group
        if len(self._cache) > WINDOW:
            self._cache.popitem(last=False)
        return group

    def row(self, index: int) -> TargetRow:
        """Row `index`, 0 <= index < len, as views of its row group."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        group = int(np.searchsorted(self._row_starts, index, side="right")) - 1
        return self.group(group).row(index - int(self._row_starts[group]))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the rows (int64) from (seed, epoch) and the store's layout alone.

        Row groups are shuffled, then the rows of each WINDOW of consecutive ones: reading in this
        order decodes every row group once and holds WINDOW of them.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        groups = rng.permutation(self.num_groups)
        windows = [
            rng.permutation(
                np.concatenate(
                    [np.arange(*self._row_starts[g : g + 2]) for g in groups[i : i + WINDOW]]
                )
            )
            for i in range(0, len(groups), WINDOW)
        ]
        return np.concatenate([np.zeros(0, np.int64), *windows])

    def iterate(self, seed: int, epoch: int, position: int = 0) -> Iterator[TargetRow]:
        """The rows of an epoch in `order(seed, epoch)`, from `position` on."""
        for index in self.order(seed, epoch)[position:]:
            yield self.row(int(index))


def _read_footer(path: Path) -> _Footer:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            keys = file.metadata.metadata or {}
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            columns = file.schema_arrow
        meta = StoreMeta.from_json(keys[META_KEY].decode())
        infos = [RowGroup(**values) for values in json.loads(keys[GROUPS_KEY])]
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except FOREIGN as error:
        raise ArtifactError(f"{path} is not a whole shard of a target store: {error}") from error
    # The checksums are of row groups; a damaged footer shows in what it says of them.
    if [info.rows for info in infos] != rows or columns != arrow_schema(meta):
        raise ArtifactError(f"{path}: its footer is damaged, or not of a target store; restore it")
    return _Footer(meta, [_Located(path, index, info) for index, info in enumerate(infos)])


def _load(group: _Located, meta: StoreMeta) -> TargetGroup:
    with _mapped(group) as source:
        _verify(source, group, meta)
        try:
            table = pq.ParquetFile(source).read_row_group(group.index, use_threads=False)
            return from_table(table, meta)
        except FOREIGN as error:
            raise ArtifactError(f"{_where(group)} cannot be decoded: {error}") from error


def _mapped(group: _Located) -> pa.NativeFile:
    try:
        return pa.memory_map(str(group.path))
    except OSError as error:
        raise ArtifactError(f"{_where(group)} cannot be read: {error}") from error


def _verify(source: pa.NativeFile, group: _Located, meta: StoreMeta) -> None:
    try:
        source.seek(group.info.offset)
        data = source.read_buffer(group.info.bytes)
    except FOREIGN as error:
        raise ArtifactError(f"{_where(group)} cannot be read: {error}") from error
    if checksum(meta, data) != group.info.crc32:
        raise ArtifactError(
            f"{_where(group)} is damaged (its checksum differs); restore the file, score that "
            "shard again, or read the rest with skip_damaged (`targets show --skip-damaged`)"
        )


def _where(group: _Located) -> str:
    return f"{group.path}: row group {group.index} ({group.info.rows} rows)"


def _common(footers: dict[Path, _Footer]) -> StoreMeta:
    """The one origin of all shards, or ArtifactError naming what differs where."""
    (first_path, first), *others = footers.items()
    for path, footer in others:
        wanted = asdict(first.meta)
        differing = [k for k, v in asdict(footer.meta).items() if v != wanted[k]]
        if differing:
            raise ArtifactError(
                f"{path} and {first_path} are not of one store: {', '.join(differing)} differ"
            )
    return first.meta
