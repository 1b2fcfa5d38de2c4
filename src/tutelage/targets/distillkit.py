"""DistillKit's published compressed-logit format: its settings, its size, reading and writing it.

Owns the format alone; what becomes of it in our store is the affair of stage `convert`, and how it
compares that of `bench store`. Written from the published description.

A token is a top-k: `exact_k` log-probabilities as floats, then the coefficients of a curve over the
other ranks `t = 0, 1, ...` (powers of t, and `sqrt`, `exp`), then bins of residuals; its k ids are
packed to `ceil(log2 d)` bits each, the highest bit first.

Legend: N tokens, K = k stored ids, B bytes of a token, R ranks under the curve, F terms of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tutelage.core.errors import DataError

WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
CURVES = {"sqrt": np.sqrt, "exp": np.exp}
SINGULAR = 1e-5
"""Singular values of the fit below this are left out, as the format's own writer does."""


@dataclass(frozen=True)
class Bin:
    """Residuals of some ranks, quantised together."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def bytes(self) -> int:
        """Its scale and its elements."""
        return WIDTHS[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


@dataclass(frozen=True)
class Settings:
    """`logprob_compressor` of a DistillKit configuration, under its own names."""

    d: int
    """Vocabulary size"""
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[Bin, ...] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False
    """Changes what is written, not how it is read."""
    normalize_t: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Settings":
        """From the mapping in `compression_config.yaml`. Raises DataError."""
        try:
            known = {field.name for field in fields(cls)}
            if unknown := set(values) - known:
                raise DataError(
                    f"compression settings have unknown keys {sorted(unknown)}; the legacy format "
                    "(polynomial_degree) is not read"
                )
            bins = tuple(Bin(**entry) for entry in values.get("residual_bins") or ())
            terms = tuple(values.get("polynomial_terms") or ())
            made = cls(**{**values, "residual_bins": bins, "polynomial_terms": terms})
        except TypeError as error:
            raise DataError(f"compression settings are not those of DistillKit: {error}") from None
        made._check()
        return made

    def _check(self) -> None:
        whole = (self.d, self.k, self.exact_k)
        parts = [n for b in self.residual_bins for n in (b.element_bits, b.num_elements)]
        if not all(type(number) is int for number in (*whole, *parts)):
            raise DataError("compression settings: d, k, exact_k and bins are whole numbers")
        for dtype in (
            self.exact_dtype,
            self.term_dtype,
            *(b.scale_dtype for b in self.residual_bins),
        ):
            if dtype not in WIDTHS:
                raise DataError(f"compression settings: no dtype {dtype!r}")
        if not 0 < self.k <= self.d or not 0 <= self.exact_k <= self.k:
            raise DataError("compression settings: 0 <= exact_k <= k <= d does not hold")
        for term in self.polynomial_terms:
            if type(term) is not int and term not in CURVES:
                raise DataError(f"compression settings: no polynomial term {term!r}")
        if not all(0 < bits <= 64 for bits in (b.element_bits for b in self.residual_bins)):
            raise DataError("compression settings: element_bits of a bin lie between 1 and 64")
        rest = self.k - self.exact_k
        if sum(b.num_elements for b in self.residual_bins) > rest:
            raise DataError(
                f"compression settings: residual_bins hold more than k - exact_k = {rest}"
            )
        if rest and not (self.polynomial_terms or self.residual_bins):
            raise DataError(
                "compression settings: exact_k < k needs polynomial_terms or residual_bins"
            )

    @property
    def id_bits(self) -> int:
        """Bits of an id."""
        return math.ceil(math.log2(self.d))

    @property
    def id_bytes(self) -> int:
        """Bytes of a token's ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def logp_bytes(self) -> int:
        """Bytes of a token's log-probabilities."""
        floats = self.exact_k * WIDTHS[self.exact_dtype]
        curve = len(self.polynomial_terms) * WIDTHS[self.term_dtype]
        return floats + curve + sum(part.bytes for part in self.residual_bins)

    @property
    def bytes_per_token(self) -> int:
        """The published size formula."""
        return self.id_bytes + self.logp_bytes


def recommended(vocab_size: int) -> Settings:
    """The configuration DistillKit recommends for new captures: about 300 bytes a token."""
    return Settings(
        d=vocab_size, k=128, exact_k=16, exact_dtype="bfloat16", delta_encoding=False,
        polynomial_terms=(0, 1, 2, 3, 4, "sqrt"),
    )  # fmt: skip


def budget_pick(vocab_size: int) -> Settings:
    """Its "budget pick": about 114 bytes a token."""
    return Settings(
        d=vocab_size, k=50, exact_k=1, exact_dtype="bfloat16", delta_encoding=False,
        polynomial_terms=(0, 1, "sqrt"),
    )  # fmt: skip


def decode_ids(packed_NB: np.ndarray, settings: Settings) -> np.ndarray:
    """Ids [N, K], int32, of packed bytes [N, B]."""
    return _unpack(packed_NB, settings.id_bits, settings.k).astype(np.int32)


