"""Stage `synthesize`: the teacher answers the prompts, and the answers that are right are kept.

Reasoning works with any teacher. One that thinks by itself closes its chain and answers in one go;
with another, what it says first is the chain, the marker is closed for it, and it goes on to
answer.

Answers that are empty or unwanted fall first; then a rule grades the others, a judge rates those
that passed, and of a prompt's answers that are left the shortest may be taken (arXiv 2505.22375).
A shard holds whole prompts, so all of it is decided there, and what falls is kept aside with why.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.core.artifact import Artifact, Site, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import atomic_path, write_json, write_text
from tutelage.core.shards import MakeShard, OnTokens, Shard, run_shards, shards
from tutelage.data.prepare import Dropped
from tutelage.engines.base import Completion, Engine, Sampler, SamplingParams
from tutelage.engines.opening import opened
from tutelage.evals.graders import can_grade, resolved
from tutelage.evals.grading import Given, Grading
from tutelage.evals.judge import MOST, REPLY_TOKENS, judge_messages, parse_rating
from tutelage.evals.textmatch import answer_length
from tutelage.recipe.tables import Synthesize
from tutelage.records import CONVERSATIONS, RowFiles, prompt_messages, write_rows
from tutelage.text.chat import ChatFormat

ANSWER_SEED = 1  # the answer's randomness must not repeat the chain's
UNFINISHED, FAILED, JUDGED = "unfinished", "failed", "judged"
"""Why an answer falls, each with its `quarantine/<name>.jsonl`."""
QUARANTINE = "quarantine"
COUNTS = "counts"  # in scratch, a file a shard, as what falls: a resumed run must still know both


@dataclass(frozen=True)
class _Speaker:
    sampler: Sampler
    chat: ChatFormat


@dataclass(frozen=True)
class _Job:
    config: Synthesize
    teacher: _Speaker
    judge: _Speaker | None
    grading: Grading
    source: str
    site: Site


@dataclass(frozen=True)
class _Answer:
    thinking: str | None
    content: str
    complete: bool
    tokens: int
    """Of chain and answer together, without the end of turn."""


@dataclass(frozen=True)
class _Candidate:
    """An answer as a row, while it is open whether it stays."""

    prompt: int
    record: Mapping[str, Any]
    tokens: int

    @property
    def content(self) -> str:
        return self.record["messages"][-1]["content"]

    def dropped(self, name: str, reason: str, **more: Any) -> Dropped:
        return Dropped(name, self.record["id"], self.record["id"], reason, self.record, more)


def run(config: Synthesize, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, float]:
    """Answer every prompt `samples` times and keep the answers that pass; returns counts.

    `mean_tokens` is over the rows, `mean_tokens_passed` over all answers that could have been one:
    the difference is what `keep = "shortest"` saves. With a verifier, `unjudged` answers passed
    because their prompt has no gold answer; with a judge, `no_opinion` ones because its reply held
    no rating. Raises RecipeError for an unknown verifier, DataError when no answer is left.
    """
    if config.verifier:
        resolved(config.verifier, {})  # an unknown name fails before any work is done
    prompts = RowFiles(inputs["prompts"].shards())
    each = config.max_tokens + (config.max_think_tokens if config.mode == "reasoning" else 0)
    each += REPLY_TOKENS if config.judge else 0
    run_shards(
        work, shards(len(prompts), max(1, config.shard_rows // config.samples)),
        partial(_answering, config, inputs, work.site()),
        label="teacher answers", tokens_each=each * config.samples,
    )  # fmt: skip
    return _summary(config, work)


@contextlib.contextmanager
def _answering(
    config: Synthesize, inputs: Mapping[str, Artifact], site: Site
) -> Iterator[MakeShard]:
    prompts = RowFiles(inputs["prompts"].shards())
    with contextlib.ExitStack() as stack:
        job = _job(config, inputs, site, stack)

        def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
            rows = list(prompts.rows(shard.items))
            if config.verifier:
                job.grading.check(config.verifier, rows)
            asked, decoded = _candidates(job, rows, shard.items.start, on_tokens)
            kept, read = _sifted(job, asked, shard, on_tokens)
            write_rows(site.path / f"{shard.name}.parquet", [c.record for c in kept], CONVERSATIONS)
            return {"teacher_decoded": decoded + read}

        yield make


def _job(
    config: Synthesize, inputs: Mapping[str, Artifact], site: Site, stack: contextlib.ExitStack
) -> _Job:
    grading = stack.enter_context(Grading(site.sandbox, workers=site.workers))
    teacher, judge = inputs["teacher"], inputs.get("judge")
    source = f"teacher:{teacher.fingerprint[:12]}"
    answering = _speaker(stack.enter_context(opened("teacher", inputs, site)), config)
    if judge is None:
        return _Job(config, answering, None, grading, source, site)
    same = judge.fingerprint == teacher.fingerprint  # then it is in memory once
    judging = answering
    if not same:
        judging = _speaker(stack.enter_context(opened("judge", inputs, site)), config)
    return _Job(config, answering, judging, grading, source, site)


def _speaker(engine: Engine, config: Synthesize) -> _Speaker:
    sampler = engine.sampler(batch_rows=config.batch_rows)
    return _Speaker(sampler, ChatFormat.from_tokenizer(engine.tokenizer))


def _candidates(
    job: _Job, prompts: Sequence[Mapping[str, Any]], first: int, on_tokens: OnTokens
) -> tuple[list[_Candidate], int]:
    """All samples of each prompt in order, and the tokens they took; `first` numbers the prompts.

    An answer's randomness comes from its own number, so a shard's do not depend on the others.
    """
    samples = job.config.samples
    rows = [row for row in prompts for _ in range(samples)]
    keys = range(first * samples, first * samples + len(rows))
    answers, decoded = _answers(job.teacher, job.config, rows, keys, on_tokens)
    return [
        _Candidate(key // samples, _record(job, row, key % samples, answer), answer.tokens)
        for row, key, answer in zip(rows, keys, answers, strict=True)
    ], decoded


def _answers(
    teacher: _Speaker, config: Synthesize, rows: Sequence[Mapping[str, Any]], keys: Sequence[int],
    on_tokens: OnTokens,
) -> tuple[list[_Answer], int]:  # fmt: skip
    """Answers in row order, and how many tokens were decoded for them."""
    chat = teacher.chat
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
    chains = [chat.chain_ids(answers[i].thinking or "") for i in open_]
    second = teacher.sampler.sample(
        [prompts[i] + chain for i, chain in zip(open_, chains, strict=True)],
        replace(params, seed=params.seed + ANSWER_SEED),
        keys=[keys[i] for i in open_], on_tokens=on_tokens,
    )  # fmt: skip
    for i, chain, completion in zip(open_, chains, second, strict=True):
        answer = _finished(chat, completion, answers[i].thinking)
        answers[i] = replace(answer, tokens=len(chain) + answer.tokens)
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
    said = content.strip() if ended else ""
    return _Answer((chain or "").strip(), said, ended, _length(completion))


def _finished(chat: ChatFormat, completion: Completion, chain: str | None) -> _Answer:
    _, content = chat.decode_response(completion.response_ids, "fast")
    ended = completion.finish_reason == "stop"
    return _Answer(chain, content.strip(), ended, _length(completion))


def _length(completion: Completion) -> int:
    return answer_length(completion.response_ids, finish_reason=completion.finish_reason)


def _decoded(completions: Sequence[Completion]) -> int:
    return sum(len(c.response_ids) for c in completions)


def _record(job: _Job, row: Mapping[str, Any], sample: int, answer: _Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.content, "thinking": answer.thinking or None}
    return {
        **row,
        "id": f"{row['id']}/{job.config.mode}/{sample}",
        "source": job.source,
        "mode": job.config.mode,
        "messages": [*prompt_messages(row), message],
        "complete": answer.complete,
    }


def _sifted(
    job: _Job, asked: Sequence[_Candidate], shard: Shard, on_tokens: OnTokens
) -> tuple[Sequence[_Candidate], int]:
    """A shard's answers that stay, and the tokens the judge said; what falls is put on record."""
    config = job.config
    finished, unfinished = _split(asked, [_unfinished(c, config) for c in asked])
    verified, failed = _split(finished, _failed(finished, job))
    replies, said = _replies(job, verified, on_tokens)
    judged = zip(verified, replies, strict=True)
    passed, judged_out = _split(verified, [_judged_out(c, reply, config) for c, reply in judged])
    kept = _shortest(passed) if config.keep == "shortest" else passed
    for dropped in (unfinished, failed, judged_out):
        if dropped:
            lines = "".join(row.line() for row in dropped)
            write_text(_aside(job.site, dropped[0].name) / f"{shard.name}.jsonl", lines)
    unjudged = sum(not _judgeable(c, config) for c in finished)
    counts = {
        "rows": len(kept), "asked": len(asked), "unfinished": len(unfinished),
        "failed": len(failed), "unjudged": unjudged, "passed": len(verified) - unjudged,
        "judged_out": len(judged_out),
        "no_opinion": sum(parse_rating(reply) is None for reply in replies),
        "truncated": sum(not c.record["complete"] for c in kept),
        "tokens": sum(c.tokens for c in kept),
        "left": len(passed), "tokens_left": sum(c.tokens for c in passed),
    }  # fmt: skip
    write_json(job.site.scratch(COUNTS) / f"{shard.name}.json", counts)
    return kept, said


