"""A student against its teacher on fixed token sequences: how far apart they are, token by token.

Legend: N response tokens, C tokens of a chunk, D hidden size, V vocabulary, K = TOP_K, B rows of a
batch, T its longest sequence. Owns the measures and the memory they take; where sequences come from
and how sure a figure is (`stats`) belongs to others.

A model is read once: `read_sequences` keeps the hidden states of response tokens, so that one
teacher is compared with many students without running again. Only the output layers run per pair,
over chunks of tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tutelage.core.errors import DataError, ModelError
from tutelage.models.load import BackboneAndHead, backbone_and_head

TOP_K = 10
BATCH_TOKENS = 1024
"""Tokens of a batch through the backbone, padding included. 24 answers of 100 tokens: 9 % padding
and 7.8 s of a core with 135M parameters; at 4096, 28 % and 9.7 s."""
CHUNK_BYTES = 64 * 2**20
"""Bytes of all [C, V] buffers alive together."""
CHUNK_BUFFERS = 3
"""fp32 [C, V] buffers alive together: two models' log-probabilities and one work buffer."""

OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and the answer on which two models are compared, as ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


@dataclass(frozen=True)
class Reading:
    """What a model made of the sequences: hidden states that predict response tokens, on the CPU.

    N * D numbers in the model's dtype: 1,000 answers of 200 tokens at D = 4096 in bf16 are 1.6 GB.
    """

    hidden_ND: Sequence[Tensor]
    """One tensor a sequence."""
    head: BackboneAndHead


@dataclass(frozen=True)
class SequenceComparison:
    """Sums over the response tokens of one sequence; divide sums by sums, never mean by mean.

    p is the student, q the teacher, both over the full vocabulary at temperature 1; nats.
    """

    tokens: int
    forward_kl: float
    """E_teacher[log q - log p]."""
    reverse_kl: float
    """E_student[log p - log q]."""
    top1_agreement: float
    """1 where both have the same most likely id."""
    topk_overlap: float
    """|topk(p) and topk(q)| / K, K = 10."""
    overlap_mass: float
    """Teacher's probability of the ids in both top-k sets."""
    student_entropy: float
    teacher_entropy: float
    label_gap: float
    """log q(y) - log p(y) of the token y that stands in the sequence."""


MEASURES = tuple(field.name for field in fields(SequenceComparison) if field.name != "tokens")


def compare_models(
    student: PreTrainedModel, teacher: PreTrainedModel, sequences: Sequence[TokenSequence], *,
    chunk_bytes: int = CHUNK_BYTES, on_tokens: OnTokens = lambda count: None,
) -> list[SequenceComparison]:  # fmt: skip
    """Read the sequences with both models and compare; one result a sequence, in order.

    For several students, read the teacher once and call `compare_readings` for each.
    `on_tokens` counts as there: twice the tokens of `sequences`, plus their response tokens.
    Raises DataError, ModelError.
    """
    return compare_readings(
        read_sequences(student, sequences, on_tokens=on_tokens),
        read_sequences(teacher, sequences, on_tokens=on_tokens),
        sequences, chunk_bytes=chunk_bytes, on_tokens=on_tokens,
    )  # fmt: skip


@torch.no_grad()
def read_sequences(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *,
    batch_tokens: int = BATCH_TOKENS, on_tokens: OnTokens = lambda count: None,
) -> Reading:  # fmt: skip
    """One forward of the backbone over all sequences, in batches of like length.

    `on_tokens` hears of prompt and response tokens as they are read. The model is left in the mode
    it was in. Raises DataError for a sequence without a prompt or a response.
    """
    for index, sequence in enumerate(sequences):
        if len(sequence.prompt_ids) == 0 or len(sequence.response_ids) == 0:
            raise DataError(f"sequence {index} lacks a prompt or a response: leave it out")
    head = backbone_and_head(model)
    hidden_ND: list[Tensor] = [torch.empty(0)] * len(sequences)
    was_training = model.training
    model.eval()
    try:
        for rows in _batches([_length(sequence) for sequence in sequences], batch_tokens):
            batch = [sequences[row] for row in rows]
            hidden_BTD = _hidden_states(head.backbone, batch, device=head.weight_VD.device)
            for row, sequence, hidden_TD in zip(rows, batch, hidden_BTD, strict=True):
                # The state at the last prompt token predicts the first response token.
                first = len(sequence.prompt_ids) - 1
                kept = hidden_TD[first : first + len(sequence.response_ids)]
                hidden_ND[row] = kept.to("cpu", copy=True)  # a view would keep the whole batch
            on_tokens(sum(_length(sequence) for sequence in batch))
    finally:
        model.train(was_training)
    return Reading(hidden_ND, head)


