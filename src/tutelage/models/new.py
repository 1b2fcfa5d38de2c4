"""A model with random weights: Llama's architecture in any size, drawn from a seed alone.

torch and transformers are imported where a model is made: a plan asks for sizes only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tutelage.recipe.tables import NewModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH_MULTIPLE = 8
"""Feed-forward widths are rounded up to it: vector units like whole registers."""
SMALLEST_STD = 0.02
"""Llama's own, and 1/sqrt(D) of a width of 2,500."""


def new_model(config: NewModel, *, vocab_size: int, end_id: int) -> PreTrainedModel:
    """A LlamaForCausalLM in fp32 with `vocab_size` logits, in evaluation mode.

    Weights come from `config.seed` and nothing else; torch's generator is left as it was. Matrices
    are normal with a standard deviation of 1/sqrt(D): then a layer's output is as large as its
    input, and tied logits begin with a variance of 1. The usual 0.02 says the same of D = 2,500; at
    D = 32 it makes each matrix shrink its input ninefold, and attention and feed-forward begin
    silent: on sums of two numbers (D 32, 2 layers) it took 50 steps to the loss that
    1/sqrt(D) had after 25. From D = 2,500 on it is 0.02.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=feed_forward_width(config),
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=max(SMALLEST_STD, 1 / math.sqrt(config.hidden_size)),
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # of the CPU: torch.manual_seed sets all
        return LlamaForCausalLM(shape).eval()


def feed_forward_width(config: NewModel) -> int:
    """Width of the feed-forward layers: as given, or 8/3 of hidden_size up to a multiple of 8."""
    if config.intermediate_size:
        return config.intermediate_size
    return WIDTH_MULTIPLE * -(-8 * config.hidden_size // (3 * WIDTH_MULTIPLE))


def parameter_count(config: NewModel, vocab_size: int) -> int:
    """Parameters of `new_model(config, vocab_size=vocab_size)`, a tied output layer counted once.

    V D (twice untied) + L (2 D^2 (1 + kv_heads / heads) + 3 D F + 2 D) + D.
    """
    width, kv_heads = config.hidden_size, config.kv_heads or config.heads
    attention = 2 * width**2 + 2 * width * kv_heads * (width // config.heads)
    layer = attention + 3 * width * feed_forward_width(config) + 2 * width
    embeddings = (1 if config.tie_embeddings else 2) * vocab_size * width
    return embeddings + config.layers * layer + width
