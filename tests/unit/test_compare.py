"""A student against its teacher: on real (tiny) models, in closed form, and by their texts."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.core.errors import DataError, ModelError
from tutelage.evals.compare import (
    CHUNK_BUFFERS,
    MEASURES,
    Reading,
    SequenceComparison,
    TokenSequence,
    compare_models,
    compare_readings,
    read_sequences,
)
from tutelage.evals.textmatch import answer_length, repeated_share, rouge_l, rouge_tokens
from tutelage.models.load import BackboneAndHead

VOCAB = 40


def tiny_model(seed: int, *, vocab: int = VOCAB, dropout: float = 0.0) -> LlamaForCausalLM:
    """A random Llama whose distributions are peaked enough that models differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.4, attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def student() -> LlamaForCausalLM:
    return tiny_model(1)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return tiny_model(2)


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    """Of unlike lengths, out of order, so that batches sort and pad them."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, VOCAB, (count,), generator=generator).tolist()

    return [TokenSequence(ids(p), ids(r)) for p, r in [(3, 5), (9, 1), (1, 12), (4, 7), (1, 1)]]


def dense(model: LlamaForCausalLM, sequence: TokenSequence) -> Tensor:
    """Log-probabilities [N, V] of the response tokens by the model's own logits, in float64."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    return logits[len(sequence.prompt_ids) - 1 : -1].double().log_softmax(-1)


def by_definition(logp: Tensor, logq: Tensor, labels: list[int]) -> SequenceComparison:
    """Every measure as its definition says it, token by token."""
    p, q = logp.exp(), logq.exp()
    tops = [
        (set(a.topk(10).indices.tolist()), set(b.topk(10).indices.tolist()))
        for a, b in zip(logp, logq, strict=True)
    ]
    return SequenceComparison(
        tokens=len(labels),
        forward_kl=float((q * (logq - logp)).sum()),
        reverse_kl=float((p * (logp - logq)).sum()),
        top1_agreement=float((p.argmax(1) == q.argmax(1)).sum()),
        topk_overlap=sum(len(ours & theirs) / 10 for ours, theirs in tops),
        overlap_mass=sum(
            float(q[n, sorted(ours & theirs)].sum()) for n, (ours, theirs) in enumerate(tops)
        ),
        student_entropy=float(-(p * logp).sum()),
        teacher_entropy=float(-(q * logq).sum()),
        label_gap=sum(float(logq[n, y] - logp[n, y]) for n, y in enumerate(labels)),
    )


def assert_close(ours: SequenceComparison, theirs: SequenceComparison) -> None:
    assert ours.tokens == theirs.tokens
    for name in MEASURES:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=2e-5), name


