"""The chunked head against whole logits. N tokens, D hidden size, V vocabulary, K stored ids."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.bench import loss as loss_bench
from tutelage.train.chunk_softmax import softmax_in_place
from tutelage.train.fused import FusedOutput, fused_loss, tokens_that_fit
from tutelage.train.losses import SparseTarget, prepare, token_losses, view_of_logits
from tutelage.train.spec import CROSS_ENTROPY, LossSpec, Term

N, D, V, K = 13, 7, 29, 6
KINDS = [("forward_kl", "unbiased"), ("policy_gradient", "sampled")] + [
    (divergence, treatment)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew")
    for treatment in ("bucket", "truncated", "renormalised", "dense")
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def sparse_target(seed: int, *, rows: int = N) -> SparseTarget:
    """Ragged rows of up to K ids, half of them head; some rows are empty, some have no tail."""
    q_NV = normal(seed, rows, V, scale=2.0).softmax(-1)
    q_NK, ids_NK = q_NV.topk(K, -1)
    counts_N1 = torch.randint(0, K + 1, (rows, 1), generator=generator(seed))
    valid_NK = torch.arange(K) < counts_N1
    head_NK = valid_NK & (torch.arange(K) < 3)
    labels_N = torch.randint(0, V, (rows,), generator=generator(seed + 1))
    label_logq_N = q_NV.log().gather(1, labels_N[:, None])[:, 0]
    entropy_N = -(q_NV * q_NV.log()).sum(-1)
    ids_NK = ids_NK.masked_fill(~valid_NK, 0)
    return SparseTarget(ids_NK, q_NK, head_NK, valid_NK, labels_N, label_logq_N, entropy_N)


def dense_target(seed: int) -> SparseTarget:
    q_NV = normal(seed, N, V, scale=2.0).softmax(-1)
    every_NV = torch.ones(N, V, dtype=torch.bool)
    ids_NV = torch.arange(V).repeat(N, 1)
    entropy_N = -(q_NV * q_NV.log()).sum(-1)
    labels_N = torch.arange(N)
    return SparseTarget(
        ids_NV, q_NV, every_NV, every_NV, labels_N, q_NV.log()[labels_N, labels_N], entropy_N
    )


def target_for(treatment: str) -> SparseTarget:
    return dense_target(3) if treatment == "dense" else sparse_target(3)


def parameters(*, bias: bool = False) -> list[Tensor]:
    tensors = [normal(10, N, D), normal(11, V, D)] + ([normal(12, V)] if bias else [])
    return [tensor.requires_grad_() for tensor in tensors]


def run(inputs: list[Tensor], target: SparseTarget, spec: LossSpec, **options: Any) -> FusedOutput:
    bias_V = inputs[2] if len(inputs) > 2 else None
    return fused_loss(inputs[0], inputs[1], target, spec, bias_V=bias_V, **options)


def with_gradients(
    inputs: list[Tensor], target: SparseTarget, spec: LossSpec, **options: Any
) -> tuple[Tensor, ...]:
    loss_sum = run(inputs, target, spec, **options).loss_sum
    return loss_sum.detach(), *torch.autograd.grad(loss_sum, inputs)


def reference(
    inputs: list[Tensor], target: SparseTarget, spec: LossSpec, weights_N: Tensor,
    softcap: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Loss and gradients through whole logits by autograd."""
    logits_NV = inputs[0] @ inputs[1].T + (inputs[2] if len(inputs) > 2 else 0)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    target = prepare(target, spec, vocab_size=V)
    losses = token_losses(view_of_logits(logits_NV, target, spec), target, spec)
    loss_sum = (losses.total_N * weights_N).sum()
    return loss_sum.detach(), *torch.autograd.grad(loss_sum, inputs)