@torch.no_grad()
def compare_readings(
    student: Reading, teacher: Reading, sequences: Sequence[TokenSequence], *,
    chunk_bytes: int = CHUNK_BYTES, on_tokens: OnTokens = lambda count: None,
) -> list[SequenceComparison]:  # fmt: skip
    """Compare what two models read in the same `sequences`; one result a sequence, in order.

    `chunk_bytes` bounds the [C, V] buffers of both models together (one token at least).
    `on_tokens` hears of response tokens. Raises ModelError for vocabularies of unlike size and for
    logits that are not finite.
    """
    vocab = len(student.head.weight_VD)
    if vocab != len(teacher.head.weight_VD):
        raise ModelError(
            f"student and teacher have {vocab} and {len(teacher.head.weight_VD)} token ids: "
            "they can be compared only on one vocabulary"
        )
    counts = [len(sequence.response_ids) for sequence in sequences]
    student_ND, teacher_ND = torch.cat(list(student.hidden_ND)), torch.cat(list(teacher.hidden_ND))
    labels_N = torch.tensor([i for sequence in sequences for i in sequence.response_ids])
    chunk = max(1, chunk_bytes // (CHUNK_BUFFERS * vocab * torch.float32.itemsize))
    columns = []
    for start in range(0, len(labels_N), chunk):
        part = slice(start, start + chunk)
        logp_CV = _log_probs(student_ND[part], student.head)
        logq_CV = _log_probs(teacher_ND[part], teacher.head)
        columns.append(_measures(logp_CV, logq_CV, labels_N[part].to(logp_CV.device)).cpu())
        on_tokens(len(labels_N[part]))
        del logp_CV, logq_CV  # before the next chunk's logits, not after
    per_token = torch.cat(columns, dim=1).split(counts, dim=1)
    return [_summed(tokens_MN, index) for index, tokens_MN in enumerate(per_token)]


def _length(sequence: TokenSequence) -> int:
    return len(sequence.prompt_ids) + len(sequence.response_ids)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows by falling length, as many as fit; the first batch is the largest, so it fails first."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _hidden_states(
    backbone: torch.nn.Module, batch: Sequence[TokenSequence], *, device: torch.device
) -> Tensor:
    """Last hidden states [B, T, D] of right-padded rows.

    Without an attention mask: a causal model's real tokens never see the padding to their right,
    whatever its id, and attention without a mask takes the fast path.
    """
    rows = [torch.tensor([*s.prompt_ids, *s.response_ids[:-1]]) for s in batch]
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    return backbone(input_ids=ids_BT, use_cache=False).last_hidden_state


def _log_probs(hidden_CD: Tensor, head: BackboneAndHead) -> Tensor:
    """fp32 log-softmax of the output layer."""
    return head.logits(hidden_CD.to(head.weight_VD.device)).log_softmax(-1)


def _measures(logp_CV: Tensor, logq_CV: Tensor, labels_C: Tensor) -> Tensor:
    """The values [len(MEASURES), C] of each token, in the order of MEASURES."""
    topp_CK, topq_CK = logp_CV.topk(TOP_K), logq_CV.topk(TOP_K)
    shared_CKK = topq_CK.indices.unsqueeze(2) == topp_CK.indices.unsqueeze(1)
    shared_CK = shared_CKK.any(2).float()  # of the teacher's top ids, those in the student's too
    prob_CV = logq_CV.exp()
    cross_q_C, entropy_q_C = -_dot(prob_CV, logp_CV), -_dot(prob_CV, logq_CV)
    torch.exp(logp_CV, out=prob_CV)
    cross_p_C, entropy_p_C = -_dot(prob_CV, logq_CV), -_dot(prob_CV, logp_CV)
    label_p_C, label_q_C = (x.gather(1, labels_C[:, None])[:, 0] for x in (logp_CV, logq_CV))
    return torch.stack(
        [
            cross_q_C - entropy_q_C,
            cross_p_C - entropy_p_C,
            (topp_CK.indices[:, 0] == topq_CK.indices[:, 0]).float(),
            shared_CK.mean(1),
            (shared_CK * topq_CK.values.exp()).sum(1),
            entropy_p_C,
            entropy_q_C,
            label_q_C - label_p_C,
        ]
    )


def _dot(a_CV: Tensor, b_CV: Tensor) -> Tensor:
    """Row by row dot product [C], as a matrix product: it makes no [C, V] buffer of its own."""
    return torch.bmm(a_CV.unsqueeze(1), b_CV.unsqueeze(2)).flatten()


def _summed(values_MN: Tensor, index: int) -> SequenceComparison:
    sums = values_MN.double().sum(1).tolist()
    if not all(map(math.isfinite, sums)):
        raise ModelError(f"a model gives logits that are not finite on sequence {index}: damaged?")
    return SequenceComparison(values_MN.shape[1], **dict(zip(MEASURES, sums, strict=True)))
