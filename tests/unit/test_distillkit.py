"""DistillKit's format: its size, and what an encoder written another way put into the bytes."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.core.errors import DataError
from tutelage.targets.distillkit import (
    Bin,
    Settings,
    budget_pick,
    decode_ids,
    decode_logp,
    encode,
    recommended,
)

VOCAB = 49_152
MINIMAL: dict[str, Any] = {"d": 300, "k": 4, "exact_k": 4, "residual_bins": []}
FLOATS = {"float16": "<e", "float32": "<f", "float64": "<d"}


def bits_of(number: int, width: int) -> str:
    """The number in `width` binary digits, the highest first."""
    return format(number, f"0{width}b")


def bytes_of(bits: str) -> bytes:
    """Digits as bytes, zeros behind the last."""
    padded = bits + "0" * (-len(bits) % 8)
    return bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8))


def float_bytes(value: float, dtype: str) -> bytes:
    if dtype == "bfloat16":  # cut, not rounded: tests give values it can hold
        return struct.pack("<f", value)[2:]
    return struct.pack(FLOATS[dtype], value)


def packed(*tokens: bytes) -> np.ndarray:
    return np.array([list(token) for token in tokens], np.uint8)


def top_k(tokens: int, k: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids and log-probabilities that fall like a language model's, [tokens, k]."""
    rng = np.random.default_rng(seed)
    ids_NK = np.stack([rng.choice(VOCAB, k, replace=False) for _ in range(tokens)])
    steps_NK = rng.exponential(1 / (1 + np.arange(k)), (tokens, k))
    return ids_NK, (-0.5 - np.cumsum(steps_NK, 1)).astype(np.float32)


@pytest.mark.parametrize(("made", "size"), [(recommended(VOCAB), 312), (budget_pick(VOCAB), 114)])
def test_the_two_recommended_settings_have_their_published_sizes(made: Settings, size: int) -> None:
    assert made.bytes_per_token == size
    ids_NK, logp_NK = top_k(3, made.k)
    stored_logp, stored_ids = encode(ids_NK, logp_NK, made)
    assert stored_logp.shape[1] + stored_ids.shape[1] == size
    assert stored_logp.dtype == stored_ids.dtype == np.uint8


@pytest.mark.parametrize("made", [recommended(VOCAB), budget_pick(VOCAB)])
def test_what_is_written_is_read_within_bfloat16_and_the_best_curve(made: Settings) -> None:
    ids_NK, logp_NK = top_k(50, made.k)
    stored_logp, stored_ids = encode(ids_NK, logp_NK, made)
    np.testing.assert_array_equal(decode_ids(stored_ids, made), ids_NK)
    again_NK = decode_logp(stored_logp, made)
    exact = made.exact_k
    np.testing.assert_allclose(again_NK[:, :exact], logp_NK[:, :exact], rtol=2.0**-8)
    # Columns of one size span the same curves, and least squares is then without a cut.
    t_R = np.arange(made.k - exact, dtype=np.float64)
    powers = [t_R ** (0.5 if term == "sqrt" else float(term)) for term in made.polynomial_terms]
    columns_RF = np.stack([column / max(1, np.abs(column).max()) for column in powers], 1)
    best_FN, *_ = np.linalg.lstsq(columns_RF, logp_NK[:, exact:].T.astype(np.float64), rcond=None)
    best_NR = (columns_RF @ best_FN).T
    residual = np.abs(best_NR - logp_NK[:, exact:]).max()
    assert 0.01 < residual < 1  # the curve does not fit by itself: the next line says something
    tolerance = 0.02 if made.k == 50 else 0.25  # of t^4, singular values are left out
    np.testing.assert_allclose(again_NK[:, exact:], best_NR, atol=tolerance)


