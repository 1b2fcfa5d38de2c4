"""Standard tasks: lm-evaluation-harness asks, the model answers through its memory.

Each item becomes a row of `records.VERDICTS`; what lm_eval says of a task besides (its version,
which metric is the score, its other metrics) becomes the task's `Facts`.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tutelage.core.progress import Reporter
from tutelage.engines.answerer import Answerer
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.evals.grading import Grading
from tutelage.evals.harness import TaskResult, run_task, runs_code
from tutelage.evals.sandbox import Sandbox, Unsafe
from tutelage.recipe.evaluation import Evaluate, Task
from tutelage.text.chat import ChatFormat

Row = Mapping[str, Any]
Facts = dict[str, Any]
"""Of a task: `lm_eval_task`, `version`, `metric`, `filter`, `lm_eval` and `shots`, and `all`, every
metric that lm_eval aggregates for one model."""
Ids = Sequence[int]
Pool = Sandbox | Unsafe


def check(tasks: Sequence[Task], grading: Grading) -> Pool | None:
    """Raise now, before a model is loaded, what asking these tasks would raise first.

    Returns the sandbox, started, where one of them runs code. Raises RecipeError for an unknown
    task, DataError for rows that are missing or unfit, EngineError where programs will come and
    nothing may run them.
    """
    wanted = [runs_code(task) for task in tasks]  # a list: each task is checked
    return grading.started() if any(wanted) else None


class Asked:
    """A loaded model as a task sees it: it answers, and says how likely a continuation is."""

    def __init__(
        self, answerer: Answerer, chat: ChatFormat, *, seed: int, label: str, reporter: Reporter
    ) -> None:
        self._answerer, self._chat, self._seed = answerer, chat, seed
        self._label, self._reporter = label, reporter
        self.temperature = 0.0
        """The highest that the task asked for."""

    def generate(
        self, prompts: Sequence[Ids], max_tokens: int, temperature: float
    ) -> list[tuple[Ids, str]]:
        """See `harness_model.Generate`."""
        self.temperature = max(self.temperature, temperature)
        params = SamplingParams(max_tokens, temperature, self._seed, self._chat.stop_ids)
        with self._bar(len(prompts) * max_tokens, "answers") as advance:
            done = self._answerer.sample(
                prompts, params, keys=range(len(prompts)), on_tokens=advance
            )
        return [(one.response_ids, one.finish_reason) for one in done]

    def logps(self, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[np.ndarray]:
        """See `harness_model.Logps`."""
        pairs = [Scorable(list(p), list(r)) for p, r in zip(prompts, responses, strict=True)]
        with self._bar(sum(map(len, responses)), "choices") as advance:
            return self._answerer.label_logps(pairs, on_tokens=advance)

    @contextlib.contextmanager
    def _bar(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        with self._reporter.bar(total, f"{self._label} {what}", unit="tokens") as bar:
            yield bar.advance
            bar.advance(total - bar.done)


def verdicts(
    task: Task, config: Evaluate, *, model: str, answerer: Answerer, chat: ChatFormat,
    runner: Pool | None, reporter: Reporter,
) -> tuple[list[Row], Facts]:  # fmt: skip
    """A row for each item of one task, and what lm_eval says of all together.

    Raises as `harness.run_task`.
    """
    asked = Asked(answerer, chat, seed=config.seed, label=task.name, reporter=reporter)
    result = run_task(
        task, chat=chat, generate=asked.generate, logps=asked.logps, mode=config.mode,
        system=config.system, max_tokens=task.max_tokens or config.max_tokens,
        runner=runner, seed=config.seed,
    )  # fmt: skip
    return _rows(result, config, model, asked.temperature), _facts(result)


def _rows(result: TaskResult, config: Evaluate, model: str, temperature: float) -> list[Row]:
    return [
        {
            "model": model,
            "test": result.task,
            "item": item.item,
            "language": None,
            "mode": config.mode,
            "temperature": temperature,
            "sample": 0,
            "prompt": item.prompt,
            "thinking": item.thinking,
            "answer": item.answer,
            "gold": item.gold,
            "correct": item.correct,
            "reason": item.reason,
            "tokens": item.tokens,
            "finish_reason": item.finish_reason,
        }
        for item in result.items
    ]


def _facts(result: TaskResult) -> Facts:
    names = ("lm_eval_task", "version", "metric", "filter", "lm_eval", "shots")
    return {**{name: getattr(result, name) for name in names}, "all": dict(result.all)}
