"""Reads prompt and response once under a teacher and turns its logits into targets.

Owns batching, which position predicts which token, and the memory of the head. Does not know what a
target is (the estimator's part) nor how targets are stored.

Response token j behind a prompt of P tokens stands at position P + j and is predicted by position
P + j - 1. So a sequence of P + N tokens is read up to its last but one, and the last N positions
read are the ones that predict.

Shapes: B sequences, T padded positions, D hidden size, N response tokens of a batch or a chunk,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tutelage.core.errors import EngineError
from tutelage.engines.base import Scorable, sequence_rng
from tutelage.models.load import backbone_and_head, check_head
from tutelage.targets.schema import TokenTargets, concat_targets

if TYPE_CHECKING:
    from tutelage.engines.base import Estimator

Part = TypeVar("Part")

# Padded positions of one backbone pass: bounds its activations whatever the number of sequences.
# 4096 was 10 % slower than 2048 on a CPU (135M): its activations no longer fit a 32 MB cache.
BATCH_TOKENS = 2048
_FLOAT32_BYTES = 4


class TransformersScorer:
    """The embedded `Scorer`.

    Args:
        model: a causal LM whose logits are its output embedding applied to the last hidden state
            (with a `final_logit_softcapping`, where its config has one); put in eval mode and moved
            to `device`.
        device: any torch device name.
        chunk_bytes: size of the one float32 chunk of logits, [N, V], that is alive at a time.

    Raises:
        ModelError: for a model whose logits are made otherwise.
    """

    def __init__(self, model: PreTrainedModel, *, device: str, chunk_bytes: int) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()  # type: ignore[arg-type]
        self.head = backbone_and_head(model)
        self.chunk_tokens = max(1, chunk_bytes // (_FLOAT32_BYTES * len(self.head.weight_VD)))
        check_head(model)

    def score(
        self,
        sequences: Sequence[Scorable],
        *,
        estimator: Estimator,
        seed: int,
        keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[TokenTargets]:
        """See `Scorer.score`.

        Raises:
            EngineError: for an empty prompt or response, or logits that are not finite.
        """
        results: dict[int, TokenTargets] = {}
        for batch in length_sorted_batches(sequences):
            sizes = [len(sequences[index].response_ids) for index in batch]
            streams = [sequence_rng(seed, keys[index], "score") for index in batch]
            uniforms = [
                stream.random((size, estimator.draws), dtype=np.float32)
                for stream, size in zip(streams, sizes, strict=True)
            ]
            uniforms_NS = torch.from_numpy(np.concatenate(uniforms)).to(self.device)
            visit = partial(_estimate, estimator, uniforms_NS)
            whole = concat_targets(self._visit_batch(sequences, batch, visit, on_tokens))
            results.update(zip(batch, split_targets(whole, sizes), strict=True))
        return [results[index] for index in range(len(sequences))]

    def label_logps(
        self, sequences: Sequence[Scorable], *, on_tokens: Callable[[int], None]
    ) -> list[np.ndarray]:
        """Log-probability (nats, temperature 1, float32) of every response token, and nothing else.

        Raises:
            EngineError: for an empty prompt or response, or logits that are not finite.
        """
        results: dict[int, np.ndarray] = {}
        for batch in length_sorted_batches(sequences):
            sizes = [len(sequences[index].response_ids) for index in batch]
            whole_N = np.concatenate(self._visit_batch(sequences, batch, _label_logp, on_tokens))
            pieces = np.split(whole_N, list(accumulate(sizes))[:-1])
            results.update(zip(batch, pieces, strict=True))
        return [results[index] for index in range(len(sequences))]

    @torch.inference_mode()
    def hidden_states(
        self, sequences: Sequence[Scorable], *, on_tokens: Callable[[int], None]
    ) -> Tensor:
        """What the head reads before every response token, end to end in the given order, [N, D].

        Raises EngineError for an empty prompt or response.
        """
        pieces: dict[int, Tensor] = {}
        for batch in length_sorted_batches(sequences):
            chosen = [sequences[index] for index in batch]
            sizes = [len(one.response_ids) for one in chosen]
            pieces.update(zip(batch, self._response_hidden(chosen).split(sizes), strict=True))
            on_tokens(sum(sizes))
        return torch.cat([pieces[index] for index in range(len(sequences))])

    @torch.inference_mode()
    def _visit_batch(
        self,
        sequences: Sequence[Scorable],
        batch: Sequence[int],
        visit: Callable[[Tensor, Tensor, slice], Part],
        on_tokens: Callable[[int], None],
    ) -> list[Part]:
        """Give `visit` the logits of the batch's response tokens, one chunk after the other."""
        chosen = [sequences[index] for index in batch]
        hidden_ND = self._response_hidden(chosen)
        labels = [token for one in chosen for token in one.response_ids]
        labels_N = torch.tensor(labels, device=self.device)
        owners = np.repeat(batch, [len(one.response_ids) for one in chosen])
        parts: list[Part] = []
        for first in range(0, len(labels), self.chunk_tokens):
            rows = slice(first, min(first + self.chunk_tokens, len(labels)))
            logits_NV = self.head.logits(hidden_ND[rows])
            bad = _first_not_finite(logits_NV)
            if bad is not None:
                raise EngineError(
                    f"{_called(sequences, int(owners[rows][bad]))}: teacher logits are not finite "
                    "at a response token; check the teacher's weights and dtype"
                )
            parts.append(visit(logits_NV, labels_N[rows], rows))
            del logits_NV  # before the next chunk is made, or two are alive
            on_tokens(rows.stop - rows.start)
        return parts

    def _response_hidden(self, chosen: Sequence[Scorable]) -> Tensor:
        """Hidden states that predict the response tokens of all sequences, in order, [N, D]."""
        read = [[*one.prompt_ids, *one.response_ids][:-1] for one in chosen]
        width = max(len(ids) for ids in read)
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in read], device=self.device)
        # No mask: padding stands on the right, where causal attention never looks.
        hidden_BTD = self.head.backbone(input_ids=padded, use_cache=False).last_hidden_state
        wanted = [
            row * width + position
            for row, (ids, one) in enumerate(zip(read, chosen, strict=True))
            for position in range(len(ids) - len(one.response_ids), len(ids))
        ]
        return hidden_BTD.flatten(0, 1)[torch.tensor(wanted, device=self.device)]