def test_a_curve_that_fits_is_read_back() -> None:
    made = budget_pick(VOCAB)
    t_R = np.arange(49)
    logp_NK = np.concatenate([[-0.5], -1 - 0.02 * t_R - 0.3 * np.sqrt(t_R)])[None]
    again_NK = decode_logp(encode(top_k(1, 50)[0], logp_NK.astype(np.float32), made)[0], made)
    np.testing.assert_allclose(again_NK, logp_NK, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ids_are_exact_at_any_width(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(2, 1 << 20))
    k = data.draw(st.integers(1, min(vocab, 9)))
    row = st.lists(st.integers(0, vocab - 1), min_size=k, max_size=k)
    ids_NK = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    made = Settings(d=vocab, k=k, exact_k=k)
    width = (vocab - 1).bit_length()
    assert made.id_bits == width
    stored = packed(*(bytes_of("".join(bits_of(i, width) for i in row)) for row in ids_NK.tolist()))
    np.testing.assert_array_equal(decode_ids(stored, made), ids_NK)
    with_curve = Settings(d=vocab, k=k, exact_k=0, polynomial_terms=(0,), delta_encoding=False)
    np.testing.assert_array_equal(encode(ids_NK, np.zeros((len(ids_NK), k)), with_curve)[1], stored)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_exact_values_of_every_dtype_are_read(dtype: str) -> None:
    values = [-0.25, -1.5, -3.0, -96.0]
    made = Settings.parse({**MINIMAL, "exact_dtype": dtype, "delta_encoding": False})
    stored = packed(b"".join(float_bytes(value, dtype) for value in values))
    assert decode_logp(stored, made).tolist() == [values]
    assert made.logp_bytes == stored.shape[1]


def test_delta_encoding_sums_the_steps_of_exact_values() -> None:
    made = Settings.parse({**MINIMAL, "exact_dtype": "float16"})
    assert made.delta_encoding  # its default
    steps = [-0.5, -0.25, -1.0, 0.0]
    stored = packed(b"".join(float_bytes(step, "float16") for step in steps))
    assert decode_logp(stored, made).tolist() == [[-0.5, -0.75, -1.75, -1.75]]


def test_delta_encoding_sums_over_residuals_too() -> None:
    """A step of the rest is its curve (here the constant -1) and its residual."""
    made = Settings.parse(
        {"d": 300, "k": 4, "exact_k": 1, "exact_dtype": "float32", "polynomial_terms": [0],
         "term_dtype": "float16",
         "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}]}
    )  # fmt: skip
    bin_bytes = float_bytes(0.125, "float16") + bytes_of(bits_of(8 + 2, 4) + bits_of(8 - 4, 4))
    stored = packed(float_bytes(-0.5, "float32") + float_bytes(-1, "float16") + bin_bytes)
    steps = [-0.5, -1 + 0.25, -1 - 0.5, -1]  # the last rank has no residual
    assert decode_logp(stored, made).tolist() == [np.cumsum(steps).tolist()]


def test_bins_of_every_width_stand_behind_each_other_on_their_own_bytes() -> None:
    """Elements are offset binary; of one bit they are plus and minus the scale."""
    made = Settings.parse(
        {"d": 300, "k": 11, "exact_k": 1, "exact_dtype": "float32", "delta_encoding": False,
         "residual_bins": [
             {"scale_dtype": "float16", "element_bits": 3, "num_elements": 3},
             {"scale_dtype": "float32", "element_bits": 1, "num_elements": 5},
             {"scale_dtype": "bfloat16", "element_bits": 9, "num_elements": 1}]}
    )  # fmt: skip
    stored = (
        float_bytes(-0.75, "float32")
        + float_bytes(0.5, "float16") + bytes_of("".join(bits_of(4 + v, 3) for v in (-4, 0, 3)))
        + float_bytes(0.25, "float32") + bytes_of("10110")
        + float_bytes(-2.0, "bfloat16") + bytes_of(bits_of(256 + 100, 9))
    )  # fmt: skip
    assert made.logp_bytes == len(stored) == 4 + (2 + 2) + (4 + 1) + (2 + 2)
    wanted = [-0.75, -2.0, 0.0, 1.5, 0.25, -0.25, 0.25, 0.25, -0.25, -200.0, 0.0]
    assert decode_logp(packed(stored, stored), made).tolist() == [wanted, wanted]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_curve_is_taken_at_the_rank_or_at_the_rank_scaled_to_one(normalize: bool) -> None:
    made = Settings.parse(
        {"d": 300, "k": 6, "exact_k": 1, "exact_dtype": "float32", "delta_encoding": False,
         "polynomial_terms": [1, 3, "sqrt", "exp"], "normalize_t": normalize,
         "term_dtype": "float64", "residual_bins": []}
    )  # fmt: skip
    terms = [-0.5, 0.0625, -0.25, -0.03125]
    stored = packed(float_bytes(-0.5, "float32") + b"".join(struct.pack("<d", t) for t in terms))
    ranks = [t / 4 if normalize else float(t) for t in range(5)]
    curve = [
        terms[0] * t + terms[1] * t**3 + terms[2] * t**0.5 + terms[3] * np.exp(t) for t in ranks
    ]
    np.testing.assert_allclose(decode_logp(stored, made), [[-0.5, *curve]], rtol=1e-6)


def test_a_token_of_another_size_is_refused() -> None:
    made = budget_pick(VOCAB)
    stored_logp, stored_ids = encode(*top_k(2, 50), made)
    for wrong in (stored_logp[:, :-1], np.pad(stored_logp, ((0, 0), (0, 1)))):
        with pytest.raises(DataError, match=r"has 1[35] bytes .* settings make 14"):
            decode_logp(wrong, made)
    with pytest.raises(DataError, match="has 99 bytes where 100 are"):
        decode_ids(stored_ids[:, :-1], made)


def parsed(**changes: Any) -> Settings:
    return Settings.parse({**MINIMAL, **changes})


def test_settings_are_read_under_their_own_names() -> None:
    made = parsed(exact_k=2, polynomial_terms=[0, "sqrt"], error_diffusion=True,
                  residual_bins=[{"scale_dtype": "float16", "element_bits": 2,
                                  "num_elements": 2}])  # fmt: skip
    assert made.residual_bins == (Bin("float16", 2, 2),)
    assert made.polynomial_terms == (0, "sqrt")
    assert parsed(polynomial_terms=None).polynomial_terms == ()  # as its writer says "none"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"polynomial_degree": 3, "with_sqrt_term": True}, "legacy format"),
        ({"k": "four"}, "whole numbers"),
        ({"exact_dtype": "float8"}, "no dtype 'float8'"),
        ({"term_dtype": "int8"}, "no dtype 'int8'"),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 2}]}, "num_elements"),
        ({"residual_bins": [{"scale_dtype": "half", "element_bits": 2, "num_elements": 1}]},
         "no dtype 'half'"),
        ({"k": 0}, "does not hold"),
        ({"k": 301}, "does not hold"),
        ({"exact_k": 5}, "does not hold"),
        ({"exact_k": -1}, "does not hold"),
        ({"exact_k": 2, "polynomial_terms": [0, "log"]}, "'log'"),
        ({"exact_k": 2, "residual_bins":
                   [{"scale_dtype": "float16", "element_bits": 2, "num_elements": 3}]},
                  "residual_bins"),
        ({"exact_k": 2}, "polynomial_terms or residual_bins"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        made = parsed(**changes)
        decode_logp(np.zeros((1, made.logp_bytes), np.uint8), made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["d", "k", "exact_k"])
def test_a_missing_setting_is_named(missing: str) -> None:
    with pytest.raises(DataError, match=f"'{missing}'"):
        Settings.parse({key: value for key, value in MINIMAL.items() if key != missing})
