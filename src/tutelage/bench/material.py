"""Real material for the benches: the bundled teacher, its own answers at T = 1, a student of it.

Answers are sampled once and kept in the cache, so that later runs measure the same tokens.
Shapes: N response tokens, D hidden width, V vocabulary.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tutelage.core.files import write_text
from tutelage.core.progress import Reporter
from tutelage.data.identity import BUNDLED_PROMPTS
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.models import catalog
from tutelage.models.load import BackboneAndHead, Loaded, load_directory
from tutelage.models.prune import prune_least_influential
from tutelage.text.chat import ChatFormat, Message

TEACHER = "smollm2-135m-instruct"
MAX_TOKENS = 256
BATCH_ROWS = 32
DROPPED_LAYERS = 4
"""Of 30: a student about 0.8 nats from its teacher."""
CALIBRATION_ROWS = 16


@dataclass(frozen=True)
class Answer:
    """One answer of the teacher, exactly as sampled."""

    ids: Scorable
    logps: tuple[float, ...]
    finish_reason: str


@dataclass(frozen=True)
class Hidden:
    """What the head of each model reads before every response token, and that token."""

    teacher_ND: Tensor
    student_ND: Tensor
    labels_N: Tensor
    head: BackboneAndHead
    """Teacher and student share it: the student's cut left the head alone."""

    def __len__(self) -> int:
        return len(self.labels_N)


def load_teacher(reporter: Reporter) -> Loaded:
    """The bundled teacher, fetched when it is not there."""
    return load_directory(catalog.pull(TEACHER, say=reporter.say), device="auto")


def answers(teacher: Loaded, tokens: int, *, reporter: Reporter, seed: int = 0) -> list[Answer]:
    """At least `tokens` response tokens of answers to the bundled prompts, sampled at T = 1.

    The prompts are gone through again and again, each time with other randomness.
    """
    path = catalog.cache_directory() / "bench" / f"{TEACHER}-answers-{seed}.jsonl"
    found = list(_kept(path))
    count = sum(len(answer.ids.response_ids) for answer in found)
    if count < tokens:
        chat = ChatFormat.from_tokenizer(teacher.tokenizer)
        prompts = bundled_prompts(chat)
        sampler = TransformersSampler(
            teacher.model, batch_size=BATCH_ROWS, device=str(teacher.device)
        )
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=1.0, seed=seed, stop_ids=chat.stop_ids
        )
        with reporter.bar(tokens, "teacher answers", unit="tokens", done=count) as bar:
            while count < tokens:
                keys = range(len(found), len(found) + 2 * BATCH_ROWS)
                chosen = [prompts[key % len(prompts)] for key in keys]
                done = sampler.sample(chosen, params, keys=keys, on_tokens=bar.advance)
                found += [
                    Answer(Scorable(prompt, c.response_ids), c.logps, c.finish_reason)
                    for prompt, c in zip(chosen, done, strict=True)
                ]
                count = sum(len(answer.ids.response_ids) for answer in found)
                _keep(path, found)
    return _first(found, tokens)


def hidden(teacher: Loaded, given: Sequence[Answer], *, reporter: Reporter) -> Hidden:
    """Hidden states of teacher and student over all answers, end to end, float32."""
    sequences = [answer.ids for answer in given]
    student = prune_least_influential(
        teacher.model, DROPPED_LAYERS,
        [torch.tensor([list(one.prompt_ids)]) for one in sequences[:CALIBRATION_ROWS]],
    ).model  # fmt: skip
    scorers = [
        TransformersScorer(model, device=str(teacher.device), chunk_bytes=2**20)
        for model in (teacher.model, student)
    ]
    tokens = sum(len(one.response_ids) for one in sequences)
    with reporter.bar(2 * tokens, "reading", unit="tokens") as bar:
        states = [scorer.hidden_states(sequences, on_tokens=bar.advance) for scorer in scorers]
    labels = [token for one in sequences for token in one.response_ids]
    return Hidden(states[0], states[1], torch.tensor(labels), scorers[0].head)


def bundled_prompts(chat: ChatFormat) -> list[list[int]]:
    """The ids of the bundled prompts, in the file's order, each to be answered in fast mode."""
    return [chat.prompt_ids(messages, "fast") for messages in bundled_messages()]


def bundled_messages(count: int | None = None) -> list[list[Message]]:
    """The first `count` bundled prompts (all, when left out), as conversations of one message."""
    return [[_user(line)] for line in _prompt_lines()[:count]]


def _user(line: str) -> Message:
    return {"role": "user", "content": json.loads(line)["prompt"], "thinking": None}


def _prompt_lines() -> list[str]:
    return [line for line in BUNDLED_PROMPTS.read_text(encoding="utf-8").splitlines() if line]


def _first(found: Sequence[Answer], tokens: int) -> list[Answer]:
    """The first answers that hold `tokens` response tokens together."""
    taken, count = [], 0
    for answer in found:
        if count >= tokens:
            break
        taken.append(answer)
        count += len(answer.ids.response_ids)
    return taken


def _kept(path: Path) -> Iterator[Answer]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        ids = Scorable(tuple(entry["prompt_ids"]), tuple(entry["response_ids"]))
        yield Answer(ids, tuple(entry["logps"]), entry["finish_reason"])


def _keep(path: Path, found: Sequence[Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "prompt_ids": list(answer.ids.prompt_ids),
                "response_ids": list(answer.ids.response_ids),
                "logps": [round(logp, 6) for logp in answer.logps],
                "finish_reason": answer.finish_reason,
            }
        )
        for answer in found
    ]
    write_text(path, "".join(line + "\n" for line in lines))
