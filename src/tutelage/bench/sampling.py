"""What the sampler wins over plain `generate`: useful tokens/s on answers of different lengths.

Both answer the same prompts greedily, `batch_rows` at a time, in turns after a warm-up; the ratio
is the median over the rounds. Plain `generate` pads on the left and runs a batch until its longest
answer ends; a useful token is one of an answer, its end included. Answers are compared id by id.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tutelage.bench.material import bundled_prompts, load_teacher
from tutelage.core.progress import Reporter
from tutelage.engines.base import SamplingParams
from tutelage.engines.sampler import TransformersSampler
from tutelage.models.load import Loaded
from tutelage.text.chat import ChatFormat

LONGEST = 256
PROMPTS = 64


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds."""

    sampler_tokens_s: float
    generate_tokens_s: float
    ratio: float
    equal: int
    """Answers that are the same id by id."""
    answers: int
    shortest: int
    median: float
    longest: int
    """Tokens of the answers."""


def run(*, repeats: int, batch_rows: int, reporter: Reporter) -> Measured:
    """Measure on the bundled teacher."""
    teacher = load_teacher(reporter)
    chat = ChatFormat.from_tokenizer(teacher.tokenizer)
    prompts = bundled_prompts(chat)[:PROMPTS]
    ways = {
        "sampler": lambda: _sampled(teacher, prompts, chat.stop_ids, batch_rows),
        "generate": lambda: _generated(teacher, prompts, chat.stop_ids, batch_rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[list[int]]] = {}
    with reporter.bar((repeats + 1) * len(ways), "rounds", unit="runs") as bar:
        for _ in range(repeats + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                found[name] = way()
                seconds[name].append(time.perf_counter() - started)
                bar.advance(1)
    timed = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    lengths = sorted(len(answer) for answer in found["sampler"])
    pairs = list(zip(timed["generate"], timed["sampler"], strict=True))
    return Measured(
        sampler_tokens_s=sum(lengths) / statistics.median(timed["sampler"]),
        generate_tokens_s=sum(map(len, found["generate"])) / statistics.median(timed["generate"]),
        ratio=statistics.median(plain / ours for plain, ours in pairs),
        equal=sum(a == b for a, b in zip(found["sampler"], found["generate"], strict=True)),
        answers=len(prompts), shortest=lengths[0], median=statistics.median(lengths),
        longest=lengths[-1],
    )  # fmt: skip


def _sampled(
    teacher: Loaded, prompts: Sequence[Sequence[int]], stop_ids: tuple[int, ...], batch_rows: int
) -> list[list[int]]:
    sampler = TransformersSampler(teacher.model, batch_size=batch_rows, device=str(teacher.device))
    done = sampler.sample(
        prompts, SamplingParams(LONGEST, 0.0, 0, stop_ids), keys=range(len(prompts)),
        on_tokens=lambda count: None,
    )  # fmt: skip
    return [list(answer.response_ids) for answer in done]


@torch.inference_mode()
def _generated(
    teacher: Loaded, prompts: Sequence[Sequence[int]], stop_ids: tuple[int, ...], batch_rows: int
) -> list[list[int]]:
    answers = []
    for first in range(0, len(prompts), batch_rows):
        batch = prompts[first : first + batch_rows]
        width = max(map(len, batch))
        ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in batch])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        whole_BT = teacher.model.generate(  # type: ignore[operator]
            ids_BT.to(teacher.device), attention_mask=mask_BT.to(teacher.device),
            max_new_tokens=LONGEST, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=0,
        )  # fmt: skip
        answers += [_ended(ids, stop_ids) for ids in whole_BT[:, width:].tolist()]
    return answers


def _ended(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Up to the first end, that included: the rest is padding."""
    ends = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: ends[0] + 1] if ends else ids
