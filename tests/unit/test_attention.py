"""Packed rows of real architectures, random and tiny: each example as if it were alone.

The reference everywhere is transformers' own SDPA over one example at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_flash_attention_utils

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import EngineError
from tutelage.core.progress import Reporter
from tutelage.core.team import Team
from tutelage.models.load import backbone_and_head
from tutelage.recipe.training import Sft
from tutelage.targets.estimator import threshold_sample
from tutelage.targets.schema import TokenTargets
from tutelage.train import attention
from tutelage.train.batches import Example, PackedBatch, length_groups, pack, stack
from tutelage.train.loop import Objective, Plan, Trainee, _check_way, train
from tutelage.train.objectives import CrossEntropy, Distillation
from tutelage.train.spec import LossSpec, Term
from tutelage.train.team import Joined

CPU = torch.device("cpu")
V, WINDOW = 40, 6
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **MIXED, use_sliding_window=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **MIXED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
}
MIXING: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "convolutions": lambda: transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"]
    ),
    "states": lambda: transformers.MambaConfig(
        vocab_size=V, hidden_size=32, state_size=8, num_hidden_layers=2
    ),
    # Attention alone, but transformers 5.23 does not tell its mask of positions.
    "positions kept back": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, sliding_window=WINDOW, layer_types=None
    ),
}
ROWS = ((2, 150, 2, 40, 2, 9), (135,), (30, 2))
"""Lengths of examples: below and above BLOCK_TOKENS, of two tokens, alone in a row; one row is
longer than the others, which are padded to it."""
LOSSES: dict[str, LossSpec | None] = {
    "sft": None,
    "forward_kl unbiased": LossSpec(),
    **{
        f"{divergence} {treatment}": LossSpec((Term(divergence, treatment),), lam=0.7)  # type: ignore[arg-type]
        for divergence in ("forward_kl", "reverse_kl", "jsd", "skew")
        for treatment in ("bucket", "truncated", "renormalised")
    },
    "policy_gradient": LossSpec((Term("policy_gradient", "sampled"),)),
    "text of the teacher": LossSpec(ce_on="teacher"),
}


def model_of(config: transformers.PretrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # a fresh model hardly attends; one that does shows what it looks at
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8)
    return model


def some_examples(rows: Sequence[Sequence[int]] = ROWS) -> list[Example]:
    random = np.random.default_rng(0)
    examples = []
    for length in (length for row in rows for length in row):
        mask_L = np.arange(length) >= max(1, length // 3)
        examples.append(Example(random.integers(3, V, length).astype(np.int32), mask_L))
    return examples


def packed(examples: Sequence[Example], rows: Sequence[Sequence[int]] = ROWS) -> PackedBatch:
    taken, first = [], 0
    for row in rows:
        indices = range(first, first + len(row))
        taken.append(pack([examples[i] for i in indices], indices))
        first += len(row)
    return stack(taken)


def objective_of(spec: LossSpec | None, examples: Sequence[Example]) -> Objective:
    if spec is None:
        return CrossEntropy()
    generator = torch.Generator().manual_seed(1)

    def targets_of(example: Example) -> TokenTargets:
        labels_N = torch.from_numpy(example.ids_L[example.mask_L]).long()
        logits_NV = 2 * torch.randn(len(labels_N), V, generator=generator)
        offsets_N = torch.rand(len(labels_N), generator=generator)
        return threshold_sample(logits_NV, labels_N, tau=0.05, offsets_N=offsets_N)

    stored: list[TokenTargets | None] = [targets_of(example) for example in examples]
    if spec.ce_on == "teacher":
        stored[1] = stored[4] = None
    return Distillation(spec, 1.0, lambda index: stored[index])


def states_alone(model: PreTrainedModel, example: Example) -> Tensor:
    """Of an untouched model, [N, D], without any of our code."""
    assert model.config._attn_implementation != attention.BLOCKS
    ids_1L = torch.from_numpy(example.ids_L.astype(np.int64))[None]
    hidden_LD = backbone_and_head(model).backbone(input_ids=ids_1L).last_hidden_state[0]
    return hidden_LD[np.flatnonzero(example.mask_L) - 1]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_alike(together: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        difference = float((together[name] - gradient).norm())
        assert difference <= 1e-4 * float(gradient.norm()) + 1e-7, name


def compare(config: transformers.PretrainedConfig, spec: LossSpec | None, kind: str) -> Trainee:
    """Loss and gradients of packed rows against the sum over examples alone."""
    examples = some_examples()
    objective = objective_of(spec, examples)
    plain = model_of(config)
    parts = []
    for index, example in enumerate(examples):
        row = stack([pack([example], [index])])
        head = backbone_and_head(plain)
        parts.append(objective(states_alone(plain, example), head, row).loss_sum)
    alone = torch.stack(parts).sum()
    trainee = Trainee(model_of(type(config).from_dict(config.to_dict())), objective).train()
    assert trainee.way.kind == kind
    together = trainee(packed(examples), CPU).loss_sum
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    check_alike(gradients(trainee.model, together), gradients(plain, alone))
    return trainee


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_rows_have_the_loss_and_gradient_of_each_example_alone(family: str) -> None:
    compare(CONFIGS[family](), None, "blocks")


@pytest.mark.parametrize("loss", LOSSES)
def test_packing_changes_no_loss(loss: str) -> None:
    compare(CONFIGS["gemma3"](), LOSSES[loss], "blocks")


# Not of Mixtral, whose experts multiply the tokens of all examples together.
@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "mixtral"])
def test_another_first_example_moves_the_loss_of_the_second_by_no_bit(family: str) -> None:
    trainee = Trainee(model_of(CONFIGS[family]()), CrossEntropy())
    for lengths in ((2, 5, 60), (140, 30), (3, 150)):
        examples = some_examples([lengths])
        states = []
        for move in (0, 1):
            ids_L = (examples[0].ids_L + move) % V
            batch = packed([replace(examples[0], ids_L=ids_L), *examples[1:]], [lengths])
            backbone = backbone_and_head(trainee.model).backbone
            states.append(trainee.way.hidden(backbone, batch, CPU))
        first = sum(examples[0].mask_L)
        assert torch.equal(states[0][first:], states[1][first:])
        assert not torch.equal(states[0][:first], states[1][:first])


@pytest.mark.parametrize("family", MIXING)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_mixes_examples_otherwise_reads_one_a_row(family: str) -> None:
    trainee = compare(MIXING[family](), None, "alone")
    assert "one a row" in trainee.way.note


@pytest.mark.filterwarnings("ignore")
def test_a_person_is_told_that_packing_is_of_no_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = some_examples()
    plan = Plan(lambda i: examples[i], str, [[[0, 1, 2]]])
    config = Sft(stage="sft", model="m", data=("d",), seed=0, pack_tokens=256)
    work = WorkDir.open(tmp_path, reporter=Reporter(), device="cpu")
    model = model_of(MIXING["convolutions"]())
    train(model, plan, CrossEntropy(), config, work, device=CPU, label="t")
    assert "mix the examples of a packed row" in capsys.readouterr().err


def test_shards_cannot_read_one_example_a_row() -> None:
    team = Joined(Team(size=2, sharding="fsdp"), CPU)
    with pytest.raises(EngineError, match="set runtime.sharding = ddp"):
        _check_way(team, attention.Way("alone"))
    _check_way(team, attention.Way("blocks"))


def test_attention_without_a_kernel_of_ours_goes_by_one_mask() -> None:
    config = transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=WINDOW)
    assert "slow" in compare(config, None, "masked").way.note


class Disturbed(nn.Module):
    """A backbone with a fault injected into its states, of the largest one's size."""

    def __init__(self, backbone: nn.Module, by_shape: float, by_first_token: float) -> None:
        super().__init__()
        self.backbone, self.by_shape, self.by_first_token = backbone, by_shape, by_first_token

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        out = self.backbone(input_ids=input_ids, **given)
        noise = self.by_shape * input_ids.shape[1] / 10
        noise = noise + self.by_first_token * input_ids[:, :1, None]
        states = out.last_hidden_state
        return replace(out, last_hidden_state=states + noise * states.abs().max())