def some_weights() -> Tensor:
    weights_N = torch.rand(N, dtype=torch.float64, generator=generator(5))
    weights_N[[2, 7]] = 0.0
    return weights_N


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("divergence", "treatment"), KINDS)
def test_every_loss_equals_autograd_through_whole_logits(
    divergence: Any, treatment: Any, softcap: float | None
) -> None:
    spec = LossSpec((Term(divergence, treatment),), lam=0.8)
    inputs, target = parameters(bias=True), target_for(treatment)
    weights_N = some_weights()
    got = with_gradients(inputs, target, spec, weights_N=weights_N, softcap=softcap, chunk_tokens=4)
    want = reference(inputs, target, spec, weights_N, softcap)
    assert all(gradient.abs().max() > 1e-3 for gradient in want[1:])
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("treatment", ["unbiased", "bucket", "dense"])
def test_temperature_touches_kd_and_not_the_label(treatment: Any, softcap: float | None) -> None:
    spec = LossSpec((Term("forward_kl", treatment),), lam=0.8, temperature=2.0)
    inputs, target = parameters(), target_for(treatment)
    if treatment != "dense":
        target = replace(target, temperature=2.0)
    got = with_gradients(
        inputs, target, spec, weights_N=some_weights(), softcap=softcap, chunk_tokens=4
    )
    want = reference(inputs, target, spec, some_weights(), softcap)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_a_mixture_of_treatments_equals_autograd_through_whole_logits() -> None:
    terms = (Term("forward_kl", "unbiased", share=0.75), Term("reverse_kl", "bucket", share=0.25))
    text_N = torch.arange(N) % 3 == 0
    target = replace(sparse_target(3), teacher_text_N=text_N)
    spec = LossSpec(terms, ce_on="teacher")
    got = with_gradients(parameters(), target, spec, weights_N=some_weights(), chunk_tokens=5)
    want = reference(parameters(), target, spec, some_weights())
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


MIX = LossSpec((Term("forward_kl", "unbiased", share=0.5), Term("reverse_kl", "bucket", share=0.5)))


def test_the_order_of_ids_and_padding_changes_nothing() -> None:
    target = sparse_target(3)
    turned = {
        name: getattr(target, name).flip(1)
        for name in ("ids_NK", "q_NK", "head_mask_NK", "valid_NK")
    }
    got = with_gradients(parameters(), replace(target, **turned), MIX, chunk_tokens=4)
    want = with_gradients(parameters(), target, MIX, chunk_tokens=4)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_labels_only_is_cross_entropy() -> None:
    inputs, labels_N = parameters(), torch.arange(N)
    got = with_gradients(inputs, SparseTarget.labels_only(labels_N), CROSS_ENTROPY)
    loss = torch.nn.functional.cross_entropy(inputs[0] @ inputs[1].T, labels_N, reduction="sum")
    want = (loss.detach(), *torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 12, 13, 100])
def test_the_chunk_size_changes_nothing(chunk_tokens: int) -> None:
    got = with_gradients(parameters(), sparse_target(3), MIX, chunk_tokens=chunk_tokens)
    want = with_gradients(parameters(), sparse_target(3), MIX)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_micro_batches_add_up_to_the_batch() -> None:
    hidden_ND, weight_VD = parameters()
    target = sparse_target(3)
    for start, stop in ((0, 5), (5, 6), (6, N)):
        rows = target.rows(start, stop)
        (fused_loss(hidden_ND[start:stop], weight_VD, rows, MIX).loss_sum / N).backward()
    whole = parameters()
    (run(whole, target, MIX).loss_sum / N).backward()
    torch.testing.assert_close(hidden_ND.grad, whole[0].grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weight_VD.grad, whole[1].grad, atol=1e-12, rtol=1e-12)


def test_tokens_of_weight_zero_add_nothing() -> None:
    weights_N = torch.ones(N)
    weights_N[[1, 4, 9]] = 0.0
    kept_N = weights_N > 0
    got = with_gradients(parameters(), sparse_target(3), MIX, weights_N=weights_N, chunk_tokens=4)

    hidden_ND, weight_VD = parameters()
    some = {k: v[kept_N] for k, v in vars(sparse_target(3)).items() if isinstance(v, Tensor)}
    want = with_gradients([hidden_ND, weight_VD], sparse_target(3), MIX, weights_N=weights_N)
    less = fused_loss(hidden_ND[kept_N], weight_VD, replace(sparse_target(3), **some), MIX)
    less.loss_sum.backward()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[0], less.loss_sum.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[1], hidden_ND.grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[2], weight_VD.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("divergence", "treatment"), KINDS)
