"""Stage `difficulty`: how hard each row is for a student, by its own answers or by likelihood.

Rows come out as they came in and in their order, with `difficulty` set and, in meta, what it was
made of. Owns what the student is asked and what is kept of it; what a difficulty is, is
`data.difficulty`'s affair, and what is right, the graders'. A row that cannot be scored has none,
and says why.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError
from tutelage.core.files import write_json
from tutelage.core.shards import Shard, run_shards, shards
from tutelage.data.difficulty import (
    alone_openings,
    difficulty_bands,
    difficulty_from_nll,
    difficulty_from_passes,
    instruction_following_difficulty,
    mean_nll,
)
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.engines.sampler import TransformersSampler
from tutelage.engines.scorer import TransformersScorer
from tutelage.evals.graders import CODE, can_grade, resolved
from tutelage.evals.grading import Given, Grading
from tutelage.models.load import Loaded, load_for_inference
from tutelage.recipe.curation import Difficulty
from tutelage.records import CONVERSATIONS, RowFiles, prompt_messages, write_rows
from tutelage.text.chat import ChatFormat, mode_of

KEY = "difficulty"
"""Of a row's meta: {"by", "student", then "passes", "samples", "truncated" or "nll", "ifd"; or
"unscored": the reason}."""
KEPT_KEY = "difficulty_of_source"
"""Where a column `difficulty` goes that the source itself had."""
BANDS = 10
LOGIT_CHUNK_BYTES = 128 * 2**20

Row = Mapping[str, Any]
Figures = dict[str, Any]
OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class _Student:
    loaded: Loaded
    chat: ChatFormat
    context: float
    """Tokens that prompt and answer may have; learned positions end there."""
    name: str


def run(config: Difficulty, inputs: Mapping[str, Artifact], work: WorkDir) -> dict[str, Any]:
    """Score every row; returns counts, the mean, and the rows in each tenth of [0, 1].

    Raises DataError when no row can be scored, RecipeError for an unknown verifier.
    """
    rows = RowFiles(inputs["data"].shards())
    loaded = load_for_inference(inputs["model"], device=work.device)
    chat = ChatFormat.from_tokenizer(loaded.tokenizer)
    sizes = loaded.model.config.get_text_config()
    context = getattr(sizes, "max_position_embeddings", None) or math.inf
    student = _Student(loaded, chat, context, inputs["model"].fingerprint[:12])
    if config.by == "pass-rate":
        with Grading(work.sandbox, workers=work.workers) as grading:
            _by_pass_rate(config, student, rows, work, grading)
    else:
        _by_likelihood(config, student, rows, work)
    return _summary(config, work)


# --- by the student's own answers ---------------------------------------------------------------


def _by_pass_rate(
    config: Difficulty, student: _Student, rows: RowFiles, work: WorkDir, grading: Grading
) -> None:
    """Sample `samples` answers a row and grade each, without its chain."""
    sampler = TransformersSampler(
        student.loaded.model, batch_size=config.batch_rows, device=str(student.loaded.device)
    )

    def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
        found = list(rows.rows(shard.items))
        figures, decoded = _answered(
            config, student, sampler, grading, found, shard.items, on_tokens
        )
        difficulty = difficulty_from_passes(
            [one.get("passes", 0) for one in figures], [one.get("samples", 0) for one in figures]
        )
        _write(config, student, work, shard, found, difficulty, figures)
        return {"student_decoded": decoded}

    run_shards(
        work, shards(len(rows), config.shard_rows), lambda: nullcontext(make),
        label="student answers", tokens_each=config.samples * config.max_tokens, here=True,
    )  # fmt: skip


def _answered(
    config: Difficulty, student: _Student, sampler: TransformersSampler, grading: Grading,
    rows: Sequence[Row], numbers: range, on_tokens: OnTokens,
) -> tuple[list[Figures], int]:  # fmt: skip
    """Each row's figures, and how many tokens were decoded for them."""
    questions = _questions(config, student, grading, rows)
    asked = {i: ids for i, ids in enumerate(questions) if not isinstance(ids, str)}
    params = SamplingParams(
        max_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed,
        stop_ids=student.chat.stop_ids,
    )  # fmt: skip
    samples = [(i, sample) for i in asked for sample in range(config.samples)]
    # The key is the sample's own number in the whole set, so shards and batches change nothing.
    done = sampler.sample(
        [asked[i] for i, _ in samples], params,
        keys=[numbers[i] * config.samples + sample for i, sample in samples], on_tokens=on_tokens,
    )  # fmt: skip
    figures: list[Figures] = [
        {"unscored": question}
        if isinstance(question, str)
        else {"passes": 0, "samples": config.samples, "truncated": 0}
        for question in questions
    ]
    given = []
    for (i, _), completion in zip(samples, done, strict=True):
        _, answer = student.chat.decode_response(completion.response_ids, config.mode)
        given.append(Given(answer, rows[i]["answer"], rows[i]))
    verdicts = grading.grade_all(config.verifier, given)
    for (i, _), completion, verdict in zip(samples, done, verdicts, strict=True):
        figures[i]["passes"] += verdict.correct
        figures[i]["truncated"] += completion.finish_reason == "length"
    return figures, sum(len(completion.response_ids) for completion in done)