@pytest.mark.parametrize(
    ("by_shape", "by_first_token", "apart"),
    [(0.0, 0.0, True), (1e-4, 0.0, True), (0.0, 1e-4, False), (0.1, 0.0, False)],
)
def test_the_noise_of_a_deep_model_is_not_taken_for_mixing_and_a_little_mixing_is_seen(
    by_shape: float, by_first_token: float, apart: bool
) -> None:
    model = model_of(CONFIGS["llama"]()).eval()
    backbone = Disturbed(backbone_and_head(model).backbone, by_shape, by_first_token)
    assert attention._keeps_apart(backbone, CPU) is apart


def test_trying_a_model_leaves_it_as_it_was() -> None:
    model = model_of(CONFIGS["llama"]())
    model.train()
    model.lm_head.eval()
    state = torch.get_rng_state()
    attention.choose(model, backbone_and_head(model).backbone)
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_that_are_not_packed_are_read_as_before() -> None:
    plain, ours = model_of(CONFIGS["gemma3"]()).eval(), model_of(CONFIGS["gemma3"]()).eval()
    attention.choose(ours, backbone_and_head(ours).backbone)
    ids_BT = torch.arange(3, 27).reshape(2, 12)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    decoding = {"max_new_tokens": 6, "do_sample": False}
    for mask in (None, mask_BT):
        logits, texts = [], []
        for model in (plain, ours):
            logits.append(model(ids_BT, attention_mask=mask).logits)
            texts.append(model.generate(ids_BT, attention_mask=mask_BT, **decoding))  # type: ignore
        assert torch.equal(*logits)
        assert torch.equal(*texts)