def _estimate(
    estimator: Estimator, uniforms_NS: Tensor, logits_NV: Tensor, labels_N: Tensor, rows: slice
) -> TokenTargets:
    return estimator(logits_NV, labels_N, uniforms_NS[rows])


def _label_logp(logits_NV: Tensor, labels_N: Tensor, rows: slice) -> np.ndarray:
    label_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    return (label_N - logits_NV.logsumexp(-1)).cpu().numpy()


def length_sorted_batches(sequences: Sequence[Scorable]) -> Iterator[list[int]]:
    """Indices, longest first, in groups whose padded rectangle fits BATCH_TOKENS."""
    lengths = [len(one.prompt_ids) + len(one.response_ids) for one in sequences]
    for index, one in enumerate(sequences):
        if len(one.prompt_ids) == 0 or len(one.response_ids) == 0:
            raise EngineError(f"{_called(sequences, index)}: its prompt or its response is empty")
    order = sorted(range(len(sequences)), key=lengths.__getitem__, reverse=True)
    while order:
        num_rows = max(1, BATCH_TOKENS // lengths[order[0]])
        yield order[:num_rows]
        order = order[num_rows:]


def _called(sequences: Sequence[Scorable], index: int) -> str:
    name = sequences[index].name
    return f"row {name}" if name else f"sequence {index}"


def _first_not_finite(logits_NV: Tensor) -> int | None:
    """A row's sum is finite only if all its logits are: 3 ms, elementwise 94 (256 x 49,152)."""
    bad_N = ~torch.isfinite(logits_NV.sum(-1)).cpu().numpy()
    return int(bad_N.argmax()) if bad_N.any() else None


def split_targets(whole: TokenTargets, sizes: Sequence[int]) -> list[TokenTargets]:
    """The inverse of `concat_targets`: pieces of `sizes` tokens."""
    edges = [0, *accumulate(sizes)]
    head_edges = np.concatenate([[0], whole.head_counts_N.cumsum()])
    tail_edges = np.concatenate([[0], whole.tail_counts_N.cumsum()])
    pieces = []
    for first, last in pairwise(edges):
        head = slice(head_edges[first], head_edges[last])
        tail = slice(tail_edges[first], tail_edges[last])
        pieces.append(
            replace(
                whole,
                head_counts_N=whole.head_counts_N[first:last],
                head_ids_M=whole.head_ids_M[head],
                head_logq_M=whole.head_logq_M[head],
                tail_counts_N=whole.tail_counts_N[first:last],
                tail_ids_T=whole.tail_ids_T[tail],
                label_logp_N=whole.label_logp_N[first:last],
                entropy_N=whole.entropy_N[first:last],
            )
        )
    return pieces