def _split(
    candidates: Sequence[_Candidate], faults: Sequence[Dropped | None]
) -> tuple[list[_Candidate], list[Dropped]]:
    left = [c for c, fault in zip(candidates, faults, strict=True) if fault is None]
    return left, [fault for fault in faults if fault is not None]


def _unfinished(candidate: _Candidate, config: Synthesize) -> Dropped | None:
    if not candidate.content.strip():
        return candidate.dropped(UNFINISHED, "empty answer")
    if not candidate.record["complete"] and not config.keep_truncated:
        return candidate.dropped(UNFINISHED, f"cut off at {config.max_tokens} tokens")
    return None


def _failed(candidates: Sequence[_Candidate], job: _Job) -> list[Dropped | None]:
    config = job.config
    asked = [i for i, c in enumerate(candidates) if _judgeable(c, config)]
    given = [
        Given(c.content, c.record.get("answer"), c.record) for c in (candidates[i] for i in asked)
    ]
    faults: list[Dropped | None] = [None] * len(candidates)
    verdicts = job.grading.grade_all(config.verifier, given)
    for i, verdict in zip(asked, verdicts, strict=True):
        if not verdict.correct:
            faults[i] = candidates[i].dropped(FAILED, verdict.reason)
    return faults


def _judgeable(candidate: _Candidate, config: Synthesize) -> bool:
    """Whether there is a verifier, and in the row what it judges by: a gold answer, or tests."""
    record = candidate.record
    return bool(config.verifier) and can_grade(config.verifier, record, record.get("answer"))


