"""How the examples of a packed row are kept apart, at a cost that grows with them and not the row.

A causal mask over a whole row is [T, T] and most of it is nothing: T tokens of 250-token examples
need a T/250th of it. So a row is cut where no token looks back, and each part gets its own call of
torch's attention, or all of them one call of FlashAttention where there is one (`blocks`). A model
that mixes tokens in other ways too, such as a recurrent one, reads one example a row (`alone`).
Which way is right for a model is not looked up but tried, on a few tokens.

Legend: B rows, T tokens of a row, E ends of examples, L tokens of an example or block, H heads,
D width, N targets.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available, is_torch_npu_available

from tutelage.train.batches import Example, PackedBatch, length_groups, pack, stack

BLOCKS = "tutelage_blocks"
"""Our attention's name among those of transformers."""
BLOCK_TOKENS = 64
"""Neighbours of so many tokens together share a call and a mask. Measured with examples of 8 to 100
tokens: within a tenth of the fastest for 2 heads of 32 and, but for the shortest, 9 heads of 64."""
TRIED = ((5, 3), (2, 6))
"""Lengths of the examples of two rows on which a way is tried; 2 is the shortest there can be."""
HALF = (torch.bfloat16, torch.float16)
MOVED = {torch.float32: 1e-5, torch.bfloat16: 0.01}
"""How far an example's states may move, of the largest, with the one before it in the row. They do
not at all where it is not seen, but experts read all tokens in one batch."""
ALONE = {torch.float32: 0.01, torch.bfloat16: 0.1}
"""How far they may be from those of the example alone: products of other shapes, through all
layers, differ by 1e-5 in a model of 22; other positions or another mask by much more."""


