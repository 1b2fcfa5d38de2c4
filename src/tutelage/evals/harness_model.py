"""What lm-evaluation-harness sees of us: a language model that is asked through a chat format, and
its tasks with our graders where its own would run code, need the network, or judge form.

Imports lm_eval: only `harness` imports this, when a task is run. lm_eval builds each prompt, cuts
answers, filters and scores; here prompts become ids and answers become text.
"""

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

from tutelage.core.errors import DataError, EngineError, TutelageError
from tutelage.evals.benchmarks import MATH_VERIFY
from tutelage.evals.code_answers import code_tests, verdict_of
from tutelage.evals.graders import grade, raised
from tutelage.evals.sandbox import Job, SandboxVerdict
from tutelage.text.chat import ChatFormat, Message, Mode

Ids = Sequence[int]


class Generate(Protocol):
    """Answers prompts until a stop id of the chat format, which the answer includes."""

    def __call__(
        self, prompts: Sequence[Ids], max_tokens: int, temperature: float
    ) -> Sequence[tuple[Ids, str]]:
        """(Ids, "stop" or "length") of each."""
        ...


class Logps(Protocol):
    """Reads responses."""

    def __call__(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> Sequence[np.ndarray]:
        """The log-probability of every token of each response behind its prompt, in nats."""
        ...


class Runner(Protocol):
    """An entered `sandbox.Sandbox` or `sandbox.Unsafe`."""

    def map(self, jobs: Iterable[Job]) -> Iterator[SandboxVerdict]: ...


@dataclass(frozen=True)
class Answered:
    """What became of one item: the user's message, and the answer to it."""

    prompt: str
    thinking: str | None = None
    text: str = ""
    tokens: int = 0
    """Decoded, chain included."""
    finish_reason: str = "choice"
    """stop, length (of a choice: its chain was cut off), or choice."""


@dataclass(frozen=True)
class _Opened:
    """A prompt up to where the text of the answer goes on."""

    ids: list[int]
    mode: Mode
    """How what comes next is to be read: fast, once a chain is behind."""
    answered: Answered


class ChatModel(LM):
    """A chat model behind lm_eval's interface; `answered` keeps what it said, by task and item.

    lm_eval's context is the user's message, with a task's description and its solved examples in
    it; the system message is the caller's. In reasoning mode the chain is split off before lm_eval
    sees an answer. A task that opens the answer itself (a code fence), or lets log-likelihood
    choose, is answered behind the chain, for which the model is asked first.
    """

    def __init__(
        self, chat: ChatFormat, generate: Generate, logps: Logps, *,
        mode: Mode, system: str, max_tokens: int, needs_greedy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.chat, self.system, self.max_tokens = chat, system, max_tokens
        self.mode: Mode = mode
        self.needs_greedy = needs_greedy
        self.answered: dict[tuple[str, int], Answered] = {}
        self._generate, self._logps, self._stderr = generate, logps, sys.stderr

    @property
    def tokenizer_name(self) -> str:
        """lm_eval's key of a cache that is not used here."""
        return self.chat.fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as they are: lm_eval hands them back as the context of a request."""
        return json.dumps(chat_history)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers without their chains, cut before the first of a task's `until` strings."""
        with contextlib.redirect_stderr(self._stderr):
            opened = self._open([request.arguments[0] for request in requests], choosing=False)
            made = self._answers(
                opened, [_temperature(request.arguments[1]) for request in requests]
            )
        texts = []
        for request, before, (ids, ended) in zip(requests, opened, made, strict=True):
            thinking, text = self.chat.decode_response(ids, before.mode)
            cut = _cut(text, request.arguments[1].get("until") or ())
            if cut != text:
                ended = "stop"  # what stands behind the cut is no part of the answer
            self.answered[_key(request)] = replace(
                before.answered,
                thinking=thinking or before.answered.thinking,
                text=cut,
                tokens=before.answered.tokens + len(ids),
                finish_reason=ended,
            )
            texts.append(cut)
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(Log-probability of the continuation, whether it is the greedy one) of each request.

        The latter costs an answer, so without `needs_greedy` it is always False.
        Raises: EngineError for log-probabilities that are not finite.
        """
        responses = [self.chat.opening_ids(request.arguments[1]) for request in requests]
        with contextlib.redirect_stderr(self._stderr):
            opened = self._open([request.arguments[0] for request in requests], choosing=True)
            prompts = [one.ids for one in opened]
            found = self._logps(prompts, responses)
            greedy = self._are_greedy(prompts, responses)
        sums = [float(np.sum(logps, dtype=np.float64)) for logps in found]
        if not np.isfinite(sums).all():
            raise EngineError("the model gives log-probabilities that are not finite: damaged?")
        for request, before in zip(requests, opened, strict=True):
            self.answered[_key(request)] = before.answered
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Never asked: `harness` refuses tasks that measure the perplexity of a text."""
        raise NotImplementedError

    def _open(self, contexts: Sequence[str], *, choosing: bool) -> list[_Opened]:
        """The prompt of each context, up to where the answer's text begins or goes on."""
        asked = {context: self._messages(context) for context in dict.fromkeys(contexts)}
        thinks_first = {
            context: self.mode == "reasoning" and (choosing or bool(opening))
            for context, (_, opening) in asked.items()
        }
        chains = self._chains([c for c, thinks in thinks_first.items() if thinks], asked)
        opened = {}
        for context, (messages, opening) in asked.items():
            ids, mode = self.chat.prompt_ids(messages, self.mode), self.mode
            answered = Answered(messages[-1]["content"] + (f"\n\n{opening}" if opening else ""))
            if thinks_first[context]:
                chain, spent, ended = chains[context]
                ids, mode = ids + self.chat.chain_ids(chain), "fast"
                answered = replace(
                    answered, thinking=chain or None, tokens=spent, finish_reason=ended
                )
            opened[context] = _Opened(ids + self.chat.opening_ids(opening), mode, answered)
        return [opened[context] for context in contexts]

    def _messages(self, context: str) -> tuple[list[Message], str]:
        """(The conversation up to the user's message, what opens the answer) of lm_eval's turns."""
        turns = json.loads(context)
        # The white space at its end is the answer's to write: behind a bare fence, lm_eval's filter
        # for MBPP takes the answer's `def` for the name of a language.
        opening = turns.pop()["content"].strip() if turns[-1]["role"] == "assistant" else ""
        user = "".join(turn["content"] for turn in turns)  # a description stands as a system turn
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user}], opening

    def _chains(
        self, contexts: Sequence[str], asked: Mapping[str, tuple[list[Message], str]]
    ) -> dict[str, tuple[str, int, str]]:
        """(Chain, tokens spent on it and on the answer that is dropped, how it ended) of each.

        It ended in "length" where it was cut off before it was closed, else in "choice".
        """
        if not contexts:
            return {}
        prompts = [self.chat.prompt_ids(asked[context][0], "reasoning") for context in contexts]
        made = self._generate(prompts, self.max_tokens, 0.0)
        found = {}
        for context, (ids, ended) in zip(contexts, made, strict=True):
            chain, rest = self.chat.decode_response(ids, "reasoning")
            cut = ended == "length" and not rest.strip()
            found[context] = chain or "", len(ids), "length" if cut else "choice"
        return found

    def _answers(
        self, opened: Sequence[_Opened], temperatures: Sequence[float]
    ) -> list[tuple[Ids, str]]:
        made: dict[int, tuple[Ids, str]] = {}
        for temperature in dict.fromkeys(temperatures):
            rows = [row for row, own in enumerate(temperatures) if own == temperature]
            answers = self._generate(
                [opened[row].ids for row in rows], self.max_tokens, temperature
            )
            made.update(zip(rows, answers, strict=True))
        return [made[row] for row in range(len(opened))]

    def _are_greedy(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[bool]:
        if not self.needs_greedy:
            return [False] * len(prompts)
        greedy = [False] * len(prompts)
        for length in {len(response) for response in responses}:
            rows = [row for row, response in enumerate(responses) if len(response) == length]
            made = self._generate([prompts[row] for row in rows], length, 0.0)
            for row, (ids, _) in zip(rows, made, strict=True):
                greedy[row] = list(ids) == list(responses[row])
        return greedy


class GradedTask(ConfigurableTask):
    """A task of lm_eval whose grader may raise: such an answer is judged as an empty one.

    `reasons` has one line for each time it graded, "" where the metric says it all.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config=config)
        self.reasons: list[str] = []

    def process_results(self, doc: Any, results: Any) -> dict[str, Any]:
        """The metrics of one item, after one filter."""
        try:
            metrics, reason = self.judge(doc, results)
        except TutelageError:
            raise
        except Exception as error:  # an answer nobody thought of must cost one point, not the run
            metrics, _ = self.judge(doc, [""])
            reason = raised(error).reason
        self.reasons.append(reason)
        return metrics

    def judge(self, doc: Any, results: Any) -> tuple[dict[str, Any], str]:
        """(Metrics, reason or "") by lm_eval's own grader."""
        return super().process_results(doc, results), ""


class MathTask(GradedTask):
    """Hendrycks' MATH with math-verify beside lm_eval's comparison of strings.

    That one takes what stands between the first and the last dollar sign for the answer, so that
    whoever writes a formula on the way to \\boxed{} is wrong.
    """

    def judge(self, doc: Any, results: Any) -> tuple[dict[str, Any], str]:
        """(Metrics, reason of math-verify)."""
        metrics, _ = super().judge(doc, results)
        verdict = grade("math", results[0], doc["answer"], row={})
        return {**metrics, MATH_VERIFY: float(verdict.correct)}, verdict.reason


class CodeTask(GradedTask):
    """HumanEval, MBPP and their kin, judged in the sandbox; lm_eval would run the code here."""

    runner: Runner

    def apply_filters(self) -> list[Instance] | None:
        """Make programs of the answers, as lm_eval does, and run them all."""
        instances = super().apply_filters()
        jobs = {
            _job_key(instance.doc, results): _job(instance.doc, results)
            for instance in self.instances
            for results in instance.filtered_resps.values()
        }
        self._verdicts = dict(zip(jobs, self.runner.map(jobs.values()), strict=True))
        return instances

    def judge(self, doc: Any, results: Any) -> tuple[dict[str, Any], str]:
        """(pass@1, the sandbox's reason)."""
        verdict = verdict_of(self._verdicts[_job_key(doc, results[0])])
        return {"pass@1": float(verdict.correct)}, verdict.reason


def _job(doc: Mapping[str, Any], results: Any) -> Job:
    # lm_eval leaves out MBPP's `test_setup_code`, without which the gold of task 367 fails
    found = code_tests({"id": doc["task_id"], "meta": json.dumps(doc)})
    if found is None:
        raise DataError(f"row {doc['task_id']!r} has no tests in the form of HumanEval or MBPP")
    return Job(program=_program(results), tests=found.tests, entry_point=found.entry_point)


def _program(results: Any) -> str:
    return results if isinstance(results, str) else results[0]


def _job_key(doc: Mapping[str, Any], results: Any) -> tuple[str, str]:
    return str(doc["task_id"]), _program(results)


def _key(request: Instance) -> tuple[str, int]:
    return str(request.task_name), int(request.doc_id or 0)


def _temperature(gen_kwargs: Mapping[str, Any]) -> float:
    return float(gen_kwargs.get("temperature") or 0) if gen_kwargs.get("do_sample") else 0.0


def _cut(text: str, until: str | Sequence[str]) -> str:
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop, 1)[0] if stop else text
    return text