def test_our_attention_is_not_written_into_the_config() -> None:
    model = model_of(CONFIGS["llama"]())
    attention.choose(model, backbone_and_head(model).backbone)
    assert attention.BLOCKS not in model.config.to_json_string()


def test_gradient_checkpointing_packs_alike() -> None:
    examples = some_examples()
    found = []
    for checkpointing in (False, True):
        model = model_of(CONFIGS["gemma3"]())
        trainee = Trainee(model, CrossEntropy()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, trainee(packed(examples), CPU).loss_sum))
    check_alike(*found)


def test_no_mask_is_larger_than_the_examples_that_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [200, 300, 20, 30, 170]
    made: list[attention.Block] = []

    def kept(**given: Any) -> Any:
        blocks = attention.block_masks(**given)
        assert isinstance(blocks, attention.Blocks)
        made.extend(blocks.rows[0])
        return blocks

    trainee = Trainee(model_of(CONFIGS["llama"]()), CrossEntropy())
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, attention.BLOCKS, kept)
    trainee(packed(some_examples([lengths]), [lengths]), CPU)
    assert [block.tokens for block in made] == [200, 300, 50, 170]
    assert [block.mask_11LL is not None for block in made] == [False, False, True, False]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A fake for the FlashAttention kernel, which this machine's CPU cannot run: what transformers
    calls it with, computed an example at a time. It keeps the ends it was told."""
    told: list[list[int]] = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        softmax_scale: float, causal: bool, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert causal
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert q.dtype in attention.HALF
        ends = cu_seqlens_q.tolist()
        told.append(ends)
        assert max_seqlen_q == max(np.diff(ends))
        done = []
        for first, last in pairwise(ends):
            part = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
            ages = torch.arange(last - first)[:, None] - torch.arange(last - first)
            mask = (ages >= 0) & ((ages <= window_size[0]) | (window_size[0] < 0))
            out = nn.functional.scaled_dot_product_attention(
                *part, attn_mask=mask, scale=softmax_scale, enable_gqa=True
            )
            done.append(out[0].transpose(0, 1))
        return torch.cat(done)

    flash = modeling_flash_attention_utils
    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (varlen, varlen, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return told


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flash_attention_is_told_the_examples_of_every_row(
    kernel: list[list[int]], family: str
) -> None:
    trainee = Trainee(model_of(CONFIGS[family]()), CrossEntropy())
    assert trainee.way.kind == "blocks"
    assert kernel
    kernel.clear()
    examples = some_examples()
    backbone = backbone_and_head(trainee.model.requires_grad_(False)).backbone
    with torch.autocast("cpu", torch.bfloat16):
        halved_ND = trainee.way.hidden(backbone, packed(examples), CPU)
    assert kernel[0] == [0, 2, 152, 154, 194, 196, 205, 410, 440, 615]
    whole_ND = trainee.way.hidden(backbone, packed(examples), CPU)
    assert float((halved_ND - whole_ND).norm()) < 0.05 * float(whole_ND.norm())


def test_like_lengths_stand_together_and_pad_to_no_more_than_the_limit() -> None:
    lengths = [5, 90, 7, 6, 80, 5, 120]
    groups = length_groups(lengths, 100)
    assert groups == [[0, 5, 3, 2], [4], [1], [6]]
