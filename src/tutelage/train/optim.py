"""AdamW with decay groups, and the learning rate of each step."""

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)  # the usual pair for language models; 0.999 forgets too slowly for short runs


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (norms, biases) alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS)


def cosine_lr(step: int, *, steps: int, lr: float, min_share: float, warmup_share: float) -> float:
    """Learning rate of optimizer step `step` in [0, steps): linear warm-up, then cosine.

    Falls from `lr` to `min_share * lr`, which the last step reaches. A training in parts gives the
    number of the step in the whole, and the steps of the whole.
    """
    warmup = math.ceil(steps * warmup_share)
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return lr * (min_share + (1 - min_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
