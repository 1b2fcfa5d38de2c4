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
from tutelage.stages.evaluate import tasks
from tutelage.text.chat import ChatFormat

Row = Mapping[str, Any]
VERDICTS_FILE = "verdicts.parquet"
WATCHED = ("truncated", "empty", "raised")
"""Shares that make a warning."""
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
        self._limits = {task.name: task.max_tokens for task in config.tasks}
        self._grading = Grading(work.sandbox, workers=work.workers)
        self._runner: tasks.Pool | None = None

    def __enter__(self) -> "Tests":
        self._grading.__enter__()
        return self

    def check(self, num_models: int) -> None:
        """Raise before a model is loaded what is known before: names, files, gold, the sandbox."""
        if all(self._work.done(_part(index)) for index in range(num_models)):
            return
        for test in self._tests:
            self._grading.check(self._config.grader, test.rows)
            unanswered = [Given("", row["answer"], row) for row in test.rows]
            self._grading.grade_all(self._config.grader, unanswered)  # raises where gold is missing
        self._runner = tasks.check(self._config.tasks, self._grading)

    def __exit__(self, *error: Any) -> None:
        self._grading.__exit__(*error)

    def measure(self, index: int, model: Artifact, load: Callable[[], Loaded]) -> None:
        """Have one model's verdicts; they are kept, so that a killed step repeats none of them."""
        if self._work.done(_part(index)) or not (self._tests or self._config.tasks):
            return
        started = time.monotonic()
        facts: dict[str, tasks.Facts] = {}
        rows = list(self._verdicts(f"models.{index}", model, load(), facts))
        write_rows(self._work.scratch("graded") / f"{index:03d}.parquet", rows, VERDICTS)
        self._work.commit(
            _part(index), seconds=time.monotonic() - started,
            tokens={"student_decoded": sum(row["tokens"] for row in rows)}, tasks=facts,
        )  # fmt: skip

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
            self._complete(table, models)
        return found

    def _complete(self, table: dict[str, Any], models: Sequence[Artifact]) -> None:
        """Say whose figures these are, what is to be read with care, and what lm_eval says."""
        table["items"] = table["models"][0]["metrics"]["accuracy"]["n"]
        for index, (entry, model) in enumerate(zip(table["models"], models, strict=True)):
            entry |= {"role": f"models.{index}", "fingerprint": model.fingerprint}
            entry["warnings"] = self._warnings(entry["metrics"], table["test"])
            for warning in entry["warnings"]:
                name = table["test"] if table["test"] in self._limits else table["test"][:12]
                self._work.reporter.say(
                    f"  WARNING: models.{index} in {name}: {warning}", style="bold yellow"
                )
            if table["test"] in self._limits:
                facts = dict(self._work.ledger[_part(index)]["tasks"][table["test"]])
                entry["all"] = facts.pop("all")
                table["task"] = facts

    def _verdicts(
        self, role: str, model: Artifact, loaded: Loaded, facts: dict[str, tasks.Facts]
    ) -> Iterator[Row]:
        """All rows of one model; what lm_eval says of its tasks is put into `facts`."""
        chat = ChatFormat.from_tokenizer(loaded.tokenizer)
        answerer = Answerer(
            loaded, model=model.fingerprint, batch_size=self._config.batch_rows,
            memory=self._work.memory,
        )  # fmt: skip
        for test in self._tests:
            for temperature in self._config.temperatures:
                yield from self._graded(test, temperature, role, model, chat, answerer)
        for task in self._config.tasks:
            self._work.reporter.say(f"  {role}: {task.name}", style="dim")
            rows, facts[task.name] = tasks.verdicts(
                task, self._config, model=model.fingerprint, answerer=answerer, chat=chat,
                runner=self._runner, reporter=self._work.reporter,
            )  # fmt: skip
            yield from rows

    def _graded(
        self, test: _Test, temperature: float, role: str, model: Artifact, chat: ChatFormat,
        answerer: Answerer,
    ) -> Iterable[Row]:  # fmt: skip
        config = self._config
        samples = config.samples if temperature else 1
        asked = [(row, sample) for row in test.rows for sample in range(samples)]
        # Of the item's place and the sample's number: more of either leaves the others as they are.
        keys = [
            (sample << 32) + place for place in range(len(test.rows)) for sample in range(samples)
        ]
        params = SamplingParams(config.max_tokens, temperature, config.seed, chat.stop_ids)
        ids = [chat.prompt_ids(prompt_messages(row), config.mode) for row, _ in asked]
        with self._bar(len(asked) * config.max_tokens, f"answers of {role}") as advance:
            done = answerer.sample(ids, params, keys=keys, on_tokens=advance)
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
    def _bar(self, total: int, label: str) -> Iterator[Callable[[int], None]]:
        with self._work.reporter.bar(total, label, unit="tokens") as bar:
            yield bar.advance
            bar.advance(total - bar.done)

    def _warnings(self, metrics: Mapping[str, Any], test: str) -> list[str]:
        """What makes a score say something else than it seems to, a sentence each."""
        config, found = self._config, []
        share = {name: metrics[f"{name}_share"]["estimate"] for name in WATCHED}
        if share["truncated"] > config.max_truncated_share:
            most = self._limits.get(test) or config.max_tokens
            found.append(
                f"{share['truncated']:.0%} of the answers were cut off at max_tokens = {most}: "
                "this score measures length; raise max_tokens"
            )
        if config.mode == "reasoning" and share["empty"] > MANY_UNCLOSED:
            found.append(
                f"{share['empty']:.0%} of the answers in reasoning mode are empty behind their "
                "chain: was this model taught the think markers?"
            )
        if share["raised"]:
            found.append(
                f"the grader raised at {share['raised']:.1%} of the answers, which count as wrong; "
                f"`reason` in {VERDICTS_FILE} says why"
            )
        return found


def _part(index: int) -> str:
    """A model's part in the ledger."""
    return f"graded-{index}"