def _questions(
    config: Difficulty, student: _Student, grading: Grading, rows: Sequence[Row]
) -> list[list[int] | str]:
    """Each prompt's ids, or why the row cannot be scored by answering it.

    A verifier that does not suit the gold answer (numeric for text) turns every answer down: the
    row would look hardest.
    """
    able = [row for row in rows if can_grade(config.verifier, row, row["answer"])]
    turned_down = iter(grading.gold_faults(config.verifier, able))
    questions: list[list[int] | str] = []
    for row in rows:
        if not can_grade(config.verifier, row, row["answer"]):
            code = resolved(config.verifier, row) == CODE
            questions.append("no tests for a program" if code else "no gold answer")
        elif fault := next(turned_down):
            questions.append(f"the verifier turns its own gold answer down: {fault}")
        else:
            questions.append(_question(config, student, row))
    return questions


def _question(config: Difficulty, student: _Student, row: Row) -> list[int] | str:
    try:
        ids = student.chat.prompt_ids(prompt_messages(row), config.mode)
    except DataError as error:
        return str(error)
    if len(ids) + config.max_tokens > student.context:
        return f"prompt and max_tokens are longer than the model's {student.context} tokens"
    return ids


# --- by likelihood ------------------------------------------------------------------------------


def _by_likelihood(config: Difficulty, student: _Student, rows: RowFiles, work: WorkDir) -> None:
    """Read every answer with its prompt and without, then rank the rows of the whole set.

    The rank needs the figures of all rows: they go to scratch first, and the rows are written in a
    second pass, which is made again when it was cut short.
    """
    scorer = TransformersScorer(
        student.loaded.model, device=str(student.loaded.device), chunk_bytes=LOGIT_CHUNK_BYTES
    )
    openings = alone_openings(student.chat)
    scratch = work.scratch("nll")

    def read(numbers: range) -> list[_Pair | str]:
        return [_pair(student, openings, row) for row in rows.rows(numbers)]

    def make(shard: Shard, on_tokens: OnTokens) -> dict[str, int]:
        found = _likelihoods(scorer, read(shard.items), on_tokens)
        write_json(scratch / f"{shard.name}.json", found)
        return {}  # what a student reads is none of the kinds of tokens that are counted

    parts = shards(len(rows), config.shard_rows)
    sizes = [2 * len(p.alone.response_ids) for p in read(parts[0].items) if not isinstance(p, str)]
    run_shards(
        work, parts, lambda: nullcontext(make),
        label="student reads", tokens_each=sum(sizes) // max(1, len(sizes)) + 1, here=True,
    )  # fmt: skip

    def figures_of(shard: Shard) -> list[Figures]:
        return json.loads((scratch / f"{shard.name}.json").read_text())

    difficulty_N, ifd_N = _ranked(one for shard in parts for one in figures_of(shard))
    for shard in parts:
        here = slice(shard.items.start, shard.items.stop)
        figures = [
            _with_ifd(one, ifd) for one, ifd in zip(figures_of(shard), ifd_N[here], strict=True)
        ]
        _write(config, student, work, shard, rows.rows(shard.items), difficulty_N[here], figures)


@dataclass(frozen=True)
class _Pair:
    given: Scorable
    alone: Scorable


def _pair(student: _Student, openings: Mapping[str, list[int]], row: Row) -> _Pair | str:
    """The last answer behind its prompt and by itself, or why the row cannot be scored.

    The answer is all that training would teach: chain, content and end of turn. By itself it stands
    behind `alone_openings`.
    """
    last = row["messages"][-1]
    if last["role"] != "assistant":
        return "it does not end with an answer"
    try:
        whole = student.chat.render(row["messages"], supervise="last")
    except DataError as error:
        return str(error)
    start = int(np.flatnonzero(whole.mask)[0])
    answer = whole.ids[whole.mask].tolist()
    if not row["complete"]:  # cut off: the end of turn that was rendered was never written
        answer.pop()
    if not answer:
        return "its answer is empty"
    opening = openings[mode_of(last)]
    if max(start, len(opening)) + len(answer) > student.context:
        return f"prompt and answer are longer than the model's {student.context} tokens"
    return _Pair(Scorable(whole.ids[:start].tolist(), answer), Scorable(opening, answer))


