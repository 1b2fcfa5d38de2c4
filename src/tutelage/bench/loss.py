"""Time and memory of the head-and-loss step: fused distillation, fused cross-entropy, naive KL.

Legend: N tokens, D hidden size, V vocabulary, K stored ids a token.
One step is logits, loss and the gradients of hidden states and head weight, in float32.
Time: all variants take turns in one fresh process; the first round warms up; ratios are medians
over the rounds of the quotient within a round, which a busy machine disturbs least.
Memory: one fresh process a variant, two steps; the resident high-water mark (VmHWM on Linux, where
ru_maxrss of a child starts at its parent's) less what was resident before the inputs were made.
"""

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional

from tutelage.train.fused import fused_loss
from tutelage.train.losses import SparseTarget
from tutelage.train.spec import CROSS_ENTROPY, LossSpec

CE, DISTILL, NAIVE = "fused CE", "fused distill", "naive full-logit KL"
VARIANTS = (CE, DISTILL, NAIVE)
STORED_IDS = 16
"""Width K of the padded target; a threshold of 0.03 keeps 11.7 ids a token of a flat teacher."""


def run(
    *, repeats: int = 5, tokens: int = 4096,
    sizes: Sequence[tuple[int, int]] = ((576, 49_152), (1024, 151_936)),
) -> list[dict[str, float | int | str]]:  # fmt: skip
    """One row a size (D, V) and variant: seconds, peak MiB, and both as ratios to the others.

    `time_vs_ce` and `memory_vs_ce` divide by fused cross-entropy, `*_vs_naive` by the naive KL.
    The naive variant needs about 6 * N * V * 4 bytes: 15 GB at the larger size.
    """
    rows: list[dict[str, float | int | str]] = []
    for dim, vocab in sizes:
        seconds = _in_fresh_process("time", tokens, dim, vocab, repeats)
        peak = {v: _in_fresh_process("memory", tokens, dim, vocab, v) for v in VARIANTS}
        for variant in VARIANTS:
            rows.append(
                {
                    "dim": dim, "vocab": vocab, "tokens": tokens, "variant": variant,
                    "seconds": statistics.median(seconds[variant]),
                    "time_vs_ce": _ratio(seconds[variant], seconds[CE]),
                    "time_vs_naive": _ratio(seconds[variant], seconds[NAIVE]),
                    "peak_mib": peak[variant] / 2**20,
                    "memory_vs_ce": peak[variant] / peak[CE],
                    "memory_vs_naive": peak[variant] / peak[NAIVE],
                }
            )  # fmt: skip
    return rows


def measure_time(tokens: int, dim: int, vocab: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, one list a variant, in turns after a round of warm-up."""
    inputs = _inputs(tokens, dim, vocab)
    steps = {variant: _step(variant, *inputs) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats + 1):
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - started)
    return {variant: values[1:] for variant, values in seconds.items()}


def measure_memory(tokens: int, dim: int, vocab: int, variant: str) -> int:
    """Bytes that two steps add to the resident high-water mark, inputs included."""
    _step(variant, *_inputs(8, 8, 64))()
    gc.collect()
    before = psutil.Process().memory_info().rss
    step = _step(variant, *_inputs(tokens, dim, vocab))
    step()
    step()
    return high_water() - before


def _inputs(tokens: int, dim: int, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(tokens, dim, generator=generator)
    weight_VD = torch.randn(vocab, dim, generator=generator).mul_(dim**-0.5)
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_()


def _target(tokens: int, vocab: int) -> SparseTarget:
    generator = torch.Generator().manual_seed(1)
    offsets_NK = torch.randint(1, vocab // STORED_IDS, (tokens, STORED_IDS), generator=generator)
    ids_NK = offsets_NK.cumsum(-1)  # rising, so distinct
    q_NK = torch.rand(tokens, STORED_IDS, generator=generator).softmax(-1) * 0.9
    counts_N1 = torch.randint(6, STORED_IDS + 1, (tokens, 1), generator=generator)
    valid_NK = torch.arange(STORED_IDS) < counts_N1
    head_NK = valid_NK & (torch.arange(STORED_IDS) < 6)
    return SparseTarget(
        ids_NK, q_NK, head_NK, valid_NK, ids_NK[:, 0], q_NK[:, 0].log(), torch.ones(tokens)
    )


def _step(variant: str, hidden_ND: Tensor, weight_VD: Tensor) -> Callable[[], None]:
    """A step without arguments; what a variant alone needs is made here, once."""
    tokens, vocab = len(hidden_ND), len(weight_VD)
    loss_of: Callable[[], Tensor]
    if variant == NAIVE:
        teacher_NV = torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(2))

        def loss_of() -> Tensor:
            logp_NV = functional.log_softmax(hidden_ND @ weight_VD.T, -1)
            logq_NV = functional.log_softmax(teacher_NV, -1)
            return functional.kl_div(logp_NV, logq_NV, reduction="sum", log_target=True)
    else:
        target, spec = _target(tokens, vocab), LossSpec()
        if variant == CE:
            target, spec = SparseTarget.labels_only(target.label_ids_N), CROSS_ENTROPY

        def loss_of() -> Tensor:
            return fused_loss(hidden_ND, weight_VD, target, spec).loss_sum

    def step() -> None:
        hidden_ND.grad = weight_VD.grad = None
        (loss_of() / tokens).backward()

    return step


def high_water() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _in_fresh_process(what: str, *arguments: int | str) -> Any:
    command = [sys.executable, "-m", "tutelage.bench.loss", what, json.dumps(arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if len(sys.argv) == 1:  # by hand: the whole table; with arguments: one measurement of it
        for line in run():
            print(json.dumps(line))
    else:
        measure = {"time": measure_time, "memory": measure_memory}[sys.argv[1]]
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
