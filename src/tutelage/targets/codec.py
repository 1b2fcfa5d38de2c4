"""Between the arrays of a row group and the columns of its Parquet table.

Owns the columns, the quantisation and its errors. All numbers are small non-negative integers, so
that BYTE_STREAM_SPLIT lays zero bytes beside zero bytes and zstd reaches their entropy; every
decoding is one line of arithmetic (docs/store.md):

    head_q_code            q = sin(pi/2 * code / levels)^2
    student_logp_code      logp = -(code / 48)^2, nats; label_logp_code the same
    teacher_entropy_code   entropy = (code / 48)^2, nats
    tail_gaps              the tail ids of a token are the running sum of its gaps

Largest errors: `pi / (2 levels) * sqrt(q (1 - q)) + (pi / (4 levels))^2` of q, and
`sqrt(x) / 48 + 1.1e-4` of x nats. The arcsine of sqrt(q) is the scale on which sampling noise is
the same everywhere: 127 levels err by less than the noise of 6,500 draws, at q = 0.03 as at 0.999.
Measured on the gradient of a head weight they add at most 1.1 % to the variance that threshold
sampling has anyway; a logarithmic scale needs 255 levels, a bit an entry more, for the same.
"""

import numpy as np
import pyarrow as pa

from tutelage.targets.group import TEXTS, TargetGroup, starts
from tutelage.targets.schema import StoreMeta, TokenTargets

THRESHOLD_LEVELS = 127
FULL_LEVELS = 65535
NATS_SCALE = 48
TEXT_LISTS = ("prompt_ids", "response_ids")
TARGET_LISTS = (
    "student_logp_code",
    "label_logp_code",
    "teacher_entropy_code",
    "head_counts",
    "head_ids",
    "head_q_code",
    "tail_counts",
    "tail_gaps",
)


def head_levels(meta: StoreMeta) -> int:
    """Levels of `head_q_code`.

    Under a threshold no head entry is below tau. A top-k holds any q: 65,535 levels keep 1e-6
    within 3 %.
    """
    return FULL_LEVELS if meta.tau is None else THRESHOLD_LEVELS


def decoding(meta: StoreMeta) -> dict[str, str]:
    """How to decode each coded column, in words that travel with the file."""
    nats = f"(code / {NATS_SCALE})^2, nats"
    return {
        "head_q_code": f"q = sin(pi / 2 * code / {head_levels(meta)})^2",
        "student_logp_code": f"student_logp = -{nats}",
        "label_logp_code": f"label_logp = -{nats}",
        "teacher_entropy_code": f"teacher_entropy = {nats}",
        "tail_gaps": "tail ids of a token = running sum of its gaps",
    }


def arrow_schema(meta: StoreMeta) -> pa.Schema:
    """The columns of a shard; a list has an entry a token, or as many as its counts say."""

    def ragged(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False)

    code = pa.uint8() if head_levels(meta) <= np.iinfo(np.uint8).max else pa.uint16()
    kinds = {
        "head_ids": pa.int32(), "tail_gaps": pa.int32(), "head_q_code": code,
        "prompt_ids": pa.int32(), "response_ids": pa.int32(),
    }  # fmt: skip
    return pa.schema(
        [pa.field(name, pa.string(), nullable=name == "verdict") for name in TEXTS]
        + [ragged(name, kinds.get(name, pa.uint16())) for name in (*TEXT_LISTS, *TARGET_LISTS)]
    )


def to_table(group: TargetGroup, meta: StoreMeta) -> pa.Table:
    """The table of a row group."""
    targets = group.targets
    lists = {
        "prompt_ids": (group.prompt_starts_R1, group.prompt_ids_P),
        "response_ids": (group.token_starts_R1, group.response_ids_N),
        "student_logp_code": (group.token_starts_R1, nats_code(-group.student_logp_N)),
        "label_logp_code": (group.token_starts_R1, nats_code(-targets.label_logp_N)),
        "teacher_entropy_code": (group.token_starts_R1, nats_code(targets.entropy_N)),
        "head_counts": (group.token_starts_R1, targets.head_counts_N),
        "head_ids": (group.head_starts_R1, targets.head_ids_M),
        "head_q_code": (group.head_starts_R1, q_code(targets.head_logq_M, head_levels(meta))),
        "tail_counts": (group.token_starts_R1, targets.tail_counts_N),
        "tail_gaps": (group.tail_starts_R1, _gaps(targets)),
    }
    schema = arrow_schema(meta)
    columns = [pa.array(group.texts[name], pa.string()) for name in TEXTS]
    for name, (starts_R1, values) in lists.items():
        kind = schema.field(name).type
        flat = pa.array(values.astype(kind.value_type.to_pandas_dtype(), copy=False))
        columns.append(pa.ListArray.from_arrays(starts_R1.astype(np.int32), flat, type=kind))
    return pa.table(columns, schema=schema)