def _likelihoods(
    scorer: TransformersScorer, pairs: Sequence[_Pair | str], on_tokens: OnTokens
) -> list[Figures]:
    """NLL a token of each answer given its prompt, and alone, in nats."""
    scored = [pair for pair in pairs if not isinstance(pair, str)]
    given = scorer.label_logps([pair.given for pair in scored], on_tokens=on_tokens)
    alone = scorer.label_logps([pair.alone for pair in scored], on_tokens=on_tokens)
    nll = iter([mean_nll(logps) for both in zip(given, alone, strict=True) for logps in both])
    return [
        {"unscored": pair} if isinstance(pair, str) else {"nll": next(nll), "alone": next(nll)}
        for pair in pairs
    ]


def _ranked(figures: Iterable[Figures]) -> tuple[np.ndarray, np.ndarray]:
    """Difficulty and IFD of all rows; NaN for those without figures."""
    pairs = [(one.get("nll", math.nan), one.get("alone", math.nan)) for one in figures]
    nll_N, alone_N = np.array(pairs).T
    return difficulty_from_nll(nll_N, alone_N), instruction_following_difficulty(nll_N, alone_N)


def _with_ifd(figures: Figures, ifd: float) -> Figures:
    if "unscored" in figures:
        return figures
    if math.isnan(ifd):
        return {"unscored": "the answer alone has an NLL of 0: there is no IFD"}
    return {"nll": figures["nll"], "ifd": float(ifd)}


# --- what is written ----------------------------------------------------------------------------


def _write(
    config: Difficulty, student: _Student, work: WorkDir, shard: Shard, rows: Iterable[Row],
    difficulty_N: np.ndarray, figures: Sequence[Figures],
) -> None:  # fmt: skip
    records = [
        {
            **row,
            "difficulty": None if math.isnan(difficulty) else float(difficulty),
            "meta": _meta(row["meta"], {"by": config.by, "student": student.name, **found}),
        }
        for row, difficulty, found in zip(rows, difficulty_N, figures, strict=True)
    ]
    write_rows(work.path / f"{shard.name}.parquet", records, CONVERSATIONS)


def _meta(meta: str | None, figures: Figures) -> str:
    """The row's meta with these figures in place of an earlier student's."""
    before = json.loads(meta or "{}")
    old = before.get(KEY)
    if old is not None and not (isinstance(old, dict) and "student" in old):
        before[KEPT_KEY] = old
    return json.dumps({**before, KEY: figures}, ensure_ascii=False, sort_keys=True)


def _summary(config: Difficulty, work: WorkDir) -> dict[str, Any]:
    files = RowFiles(sorted(work.path.glob("part-*.parquet")))
    known: list[float] = []
    unscored, first, answers, truncated = 0, "", 0, 0
    for table in files.tables(range(len(files))):
        columns = (table[name].to_pylist() for name in ("id", "difficulty", "meta"))
        for name, difficulty, meta in zip(*columns, strict=True):
            figures = json.loads(meta)[KEY]
            answers += figures.get("samples", 0)
            truncated += figures.get("truncated", 0)
            if difficulty is None:
                unscored += 1
                first = first or f"{name}: {figures['unscored']}"
            else:
                known.append(difficulty)
    if not known:
        raise DataError(
            f"by = {config.by!r} can score none of {len(files)} rows, first: {first}; "
            "pass-rate wants a gold answer that the verifier takes, likelihood an assistant's"
        )
    if unscored:
        work.reporter.say(f"  {unscored} of {len(files)} rows are not scored, first: {first}")
    cut = {"truncated_share": truncated / answers} if answers else {}
    return {
        "rows": len(files),
        "scored": len(known),
        "unscored": unscored,
        "mean": sum(known) / len(known),
        **cut,
        "bands": _bands(np.array(known)),
    }


def _bands(difficulty_N: np.ndarray) -> dict[str, int]:
    """Rows in each tenth, under names as `0.0-0.1`."""
    counts = Counter(difficulty_bands(difficulty_N, count=BANDS))
    tenths = ((band / BANDS, (band + 1) / BANDS) for band in range(BANDS))
    return {f"{low:.1f}-{high:.1f}": counts[f"{low:.2f}-{high:.2f}"] for low, high in tenths}