@dataclass(frozen=True)
class Way:
    """How a model reads packed rows."""

    kind: Literal["blocks", "masked", "alone"]

    def hidden(self, backbone: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
        """The hidden states [N, D] that predict the batch's targets, in their order."""
        if self.kind != "alone":
            return _states(backbone, batch, device, restart=True)
        found, order = [], []
        for group, places_N in _apart(batch):
            found.append(_states(backbone, group, device, restart=False))
            order.append(places_N)
        back_N = torch.from_numpy(np.argsort(np.concatenate(order))).to(device)
        return torch.cat(found).index_select(0, back_N)

    @property
    def note(self) -> str:
        """What a person should know of it, else nothing."""
        return {
            "masked": "  examples of a packed row are kept apart by one mask over all of it: slow",
            "alone": "  this model would mix the examples of a packed row: it reads one a row",
        }.get(self.kind, "")


def choose(model: nn.Module, backbone: nn.Module) -> Way:
    """The fastest way that keeps examples apart in this model, on the device it is on.

    Sets the model's attention accordingly, which for all but packed rows is what it was.
    """
    inner = next((part for part in backbone.modules() if isinstance(part, PreTrainedModel)), None)
    if inner is None:
        return Way("alone")
    given = inner.config._attn_implementation
    device = next(model.parameters()).device
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        if given in ("sdpa", BLOCKS):
            inner.set_attn_implementation(BLOCKS)
            if _keeps_apart(backbone, device):
                return Way("blocks")
            inner.set_attn_implementation("sdpa")
        return Way("masked" if _keeps_apart(backbone, device) else "alone")
    finally:
        for part, was in training.items():
            part.training = was


def _states(
    backbone: nn.Module, batch: PackedBatch, device: torch.device, *, restart: bool
) -> Tensor:
    """One forward; the states [N, D] before each target.

    No attention mask: padding is at the end, where no causal layer looks, and positions that
    restart say where examples begin.
    """
    positions = {"position_ids": torch.from_numpy(batch.positions_BT).to(device)}
    hidden_BTD = backbone(
        input_ids=torch.from_numpy(batch.ids_BT).to(device), use_cache=False,
        **(positions if restart else {}),
    ).last_hidden_state  # fmt: skip
    source_N = torch.from_numpy(batch.source_N).to(device)
    return hidden_BTD.flatten(0, 1).index_select(0, source_N)


def _apart(batch: PackedBatch) -> Iterator[tuple[PackedBatch, np.ndarray]]:
    """The batch's examples one a row, those of like length together, no group larger than the
    batch; and which of the batch's targets are a group's. What follows a last target is left out.
    """
    flat_ids = batch.ids_BT.ravel()
    firsts = np.flatnonzero(batch.positions_BT.ravel() == 0)
    targets = np.split(np.arange(len(batch.source_N)), np.cumsum(batch.counts)[:-1])
    sources = [
        batch.source_N[ours_N] - first for ours_N, first in zip(targets, firsts, strict=True)
    ]
    lengths = [int(source_N[-1]) + 2 if len(source_N) else 1 for source_N in sources]
    for group in length_groups(lengths, flat_ids.size):
        rows = []
        for index in group:
            mask_L = np.zeros(lengths[index], bool)
            mask_L[sources[index] + 1] = True
            ids_L = flat_ids[firsts[index] : firsts[index] + lengths[index]]
            rows.append(pack([Example(ids_L, mask_L)], [batch.examples[index]]))
        yield stack(rows), np.concatenate([targets[index] for index in group])


@torch.no_grad()
def _keeps_apart(backbone: nn.Module, device: torch.device) -> bool:
    """Whether an example in a packed row gets the states it has alone, whatever stands before it.

    Where there is FlashAttention, in bfloat16 too.
    """
    dtypes = [torch.float32, *([torch.bfloat16] if has_flash(device) else [])]
    return all(_kept(backbone, device, dtype) for dtype in dtypes)


def _kept(backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    batches = [_tried(first) for first in (0, 4)]
    try:
        with torch.autocast(device.type, dtype) if dtype in HALF else nullcontext():
            packed_ND, moved_ND = (
                _states(backbone, batch, device, restart=True) for batch in batches
            )
            alone_ND, moved_alone_ND = (
                Way("alone").hidden(backbone, batch, device) for batch in batches
            )
    except (TypeError, ValueError, RuntimeError):  # it takes no positions, or has no such kernel
        return False
    second_N = np.repeat(np.arange(len(batches[0].counts)) % 2 == 1, batches[0].counts)
    moved = (packed_ND - moved_ND)[torch.from_numpy(second_N).to(device)].abs().max()
    apart = max((packed_ND - alone_ND).abs().max(), (moved_ND - moved_alone_ND).abs().max())
    largest = float(alone_ND.abs().max())
    return float(moved) <= MOVED[dtype] * largest and float(apart) <= ALONE[dtype] * largest


def _tried(first: int) -> PackedBatch:
    """Two rows of two examples; `first` moves every token of the one that stands before."""
    rows = []
    for lengths in TRIED:
        examples = [
            Example((np.arange(length) + move) % 8, np.arange(length) > 0)
            for length, move in zip(lengths, (first, 1), strict=True)
        ]
        rows.append(pack(examples, [0, 1]))
    return stack(rows)


def has_flash(device: torch.device) -> bool:
    """Whether FlashAttention is installed for this device; nothing is fetched from a hub."""
    return device.type != "cpu" and (is_flash_attn_2_available() or is_torch_npu_available())


@dataclass(frozen=True)
class Block:
    """A part of a row whose tokens look at each other only."""

    tokens: int
    mask_11LL: Tensor | None
    """None where each token looks at all before it."""


@dataclass(frozen=True)
class Blocks:
    """What stands for a mask between transformers and our attention."""

    rows: tuple[tuple[Block, ...], ...]
    ends: tuple[int, ...]
    """Where examples begin in all rows laid end to end, and the end of the last."""


def block_masks(**given: Any) -> Tensor | Blocks | None:
    """transformers' mask maker for our attention; of rows that are not packed, that of SDPA.

    What a layer may look at (all before, a window, a chunk) comes as a function of two places in
    the row, with packing in it. A row is cut before each token that does not look at the one before
    it, and the function is called on each part alone.
    """
    packed = (
        not given.get("allow_is_causal_skip", True) and given.get("attention_mask") is None
        and not given.get("use_vmap") and given["q_length"] == given["kv_length"] > 1
    )  # fmt: skip
    if not packed:
        return sdpa_mask(**given)
    looks, device, width = given["mask_function"], given["device"], given["q_length"]
    rows_B1 = torch.arange(given["batch_size"], device=device)[:, None]
    places_1T = torch.arange(width, device=device)[None]
    zero = torch.zeros((), dtype=torch.long, device=device)
    linked_BT = looks(rows_B1, zero, places_1T[:, 1:], places_1T[:, :-1])
    linked_BT = linked_BT.expand(len(rows_B1), -1).cpu().numpy()
    rows, ends = [], [0]
    for row_1, linked_T in zip(rows_B1, linked_BT, strict=True):
        cuts = (np.flatnonzero(~linked_T) + 1).tolist()
        lengths = [last - first for first, last in pairwise([0, *cuts, width])]
        ends += (ends[-1] + np.cumsum(lengths)).tolist()
        blocks, first = [], 0
        for tokens in _joined(lengths):
            places_L = places_1T[0, first : first + tokens]
            mask_LL = looks(row_1, zero, places_L[:, None], places_L[None])
            plain = torch.equal(mask_LL, torch.ones_like(mask_LL).tril())
            blocks.append(Block(tokens, None if plain else mask_LL[None, None]))
            first += tokens
        rows.append(tuple(blocks))
    return Blocks(tuple(rows), tuple(ends))


def _joined(lengths: Sequence[int]) -> list[int]:
    """Short neighbours joined, up to BLOCK_TOKENS."""
    sizes: list[int] = []
    for length in lengths:
        if sizes and sizes[-1] + length <= BLOCK_TOKENS:
            sizes[-1] += length
        else:
            sizes.append(length)
    return sizes


def block_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | Blocks | None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' SDPA, [B, H, T, D] -> [B, T, H, D], called for each block of each row alone."""
    if not isinstance(attention_mask, Blocks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if dtype in HALF and query.shape[-1] == value.shape[-1] and has_flash(query.device):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        return _flash(query, key, value, attention_mask.ends, **settings), None
    rows = []
    # By split, whose gradient is one concatenation; that of a slice is a tensor of the whole row.
    split = (x.split(1) for x in (query, key, value))
    for blocks, *row in zip(attention_mask.rows, *split, strict=True):
        sizes = [block.tokens for block in blocks]
        parts = zip(blocks, *(x.split(sizes, 2) for x in row), strict=True)
        done = [sdpa_attention_forward(module, q, k, v, block.mask_11LL, **settings)[0]
                for block, q, k, v in parts]  # fmt: skip
        rows.append(torch.cat(done, 1))
    return torch.cat(rows), None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, ends: Sequence[int], *, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """All examples in one call [B, T, H, D]; the window is the layer's own, as transformers has it.

    Where examples begin must be said: by positions, transformers finds it in one row only, and
    lets attention cross in a batch of several.
    """
    ends_E = torch.tensor(ends, dtype=torch.int32, device=query.device)
    longest = max(last - first for first, last in pairwise(ends))
    return _flash_attention_forward(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None,
        query_length=query.shape[2], is_causal=True, dropout=dropout, softmax_scale=scaling,
        sliding_window=sliding_window,
        cu_seq_lens_q=ends_E, cu_seq_lens_k=ends_E,  # type: ignore[arg-type]
        max_length_q=longest, max_length_k=longest, attn_implementation="flash_attention_2",
    )  # fmt: skip


AttentionInterface.register(BLOCKS, block_attention)
AttentionMaskInterface.register(BLOCKS, block_masks)
