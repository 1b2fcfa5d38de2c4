"""The training loop beside plain ones: its time beside bare PyTorch, its memory beside a Trainer.

Time: the loop of `tutelage run` (`train.loop.train`: log, checks, clipping, checkpoints' state) and
a bare loop of forward, backward, clipping and AdamW over the same packed batches, model, objective
and optimizer, which leaves out nothing that learns. They take turns step by step in one process, so
that a busy machine disturbs both; the first steps warm up, and the ratio is the median over steps
of ours / bare. Memory: transformers' Trainer, with its own head and loss on the same rows, and our
loop, each in a fresh process; the resident high-water mark.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.bench.loss import high_water
from tutelage.bench.material import TEACHER
from tutelage.core.artifact import WorkDir
from tutelage.core.progress import Reporter
from tutelage.models import catalog
from tutelage.models.load import Loaded, load_directory
from tutelage.recipe.training import Sft
from tutelage.train.batches import Example, PackedBatch, pack, stack
from tutelage.train.loop import Plan, Seen, Trainee, train
from tutelage.train.objectives import CrossEntropy
from tutelage.train.optim import adamw

LR = 1e-5
QUIET = Reporter(quiet=True)
OURS, TRAINER = "ours", "trainer"


def speed(*, steps: int, tokens: int, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of a step of `tokens` tokens in one packed row, and the ratio of ours to bare.

    Two models are in memory: about 5 GB for the bundled teacher in float32.
    """
    rows = _rows(steps + warm_up, tokens)
    bare = _bare(_model(), rows)
    ours: list[float] = []
    theirs: list[float] = []
    began = 0.0

    def watch(done: int, total: int) -> Seen:
        """Called once a step: what ran since the last call is our step, then comes a bare one."""
        nonlocal began
        ours.append(time.perf_counter() - began)
        theirs.append(next(bare))
        began = time.perf_counter()
        return Seen()

    loaded = _model()
    with tempfile.TemporaryDirectory() as folder:
        work = WorkDir.open(Path(folder), reporter=QUIET, device=str(loaded.device))
        began = time.perf_counter()
        train(
            loaded.model, _plan(rows, watch=watch), CrossEntropy(), _config(tokens), work,
            device=loaded.device, label="bench",
        )  # fmt: skip
    timed = [(a, b) for a, b in zip(ours, theirs, strict=True)][warm_up:]
    return {
        "ours_s": statistics.median(a for a, _ in timed),
        "bare_s": statistics.median(b for _, b in timed),
        "ratio": statistics.median(a / b for a, b in timed),
    }


def memory(*, tokens: int, steps: int = 2) -> dict[str, float]:
    """Peak resident bytes of a process that trains so, and the ratio of ours to the Trainer's."""
    found: dict[str, float] = {}
    for way in (OURS, TRAINER):
        command = [sys.executable, "-m", "tutelage.bench.training", way, str(tokens), str(steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[f"{way}_bytes"] = json.loads(done.stdout.splitlines()[-1])
    return found | {"ratio": found[f"{OURS}_bytes"] / found[f"{TRAINER}_bytes"]}


def _rows(count: int, tokens: int) -> list[Example]:
    """Random ids, one example a row: what both sides read must not depend on packing."""
    rng = np.random.default_rng(0)
    mask = np.arange(tokens) > 0
    return [Example(rng.integers(3, 40_000, tokens).astype(np.int32), mask) for _ in range(count)]


def _model() -> Loaded:
    path = catalog.pull(TEACHER, say=QUIET.say)
    return load_directory(path, device="auto", dtype="float32")


def _plan(rows: Sequence[Example], **more: Any) -> Plan:
    return Plan(rows.__getitem__, str, [[[number]] for number in range(len(rows))], **more)


def _config(tokens: int) -> Sft:
    return Sft(
        stage="sft", model="m", data=("d",), seed=0, lr=LR, pack_tokens=tokens,
        lr_schedule="constant", warmup_share=0.0,
    )  # fmt: skip


def _bare(loaded: Loaded, rows: Sequence[Example]) -> Iterator[float]:
    """Seconds of each step of a loop that does nothing but learn."""
    trainee = Trainee(loaded.model, CrossEntropy()).train()
    optimizer = adamw(loaded.model, lr=LR, weight_decay=0.0)
    batches: list[PackedBatch] = [stack([pack([row], [0])]) for row in rows]
    for batch in batches:
        started = time.perf_counter()
        loss = trainee(batch, loaded.device).loss_sum / len(batch.labels_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - started


def _peak(way: str, tokens: int, steps: int) -> int:
    """In its own process: train, and give the high-water mark."""
    loaded, rows = _model(), _rows(steps, tokens)
    with tempfile.TemporaryDirectory() as folder:
        if way == OURS:
            work = WorkDir.open(Path(folder), reporter=QUIET, device=str(loaded.device))
            train(
                loaded.model, _plan(rows), CrossEntropy(), _config(tokens), work,
                device=loaded.device, label="bench",
            )  # fmt: skip
        else:
            _trainer(loaded, rows, folder)
    return high_water()


def _trainer(loaded: Loaded, rows: Sequence[Example], folder: str) -> None:
    from transformers import Trainer, TrainingArguments

    ids = [torch.from_numpy(row.ids_L).long() for row in rows]
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, max_steps=len(rows), learning_rate=LR,
        save_strategy="no", report_to=[], disable_tqdm=True, max_grad_norm=1.0,
        use_cpu=loaded.device.type == "cpu",
    )  # fmt: skip
    data: Any = [{"input_ids": one, "labels": one} for one in ids]
    Trainer(model=loaded.model, args=arguments, train_dataset=data).train()


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
