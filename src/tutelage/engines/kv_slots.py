"""A key-value cache with rows that come and go, behind the transformers `Cache` interface.

Owns where the keys and values of each running sequence lie. Does not know tokens, logits or when a
sequence ends: the sampler moves the frame and says which row is free.

All rows end in the same column; a shorter sequence starts further right (left padding). So a new
prompt is written into the columns just before the running end, a finished row is overwritten by the
last row, and no step ever copies the cache as a whole (concatenating it each step, as DynamicCache
does, took 44 % of a decode step of a 135M model at 32 rows and 72 columns).

Shapes: B rows (slots), H key-value heads, C columns, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Columns are added this many at a time: moving the cache once in 64 steps costs under 2 % of the
# traffic of attention, which reads it whole each step, and at most 63 columns lie empty.
BLOCK_COLUMNS = 64


@dataclass(frozen=True)
class Frame:
    """The rectangle one forward pass sees: rows and columns; its last `queries` columns are new."""

    rows: slice
    columns: slice
    queries: int

    @property
    def width(self) -> int:
        """Number of columns, old and new."""
        return self.columns.stop - self.columns.start


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [B, H, C, D], written in place."""

    is_sliding = False

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.capacity = 0
        self.frame = Frame(rows=slice(0, 0), columns=slice(0, 0), queries=0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked column still enters attention as 0 * value, and 0 * NaN is NaN.
        return like.new_zeros(self.num_rows, like.shape[1], self.capacity, like.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows, columns = self.frame.rows, self.frame.columns
        new = slice(columns.stop - self.frame.queries, columns.stop)
        self.keys[rows, :, new] = key_states
        self.values[rows, :, new] = value_states
        return self.keys[rows, :, columns], self.values[rows, :, columns]

    def copy_row(self, source: int, target: int, columns: slice) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys[target, :, columns] = self.keys[source, :, columns]
        self.values[target, :, columns] = self.values[source, :, columns]

    def move(self, columns: slice, capacity: int) -> None:
        """Reallocate at `capacity` columns with `columns` at the left edge."""
        self.capacity = capacity
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        old_keys, old_values = self.keys[:, :, columns], self.values[:, :, columns]
        self.keys, self.values = self._allocate(old_keys), self._allocate(old_values)
        self.keys[:, :, : old_keys.shape[2]] = old_keys
        self.values[:, :, : old_values.shape[2]] = old_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.frame.width, 0

    def get_seq_length(self) -> int:
        return self.frame.width - self.frame.queries

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """`num_rows` slots for every layer; only attention layers, each kept at full length.

    Sliding-window layers are kept whole too: the model's own mask hides what is out of the window.
    """

    def __init__(self, *, num_layers: int, num_rows: int) -> None:
        self.slots = [_SlotLayer(num_rows) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))
        self.capacity = 0

    def set_frame(self, frame: Frame) -> None:
        """Choose what the next forward pass reads and where it writes."""
        for layer in self.slots:
            layer.frame = frame

    def copy_row(self, source: int, target: int, columns: slice) -> None:
        """Overwrite row `target` by row `source` (swap-remove)."""
        for layer in self.slots:
            layer.copy_row(source, target, columns)

    def move_left(self, columns: slice, *, room: int) -> None:
        """Put `columns` at the left edge, with at least `room` free columns behind them."""
        used = columns.stop - columns.start
        self.capacity = -(-(used + room) // BLOCK_COLUMNS) * BLOCK_COLUMNS
        for layer in self.slots:
            layer.move(columns, self.capacity)


def left_padding_mask(starts: list[int], columns: slice, *, device: torch.device) -> Tensor:
    """[B, C] bool: true where a column holds a token of the row, which begins at its start."""
    column_C = torch.arange(columns.start, columns.stop, device=device)
    return column_C[None, :] >= torch.tensor(starts, device=device)[:, None]
