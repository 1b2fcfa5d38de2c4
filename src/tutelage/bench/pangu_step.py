"""One optimizer step of openPangu-Embedded-1B's full shape in bf16, with random weights.

Run it in a process of its own: `python -m tutelage.bench.pangu_step`. It prints one JSON line of
parameters, seconds and peak memory. Weights, gradients and both moments of AdamW are bf16 (8 bytes
a parameter), so that the step fits a 16 GB machine; a real run keeps fp32 weights (16 bytes). The
batch is one packed row; the loss is the trainer's own fused cross-entropy.
"""

import argparse
import json
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tutelage.bench.loss import high_water
from tutelage.models.load import backbone_and_head
from tutelage.train.batches import Example, pack, stack
from tutelage.train.objectives import CrossEntropy
from tutelage.train.optim import adamw

SHAPE = {
    "vocab_size": 153_376, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 26,
    "num_attention_heads": 12, "num_key_value_heads": 6, "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5, "rope_theta": 4e6, "tie_word_embeddings": True, "attention_bias": True,
}  # fmt: skip
"""As the published config.json says (huggingface.co, openPangu-Embedded-1B)."""


def run(*, tokens: int, steps: int, checkpointing: bool, device: torch.device) -> dict[str, float]:
    """Seconds of each part of the last step, parameters, and the peak of this process in bytes.

    The optimizer makes its moments in the first step: with `steps = 2` the last is a usual one.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # built so at once: never an fp32 copy
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device)  # type: ignore[arg-type]
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    head = backbone_and_head(model)
    optimizer = adamw(model, lr=1e-5, weight_decay=0.1)
    ids_L = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], tokens).astype(np.int32)
    half = tokens // 2
    examples = [
        Example(ids_L[part], np.arange(half) > 0) for part in (slice(half), slice(half, 2 * half))
    ]
    batch = stack([pack(examples, [0, 1])])
    seconds: dict[str, float] = {}
    for _ in range(steps):
        started = time.perf_counter()
        hidden_BTD = head.backbone(
            input_ids=torch.from_numpy(batch.ids_BT).to(device),
            position_ids=torch.from_numpy(batch.positions_BT).to(device),
            use_cache=False,
        ).last_hidden_state
        source_N = torch.from_numpy(batch.source_N).to(device)
        out = CrossEntropy()(hidden_BTD.flatten(0, 1).index_select(0, source_N), head, batch)
        loss = out.loss_sum / len(batch.labels_N)
        value, forward = float(loss.detach()), time.perf_counter()
        loss.backward()
        norm, backward = (
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)),
            time.perf_counter(),
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended = time.perf_counter()
        seconds = {
            "loss": value, "grad_norm": norm, "forward_s": forward - started,
            "backward_s": backward - forward, "optimizer_s": ended - backward,
            "step_s": ended - started,
        }  # fmt: skip
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "tokens": 2 * half, **seconds, "peak_bytes": high_water()}


def main() -> None:
    """Parse the command line, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    print(
        json.dumps(
            run(
                tokens=asked.tokens, steps=asked.steps, checkpointing=asked.checkpointing,
                device=torch.device(asked.device),
            )
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
