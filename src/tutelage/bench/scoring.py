"""What scoring costs: tokens/s against a bare teacher forward, and memory against how much is read.

Speed: scorer and bare forward (model and head, nothing kept) read the same length-sorted batches in
turns after a warm-up; the ratio is the median over the rounds. Memory: one fresh process for each
number of tokens; its resident high-water mark.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from tutelage.bench.loss import high_water
from tutelage.bench.material import Answer, answers, load_teacher
from tutelage.core.progress import Reporter
from tutelage.engines.base import Scorable
from tutelage.engines.scorer import TransformersScorer, length_sorted_batches
from tutelage.models.load import Loaded
from tutelage.targets.estimator import Threshold

CHUNK_BYTES = 128 * 2**20
TAU = 0.02
QUIET = Reporter(quiet=True)


def speed(teacher: Loaded, given: Sequence[Answer], *, repeats: int) -> dict[str, float]:
    """Tokens read (prompts too) a second of each, and the median of their ratio."""
    sequences = [answer.ids for answer in given]
    tokens = sum(len(one.prompt_ids) + len(one.response_ids) for one in sequences)
    steps = {"scorer": _scorer(teacher, sequences), "forward": _forward(teacher, sequences)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    timed = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    pairs = zip(timed["forward"], timed["scorer"], strict=True)
    return {
        **{f"{name}_tokens_s": tokens / statistics.median(v) for name, v in timed.items()},
        "ratio": statistics.median(forward / scorer for forward, scorer in pairs),
    }


def memory(tokens: Sequence[int]) -> dict[int, int]:
    """Peak resident bytes of a process that scores so many response tokens."""
    found = {}
    for count in tokens:
        command = [sys.executable, "-m", "tutelage.bench.scoring", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[count] = json.loads(done.stdout)
    return found


def _scorer(teacher: Loaded, sequences: Sequence[Scorable]) -> Callable[[], object]:
    scorer = TransformersScorer(teacher.model, device=str(teacher.device), chunk_bytes=CHUNK_BYTES)
    return lambda: scorer.score(
        sequences, estimator=Threshold(TAU), seed=0, keys=range(len(sequences)),
        on_tokens=lambda count: None,
    )  # fmt: skip


def _forward(teacher: Loaded, sequences: Sequence[Scorable]) -> Callable[[], object]:
    """The model as it comes, head and all, over the same batches; logits are thrown away."""
    batches = []
    for batch in length_sorted_batches(sequences):
        ids = [[*sequences[i].prompt_ids, *sequences[i].response_ids][:-1] for i in batch]
        width = max(map(len, ids))
        batches.append(torch.tensor([one + [0] * (width - len(one)) for one in ids]))

    @torch.inference_mode()
    def step() -> None:
        for ids_BT in batches:
            teacher.model(input_ids=ids_BT.to(teacher.device), use_cache=False)

    return step


def _peak(tokens: int) -> int:
    """In its own process: score `tokens` response tokens shard by shard, as the stage does."""
    teacher = load_teacher(QUIET)
    given = answers(teacher, tokens, reporter=QUIET)
    for start in range(0, len(given), 256):
        _scorer(teacher, [answer.ids for answer in given[start : start + 256]])()
    return high_water()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_peak(int(sys.argv[1]))))
