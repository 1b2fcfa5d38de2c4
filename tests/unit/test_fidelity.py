"""The fidelity bench on a small random teacher: noise averages away and bias stays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.bench import fidelity
from tutelage.bench.fidelity import Measured, interpolated, measure
from tutelage.bench.material import Answer, Hidden
from tutelage.core.progress import Bar
from tutelage.engines.base import Scorable
from tutelage.models.load import BackboneAndHead
from tutelage.targets import distillkit

VOCAB, WIDTH, TOKENS = 300, 16, 8_192
COUNTS = (512, 2_048, 8_192)


def material() -> tuple[Hidden, list[Answer]]:
    """Hidden states of which a part is common to all tokens, as a real model's are.

    So a gradient, and a bias of it, add up over tokens; the student is a noisy copy of the teacher.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    teacher_ND = normal(TOKENS, WIDTH) + 0.7 * normal(1, WIDTH)
    student_ND = teacher_ND + 0.3 * normal(TOKENS, WIDTH) + 0.3 * normal(1, WIDTH)
    head = BackboneAndHead(nn.Identity(), normal(VOCAB, WIDTH) * 0.5, None, None)
    q_NV = head.logits(teacher_ND).softmax(-1)
    labels_N = torch.multinomial(q_NV, 1, generator=generator)[:, 0]
    answers = [
        Answer(Scorable((1, 2, 3), tuple(labels_N[start : start + 64].tolist())), (), "stop")
        for start in range(0, TOKENS, 64)
    ]
    return Hidden(teacher_ND, student_ND, labels_N, head), answers


Points = Mapping[tuple[str, str], Measured]


@pytest.fixture(scope="module")
def points() -> Points:
    """A few settings of each method, to stay quick."""
    hidden, answers = material()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "TAUS", {1.0: (0.5, 0.05)})
        patch.setattr(fidelity, "PURE", (6, 24))
        patch.setattr(fidelity, "TOP_K", (4, 12))
        found = measure(
            hidden, answers, temperature=1.0, counts=COUNTS, bar=Bar(TOKENS, "test", "tokens")
        )
    return {(point.method, point.setting): point for point in found}


def errors(points: Points, method: str, setting: str) -> list[float]:
    return [points[method, setting].errors[count] for count in COUNTS]


@pytest.mark.parametrize(
    ("method", "setting"),
    [(fidelity.OURS, "tau 0.5"), (fidelity.OURS, "tau 0.05"), (fidelity.PURE_SAMPLING, "6 draws")],
)
def test_noise_falls_with_the_square_root_of_the_tokens(
    points: Points, method: str, setting: str
) -> None:
    first, middle, last = errors(points, method, setting)
    assert first / middle == pytest.approx(2, rel=0.25)
    assert middle / last == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize(
    ("method", "setting"),
    [(fidelity.RENORMALISED, "k 4"), (fidelity.TRUNCATED, "k 4"), (fidelity.RENORMALISED, "k 12"),
     (fidelity.DISTILLKIT, "budget pick")],
)  # fmt: skip
def test_bias_stays_whatever_the_tokens(points: Points, method: str, setting: str) -> None:
    first, _, last = errors(points, method, setting)
    assert last > 0.8 * first
    assert last > 3 * errors(points, fidelity.OURS, "tau 0.05")[-1]


def test_more_entries_are_truer_and_larger(points: Points) -> None:
    for method, few, many in (
        (fidelity.OURS, "tau 0.5", "tau 0.05"),
        (fidelity.PURE_SAMPLING, "6 draws", "24 draws"),
        (fidelity.RENORMALISED, "k 4", "k 12"),
        (fidelity.TRUNCATED, "k 4", "k 12"),
    ):
        assert points[method, few].ids < points[method, many].ids
        assert points[method, few].bytes < points[method, many].bytes
        assert errors(points, method, few)[-1] > errors(points, method, many)[-1]


def test_four_times_the_draws_halve_the_noise(points: Points) -> None:
    few = errors(points, fidelity.PURE_SAMPLING, "6 draws")[-1]
    assert few / errors(points, fidelity.PURE_SAMPLING, "24 draws")[-1] == pytest.approx(2, rel=0.2)


