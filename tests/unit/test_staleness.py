"""The gauge of staleness against the exact KL of two real models, and when it reads and warns."""

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor
from transformers import PreTrainedModel

from tutelage.engines.base import SamplingParams, Scorable
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import load_model
from tutelage.train.staleness import Gauge, affordable_points, is_due, kl_terms, surprise

CPU = torch.device("cpu")
PROMPTS = [[5 + index % 7, 30 + index, 12] for index in range(150)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    """The generating student, with opinions, and the same a small way on."""
    folder = write_model(tmp_path_factory.mktemp("tiny") / "model", layers=1)
    found = []
    for drift in (0.0, 0.05):
        model = load_model(folder, dtype="float32", device=CPU)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:  # random weights alone are as good as uniform
                    parameter.mul_(4.0)
                    parameter.add_(drift * torch.randn(parameter.shape, generator=generator))
        found.append(model)
    return found


def answered(model: PreTrainedModel, temperature: float) -> tuple[list[Scorable], np.ndarray]:
    params = SamplingParams(max_tokens=6, temperature=temperature, seed=11, stop_ids=(318,))
    sampler = TransformersSampler(model, batch_size=50, device="cpu")
    done = sampler.sample(PROMPTS, params, keys=range(len(PROMPTS)), on_tokens=lambda count: None)
    answers = [Scorable(p, one.response_ids) for p, one in zip(PROMPTS, done, strict=True)]
    return answers, np.concatenate([one.logps for one in done])


def hidden(model: PreTrainedModel, answers: list[Scorable]) -> tuple[Tensor, TransformersScorer]:
    scorer = TransformersScorer(model, device="cpu", chunk_bytes=2**20)
    return scorer.hidden_states(answers, on_tokens=lambda count: None), scorer


@torch.inference_mode()
def logp(model: PreTrainedModel, answers: list[Scorable]) -> Tensor:
    """Whole distributions, double, [N, V]."""
    hidden_ND, scorer = hidden(model, answers)
    return scorer.head.logits(hidden_ND).double().log_softmax(-1)


def test_its_mean_over_the_generating_student_is_the_exact_kl(
    models: list[PreTrainedModel],
) -> None:
    """The expectation by summing over the vocabulary: no sampling noise, so an identity."""
    answers, _ = answered(models[0], 1.0)
    generating_NV, now_NV = (logp(model, answers) for model in models)
    terms_NV = kl_terms(now_NV.numpy(), generating_NV.numpy())
    assert terms_NV.min() >= 0
    found_N = (generating_NV.exp().numpy() * terms_NV).sum(-1)
    exact_N = (now_NV.exp() * (now_NV - generating_NV)).sum(-1).numpy()
    np.testing.assert_allclose(found_N, exact_N, rtol=1e-6, atol=1e-9)
    assert exact_N.mean() > 0.05
    other_N = (generating_NV.exp() * (generating_NV - now_NV)).sum(-1).numpy()
    assert np.abs(other_N - exact_N).max() > 1e-3  # so it is not the other direction


def test_on_sampled_answers_it_is_near_the_exact_kl(models: list[PreTrainedModel]) -> None:
    answers, generating_N = answered(models[0], 1.0)
    generating_NV, now_NV = (logp(model, answers) for model in models)
    labels_N = torch.tensor([token for one in answers for token in one.response_ids])
    now_N = now_NV.gather(-1, labels_N[:, None])[:, 0].numpy()
    terms_N = kl_terms(now_N, generating_N)
    exact = float((now_NV.exp() * (now_NV - generating_NV)).sum(-1).mean())
    assert abs(terms_N.mean() - exact) < 4 * terms_N.std() / len(terms_N) ** 0.5
    assert terms_N.std() / len(terms_N) ** 0.5 < exact / 4  # or nearly anything would pass


def test_a_student_that_has_not_moved_is_at_0() -> None:
    logp_N = np.array([-0.0, -1e-4, -3.0, -40.0], np.float32)
    assert kl_terms(logp_N, logp_N).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("temperature", "plain"), [(1.0, True), (0.0, False), (0.5, False)])
def test_surprise_tells_plain_samples_from_others(
    models: list[PreTrainedModel], temperature: float, plain: bool
) -> None:
    answers, stored_N = answered(models[0], temperature)
    hidden_ND, scorer = hidden(models[0], answers)
    labels_N = torch.tensor([token for one in answers for token in one.response_ids])
    found = surprise(hidden_ND, scorer.head, labels_N)
    np.testing.assert_allclose(found.logp_N, stored_N, atol=1e-4)
    if plain:
        assert abs(found.deviations) < 3
    else:
        assert found.deviations < -5


@torch.inference_mode()
def test_deviations_are_standard_over_tokens_of_the_models_own(
    models: list[PreTrainedModel],
) -> None:
    """400 draws of all tokens from the same distributions: mean 0 and deviation 1."""
    answers, _ = answered(models[0], 1.0)
    hidden_ND, scorer = hidden(models[0], answers[:30])
    p_NV = scorer.head.logits(hidden_ND).double().softmax(-1)
    generator = torch.Generator().manual_seed(3)
    draws_NB = torch.multinomial(p_NV, 400, replacement=True, generator=generator)
    found = [surprise(hidden_ND, scorer.head, draws_NB[:, b]).deviations for b in range(400)]
    assert abs(np.mean(found)) < 4 / 400**0.5
    assert np.std(found) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("steps", "points"), [(250, 10), (7, 10), (1, 3), (11, 4)])
def test_it_reads_at_even_points_and_at_the_end(steps: int, points: int) -> None:
    due = [done for done in range(1, steps + 1) if is_due(done, steps, points)]
    assert len(due) == min(steps, points)
    assert due[-1] == steps
    gaps = np.diff([0, *due])
    assert max(gaps) - min(gaps) <= 1


def test_it_reads_less_often_where_training_is_short() -> None:
    assert affordable_points(10, held_tokens=100, trained_tokens=1_000_000) == 10
    assert affordable_points(10, held_tokens=100, trained_tokens=10_000) == 5
    assert affordable_points(10, held_tokens=100, trained_tokens=500) == 1


@pytest.mark.parametrize("stop", [False, True])
def test_it_warns_once_above_the_limit_and_ends_the_training_only_if_asked(stop: bool) -> None:
    drift = [0.0]
    said: list[str] = []
    stored_N = np.full(50, -2.0)
    gauge = Gauge(lambda: stored_N + drift[0], stored_N, 4, 0.1, stop, said.append)
    assert gauge(2, 8).figures == {"staleness": 0.0, "staleness_error": 0.0}
    assert gauge(3, 8).figures == {}
    drift[0] = 0.5  # 0.5 e^0.5 - e^0.5 + 1 = 0.176
    for done in (4, 6):
        seen = gauge(done, 8)
        assert seen.figures["staleness"] == pytest.approx(0.17564, abs=1e-5)
        assert seen.stop == stop
    warnings = [line for line in said if "rounds = 2" in line]
    assert len(warnings) == 1
    assert "step 4 of 8: the student is 0.18 +- 0.00 nats" in warnings[0]
    assert any("stopped" in line for line in said) == stop
