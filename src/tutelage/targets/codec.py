"""Between the arrays of a row group and the columns of its Parquet table.

Owns the columns, the quantisation and its errors. All numbers are small non-negative integers, so
that BYTE_STREAM_SPLIT lays zero bytes beside zero bytes and zstd reaches their entropy; every
decoding is one line of arithmetic (docs/store.md):

    head_gaps              the head ids of a token are the running sum of its gaps; tail_gaps same
    head_q_code            q = sin(pi/2 * code / levels)^2, in the order of the head ids
    student_logp_code      logp = -(code / 48)^2, nats
    label_logp_code        the same; but 0 for a response id in the head: then it is log(head q)
    teacher_entropy_code   entropy = (code / 48)^2, nats

Largest errors: `pi / (2 levels) * sqrt(q (1 - q)) + (pi / (4 levels))^2` of q, and
`sqrt(x) / 48 + 1.1e-4` of x nats. The arcsine of sqrt(q) is the scale on which sampling noise is
the same everywhere: 127 levels err by less than the noise of 6,500 draws, at q = 0.03 as at 0.999.
Measured on the gradient of a head weight they add at most 1.1 % to the variance that threshold
sampling has anyway; a logarithmic scale needs 255 levels, a bit an entry more, for the same.

Ids in rising order cost 0.15 bytes an entry less than by falling q, though q then costs 0.03 more;
a label is left out where its head entry holds it as exactly, from q = 0.15 up: 0.26 bytes a token.
"""

import numpy as np
import pyarrow as pa

from tutelage.targets.group import TEXTS, TargetGroup, starts
from tutelage.targets.schema import StoreMeta, TokenTargets

THRESHOLD_LEVELS = 127
FULL_LEVELS = 65535
NATS_SCALE = 48
ID_BITS = 20
"""Of the largest vocabulary."""
LABEL_ANGLE = 0.25
"""Share of the levels: q = 0.15, from where a head entry is as exact as a label's own code."""
TEXT_LISTS = ("prompt_ids", "response_ids")
TARGET_LISTS = (
    "student_logp_code",
    "label_logp_code",
    "teacher_entropy_code",
    "head_counts",
    "head_gaps",
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
        "label_logp_code": f"label_logp = -{nats}; if 0 and the response id is in the head: log q",
        "teacher_entropy_code": f"teacher_entropy = {nats}",
        "head_gaps": "head ids of a token = running sum of its gaps",
        "tail_gaps": "tail ids of a token = running sum of its gaps",
    }


def arrow_schema(meta: StoreMeta) -> pa.Schema:
    """The columns of a shard; a list has an entry a token, or as many as its counts say."""

    def ragged(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False)

    code = pa.uint8() if head_levels(meta) <= np.iinfo(np.uint8).max else pa.uint16()
    kinds = {
        "head_gaps": pa.int32(), "tail_gaps": pa.int32(), "head_q_code": code,
        "prompt_ids": pa.int32(), "response_ids": pa.int32(),
    }  # fmt: skip
    return pa.schema(
        [pa.field(name, pa.string(), nullable=name == "verdict") for name in TEXTS]
        + [ragged(name, kinds.get(name, pa.uint16())) for name in (*TEXT_LISTS, *TARGET_LISTS)]
    )


def to_table(group: TargetGroup, meta: StoreMeta) -> pa.Table:
    """The table of a row group."""
    targets, levels = group.targets, head_levels(meta)
    token_M = np.repeat(np.arange(len(targets)), targets.head_counts_N)
    rising = np.argsort((token_M << ID_BITS) | targets.head_ids_M, kind="stable")
    q_code_M = q_code(targets.head_logq_M, levels)
    lists = {
        "prompt_ids": (group.prompt_starts_R1, group.prompt_ids_P),
        "response_ids": (group.token_starts_R1, group.response_ids_N),
        "student_logp_code": (group.token_starts_R1, nats_code(-group.student_logp_N)),
        "label_logp_code": (group.token_starts_R1, _label_code(group, token_M, q_code_M / levels)),
        "teacher_entropy_code": (group.token_starts_R1, nats_code(targets.entropy_N)),
        "head_counts": (group.token_starts_R1, targets.head_counts_N),
        "head_gaps": (
            group.head_starts_R1,
            _gaps(targets.head_ids_M[rising], targets.head_counts_N),
        ),
        "head_q_code": (group.head_starts_R1, q_code_M[rising]),
        "tail_counts": (group.token_starts_R1, targets.tail_counts_N),
        "tail_gaps": (group.tail_starts_R1, _gaps(targets.tail_ids_T, targets.tail_counts_N)),
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
    head_counts_N = flat["head_counts"].astype(np.int32)
    tail_counts_N = flat["tail_counts"].astype(np.int32)
    token_M = np.repeat(np.arange(len(head_counts_N)), head_counts_N)
    head_ids_M = _ids(flat["head_gaps"], head_counts_N)
    head_code_M = flat["head_q_code"]
    # One key and a stable sort, as ids rise already: 3 times faster than a lexical sort.
    falling = np.argsort(token_M * (levels + 1) - head_code_M, kind="stable")
    label_logp_N = -code_nats(flat["label_logp_code"])
    left_out_M = flat["response_ids"][token_M] == head_ids_M
    left_out_M &= flat["label_logp_code"][token_M] == 0
    label_logp_N[token_M[left_out_M]] = logq_by_code[head_code_M[left_out_M]]
    targets = TokenTargets(
        head_counts_N=head_counts_N,
        head_ids_M=head_ids_M[falling],
        head_logq_M=logq_by_code[head_code_M[falling]],
        tail_counts_N=tail_counts_N,
        tail_ids_T=_ids(flat["tail_gaps"], tail_counts_N),
        label_logp_N=label_logp_N,
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
        head_starts_R1=offsets["head_gaps"],
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


def _label_code(group: TargetGroup, token_M: np.ndarray, angle_M: np.ndarray) -> np.ndarray:
    """The code of each label; 0 where its head entry is large enough to stand for it."""
    code_N = nats_code(-group.targets.label_logp_N)
    is_label_M = group.response_ids_N[token_M] == group.targets.head_ids_M
    code_N[token_M[is_label_M & (angle_M >= LABEL_ANGLE)]] = 0
    return code_N


def _gaps(ids_E: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """A token's first id, then the differences: ids rise within a token."""
    gaps_E = np.diff(ids_E, prepend=np.int32(0))
    firsts = _firsts(counts_N)
    gaps_E[firsts] = ids_E[firsts]
    return gaps_E


def _ids(gaps_E: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """The inverse of `_gaps`: one running sum, less what stood before each token's first."""
    running_E1 = starts(gaps_E)
    firsts = _firsts(counts_N)
    before = np.repeat(running_E1[firsts], counts_N[counts_N > 0])
    return (running_E1[1:] - before).astype(np.int32)


def _firsts(counts_N: np.ndarray) -> np.ndarray:
    """Where each token that has an entry begins."""
    return starts(counts_N)[:-1][counts_N > 0]