def test_padded_batches_give_the_measures_of_the_models_own_logits(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    compared = compare_models(student, teacher, sequences)
    for result, sequence in zip(compared, sequences, strict=True):
        expected = by_definition(
            dense(student, sequence), dense(teacher, sequence), list(sequence.response_ids)
        )
        assert_close(result, expected)
    # The two models are no special case: nothing here is nearly 0, 1 or equal.
    tokens = sum(result.tokens for result in compared)
    assert sum(result.forward_kl for result in compared) / tokens > 0.5
    assert 0.1 < sum(result.topk_overlap for result in compared) / tokens < 0.9


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_batches_change_nothing_but_rounding(
    student: LlamaForCausalLM, sequences: list[TokenSequence], batch_tokens: int
) -> None:
    reading = read_sequences(student, sequences, batch_tokens=batch_tokens)
    whole = read_sequences(student, sequences)
    for one, other in zip(reading.hidden_ND, whole.hidden_ND, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_model_equals_itself(student: LlamaForCausalLM, sequences: list[TokenSequence]) -> None:
    for result in compare_models(student, student, sequences):
        assert result.forward_kl == result.reverse_kl == result.label_gap == 0
        assert result.top1_agreement == result.tokens
        assert result.topk_overlap == pytest.approx(result.tokens)
        assert result.student_entropy == result.teacher_entropy


def test_exchanging_the_models_exchanges_the_directions(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    there = compare_models(student, teacher, sequences)
    back = compare_models(teacher, student, sequences)
    for one, other in zip(there, back, strict=True):
        assert one.forward_kl == pytest.approx(other.reverse_kl, rel=1e-5)
        assert one.student_entropy == pytest.approx(other.teacher_entropy)
        assert one.label_gap == pytest.approx(-other.label_gap)


def test_chunks_hold_to_their_bytes_and_change_nothing(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    ours, theirs = read_sequences(student, sequences), read_sequences(teacher, sequences)
    whole = compare_readings(ours, theirs, sequences)
    for tokens in (1, 4):
        counts: list[int] = []
        budget = tokens * CHUNK_BUFFERS * VOCAB * 4 + 3
        parts = compare_readings(
            ours, theirs, sequences, chunk_bytes=budget, on_tokens=counts.append
        )
        assert max(counts) == tokens
        assert sum(counts) == sum(result.tokens for result in whole)
        for one, other in zip(parts, whole, strict=True):
            assert_close(one, other)


def test_every_token_read_is_reported(
    student: LlamaForCausalLM, teacher: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    counts: list[int] = []
    compare_models(student, teacher, sequences, on_tokens=counts.append)
    responses = sum(len(s.response_ids) for s in sequences)
    assert sum(counts) == 2 * (responses + sum(len(s.prompt_ids) for s in sequences)) + responses


def with_logits(logits: list[list[float]], **head: Tensor | float | None) -> Reading:
    """A reading whose output layer is the identity, so that its hidden states are the logits."""
    hidden_ND = torch.tensor(logits)
    parts = {"bias_V": None, "softcap": None, **head}
    return Reading(
        [hidden_ND],
        BackboneAndHead(nn.Identity(), torch.eye(hidden_ND.shape[1]), **parts),  # type: ignore[arg-type]
    )


def test_closed_forms_against_a_uniform_teacher() -> None:
    """q uniform over 40; p = 1/2 on id 7, the rest even: both KLs are written out by hand."""
    p_rest = 0.5 / 39
    uniform = with_logits([[0.0] * 40])
    peaked = with_logits([[math.log(0.5 if i == 7 else p_rest) for i in range(40)]])
    (result,) = compare_readings(peaked, uniform, [TokenSequence([0], [7])])
    forward = (math.log(1 / 40 / 0.5) + 39 * math.log(1 / 40 / p_rest)) / 40
    reverse = 0.5 * math.log(0.5 * 40) + 0.5 * math.log(p_rest * 40)
    assert result.forward_kl == pytest.approx(forward, abs=1e-5)
    assert result.reverse_kl == pytest.approx(reverse, abs=1e-5)
    assert result.teacher_entropy == pytest.approx(math.log(40), abs=1e-5)
    assert result.label_gap == pytest.approx(math.log(1 / 40 / 0.5), abs=1e-5)


def test_disjoint_top_ids_share_no_mass() -> None:
    low, high = [[0.0] * 15 + [9.0] * 15], [[9.0] * 15 + [0.0] * 15]
    (result,) = compare_readings(with_logits(low), with_logits(high), [TokenSequence([0], [1])])
    assert (result.topk_overlap, result.overlap_mass, result.top1_agreement) == (0, 0, 0)


def test_bias_and_softcap_of_the_output_layer_count() -> None:
    logits = torch.linspace(-3, 3, 20)
    bias_V = torch.arange(20.0).flip(0) / 7
    plain = with_logits([(2.5 * torch.tanh((logits + bias_V) / 2.5)).tolist()])
    reading = with_logits([logits.tolist()], bias_V=bias_V, softcap=2.5)
    (result,) = compare_readings(reading, plain, [TokenSequence([0], [1])])
    assert result.forward_kl == pytest.approx(0, abs=1e-6)
    assert result.label_gap == pytest.approx(0, abs=1e-6)


def test_reading_uses_no_dropout_and_leaves_the_mode_as_it_was(
    sequences: list[TokenSequence],
) -> None:
    model = tiny_model(1, dropout=0.5)
    expected = read_sequences(model, sequences).hidden_ND
    found = read_sequences(model.train(), sequences).hidden_ND
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_reading_keeps_response_tokens_only(
    student: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    for hidden_ND, sequence in zip(
        read_sequences(student, sequences).hidden_ND, sequences, strict=True
    ):
        assert hidden_ND.shape == (len(sequence.response_ids), 16)
        assert hidden_ND.untyped_storage().nbytes() == hidden_ND.numel() * 4


def test_unlike_vocabularies_raise(
    student: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    with pytest.raises(ModelError, match="40 and 50 token ids"):
        compare_models(student, tiny_model(3, vocab=50), sequences)


def test_logits_that_are_not_finite_raise_and_name_the_sequence(
    teacher: LlamaForCausalLM, sequences: list[TokenSequence]
) -> None:
    reading = read_sequences(teacher, sequences)
    broken = [states_ND.clone() for states_ND in reading.hidden_ND]
    broken[2][3, 0] = math.nan
    with pytest.raises(ModelError, match="sequence 2"):
        compare_readings(Reading(broken, reading.head), reading, sequences)


@pytest.mark.parametrize("empty", [TokenSequence([], [1]), TokenSequence([1], [])])
def test_a_sequence_without_prompt_or_response_raises(
    student: LlamaForCausalLM, empty: TokenSequence
) -> None:
    with pytest.raises(DataError, match="sequence 1"):
        read_sequences(student, [TokenSequence([1], [2]), empty])


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert rouge_l("the cat is on the mat", "The cat sat on the mat.") == pytest.approx(10 / 12)
    # "police the gunman" keeps "the gunman" in order; Lin 2004's third candidate (beta = 1).
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("a b", "a b c d e f") == pytest.approx(2 * 2 / 8)


def test_rouge_l_counts_characters_where_words_are_not_spaced() -> None:
    assert rouge_l("我喜欢猫。", "我喜欢狗！") == pytest.approx(6 / 8)
    assert rouge_l("私はカレー", "私はラーメン") == pytest.approx(2 * 3 / 11)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Don't PANIC: 3.5%", ["don", "t", "panic", "3", "5"]),
        ("Straße Café", ["strasse", "café"]),
        ("cafe\u0301", ["café"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("用GPU跑3次", ["用", "gpu", "跑", "3", "次"]),
        ("น้ำใจ", ["น\u0e49\u0e4d", "า", "ใ", "จ"]),  # NFKC cuts sara am into nikhahit and sara aa
        ("ｶﾞ々", ["ガ", "々"]),
        ("🙂 …", []),
    ],
)
def test_tokens_of_many_scripts(text: str, tokens: list[str]) -> None:
    assert rouge_tokens(text) == tokens


def test_rouge_l_without_any_token_is_zero() -> None:
    assert rouge_l("", "") == rouge_l("…", "a") == 0.0


@pytest.mark.parametrize(
    ("ids", "share"),
    [(list(range(30)), 0), ([1, 2, 3] * 10, 1 - 3 / 27), ([5] * 4, 0), ([5] * 3, 0), ([], 0)],
)  # fmt: skip
def test_a_loop_shows_as_repeated_ngrams(ids: list[int], share: float) -> None:
    assert repeated_share(ids) == pytest.approx(share)


def test_length_leaves_the_stop_token_out() -> None:
    assert answer_length([4, 5, 2], finish_reason="stop") == 2
    assert answer_length([4, 5, 6], finish_reason="length") == 3