def test_all_masked_is_finite_with_zero_gradient(divergence: Any, treatment: Any) -> None:
    spec = LossSpec((Term(divergence, treatment),))
    got = with_gradients(
        parameters(), target_for(treatment), spec, weights_N=torch.zeros(N), chunk_tokens=4
    )
    assert [float(tensor.abs().max()) for tensor in got] == [0.0, 0.0, 0.0]


def test_no_tokens_at_all_is_zero_with_zero_gradient() -> None:
    hidden_0D, weight_VD = normal(1, 0, D).requires_grad_(), normal(2, V, D).requires_grad_()
    out = fused_loss(hidden_0D, weight_VD, sparse_target(3).rows(0, 0), MIX)
    out.loss_sum.backward()
    assert out.loss_sum == 0
    assert weight_VD.grad is not None
    assert weight_VD.grad.abs().max() == 0
    assert hidden_0D.grad is not None


@pytest.mark.parametrize("treatment", ["bucket", "dense"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew"])
def test_a_student_equal_to_its_teacher_is_left_alone(divergence: Any, treatment: Any) -> None:
    inputs = parameters()
    q_NV = (inputs[0] @ inputs[1].T).softmax(-1).detach()
    q_NK, ids_NK = q_NV.topk(V if treatment == "dense" else K, -1)
    every_NK = torch.ones_like(ids_NK, dtype=torch.bool)
    zeros_N = torch.zeros(N)
    target = SparseTarget(ids_NK, q_NK, every_NK, every_NK, ids_NK[:, 0], zeros_N, zeros_N)
    spec = LossSpec((Term(divergence, treatment),), lam=1.0, ce_on="none")
    got = with_gradients(inputs, target, spec, chunk_tokens=4)
    assert max(float(tensor.abs().max()) for tensor in got) < 1e-6


class Watch(TorchDispatchMode):
    """Counts matrix products and the fresh tensors of at least `cells` cells."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells, self.products, self.fresh, self.largest = cells, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        self.products += name in ("mm", "addmm", "addmm_")
        owns = name in (
            "empty",
            "new_empty",
            "zeros",
            "zeros_like",
            "empty_like",
            "clone",
            "_to_copy",
        )
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                is_fresh = owns or not (
                    func.is_view or name.endswith("_") or "out" in (kwargs or {})
                )
                self.fresh += is_fresh and tensor.numel() >= self.cells
        return out


@pytest.mark.parametrize("entropy", [False, True])
def test_one_buffer_of_a_chunk_serves_all_and_nothing_is_larger(entropy: bool) -> None:
    vocab, chunk, chunks = 3000, 8, 5
    hidden_ND = normal(1, chunk * chunks, D).float().requires_grad_()
    weight_VD = normal(2, vocab, D).float().requires_grad_()
    target = sparse_target(3, rows=chunk * chunks)
    with Watch(chunk * vocab) as watch:
        out = fused_loss(hidden_ND, weight_VD, target, MIX, chunk_tokens=chunk, entropy=entropy)
        out.loss_sum.backward()
    assert watch.largest == chunk * vocab
    # The entropy takes a block of rows a chunk; at this size it holds the whole chunk.
    assert watch.fresh == 1 + (chunks if entropy else 0)
    assert watch.products == 3 * chunks


def test_evaluation_gives_the_same_loss_and_does_no_gradient_work() -> None:
    inputs, target = parameters(), sparse_target(3)
    with torch.no_grad(), Watch(4 * V) as watch:
        out = run(inputs, target, MIX, chunk_tokens=4, softcap=3.0)
    assert not out.loss_sum.requires_grad
    assert watch.products == math.ceil(N / 4)
    assert watch.fresh == 1
    torch.testing.assert_close(out.loss_sum, with_gradients(inputs, target, MIX, softcap=3.0)[0])


def test_a_frozen_head_gets_no_gradient_and_costs_no_product() -> None:
    hidden_ND, weight_VD = parameters()
    target = sparse_target(3)
    with Watch(4 * V) as watch:
        loss_sum = fused_loss(hidden_ND, weight_VD.detach(), target, MIX, chunk_tokens=4).loss_sum
    loss_sum.backward()
    assert watch.products == 2 * math.ceil(N / 4)
    want = with_gradients([hidden_ND, weight_VD], target, MIX)[1]
    torch.testing.assert_close(hidden_ND.grad, want)


def test_backward_works_once_and_says_so() -> None:
    loss_sum = run(parameters(), sparse_target(3), MIX).loss_sum
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss_sum.backward()


def test_bfloat16_keeps_log_sum_exp_in_float32() -> None:
    # 4,096 equal logits: a sum of exps in bfloat16 stalls at 256, log 4096 - log 256 = 2.8 off.
    hidden_ND = torch.zeros(4, D, dtype=torch.bfloat16)
    weight_VD = torch.ones(4096, D, dtype=torch.bfloat16)
    out = fused_loss(hidden_ND, weight_VD, SparseTarget.labels_only(torch.arange(4)), CROSS_ENTROPY)
    want_N = torch.full((4,), math.log(4096))
    torch.testing.assert_close(out.metrics.ce_N, want_N, atol=1e-5, rtol=0)
    assert out.metrics.ce_N.dtype == torch.float32


def test_bfloat16_accumulates_the_heads_gradient_in_float32() -> None:
    # 512 chunks of one token each add the same to the gradient: bfloat16 sums would stall at 256.
    rows = 512
    hidden_ND = torch.ones(rows, D, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    target = SparseTarget.labels_only(torch.zeros(rows, dtype=torch.int64))
    fused_loss(hidden_ND, weight_VD, target, CROSS_ENTROPY, chunk_tokens=1).loss_sum.backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.dtype == torch.bfloat16
    want = torch.full((D,), rows * (1 / V - 1))
    torch.testing.assert_close(weight_VD.grad[0].float(), want, rtol=0.01, atol=0)


def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients() -> None:
    hidden_ND, weight_VD = (tensor.detach().float().requires_grad_() for tensor in parameters())
    target = sparse_target(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_sum = fused_loss(hidden_ND, weight_VD, target, MIX, chunk_tokens=4).loss_sum
    got = torch.autograd.grad(loss_sum, (hidden_ND, weight_VD))
    exact = with_gradients([hidden_ND, weight_VD], target, MIX)
    assert loss_sum.dtype == got[0].dtype == got[1].dtype == torch.float32
    assert loss_sum != exact[0]
    torch.testing.assert_close(loss_sum.detach(), exact[0], rtol=0.02, atol=0.02)
    for gradient, want in zip(got, exact[1:], strict=True):
        assert (gradient - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew"])
def test_a_student_sure_of_the_head_gives_finite_float32_numbers(divergence: Any) -> None:
    # Logits of 300: 1 - P underflows float32, and an exp taken against the wrong maximum overflows.
    target = replace(sparse_target(3), valid_NK=torch.ones(N, K, dtype=torch.bool))
    target = replace(target, ids_NK=torch.arange(K).repeat(N, 1))
    hidden_ND = torch.full((N, D), 300 / D, requires_grad=True)
    weight_VD = (torch.arange(V) < 3).float()[:, None].repeat(1, D).requires_grad_()
    spec = LossSpec((Term(divergence, "bucket"),))
    out = fused_loss(hidden_ND, weight_VD, target, spec, entropy=True)
    out.loss_sum.backward()
    assert out.loss_sum.isfinite()
    assert out.metrics.entropy_N is not None
    torch.testing.assert_close(out.metrics.entropy_N, torch.full((N,), math.log(3)))
    for tensor in (hidden_ND, weight_VD):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert weight_VD.grad is not None
    if divergence == "forward_kl":  # teacher mass outside pulls at the rest with full force
        assert weight_VD.grad[K:].abs().max() > 1e-3


def test_log_rest_keeps_its_digits_in_float32_where_p_rounds_to_one() -> None:
    logits_CV = torch.zeros(1, V)
    logits_CV[0, 0] = 40.0
    ids_CK = torch.zeros(1, 1, dtype=torch.int64)
    soft = softmax_in_place(logits_CV, ids_CK, torch.ones(1, 1, dtype=torch.bool), entropy=False)
    want = torch.tensor([math.log(V - 1) - 40.0])
    torch.testing.assert_close(soft.log_rest_C, want, rtol=1e-6, atol=0)


def test_metrics_are_detached_and_right() -> None:
    inputs = parameters()
    teacher_NV = normal(3, N, V, scale=2.0)
    q_NK, ids_NK = teacher_NV.softmax(-1).topk(K, -1)
    target = replace(sparse_target(3), ids_NK=ids_NK, q_NK=q_NK)
    metrics = run(inputs, target, MIX, chunk_tokens=4, entropy=True).metrics
    logp_NV = (inputs[0] @ inputs[1].T).log_softmax(-1).detach()
    label_N = logp_NV.gather(1, target.label_ids_N[:, None])[:, 0]
    torch.testing.assert_close(metrics.ce_N, -label_N)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    torch.testing.assert_close(metrics.entropy_N, entropy_N)
    known_N = target.head_mask_NK.any(-1)
    agree_N = known_N & (logp_NV.argmax(-1) == ids_NK[:, 0])
    assert 0 < known_N.sum() < N
    torch.testing.assert_close(metrics.top1_known_N, known_N.double())
    torch.testing.assert_close(metrics.top1_agree_N, agree_N.double())
    soft_ce_N = -(q_NK * logp_NV.gather(1, ids_NK) * target.valid_NK).sum(-1)
    torch.testing.assert_close(metrics.forward_kl_N, soft_ce_N - target.teacher_entropy_N)
    assert not any(tensor.requires_grad for tensor in vars(metrics).values())


def test_agreement_counts_a_students_top_id_in_the_teachers_head() -> None:
    teacher_NV = normal(3, N, V, scale=2.0)
    target = replace(
        sparse_target(3),
        ids_NK=teacher_NV.topk(K, -1).indices,
        q_NK=torch.ones(N, K).cumsum(-1) / 99,
    )
    everywhere_NK = torch.ones(N, K, dtype=torch.bool)
    target = replace(target, valid_NK=everywhere_NK, head_mask_NK=everywhere_NK)
    # The largest q stands last here: the top is found by value, not by place.
    student_NV = torch.zeros(N, V, dtype=torch.float64).scatter(1, target.ids_NK[:, -1:], 5.0)
    out = fused_loss(student_NV, torch.eye(V, dtype=torch.float64), target, MIX)
    assert out.metrics.top1_agree_N.tolist() == [1.0] * N
    moved = fused_loss(student_NV.roll(1, 1), torch.eye(V, dtype=torch.float64), target, MIX)
    assert moved.metrics.top1_agree_N.sum() == 0


def test_chunks_are_bounded_by_bytes_and_hold_at_least_a_token() -> None:
    assert tokens_that_fit(151_936 * 4) == 441
    assert tokens_that_fit(2**40) == 1


def test_the_benchmark_takes_turns_and_measures_every_variant() -> None:
    seconds = loss_bench.measure_time(8, 8, 64, 2)
    assert {variant: len(taken) for variant, taken in seconds.items()} == dict.fromkeys(
        loss_bench.VARIANTS, 2
    )
    assert all(taken > 0 for values in seconds.values() for taken in values)