def decode_logp(packed_NB: np.ndarray, settings: Settings) -> np.ndarray:
    """Log-probabilities [N, K], float32, of packed bytes [N, B]: as the format's reader has them.

    Raises DataError when a token has another number of bytes than the settings say.
    """
    if packed_NB.shape[1] != settings.logp_bytes:
        raise DataError(
            f"a token has {packed_NB.shape[1]} bytes of log-probabilities, and the settings make "
            f"{settings.logp_bytes}: not the settings it was captured with"
        )
    sizes = [settings.exact_k * WIDTHS[settings.exact_dtype]]
    sizes += [len(settings.polynomial_terms) * WIDTHS[settings.term_dtype]]
    sizes += [part.bytes for part in settings.residual_bins]
    exact_NB, terms_NB, *bins = np.split(packed_NB, np.cumsum(sizes)[:-1], axis=1)
    rest_NR = np.zeros((len(packed_NB), settings.k - settings.exact_k), np.float32)
    first = 0
    for part, bytes_NB in zip(settings.residual_bins, bins, strict=True):
        rest_NR[:, first : first + part.num_elements] = _residuals(bytes_NB, part)
        first += part.num_elements
    if settings.polynomial_terms:
        terms_NF = _floats(terms_NB, settings.term_dtype)
        rest_NR += terms_NF @ _curve(settings).astype(np.float32).T
    logp_NK = np.concatenate([_floats(exact_NB, settings.exact_dtype), rest_NR], axis=1)
    return np.cumsum(logp_NK, axis=1, dtype=np.float32) if settings.delta_encoding else logp_NK


def encode(
    ids_NK: np.ndarray, logp_NK: np.ndarray, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """Packed log-probabilities and ids (uint8) of a top-k by falling log-probability.

    Only for settings without residual bins, delta encoding and bfloat16 terms, as both recommended
    ones are: the inverse of the two decoders up to the format's own error.
    """
    assert not settings.residual_bins
    assert not settings.delta_encoding
    exact_NK, rest_NR = np.split(logp_NK.astype(np.float32), [settings.exact_k], axis=1)
    curve_RF = _curve(settings)
    terms_NF = rest_NR.astype(np.float64) @ np.linalg.pinv(curve_RF, rcond=_cut(curve_RF)).T
    parts = [
        _bytes(exact_NK, settings.exact_dtype),
        _bytes(terms_NF.astype(np.float32), settings.term_dtype),
    ]
    bits = (ids_NK[..., None] >> np.arange(settings.id_bits - 1, -1, -1)) & 1
    packed = np.packbits(bits.reshape(len(ids_NK), -1).astype(np.uint8), axis=1)
    return np.concatenate(parts, axis=1), packed


def _cut(curve_RF: np.ndarray) -> float:
    return SINGULAR / float(np.linalg.svd(curve_RF, compute_uv=False)[0])


def _curve(settings: Settings) -> np.ndarray:
    """The terms at each rank, float64 [R, F]."""
    ranks = settings.k - settings.exact_k
    t_R = np.linspace(0, 1, ranks) if settings.normalize_t else np.arange(ranks, dtype=np.float64)
    columns = [
        CURVES[term](t_R) if isinstance(term, str) else t_R**term
        for term in settings.polynomial_terms
    ]
    return np.stack(columns, axis=1)


def _unpack(packed_NB: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` unsigned integers of `bits` bits a row, highest bit first, int64."""
    if packed_NB.shape[1] * 8 < bits * count:
        raise DataError(f"a token has {packed_NB.shape[1]} bytes where {-(-bits * count // 8)} are")
    flat_NE = np.unpackbits(np.ascontiguousarray(packed_NB), axis=1, count=bits * count)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return flat_NE.reshape(len(packed_NB), count, bits) @ weights


def _residuals(bytes_NB: np.ndarray, part: Bin) -> np.ndarray:
    scale_NB, elements_NB = np.split(bytes_NB, [WIDTHS[part.scale_dtype]], axis=1)
    code_NE = _unpack(elements_NB, part.element_bits, part.num_elements)
    scale_N1 = _floats(scale_NB, part.scale_dtype)
    if part.element_bits == 1:
        return (code_NE * 2.0 - 1.0) * scale_N1
    return (code_NE - 2.0 ** (part.element_bits - 1)) * scale_N1


def _floats(bytes_NB: np.ndarray, dtype: str) -> np.ndarray:
    """Little-endian floats as float32 [N, ...]."""
    rows = np.ascontiguousarray(bytes_NB)
    if dtype == "bfloat16":  # the upper half of a float32
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return rows.view(np.dtype(dtype).newbyteorder("<")).astype(np.float32)


def _bytes(values_NK: np.ndarray, dtype: str) -> np.ndarray:
    values = np.ascontiguousarray(values_NK, np.float32)
    if dtype != "bfloat16":
        return values.astype(np.dtype(dtype).newbyteorder("<")).view(np.uint8)
    raw = values.view(np.uint32)
    rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16  # to the nearest, ties to even
    return rounded.astype("<u2").view(np.uint8)