def _replies(
    job: _Job, candidates: Sequence[_Candidate], on_tokens: OnTokens
) -> tuple[list[str], int]:
    """What the judge says of each answer (nothing, if there is none), and the tokens it took."""
    if job.judge is None:
        return [""] * len(candidates), 0
    chat = job.judge.chat
    questions = [
        judge_messages(job.config.rubric, prompt_messages(c.record), c.content) for c in candidates
    ]
    done = job.judge.sampler.sample(
        [chat.prompt_ids(messages, "fast") for messages in questions],
        SamplingParams(REPLY_TOKENS, 0.0, job.config.seed, chat.stop_ids),
        keys=range(len(questions)), on_tokens=on_tokens,
    )  # fmt: skip
    return [chat.decode_response(c.response_ids, "fast")[1].strip() for c in done], _decoded(done)


def _judged_out(candidate: _Candidate, reply: str, config: Synthesize) -> Dropped | None:
    rating = parse_rating(reply)
    if rating is None or rating >= config.judge_least:
        return None
    reason = f"rated {rating} of {MOST}, under {config.judge_least}"
    return candidate.dropped(JUDGED, reason, rating=rating, reply=reply)


def _shortest(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Of each prompt one: complete before cut off, then fewest tokens, then the earlier sample."""
    best: dict[int, _Candidate] = {}
    for c in candidates:
        found = best.setdefault(c.prompt, c)
        if _cost(c) < _cost(found):
            best[c.prompt] = c
    return list(best.values())


def _cost(candidate: _Candidate) -> tuple[bool, int]:
    return not candidate.record["complete"], candidate.tokens


def _aside(site: Site, name: str) -> Path:
    return site.scratch(f"aside-{name}")


def _summary(config: Synthesize, work: WorkDir) -> dict[str, float]:
    """Put what fell of all shards together, in their order, and add their counts up."""
    for name in (UNFINISHED, FAILED, JUDGED):
        if parts := sorted(_aside(work, name).glob("*.jsonl")):
            with atomic_path(work.path / QUARANTINE / f"{name}.jsonl") as path:
                path.write_bytes(b"".join(part.read_bytes() for part in parts))
    shards = [json.loads(part.read_text()) for part in work.scratch(COUNTS).glob("*.json")]
    counts = {name: sum(shard[name] for shard in shards) for name in shards[0]}
    if not counts["rows"]:
        raise DataError(_nothing_left(counts, work))
    told = {
        "have no gold answer and pass unjudged": counts["unjudged"] if config.verifier else 0,
        "got no rating from the judge and pass": counts["no_opinion"] if config.judge else 0,
    }
    for what, count in told.items():
        if count:
            work.reporter.say(f"  {count} of {counts['asked']} answers {what}")
    verifier = ("passed", "failed", "unjudged") if config.verifier else ()
    judge = ("judged_out", "no_opinion") if config.judge else ()
    return {
        "rows": counts["rows"],
        "asked": counts["asked"],
        **{name: counts[name] for name in (*verifier, *judge, "unfinished")},
        "truncated_share": counts["truncated"] / counts["rows"],
        "mean_tokens": counts["tokens"] / counts["rows"],
        "mean_tokens_passed": counts["tokens_left"] / counts["left"],
    }


def _nothing_left(counts: Mapping[str, int], work: WorkDir) -> str:
    fell = {
        "empty or cut off (raise max_tokens)": counts["unfinished"],
        "failed by the verifier (raise samples, or take easier prompts)": counts["failed"],
        "rated too low (lower judge_least)": counts["judged_out"],
    }
    told = ", ".join(f"{count} {name}" for name, count in fell.items() if count)
    return f"no answer is left of {counts['asked']}: {told}; see {work.path / QUARANTINE}"
