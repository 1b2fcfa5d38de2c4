"""How true a stored target is for its size: error of the head gradient against bytes a token.

The gradient of forward KL by the head's weight is `sum_n (p_n - q_n) h_n^T`, [V, D]. A method
stores some of q; its error is the relative L2 distance of the gradient it gives from the dense one,
over all tokens together: what is noise averages away with their number, what is bias does not.

Legend: N tokens, V vocabulary, D hidden width, K largest ids, M stored entries.

Each peer is given our own codec where it has none of its own, which is smaller than what it uses.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tutelage.bench.material import Answer, Hidden
from tutelage.core.progress import Bar
from tutelage.engines.scorer import split_targets
from tutelage.targets import distillkit
from tutelage.targets.batch import pad_targets
from tutelage.targets.calibrate import tau_for_budget
from tutelage.targets.codec import TARGET_LISTS
from tutelage.targets.estimator import fixed_sample, threshold_sample
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets, concat_targets
from tutelage.targets.writer import write_shard

CHUNK = 256
"""Tokens whose [N, V] logits are alive."""
SIZED_TOKENS = 16_384
"""Of which bytes are measured: a quarter of a row group, and no more memory than that."""
LARGEST = 128
TOP_K = (1, 2, 4, 8, 12, 25, 50)
PURE = (3, 6, 12, 24, 48, 96)
TAUS: Mapping[float, Sequence[float]] = {
    1.0: (0.9, 0.5, 0.2, 0.1, 0.06, 0.03, 0.02, 0.01, 0.005, 0.0025),
    0.5: (0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.004, 0.001, 0.0003),
}
"""By the teacher's temperature: each list spans 8 to 128 bytes a token."""
TARGET_BUDGET: Mapping[float, float] = {1.0: 37.0, 0.5: 12.0}
CALIBRATION = 512
OURS, RENORMALISED, TRUNCATED, PURE_SAMPLING, DISTILLKIT = (
    "threshold", "top-k renormalised", "top-k truncated", "pure sampling", "DistillKit",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One setting of one method on one teacher."""

    temperature: float
    method: str
    setting: str
    ids: float
    """Stored ids a token"""
    bytes: float
    """Of what is stored of the teacher, a token; the text's own ids are not counted for anyone"""
    errors: Mapping[int, float]
    """By how many tokens: relative L2 error of the head-weight gradient"""


@dataclass(frozen=True)
class _Stored:
    """What a method keeps of a chunk's tokens, as entries of q_hat and as targets to be written."""

    token_M: Tensor
    id_M: Tensor
    q_M: Tensor
    targets: TokenTargets | None = None
    student_weight_N: Tensor | None = None
    """The gradient is `weight * p - q_hat`; None = 1. Truncation scales p by the head's mass."""


@dataclass
class _Sum:
    """Running gradient of one setting."""

    method: str
    setting: str
    fixed_bytes: float | None
    q_VD: Tensor
    p_VD: Tensor | None = None
    entries: int = 0
    kept: list[TokenTargets] = field(default_factory=list)
    errors: dict[int, float] = field(default_factory=dict)


@torch.inference_mode()
def measure(
    hidden: Hidden, answers: Sequence[Answer], *, temperature: float, counts: Sequence[int],
    bar: Bar, directions: int = 0, seed: int = 0,
) -> list[Measured]:  # fmt: skip
    """Every method and setting on one teacher (its logits at `temperature`), at each token count.

    `counts` rise; the last is how many tokens are read. Memory: a [V, D] matrix a setting, about
    115 MB each for the bundled teacher. With `directions`, gradients are taken along so many random
    directions of the hidden states only: squared norms keep their mean and are off by about
    sqrt(2 / directions) over the root of the gradient's effective rank, for that much less work.
    """
    generator = torch.Generator().manual_seed(seed)
    V, D = hidden.head.weight_VD.shape
    project_DD = torch.eye(D)
    if directions:
        D = directions
        project_DD = torch.randn(len(project_DD), D, generator=generator) / D**0.5
    sums: dict[tuple[str, str], _Sum] = {}
    dense_q_VD, dense_p_VD = torch.zeros(V, D), torch.zeros(V, D)
    first_NV = hidden.head.logits(hidden.teacher_ND[:CALIBRATION])
    budget_tau = tau_for_budget(
        first_NV, budget=TARGET_BUDGET[temperature], unit="bytes", temperature=temperature
    )
    edges = sorted({*range(0, counts[-1], CHUNK), *counts})
    for start, stop in itertools.pairwise(edges):
        rows = slice(start, stop)
        student_ND, labels_N = hidden.student_ND[rows], hidden.labels_N[rows]
        logits_NV = hidden.head.logits(hidden.teacher_ND[rows])
        q_NV = (logits_NV / temperature).softmax(-1)
        p_NV = (hidden.head.logits(student_ND) / temperature).softmax(-1)
        if directions:
            student_ND = student_ND @ project_DD
        dense_q_VD.addmm_(q_NV.T, student_ND)
        dense_p_VD.addmm_(p_NV.T, student_ND)
        taus = [*TAUS[temperature], budget_tau]
        for method, setting, size, stored in _methods(
            logits_NV, q_NV, labels_N, temperature, taus, generator
        ):
            total = sums.get((method, setting))
            if total is None:
                total = _Sum(method, setting, size, torch.zeros(V, D))
                sums[method, setting] = total
            _add(total, stored, student_ND, p_NV, sized=start < SIZED_TOKENS)
        if stop in counts:
            for total in sums.values():
                total.errors[stop] = _error(total, dense_q_VD, dense_p_VD)
        bar.advance(stop - start)
    read = counts[-1]
    return [
        Measured(
            temperature, total.method, total.setting, total.entries / read,
            total.fixed_bytes or _bytes(total.kept, answers), total.errors,
        )
        for total in sums.values()
    ]  # fmt: skip


def interpolated(points: Sequence[Measured], *, count: int, bytes_: float) -> float | None:
    """The error of a method at a size between its settings, on log-log axes; None outside them."""
    ordered = sorted(points, key=lambda point: point.bytes)
    x = np.log([point.bytes for point in ordered])
    y = np.log([point.errors[count] for point in ordered])
    if not x[0] - 1e-9 <= np.log(bytes_) <= x[-1] + 1e-9:
        return None
    return float(np.exp(np.interp(np.log(bytes_), x, y)))


def _methods(
    logits_NV: Tensor, q_NV: Tensor, labels_N: Tensor, temperature: float, taus: Sequence[float],
    generator: torch.Generator,
) -> Iterator[tuple[str, str, float | None, _Stored]]:  # fmt: skip
    """(method, setting, bytes a token where a published formula says them, what it stores)."""
    count = len(logits_NV)
    for tau in taus:
        offsets_N = torch.rand(count, generator=generator)
        targets = threshold_sample(
            logits_NV, labels_N, tau=tau, offsets_N=offsets_N, temperature=temperature
        )
        yield OURS, f"tau {tau:.3g}", None, _entries(targets)
    for draws in PURE:
        uniforms_NS = torch.rand(count, draws, generator=generator)
        targets = fixed_sample(
            logits_NV, labels_N, head=0, uniforms_NS=uniforms_NS, temperature=temperature
        )
        yield PURE_SAMPLING, f"{draws} draws", None, _entries(targets)
    top = torch.topk(q_NV, LARGEST, -1)
    for k in TOP_K:
        ids_NK, head_NK = top.indices[:, :k], top.values[:, :k]
        mass_N = head_NK.sum(-1)
        targets = _top_k_targets(ids_NK, head_NK, q_NV, labels_N)
        rectangle = _rectangle(ids_NK, head_NK / mass_N[:, None], targets)
        yield RENORMALISED, f"k {k}", None, rectangle
        cut = _rectangle(ids_NK, head_NK, targets)
        yield TRUNCATED, f"k {k}", None, _Stored(**{**vars(cut), "student_weight_N": mass_N})
    settings = (
        ("recommended", distillkit.recommended(q_NV.shape[1])),
        ("budget pick", distillkit.budget_pick(q_NV.shape[1])),
    )
    for name, setting in settings:
        ids_NK, logq_NK = top.indices[:, : setting.k], top.values[:, : setting.k].log()
        packed = distillkit.encode(ids_NK.numpy(), logq_NK.numpy(), setting)
        again_NK = torch.from_numpy(distillkit.decode_logp(packed[0], setting))
        # Its KL normalises what it read ("missing_probability_handling: zero", its default).
        yield (
            DISTILLKIT, name, float(setting.bytes_per_token),
            _rectangle(ids_NK, again_NK.softmax(-1), None),
        )  # fmt: skip


def _entries(targets: TokenTargets) -> _Stored:
    padded = pad_targets([targets])
    token_M, place_M = np.nonzero(padded.valid_NK)
    return _Stored(
        torch.from_numpy(token_M), torch.from_numpy(padded.ids_NK[token_M, place_M]),
        torch.from_numpy(padded.q_NK[token_M, place_M]), targets,
    )  # fmt: skip


def _rectangle(ids_NK: Tensor, q_NK: Tensor, targets: TokenTargets | None) -> _Stored:
    token_M = torch.arange(len(ids_NK)).repeat_interleave(ids_NK.shape[1])
    return _Stored(token_M, ids_NK.reshape(-1), q_NK.reshape(-1), targets)


def _top_k_targets(ids_NK: Tensor, q_NK: Tensor, q_NV: Tensor, labels_N: Tensor) -> TokenTargets:
    """For its bytes only; label and entropy cost a peer nothing if they are said to be 0."""
    count, k = ids_NK.shape
    blank = TokenTargets.blank(count, None)
    return TokenTargets(
        head_counts_N=np.full(count, k, np.int32), head_ids_M=ids_NK.reshape(-1).int().numpy(),
        head_logq_M=q_NK.reshape(-1).log().clamp(min=-60).numpy(),
        tail_counts_N=blank.tail_counts_N, tail_ids_T=blank.tail_ids_T,
        label_logp_N=blank.label_logp_N, entropy_N=blank.entropy_N, tau=None,
    )  # fmt: skip


def _add(total: _Sum, stored: _Stored, student_ND: Tensor, p_NV: Tensor, *, sized: bool) -> None:
    rows_MD = student_ND[stored.token_M] * stored.q_M[:, None]
    total.q_VD.index_add_(0, stored.id_M, rows_MD)
    total.entries += len(stored.id_M)
    if stored.student_weight_N is not None:
        if total.p_VD is None:
            total.p_VD = torch.zeros_like(total.q_VD)
        total.p_VD.addmm_(p_NV.T, student_ND * stored.student_weight_N[:, None])
    if sized and stored.targets is not None:
        total.kept.append(stored.targets)


def _error(total: _Sum, dense_q_VD: Tensor, dense_p_VD: Tensor) -> float:
    p_VD = dense_p_VD if total.p_VD is None else total.p_VD
    dense_VD = dense_p_VD - dense_q_VD
    return float(((p_VD - total.q_VD) - dense_VD).norm() / dense_VD.norm())


def _bytes(kept: Sequence[TokenTargets], answers: Sequence[Answer]) -> float:
    """Compressed bytes a token of the columns of a real shard that hold what the teacher says."""
    whole = concat_targets(kept)
    meta = StoreMeta(
        student="", teacher="", tokenizer="", chat_template="", vocab_size=1 << 20, temperature=1.0,
        engine="bench", dtype="float32", estimator="bench", tau=whole.tau,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        write_shard(path, _rows(whole, answers), meta=meta)
        return _target_bytes(path) / len(whole)


def _rows(whole: TokenTargets, answers: Sequence[Answer]) -> Iterator[TargetRow]:
    sizes, left = [], len(whole)
    for answer in answers:
        sizes.append(min(left, len(answer.ids.response_ids)))
        left -= sizes[-1]
        if not left:
            break
    for answer, targets in zip(answers, split_targets(whole, sizes), strict=False):
        ids = np.asarray(answer.ids.response_ids[: len(targets)], np.int32)
        yield TargetRow(
            id="", prompt_id="", source="", mode="fast", finish_reason="stop", verdict=None,
            prompt_ids=np.asarray(answer.ids.prompt_ids, np.int32), response_ids=ids,
            student_logp_N=np.zeros(len(ids), np.float32), targets=targets,
        )  # fmt: skip


def _target_bytes(path: Path) -> int:
    """All lists but `student_logp`, which is the student's, and the text."""
    metadata = pq.read_metadata(path)
    wanted = tuple(name for name in TARGET_LISTS if name != "student_logp_code")
    return sum(
        column.total_compressed_size
        for group in range(metadata.num_row_groups)
        for column in map(metadata.row_group(group).column, range(metadata.num_columns))
        if column.path_in_schema.split(".")[0] in wanted
    )
