"""The embedded sampler, on random models of a few thousand parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from tutelage.core.errors import EngineError
from tutelage.engines import kv_slots, sampler
from tutelage.engines.base import Completion, SamplingParams, sequence_rng
from tutelage.engines.sampler import TransformersSampler, draw

VOCAB = 300  # not a multiple of the block width of the draw
STOPS = tuple(range(5, 20))
MAX_TOKENS = 30
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # far from uniform, so that greedy has no near-ties
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return _llama()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(20, VOCAB, size=size).tolist() for size in rng.integers(1, 30, size=14)]


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    answers = [_generate(model, prompt) for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 6, "the case needs answers of many lengths"
    return answers


def _sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    temperature: float,
    keys: Sequence[int] | None = None,
    stop_ids: tuple[int, ...] = STOPS,
    max_tokens: int = MAX_TOKENS,
    seed: int = 17,
) -> list[Completion]:
    params = SamplingParams(max_tokens, temperature, seed, stop_ids)
    return TransformersSampler(model, batch_size=batch_size, device="cpu").sample(
        prompts, params, keys=keys or range(len(prompts)), on_tokens=lambda count: None
    )


def _generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=list(STOPS),
    )
    return whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_greedy_answers_equal_generate_token_for_token(
    model: PreTrainedModel, prompts: list[list[int]], expected: list[list[int]], batch_size: int
) -> None:
    answers = _sample(model, prompts, batch_size=batch_size, temperature=0)
    assert [list(answer.response_ids) for answer in answers] == expected


def test_greedy_answers_equal_generate_when_the_cache_moves_often(
    model: PreTrainedModel,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_slots, "BLOCK_COLUMNS", 3)
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 40)
    answers = _sample(model, prompts, batch_size=5, temperature=0)
    assert [list(answer.response_ids) for answer in answers] == expected


def test_greedy_answers_equal_generate_with_a_sliding_window(prompts: list[list[int]]) -> None:
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)).eval()
    answers = _sample(windowed, prompts[:6], batch_size=4, temperature=0)
    expected = [_generate(windowed, prompt) for prompt in prompts[:6]]
    assert [list(answer.response_ids) for answer in answers] == expected


def test_equal_keys_give_equal_answers_in_any_batch(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    keys = [1000 + index for index in range(len(prompts))]
    alone = _sample(model, prompts, batch_size=1, temperature=0.8, keys=keys)
    together = _sample(model, prompts, batch_size=7, temperature=0.8, keys=keys)
    backwards = _sample(model, prompts[::-1], batch_size=4, temperature=0.8, keys=keys[::-1])[::-1]
    part = _sample(model, prompts[5:9], batch_size=4, temperature=0.8, keys=keys[5:9])
    ids = [answer.response_ids for answer in alone]
    assert [answer.response_ids for answer in together] == ids
    assert [answer.response_ids for answer in backwards] == ids
    assert [answer.response_ids for answer in part] == ids[5:9]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)


def test_another_key_or_seed_gives_another_answer(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    same_prompt = [prompts[0]] * 2
    by_key = _sample(model, same_prompt, batch_size=2, temperature=1.0, keys=[1, 2], stop_ids=())
    by_seed = _sample(
        model, same_prompt, batch_size=2, temperature=1.0, keys=[1, 1], stop_ids=(), seed=18
    )
    assert by_key[0].response_ids != by_key[1].response_ids
    assert by_seed[0].response_ids == by_seed[1].response_ids
    assert by_seed[0].response_ids != by_key[0].response_ids


def test_an_answer_ends_with_its_first_stop_token_or_at_the_limit(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    answers = _sample(model, prompts, batch_size=6, temperature=1.0)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        stops = [token in STOPS for token in answer.response_ids]
        assert not any(stops[:-1])
        assert len(answer.logps) == len(answer.response_ids) <= MAX_TOKENS
        assert answer.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(stops) == MAX_TOKENS


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logps_are_those_of_a_whole_forward_at_temperature_one(
    model: PreTrainedModel, prompts: list[list[int]], temperature: float
) -> None:
    for prompt, answer in zip(
        prompts, _sample(model, prompts, batch_size=6, temperature=temperature), strict=True
    ):
        ids = torch.tensor([[*prompt, *answer.response_ids]])
        with torch.inference_mode():
            logp_TV = model(input_ids=ids).logits[0].double().log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        expected = logp_TV[rows, ids[0, len(prompt) :]].numpy()
        np.testing.assert_allclose(answer.logps, expected, atol=1e-4)


def test_no_finished_row_is_ever_decoded_and_free_slots_are_refilled(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: rows.append(output.shape[0])
    )
    heard: list[int] = []
    params = SamplingParams(MAX_TOKENS, 0.0, 17, STOPS)
    engine = TransformersSampler(model, batch_size=6, device="cpu")
    answers = engine.sample(prompts, params, keys=range(len(prompts)), on_tokens=heard.append)
    hook.remove()
    num_tokens = sum(len(answer.response_ids) for answer in answers)
    assert sum(rows) == sum(heard) == num_tokens
    in_turn = sorted(prompts, key=len, reverse=True)
    batches = [in_turn[first : first + 6] for first in range(0, len(prompts), 6)]
    length = {tuple(p): len(a.response_ids) for p, a in zip(prompts, answers, strict=True)}
    assert len(rows) < sum(max(length[tuple(prompt)] for prompt in batch) for batch in batches)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_is_the_inverse_cdf_in_vocabulary_order(temperature: float) -> None:
    rng = np.random.default_rng(1)
    logits_V = rng.normal(size=VOCAB) * 3
    p_V = np.exp((logits_V - logits_V.max()) / temperature)
    cdf_V = (p_V / p_V.sum()).cumsum()
    uniforms_B = rng.random(4000)
    logits_BV = torch.tensor(logits_V, dtype=torch.float32).expand(4000, -1)
    ids_B, logps_B = draw(logits_BV, temperature=temperature, uniforms_B=uniforms_B)
    expected_B = np.searchsorted(cdf_V, uniforms_B, side="right")
    assert (ids_B != expected_B).mean() < 1e-3  # float32 against float64, at the edges of a step
    logp_V = logits_V - np.log(np.exp(logits_V).sum())
    np.testing.assert_allclose(logps_B, logp_V[ids_B], atol=1e-5)


def test_draw_never_takes_a_token_without_probability() -> None:
    logits_BV = torch.full((2, VOCAB), -torch.inf)
    logits_BV[:, [3, 280]] = torch.tensor([0.0, 1.0])
    edges_B = np.array([0.0, 1 - 2**-53])
    ids_B, logps_B = draw(logits_BV, temperature=1.0, uniforms_B=edges_B)
    assert ids_B.tolist() == [3, 280]
    np.testing.assert_allclose(logps_B, [-np.log(1 + np.e), 1 - np.log(1 + np.e)], atol=1e-6)


def test_sampled_frequencies_follow_the_model(model: PreTrainedModel) -> None:
    num_draws = 2000
    answers = _sample(
        model, [[30, 40]] * num_draws, batch_size=1000, temperature=1.0, max_tokens=1, stop_ids=()
    )
    counts_V = np.bincount([answer.response_ids[0] for answer in answers], minlength=VOCAB)
    with torch.inference_mode():
        p_V = model(input_ids=torch.tensor([[30, 40]])).logits[0, -1].softmax(-1).numpy()
    sigma_V = np.sqrt(num_draws * p_V * (1 - p_V))
    assert (np.abs(counts_V - num_draws * p_V) < 4.5 * sigma_V + 1).all()


def test_logits_that_are_not_finite_name_the_prompt() -> None:
    broken = _llama()
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = torch.nan  # type: ignore[index]
    with pytest.raises(EngineError, match="prompt 1: logits at answer token 0 are not finite"):
        _sample(broken, [[30, 31], [32, 7, 33, 34]], batch_size=2, temperature=1.0)


def test_an_empty_prompt_is_refused_by_its_index(model: PreTrainedModel) -> None:
    with pytest.raises(EngineError, match="prompt 1 is empty"):
        _sample(model, [[1], []], batch_size=2, temperature=1.0)


def test_a_model_with_recurrent_layers_is_refused() -> None:
    recurrent = _llama()
    recurrent.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(EngineError, match="linear_attention"):
        TransformersSampler(recurrent, batch_size=2, device="cpu")


def test_sampling_and_scoring_never_share_uniforms() -> None:
    sampled = sequence_rng(17, 3, "sample").random(100)
    assert np.array_equal(sampled, sequence_rng(17, 3, "sample").random(100))
    assert not np.isin(sampled, sequence_rng(17, 3, "score").random(100)).any()
    assert not np.isin(sampled, sequence_rng(3, 17, "sample").random(100)).any()