def from_table(table: pa.Table, meta: StoreMeta) -> TargetGroup:
    """The inverse, up to the quantisation."""
    offsets, flat = {}, {}
    for name in (*TEXT_LISTS, *TARGET_LISTS):
        column = table[name].combine_chunks()
        offsets[name] = column.offsets.to_numpy().astype(np.int64)
        flat[name] = column.values.to_numpy()
    levels = head_levels(meta)
    logq_by_code = code_logq(np.arange(levels + 1), levels).astype(np.float32)
    tail_counts_N = flat["tail_counts"].astype(np.int32)
    targets = TokenTargets(
        head_counts_N=flat["head_counts"].astype(np.int32),
        head_ids_M=flat["head_ids"],
        head_logq_M=logq_by_code[flat["head_q_code"]],
        tail_counts_N=tail_counts_N,
        tail_ids_T=_ids(flat["tail_gaps"], tail_counts_N),
        label_logp_N=-code_nats(flat["label_logp_code"]),
        entropy_N=code_nats(flat["teacher_entropy_code"]),
        tau=meta.tau,
    )
    return TargetGroup(
        texts={name: table[name].to_pylist() for name in TEXTS},
        prompt_starts_R1=offsets["prompt_ids"],
        prompt_ids_P=flat["prompt_ids"],
        token_starts_R1=offsets["response_ids"],
        response_ids_N=flat["response_ids"],
        student_logp_N=-code_nats(flat["student_logp_code"]),
        head_starts_R1=offsets["head_ids"],
        tail_starts_R1=offsets["tail_gaps"],
        targets=targets,
    )


def q_code(logq_M: np.ndarray, levels: int) -> np.ndarray:
    """The nearest code; at least 1, for the log of a stored probability is finite."""
    angle_M = np.arcsin(np.sqrt(np.minimum(np.exp(logq_M), 1.0)))
    return np.maximum(np.rint(angle_M * (2 / np.pi * levels)), 1)


def code_logq(code_M: np.ndarray, levels: int) -> np.ndarray:
    """Log of `sin(pi/2 * code / levels)^2`, nats; code 0 is never stored."""
    return 2 * np.log(np.sin(np.pi / 2 * np.maximum(code_M, 1) / levels))


def nats_code(nats_N: np.ndarray) -> np.ndarray:
    """The nearest code of non-negative nats; float noise below 0 is 0."""
    return np.rint(np.sqrt(np.maximum(nats_N, 0.0)) * NATS_SCALE)


def code_nats(code_N: np.ndarray) -> np.ndarray:
    """`(code / 48)^2`, float32."""
    return np.square(code_N.astype(np.float32) / NATS_SCALE)


def _gaps(targets: TokenTargets) -> np.ndarray:
    """A token's first tail id, then the differences: 9 % smaller than ids on a flat teacher."""
    gaps_T = np.diff(targets.tail_ids_T, prepend=np.int32(0))
    firsts = _firsts(targets.tail_counts_N)
    gaps_T[firsts] = targets.tail_ids_T[firsts]
    return gaps_T


def _ids(gaps_T: np.ndarray, tail_counts_N: np.ndarray) -> np.ndarray:
    """The inverse of `_gaps`: one running sum, less what stood before each token's first."""
    running_T1 = starts(gaps_T)
    firsts = _firsts(tail_counts_N)
    before = np.repeat(running_T1[firsts], tail_counts_N[tail_counts_N > 0])
    return (running_T1[1:] - before).astype(np.int32)


def _firsts(tail_counts_N: np.ndarray) -> np.ndarray:
    """Where each token that has a tail begins."""
    return starts(tail_counts_N)[:-1][tail_counts_N > 0]
