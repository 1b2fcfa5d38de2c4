"""Stage `synthesize`: the teacher answers the prompts, in reasoning or in fast mode.

Reasoning works with any teacher. One that thinks by itself closes its chain and answers in one go;
with another, what it says first is the chain, the marker is closed for it, and it goes on to
answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.shards import Shard, run_shards
from tutelage.engines.base import Completion, SamplingParams
from tutelage.engines.sampler import TransformersSampler
from tutelage.models.load import load_for_inference
from tutelage.recipe.tables import Synthesize
from tutelage.records import CONVERSATIONS, prompt_messages, read_rows, write_rows
from tutelage.text.chat import ChatFormat

ANSWER_SEED = 1  # the answer's randomness must not repeat the chain's


@dataclass(frozen=True)
class _Teacher:
    sampler: TransformersSampler
    chat: ChatFormat
    config: Synthesize


def run(config: Synthesize, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Answer every prompt `samples` times; returns counts and the share cut off."""
    prompts = list(read_rows(inputs["prompts"].shards()))
    loaded = load_for_inference(inputs["teacher"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    sampler = TransformersSampler(
        loaded.model, batch_size=config.batch_rows, device=str(loaded.device)
    )
    teacher = _Teacher(sampler, chat, config)
    total = len(prompts) * config.samples

    def make(shard: Shard, on_tokens: Callable[[int], None]) -> dict[str, int]:
        rows = [prompts[item // config.samples] for item in shard.items]
        answers, decoded = _answers(teacher, rows, list(shard.items), on_tokens)
        made = [
            _record(row, item % config.samples, answer, inputs["teacher"], config)
            for row, item, answer in zip(rows, shard.items, answers, strict=True)
        ]
        kept = [record for record in made if record["complete"] or config.keep_truncated]
        kept = [record for record in kept if record["messages"][-1]["content"].strip()]
        write_rows(work.path / f"{shard.name}.parquet", kept, CONVERSATIONS)
        return {"teacher_decoded": decoded}

    each = config.max_tokens + (config.max_think_tokens if config.mode == "reasoning" else 0)
    run_shards(work, total, config.shard_rows, make, label="teacher answers", tokens_each=each)
    return _summary(work, total)


def _summary(work: WorkDir, asked: int) -> dict[str, float]:
    rows = list(read_rows(sorted(work.path.glob("part-*.parquet"))))
    if not rows:
        raise DataError(
            "no answer is left: all were empty or cut off; raise max_tokens or keep_truncated"
        )
    cut = sum(not row["complete"] for row in rows)
    return {"rows": len(rows), "asked": asked, "truncated_share": cut / len(rows)}


@dataclass(frozen=True)
class _Answer:
    thinking: str | None
    content: str
    complete: bool


def _answers(
    teacher: _Teacher, rows: Sequence[Mapping[str, Any]], keys: Sequence[int],
    on_tokens: Callable[[int], None],
) -> tuple[list[_Answer], int]:  # fmt: skip
    """Answers in row order, and how many tokens were decoded for them."""
    config, chat = teacher.config, teacher.chat
    asked = [_asked(row, config) for row in rows]
    params = SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
        stop_ids=chat.stop_ids,
    )  # fmt: skip
    prompts = [chat.prompt_ids(messages, config.mode) for messages in asked]
    if config.mode == "fast":
        done = teacher.sampler.sample(prompts, params, keys=keys, on_tokens=on_tokens)
        return [_finished(chat, completion, None) for completion in done], _decoded(done)
    first = teacher.sampler.sample(
        prompts, replace(params, max_tokens=config.max_think_tokens), keys=keys, on_tokens=on_tokens
    )
    answers = [_native(chat, completion) for completion in first]
    open_ = [i for i, answer in enumerate(answers) if not answer.content]
    second = teacher.sampler.sample(
        [prompts[i] + chat.chain_ids(answers[i].thinking or "") for i in open_],
        replace(params, seed=params.seed + ANSWER_SEED),
        keys=[keys[i] for i in open_], on_tokens=on_tokens,
    )  # fmt: skip
    for i, completion in zip(open_, second, strict=True):
        answers[i] = _finished(chat, completion, answers[i].thinking)
    return answers, _decoded(first) + _decoded(second)


def _asked(row: Mapping[str, Any], config: Synthesize) -> list[Any]:
    """The prompt, with the recipe's elicitation added for the teacher alone in reasoning mode."""
    messages = prompt_messages(row)
    if config.mode == "fast" or not config.elicit:
        return messages
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n\n{config.elicit}"}]


def _native(chat: ChatFormat, completion: Completion) -> _Answer:
    """Chain and answer of a teacher that closed its own chain and ended; else the chain alone."""
    chain, content = chat.decode_response(completion.response_ids, "reasoning")
    ended = completion.finish_reason == "stop"
    return _Answer((chain or "").strip(), content.strip() if ended else "", complete=ended)


def _finished(chat: ChatFormat, completion: Completion, chain: str | None) -> _Answer:
    _, content = chat.decode_response(completion.response_ids, "fast")
    return _Answer(chain, content.strip(), complete=completion.finish_reason == "stop")


def _decoded(completions: Sequence[Completion]) -> int:
    return sum(len(c.response_ids) for c in completions)


def _record(
    row: Mapping[str, Any], sample: int, answer: _Answer, teacher: Artifact, config: Synthesize
) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.content, "thinking": answer.thinking or None}
    return {
        **row,
        "id": f"{row['id']}/{config.mode}/{sample}",
        "source": f"teacher:{teacher.fingerprint[:12]}",
        "mode": config.mode,
        "messages": [*prompt_messages(row), message],
        "complete": answer.complete,
    }