def test_bytes_are_those_of_each_method(points: Points) -> None:
    """DistillKit's are its published formula; a top-k stores its k ids exactly, draws repeat."""
    picked = points[fidelity.DISTILLKIT, "budget pick"]
    assert picked.bytes == distillkit.budget_pick(VOCAB).bytes_per_token
    assert points[fidelity.DISTILLKIT, "recommended"].bytes > picked.bytes
    assert points[fidelity.RENORMALISED, "k 12"].ids == 12
    assert points[fidelity.RENORMALISED, "k 12"].bytes == points[fidelity.TRUNCATED, "k 12"].bytes
    assert points[fidelity.PURE_SAMPLING, "24 draws"].ids < 24
    for point in points.values():
        if point.method != fidelity.DISTILLKIT:  # an id costs from a bit to its own width and more
            assert 0.3 * point.ids < point.bytes < 5 * point.ids + 8


def test_the_setting_at_the_target_budget_is_measured_too(points: Points) -> None:
    """The tau that 37 bytes buy, besides the listed ones."""
    ours = [point for point in points.values() if point.method == fidelity.OURS]
    assert len(ours) == 3
    (found,) = (point for point in ours if point.setting not in ("tau 0.5", "tau 0.05"))
    # The model of a byte's cost is of V = 49,152: here ids are shorter.
    assert 15 < found.bytes < 37 * 1.1


def test_the_error_is_the_distance_from_the_dense_gradient() -> None:
    """Of a plain top-k on few tokens, made anew with whole matrices."""
    hidden, answers = material()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "TAUS", {1.0: ()})
        patch.setattr(fidelity, "PURE", ())
        patch.setattr(fidelity, "TOP_K", (3,))
        patch.setattr(fidelity, "CHUNK", 100)  # 300 tokens in pieces: the sums run over them
        found = measure(
            hidden, answers, temperature=1.0, counts=(128, 300), bar=Bar(300, "test", "tokens")
        )
    by_method = {point.method: point for point in found}
    for count in (128, 300):
        student_ND = hidden.student_ND[:count].double()
        weight_VD = hidden.head.weight_VD.double()
        q_NV = (hidden.teacher_ND[:count].double() @ weight_VD.T).softmax(-1)
        p_NV = (student_ND @ weight_VD.T).softmax(-1)
        cut_NV = torch.where(q_NV >= q_NV.topk(3).values[:, -1:], q_NV, 0)
        mass_N1 = cut_NV.sum(-1, keepdim=True)
        dense_VD = (p_NV - q_NV).T @ student_ND
        wanted: dict[str, Any] = {
            fidelity.RENORMALISED: (p_NV - cut_NV / mass_N1).T @ student_ND,
            fidelity.TRUNCATED: (p_NV * mass_N1 - cut_NV).T @ student_ND,
        }
        for method, gradient_VD in wanted.items():
            error = float((gradient_VD - dense_VD).norm() / dense_VD.norm())
            assert by_method[method].errors[count] == pytest.approx(error, rel=1e-3), method


def point(bytes_: float, error: float) -> Measured:
    return Measured(1.0, fidelity.OURS, "", 1.0, bytes_, {1_000: error})


def test_between_settings_errors_are_read_off_log_axes() -> None:
    curve = [point(64, 0.1), point(4, 0.4), point(16, 0.2)]  # in any order
    at = {size: interpolated(curve, count=1_000, bytes_=size) for size in (4, 8, 16, 32, 64)}
    np.testing.assert_allclose(
        [at[size] for size in (4, 8, 16, 32, 64)],  # type: ignore[misc]
        [0.4, np.sqrt(0.08), 0.2, np.sqrt(0.02), 0.1],
    )


@pytest.mark.parametrize("size", [3.9, 65])
def test_outside_its_settings_a_method_has_no_error(size: float) -> None:
    assert interpolated([point(4, 0.4), point(64, 0.1)], count=1_000, bytes_=size) is None
