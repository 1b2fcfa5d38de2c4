"""Graded answers: data steps with gold answers, and standard tasks through lm-evaluation-harness.

Every model answers every item, in the recipe's mode and at each temperature; a grader judges, and
each answer is kept with its verdict in `verdicts.parquet`. What is counted of them is in
`evals.graded`.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.artifact import Artifact, WorkDir, several
from tutelage.core.errors import DataError
from tutelage.engines.answerer import Answerer
from tutelage.engines.base import SamplingParams
from tutelage.evals import graded
from tutelage.evals.grading import Given, Grading
from tutelage.evals.textmatch import answer_length
from tutelage.models.load import Loaded
from tutelage.recipe.evaluation import Evaluate
from tutelage.records import VERDICTS, prompt_messages, read_rows, write_rows
from tutelage.text.chat import ChatFormat

Row = Mapping[str, Any]
VERDICTS_FILE = "verdicts.parquet"
MANY_UNCLOSED = 0.5
"""More reasoning answers than this that never close their chain: the model was not taught to."""


@dataclass(frozen=True)
class _Test:
    """A data step's rows; `name` is its fingerprint, since a step's own name is no part of it."""

    name: str
    rows: Sequence[Row]


class Tests:
    """The graded part of one evaluate step; as a context it holds the graders' processes."""

    def __init__(self, config: Evaluate, inputs: Mapping[str, Artifact], work: WorkDir) -> None:
        self._config, self._work = config, work
        self._tests = [
            _Test(artifact.fingerprint, list(read_rows(artifact.shards())))
            for artifact in several(inputs, "tests")
        ]
        if empty := [test.name for test in self._tests if not test.rows]:
            raise DataError(f"a test has no row ({empty[0][:12]}); widen its data step")
        self._grading = Grading(work.sandbox, workers=work.workers)

    def __enter__(self) -> "Tests":
        self._grading.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._grading.__exit__(*error)

    def measure(self, index: int, model: Artifact, load: Callable[[], Loaded]) -> None:
        """Have one model's verdicts; they are kept, so that a killed step repeats none of them."""
        name = f"graded-{index}"
        if self._work.done(name) or not (self._tests or self._config.tasks):
            return
        started = time.monotonic()
        rows = list(self._verdicts(model, load()))
        write_rows(self._work.scratch("graded") / f"{index:03d}.parquet", rows, VERDICTS)
        decoded = sum(row["tokens"] for row in rows if row["finish_reason"] != "choice")
        self._work.commit(
            name, seconds=time.monotonic() - started, tokens={"student_decoded": decoded}
        )

    def finish(self, models: Sequence[Artifact]) -> list[dict[str, Any]]:
        """Write `verdicts.parquet`; returns what `scores.json` says of each test."""
        if not (self._tests or self._config.tasks):
            return []
        folder = self._work.scratch("graded")
        parts = [list(read_rows([folder / f"{i:03d}.parquet"])) for i in range(len(models))]
        rows = [row for part in parts for row in part]
        write_rows(self._work.path / VERDICTS_FILE, rows, VERDICTS)
        settings = graded.Settings(self._config.pass_at, self._config.seed, self._config.bootstrap)
        found = graded.tables(parts, settings)
        for table in found:
            for index, (entry, model) in enumerate(zip(table["models"], models, strict=True)):
                entry |= {"role": f"models.{index}", "fingerprint": model.fingerprint}
                self._warn(entry["metrics"], index)
        return found

    def _verdicts(self, model: Artifact, loaded: Loaded) -> Iterator[Row]:
        chat = ChatFormat.from_tokenizer(loaded.tokenizer)
        answerer = Answerer(
            loaded, model=model.fingerprint, batch_size=self._config.batch_rows,
            memory=self._work.memory,
        )  # fmt: skip
        for test in self._tests:
            for temperature in self._config.temperatures:
                yield from self._graded(test, temperature, model, chat, answerer)

    def _graded(
        self, test: _Test, temperature: float, model: Artifact, chat: ChatFormat, answerer: Answerer
    ) -> Iterable[Row]:
        config = self._config
        samples = config.samples if temperature else 1
        asked = [(row, sample) for row in test.rows for sample in range(samples)]
        params = SamplingParams(config.max_tokens, temperature, config.seed, chat.stop_ids)
        ids = [chat.prompt_ids(prompt_messages(row), config.mode) for row, _ in asked]
        with self._bar(len(asked) * config.max_tokens) as advance:
            done = answerer.sample(ids, params, keys=range(len(asked)), on_tokens=advance)
        split = [chat.decode_response(one.response_ids, config.mode) for one in done]
        verdicts = self._grading.grade_all(
            config.grader,
            [
                Given(answer, row["answer"], row)
                for (_, answer), (row, _) in zip(split, asked, strict=True)
            ],
        )
        return [
            {
                "model": model.fingerprint,
                "test": test.name,
                "item": row["id"],
                "language": row["language"],
                "mode": config.mode,
                "temperature": temperature,
                "sample": sample,
                "prompt": prompt_messages(row)[-1]["content"],
                "thinking": thinking,
                "answer": answer,
                "gold": row["answer"],
                "correct": float(verdict.correct),
                "reason": verdict.reason,
                "tokens": answer_length(one.response_ids, finish_reason=one.finish_reason),
                "finish_reason": one.finish_reason,
            }
            for (row, sample), one, (thinking, answer), verdict in zip(
                asked, done, split, verdicts, strict=True
            )
        ]

    @contextlib.contextmanager
    def _bar(self, total: int) -> Iterator[Callable[[int], None]]:
        with self._work.reporter.bar(total, "answers", unit="tokens") as bar:
            yield bar.advance
            bar.advance(total - bar.done)

    def _warn(self, metrics: Mapping[str, Any], index: int) -> None:
        say, config = self._work.reporter.say, self._config
        cut = metrics["truncated_share"]["estimate"]
        if cut > config.max_truncated_share:
            say(
                f"  WARNING: models.{index}: {cut:.0%} of the answers were cut off at max_tokens = "
                f"{config.max_tokens}: this score measures length; raise max_tokens",
                style="bold yellow",
            )
        empty = metrics["empty_share"]["estimate"]
        if config.mode == "reasoning" and empty > MANY_UNCLOSED:
            say(
                f"  WARNING: models.{index}: {empty:.0%} of the answers in reasoning mode are empty"
                " behind their chain: was this model taught the think markers?",
                style="bold yellow",
            )
