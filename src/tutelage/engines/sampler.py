"""Answers prompts with a loaded Hugging Face causal LM, many at once, on any device.

Owns batching, decoding and the draw of each token. Does not know chat templates, files or graders.

Continuous batching in one loop: prompts wait longest first; `batch_size` slots decode one token a
step; a finished row is overwritten by the last one, so every row of a forward pass is useful; free
slots are refilled by a prefill that ends in the running column. Because prompts come longest first,
and every running row is at least as long as its own prompt, the next prompt always fits.

Shapes: B running rows, P prompt columns, V vocabulary, K blocks of W = 256 entries of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tutelage.core.errors import EngineError
from tutelage.engines.base import Completion, SamplingParams, sequence_rng
from tutelage.engines.kv_slots import Frame, SlotCache, left_padding_mask

# Padded prompt tokens in one prefill: bounds its activations, and is far past the few hundred where
# a matrix product of a small model runs at full speed.
PREFILL_TOKENS = 2048
# Slots are refilled once 1/8 of them are free: a prefill of one short prompt costs as much as a
# step of the whole batch, so it should bring several. Against waiting for an empty batch: 1.10
# times the tokens/s (135M, CPU, 64 prompts in 16 slots, 7-96 tokens); 1/16 to 1/2 differ by less
# than 2 %.
REFILL_SHARE = 8
_BLOCK_WIDTH = 256


@dataclass
class _Row:
    """A running sequence; row r of the cache belongs to entry r of the running list."""

    index: int
    num_prompt: int
    start: int
    rng: np.random.Generator
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""


class TransformersSampler:
    """The embedded `Sampler`.

    Args:
        model: a causal LM whose layers are attention only; put in eval mode and moved to `device`.
        batch_size: sequences decoded together. Memory of the cache is batch_size * (prompt +
            answer) * layers * 2 * kv_heads * head_dim numbers.
        device: any torch device name.

    Raises:
        EngineError: for layers whose state is not keys and values, an empty prompt, or logits that
            are not finite.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int, device: str) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        unknown = kinds - {"full_attention", "sliding_attention"}
        if unknown:
            raise EngineError(
                f"the transformers sampler cannot cache layers of kind {sorted(unknown)} "
                f"({config.model_type}); use the vllm or server engine for this model"
            )
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.num_layers = int(config.num_hidden_layers)

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[Completion]:
        """See `Sampler.sample`."""
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise EngineError(f"prompt {index} is empty; give it at least one token")
        waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True))
        completions: dict[int, Completion] = {}
        run = _Run(self.model, self.num_layers, min(self.batch_size, len(prompts)), self.device)
        while waiting or run.rows:
            free = self.batch_size - len(run.rows)
            if waiting and (not run.rows or free * REFILL_SHARE >= self.batch_size):
                group = _take_group(waiting, prompts, free)
                rngs = [sequence_rng(params.seed, keys[i], "sample") for i in group]
                fresh, logits_BV = run.prefill(group, [prompts[i] for i in group], rngs)
            else:
                fresh, logits_BV = run.rows, run.decode()
            _append_tokens(fresh, logits_BV, params)
            on_tokens(len(fresh))
            for row in run.drop_finished():
                completions[row.index] = _completion(row)
        return [completions[index] for index in range(len(prompts))]


