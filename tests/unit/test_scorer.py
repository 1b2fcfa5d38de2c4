"""The embedded scorer, on random models of a few thousand parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tutelage.core.errors import EngineError, ModelError
from tutelage.engines import scorer
from tutelage.engines.base import Completion, SamplingParams, Scorable, sequence_rng
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.models.load import BackboneAndHead
from tutelage.targets.schema import TokenTargets

VOCAB = 300
STOPS = tuple(range(5, 20))
TAU = 0.05
ROW_BYTES = 4 * VOCAB
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
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
def sequences() -> list[Scorable]:
    rng = np.random.default_rng(0)
    shapes = zip(rng.integers(1, 20, size=11), rng.integers(1, 30, size=11), strict=True)
    return [
        Scorable(rng.integers(20, VOCAB, size=p).tolist(), rng.integers(5, VOCAB, size=n).tolist())
        for p, n in shapes
    ]


def _scorer(model: PreTrainedModel, *, chunk_rows: int = 7) -> TransformersScorer:
    return TransformersScorer(model, device="cpu", chunk_bytes=chunk_rows * ROW_BYTES)


class _Ragged:
    """A target that shows every input: 1-3 top ids, by label; 0-1 tail ids, by its two uniforms."""

    draws = 2

    def __call__(self, logits_NV: Tensor, labels_N: Tensor, uniforms_NS: Tensor) -> TokenTargets:
        return _ragged(logits_NV, labels_N, uniforms_NS @ torch.tensor([0.5, 0.25]))


def _ragged(logits_NV: Tensor, labels_N: Tensor, offsets_N: Tensor) -> TokenTargets:
    logp_NV = logits_NV.double().log_softmax(-1)
    head_counts_N, tail_counts_N = 1 + labels_N % 3, labels_N % 2
    ranked_NV = logp_NV.argsort(-1, descending=True)
    head = [row[:count] for row, count in zip(ranked_NV, head_counts_N.tolist(), strict=True)]
    logq = [row[ids] for row, ids in zip(logp_NV, head, strict=True)]
    return TokenTargets(
        head_counts_N=head_counts_N.int().numpy(),
        head_ids_M=torch.cat(head).int().numpy(),
        head_logq_M=torch.cat(logq).float().numpy(),
        tail_counts_N=tail_counts_N.int().numpy(),
        tail_ids_T=(offsets_N * 1e6).int()[tail_counts_N > 0].numpy(),
        label_logp_N=logp_NV.gather(-1, labels_N[:, None])[:, 0].float().numpy(),
        entropy_N=(-(logp_NV.exp() * logp_NV).sum(-1)).float().numpy(),
        tau=TAU,
    )


def _score(
    engine: TransformersScorer, sequences: Sequence[Scorable], keys: Sequence[int]
) -> list[TokenTargets]:
    return engine.score(
        sequences, estimator=_Ragged(), seed=17, keys=keys, on_tokens=lambda count: None
    )


def _label_logps(engine: TransformersScorer, sequences: Sequence[Scorable]) -> list[np.ndarray]:
    return engine.label_logps(sequences, on_tokens=lambda count: None)


def _assert_equal(got: TokenTargets, wanted: TokenTargets) -> None:
    for name in (field.name for field in fields(TokenTargets)):
        value, expected = getattr(got, name), getattr(wanted, name)
        np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
@pytest.mark.parametrize("chunk_rows", [1, 7, 10_000])
def test_targets_are_those_of_each_sequence_read_alone_with_whole_logits(
    model: PreTrainedModel,
    sequences: list[Scorable],
    batch_tokens: int,
    chunk_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer, "BATCH_TOKENS", batch_tokens)
    keys = range(100, 100 + len(sequences))
    found = _score(_scorer(model, chunk_rows=chunk_rows), sequences, keys)
    for one, key, targets in zip(sequences, keys, found, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
            logits_TV = model(input_ids=ids).logits[0]
        num_prompt, num_response = len(one.prompt_ids), len(one.response_ids)
        uniforms = sequence_rng(17, key, "score").random((num_response, 2), dtype=np.float32)
        wanted = _Ragged()(
            logits_TV[num_prompt - 1 : -1], torch.tensor(one.response_ids), torch.tensor(uniforms)
        )
        _assert_equal(targets, wanted)


def test_targets_depend_on_seed_and_key_but_not_on_neighbours(
    model: PreTrainedModel, sequences: list[Scorable]
) -> None:
    engine = _scorer(model)
    keys = list(range(len(sequences)))
    whole = _score(engine, sequences, keys)
    part = _score(engine, sequences[6:2:-1], keys[6:2:-1])
    for one, other in zip(part, whole[6:2:-1], strict=True):
        _assert_equal(one, other)
    rekeyed = _score(engine, sequences, [key + 50 for key in keys])
    tails = [np.concatenate([one.tail_ids_T for one in run]) for run in (whole, rekeyed)]
    assert (tails[0] != tails[1]).mean() > 0.9


def _agrees(answers: Sequence[Completion], scored: Sequence[np.ndarray]) -> bool:
    """Do the log-probabilities kept while sampling equal those of one read by the same model?"""
    return all(
        len(answer.logps) == len(logps) and np.abs(np.array(answer.logps) - logps).max() < 1e-3
        for answer, logps in zip(answers, scored, strict=True)
    )


def _drop_stop(answer: Completion) -> Completion:
    stops = answer.finish_reason == "stop"
    return replace(answer, response_ids=answer.response_ids[:-1]) if stops else answer


def _shift(engine: TransformersScorer) -> Callable[[Sequence[Scorable]], Tensor]:
    hidden = engine._response_hidden
    return lambda chosen: hidden(chosen).roll(1, 0)


def _heat() -> Callable[[BackboneAndHead, Tensor], Tensor]:
    logits = BackboneAndHead.logits
    return lambda head, hidden_ND: logits(head, hidden_ND) / 0.9


@pytest.mark.parametrize("fault", ["none", "off by one", "wrong temperature", "dropped stop token"])
def test_scorer_and_sampler_agree_on_one_model_and_each_planted_fault_shows(
    model: PreTrainedModel, sequences: list[Scorable], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [one.prompt_ids for one in sequences]
    answers = TransformersSampler(model, batch_size=4, device="cpu").sample(
        prompts,
        SamplingParams(25, 0.8, 17, STOPS),
        keys=range(len(prompts)),
        on_tokens=lambda count: None,
    )
    assert any(1 < len(answer.logps) < 25 for answer in answers)
    engine = _scorer(model)
    if fault == "off by one":
        monkeypatch.setattr(engine, "_response_hidden", _shift(engine))
    if fault == "wrong temperature":
        monkeypatch.setattr(BackboneAndHead, "logits", _heat())
    read = [_drop_stop(answer) if fault == "dropped stop token" else answer for answer in answers]
    pairs = [
        (answer, Scorable(prompt, seen.response_ids))
        for prompt, answer, seen in zip(prompts, answers, read, strict=True)
        if seen.response_ids
    ]
    scored = _label_logps(engine, [sequence for _, sequence in pairs])
    assert _agrees([answer for answer, _ in pairs], scored) == (fault == "none")


def test_only_one_bounded_chunk_of_logits_is_alive(
    model: PreTrainedModel, sequences: list[Scorable], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _scorer(model, chunk_rows=7)
    logits = BackboneAndHead.logits
    earlier: list[weakref.ref[Tensor]] = []
    rows: list[int] = []

    def watched(head: BackboneAndHead, hidden_ND: Tensor) -> Tensor:
        assert all(reference() is None for reference in earlier)
        logits_NV = logits(head, hidden_ND)
        earlier.append(weakref.ref(logits_NV))
        rows.append(logits_NV.shape[0])
        return logits_NV

    heard: list[int] = []
    monkeypatch.setattr(BackboneAndHead, "logits", watched)
    engine.score(
        sequences, estimator=_Ragged(), seed=1, keys=range(len(sequences)), on_tokens=heard.append
    )
    assert max(rows) == 7
    assert sum(rows) == sum(heard) == sum(len(one.response_ids) for one in sequences)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_name_the_sequence(value: float) -> None:
    broken = _llama()
    with torch.no_grad():
        broken.get_input_embeddings().weight[77] = value  # type: ignore[index]
    sequences = [Scorable([30, 31], [32, 33]), Scorable([34] * 9, [35]), Scorable([36], [77, 37])]
    with pytest.raises(EngineError, match="sequence 2: teacher logits are not finite"):
        _label_logps(_scorer(broken), sequences)


def test_an_empty_prompt_or_response_names_the_sequence(model: PreTrainedModel) -> None:
    for empty in (Scorable([], [1]), Scorable([1], [])):
        with pytest.raises(EngineError, match="sequence 1: its prompt or its response is empty"):
            _label_logps(_scorer(model), [Scorable([1], [1]), empty])


def test_a_capped_head_is_scored_with_its_cap() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0)
    capped = Gemma2ForCausalLM(config).eval()
    with torch.inference_mode():
        logp_TV = capped(input_ids=torch.tensor([[30, 31, 32]])).logits[0].log_softmax(-1)
    found = _label_logps(_scorer(capped), [Scorable([30], [31, 32])])
    np.testing.assert_allclose(found[0], [logp_TV[0, 31], logp_TV[1, 32]], atol=1e-4)


def test_a_head_that_scales_its_logits_is_refused() -> None:
    scaled = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)).eval()
    with pytest.raises(ModelError, match="Granite"):
        _scorer(scaled)