class _Run:
    """The running rows of one call and the cache they live in."""

    def __init__(
        self, model: PreTrainedModel, num_layers: int, num_rows: int, device: torch.device
    ) -> None:
        self.model = model
        self.device = device
        self.cache = SlotCache(num_layers=num_layers, num_rows=num_rows)
        self.rows: list[_Row] = []
        self.end = 0  # the column behind the last token of every running row

    def prefill(
        self, group: list[int], prompts: list[Sequence[int]], rngs: list[np.random.Generator]
    ) -> tuple[list[_Row], Tensor]:
        """Take new rows in; returns them and their next-token logits, [B, V]."""
        num_columns = max(len(prompt) for prompt in prompts)
        if not self.rows:
            self.end = num_columns
            self.cache.move_left(slice(0, 0), room=num_columns + 1)
        first = self.end - num_columns
        fresh = [
            _Row(index, len(prompt), self.end - len(prompt), rng)
            for index, prompt, rng in zip(group, prompts, rngs, strict=True)
        ]
        padded = [[0] * (num_columns - len(prompt)) + list(prompt) for prompt in prompts]
        frame = Frame(
            rows=slice(len(self.rows), len(self.rows) + len(fresh)),
            columns=slice(first, self.end),
            queries=num_columns,
        )
        column_P = torch.arange(first, self.end, device=self.device)
        starts_B1 = torch.tensor([[row.start] for row in fresh], device=self.device)
        positions_BP = (column_P - starts_B1).clamp(min=0)
        logits_BV = self._forward(padded, positions_BP, fresh, frame)
        self.rows = self.rows + fresh
        return fresh, logits_BV

    def decode(self) -> Tensor:
        """One step for every running row; returns the next-token logits, [B, V]."""
        first = min(row.start for row in self.rows)
        if self.end == self.cache.capacity:
            self.cache.move_left(slice(first, self.end), room=1)
            for row in self.rows:
                row.start -= first
            self.end, first = self.end - first, 0
        self.end += 1
        frame = Frame(rows=slice(0, len(self.rows)), columns=slice(first, self.end), queries=1)
        positions_B1 = torch.tensor(
            [[self.end - 1 - row.start] for row in self.rows], device=self.device
        )
        return self._forward([[row.ids[-1]] for row in self.rows], positions_B1, self.rows, frame)

    def _forward(
        self, ids: list[list[int]], positions: Tensor, rows: list[_Row], frame: Frame
    ) -> Tensor:
        self.cache.set_frame(frame)
        starts = [row.start for row in rows]
        output = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=left_padding_mask(starts, frame.columns, device=self.device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def drop_finished(self) -> list[_Row]:
        """Take finished rows out; the last row moves into each gap."""
        finished = [slot for slot, row in enumerate(self.rows) if row.finish_reason]
        dropped = [self.rows[slot] for slot in finished]
        for slot in reversed(finished):
            last = len(self.rows) - 1
            if slot != last:
                columns = slice(self.rows[last].start, self.end)
                self.cache.copy_row(last, slot, columns)
                self.rows[slot] = self.rows[last]
            self.rows.pop()
        return dropped


def _take_group(waiting: deque[int], prompts: Sequence[Sequence[int]], limit: int) -> list[int]:
    """Up to `limit` prompts off the queue that fit PREFILL_TOKENS when padded; at least one."""
    num_rows = max(1, min(limit, PREFILL_TOKENS // len(prompts[waiting[0]])))
    return [waiting.popleft() for _ in range(min(num_rows, len(waiting)))]


def _append_tokens(rows: Sequence[_Row], logits_BV: Tensor, params: SamplingParams) -> None:
    """Draw one token for each row and mark the rows that it ends."""
    uniforms_B = np.array([row.rng.random() for row in rows])
    ids_B, logps_B = draw(logits_BV, temperature=params.temperature, uniforms_B=uniforms_B)
    for row, token, logp in zip(rows, ids_B.tolist(), logps_B.tolist(), strict=True):
        if not np.isfinite(logp):
            raise EngineError(
                f"prompt {row.index}: logits at answer token {len(row.ids)} are not finite; "
                "check the model's weights and dtype"
            )
        row.ids.append(token)
        row.logps.append(logp)
        if token in params.stop_ids:
            row.finish_reason = "stop"
        elif len(row.ids) == params.max_tokens:
            row.finish_reason = "length"


def _completion(row: _Row) -> Completion:
    return Completion(
        response_ids=tuple(row.ids),
        logps=tuple(row.logps),
        finish_reason="stop" if row.finish_reason == "stop" else "length",
    )


def draw(
    logits_BV: Tensor, *, temperature: float, uniforms_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A token for each row by inverse CDF, and its log-probability at temperature 1.

    token = min{v : sum_{w <= v} p_w > u} with p = softmax(logits / temperature), in vocabulary
    order (no sort); temperature 0 takes the largest logit. Returns ids_B (int64) and logps_B
    (float32, nats, not finite where the logits are not).
    """
    logits_BV = logits_BV.float()
    top_B1 = logits_BV.amax(-1, keepdim=True)
    weights_BKW = _blocks((logits_BV - top_B1).exp_())
    mass_BK = _to_numpy(weights_BKW.sum(-1))
    if temperature == 0:
        ids_B = logits_BV.argmax(-1).cpu().numpy()
    elif temperature == 1:
        ids_B = _inverse_cdf(weights_BKW, mass_BK, uniforms_B)
    else:
        tempered_BKW = _blocks(((logits_BV - top_B1) / temperature).exp_())
        ids_B = _inverse_cdf(tempered_BKW, _to_numpy(tempered_BKW.sum(-1)), uniforms_B)
    chosen_B1 = torch.as_tensor(ids_B, device=logits_BV.device)[:, None]
    shifted_B = _to_numpy((logits_BV.gather(-1, chosen_B1) - top_B1)[:, 0])
    return ids_B, (shifted_B - np.log(mass_BK.sum(-1))).astype(np.float32)


def _blocks(weights_BV: Tensor) -> Tensor:
    """[B, V] -> [B, K, W], zeros behind the vocabulary's end."""
    missing = -weights_BV.shape[1] % _BLOCK_WIDTH
    if missing:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, missing))
    return weights_BV.view(weights_BV.shape[0], -1, _BLOCK_WIDTH)


def _inverse_cdf(weights_BKW: Tensor, mass_BK: np.ndarray, uniforms_B: np.ndarray) -> np.ndarray:
    """Index of the entry in which u * total falls: first its block, then its place in the block.

    Two levels keep the running sums in float64 on the host for K + W numbers a row in place of V
    (a float64 scan of 64 x 49,152 took 40 ms, this 1 ms) and need no float64 on the device.
    """
    target_B = uniforms_B * mass_BK.sum(-1)
    block_B, rest_B = _first_above(mass_BK, target_B)
    rows_B = torch.arange(len(block_B), device=weights_BKW.device)
    picked = torch.as_tensor(block_B, device=weights_BKW.device)
    inner_B, _ = _first_above(_to_numpy(weights_BKW[rows_B, picked]), rest_B)
    return block_B * _BLOCK_WIDTH + inner_B


def _first_above(mass_BK: np.ndarray, target_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index whose running sum exceeds the target, and what of the target is left there.

    Falls back to the last entry with mass where rounding leaves the target at or past the total.
    """
    running_BK = mass_BK.cumsum(-1)
    last_B = mass_BK.shape[1] - 1 - (mass_BK[:, ::-1] > 0).argmax(-1)
    index_B = np.minimum((running_BK <= target_B[:, None]).sum(-1), last_B)
    rows_B = np.arange(len(index_B))
    before_B = running_BK[rows_B, index_B] - mass_BK[rows_B, index_B]
    return index_B, target_B - before_B


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().double().numpy()
