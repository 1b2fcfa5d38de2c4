"""Stage `difficulty`: passes that are known, likelihoods against the model's own logits, resuming.

The student is the tiny model; where a pass rate must be known its sampler is a fake that answers
by the sample's key.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.engines.base import Completion
from tutelage.evals import grading
from tutelage.evals.graders import Verdict
from tutelage.recipe.curation import Difficulty
from tutelage.records import CONVERSATIONS, read_rows, write_rows
from tutelage.stages import difficulty
from tutelage.text.chat import ChatFormat, Message

Row = dict[str, Any]


def user(content: str) -> Message:
    return {"role": "user", "content": content, "thinking": None}


def assistant(content: str, thinking: str | None = None) -> Message:
    return {"role": "assistant", "content": content, "thinking": thinking}


def row(name: str, *messages: Message, **columns: Any) -> Row:
    return {
        "id": name, "source": "a.jsonl", "language": "en", "mode": "fast", "complete": True,
        "messages": list(messages), "answer": None, "task": None, "difficulty": None, "meta": None,
        **columns,
    }  # fmt: skip


def asked(*golds: str | None, **columns: Any) -> list[Row]:
    return [row(f"r{n}", user(f"q{n}"), answer=g, **columns) for n, g in enumerate(golds)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("student"), layers=2)


@pytest.fixture(scope="module")
def chat(model: Path) -> ChatFormat:
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(model))


class Stage:
    """The stage over given rows, each run in a folder of its own unless told otherwise."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.runs = 0
        self.summary: dict[str, Any] = {}

    def run(self, rows: Sequence[Row] | Path, *, student: str = "s" * 64, **settings: Any) -> Path:
        """The work folder; give it again as `into` to go on in it."""
        into = settings.pop("into", None) or self.folder / f"work{self.runs}"
        sandbox = settings.pop("sandbox", "bubblewrap")
        self.runs += 1
        data = rows if isinstance(rows, Path) else self.folder / f"data{self.runs}"
        if not isinstance(rows, Path):
            write_rows(data / "conversations.parquet", rows, CONVERSATIONS)
        config = Difficulty.model_validate(
            {"stage": "difficulty", "model": "m", "data": "d", "seed": 5, "max_tokens": 6}
            | settings
        )
        outside = {"stage": "external", "fingerprint": student, "identity": {}}
        inputs = {"model": Artifact(self.model, outside), "data": Artifact(data, {})}
        work = WorkDir.open(into, reporter=Reporter(quiet=True), device="cpu", sandbox=sandbox)
        self.summary = difficulty.run(config, inputs, work)
        return into


@pytest.fixture
def stage(tmp_path: Path, model: Path) -> Stage:
    return Stage(tmp_path, model)


def rows_of(work: Path) -> list[Row]:
    return list(read_rows(sorted(work.glob("part-*.parquet"))))


def scores(work: Path) -> list[float | None]:
    return [one["difficulty"] for one in rows_of(work)]


def figures(work: Path) -> list[dict[str, Any]]:
    """What meta says of each row's difficulty, without who was asked."""
    found = [json.loads(one["meta"])["difficulty"] for one in rows_of(work)]
    return [{k: v for k, v in one.items() if k not in ("by", "student")} for one in found]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.parquet"))
    assert names == sorted(path.name for path in other.glob("*.parquet"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


class Answers:
    """In place of the sampler: the answer to each key; `calls` holds prompts and keys."""

    def __init__(self, chat: ChatFormat, answer: Callable[[int], Message], cut: str = "") -> None:
        self.chat = chat
        self.answer = answer
        self.cut = cut
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    def __call__(self, model: Any, **settings: Any) -> "Answers":
        return self

    def sample(self, prompts: Any, params: Any, *, keys: Any, on_tokens: Any) -> list[Completion]:
        self.calls.append(([list(prompt) for prompt in prompts], list(keys)))
        made = []
        for key in keys:
            message = self.answer(key)
            ids = self.chat.response_ids(message)
            whole = message["content"] != self.cut
            ids = ids if whole else ids[:-1]
            reason = "stop" if whole else "length"
            made.append(Completion(tuple(ids), (0.0,) * len(ids), reason))
        return made


@pytest.fixture
def answers(
    monkeypatch: pytest.MonkeyPatch, chat: ChatFormat
) -> Callable[[Callable[[int], Message]], Answers]:
    def put(answer: Callable[[int], Message], cut: str = "") -> Answers:
        fake = Answers(chat, answer, cut)
        monkeypatch.setattr(difficulty, "TransformersSampler", fake)
        return fake

    return put


# --- pass rate ----------------------------------------------------------------------------------


def test_difficulty_is_the_share_of_answers_turned_down_and_nothing_else_changes(
    stage: Stage, answers: Any
) -> None:
    right = [4, 2, 0, 0, 1]  # of row n's four samples the first so many say its number
    answers(lambda key: assistant(f"It is {key // 4 if key % 4 < right[key // 4] else 99}."))
    rows = asked("0", "1", "2", None, "4", meta='{"page": 7}')
    work = stage.run(rows, samples=4, shard_rows=2)
    assert scores(work) == [0.0, 0.5, 1.0, None, 0.75]
    assert [one.get("passes") for one in figures(work)] == [4, 2, 0, None, 1]
    assert figures(work)[3] == {"unscored": "no gold answer"}
    for before, after in zip(rows, rows_of(work), strict=True):
        meta = json.loads(after["meta"])
        assert meta["difficulty"]["student"] == "s" * 12
        assert meta["page"] == 7
        assert {**after, "difficulty": None, "meta": None} == {**before, "meta": None}


def test_the_summary_counts_rows_by_tenths_and_answers_cut_off(stage: Stage, answers: Any) -> None:
    answers(lambda key: assistant("long" if key % 4 == 3 else str(key // 4)), cut="long")
    work = stage.run(asked("0", "7", None, "3"), samples=4)
    assert scores(work) == [0.25, 1.0, None, 0.25]
    bands = stage.summary.pop("bands")
    assert stage.summary == {
        "rows": 4, "scored": 3, "unscored": 1, "mean": 0.5, "truncated_share": 0.25,
    }  # fmt: skip
    assert bands == {
        "0.0-0.1": 0, "0.1-0.2": 0, "0.2-0.3": 2, "0.3-0.4": 0, "0.4-0.5": 0, "0.5-0.6": 0,
        "0.6-0.7": 0, "0.7-0.8": 0, "0.8-0.9": 0, "0.9-1.0": 1,
    }  # fmt: skip


def test_each_sample_is_asked_with_the_last_question_and_its_own_number(
    stage: Stage, answers: Any, chat: ChatFormat
) -> None:
    talk = [user("a"), assistant("b"), user("c"), assistant("d")]
    fake = answers(lambda key: assistant("1"))
    rows = [row("x", *talk, answer="1"), *asked(None), row("z", user("e"), answer="1")]
    stage.run(rows, samples=2, mode="reasoning")
    one, other = (chat.prompt_ids(m, "reasoning") for m in (talk[:3], [user("e")]))
    assert fake.calls == [([one, one, other, other], [0, 1, 4, 5])]


def test_a_chain_is_not_graded_and_one_without_end_is_no_answer(stage: Stage, answers: Any) -> None:
    said = [assistant("5", "It is 72."), assistant("72", "It is 5."), assistant("It is 72")]
    answers(lambda key: said[key])
    work = stage.run(asked("72", "72", "72"), samples=1, mode="reasoning", verifier="numeric")
    assert scores(work) == [1.0, 0.0, 1.0]


def test_a_gold_answer_its_verifier_cannot_use_is_not_a_hard_row(
    stage: Stage, answers: Any
) -> None:
    fake = answers(lambda key: assistant("3"))
    work = stage.run(asked("Paris", "3"), samples=2, verifier="numeric")
    assert scores(work) == [None, 0.0]
    assert "turns its own gold answer down" in figures(work)[0]["unscored"]
    assert fake.calls[0][1] == [2, 3]  # no token is spent on the other


def test_rows_of_which_none_can_be_scored_stop_the_step(stage: Stage, answers: Any) -> None:
    answers(lambda key: assistant("3"))
    with pytest.raises(DataError, match=r"score none of 2 rows, first: r0: no gold answer; "):
        stage.run(asked(None, "  "))
    with pytest.raises(RecipeError, match=r"no grader 'numerik'; did you mean 'numeric'"):
        stage.run(asked("3"), verifier="numerik")


def test_a_prompt_that_does_not_fit_the_model_is_not_scored(stage: Stage, answers: Any) -> None:
    answers(lambda key: assistant("3"))
    work = stage.run([*asked("3"), row("long", user("x" * 600), answer="3")], samples=1)
    assert scores(work) == [0.0, None]
    assert "longer than the model's 512 tokens" in figures(work)[1]["unscored"]


def program_row(name: str, solution: str | None = None, **columns: Any) -> Row:
    meta = {"test_list": ["assert f(2) == 3"], "code": solution}
    return row(name, user("f?"), meta=json.dumps(meta), **columns)


def test_a_program_is_judged_by_its_tests_and_needs_no_gold_answer(
    stage: Stage, answers: Any
) -> None:
    answers(lambda key: assistant("f = lambda x: x + 1" if key % 2 else "f = abs"))
    rows = [
        program_row("a"), program_row("b", "def f(x): return 3"), program_row("c", "f = abs"),
        row("d", user("3?"), answer="3"),
    ]  # fmt: skip
    work = stage.run(rows, samples=2, sandbox="none", max_tokens=20)
    assert scores(work) == [0.5, 0.5, None, 1.0]
    assert figures(work)[2]["unscored"] == (
        "the verifier turns its own gold answer down: failed: AssertionError in line 1: "
        "assert f(2) == 3"
    )


def test_a_row_without_tests_has_no_difficulty_where_programs_are_judged(
    stage: Stage, answers: Any
) -> None:
    answers(lambda key: assistant("f = lambda x: 3"))
    rows = [program_row("a"), row("b", user("3?"), answer="3")]
    work = stage.run(rows, samples=1, sandbox="none", verifier="code")
    assert scores(work) == [0.0, None]
    assert figures(work)[1] == {"unscored": "no tests for a program"}


def test_shards_and_batches_change_no_figure(stage: Stage, monkeypatch: Any) -> None:
    def by_text(name: str, answer: str, gold: str, *, row: Row) -> Verdict:
        return Verdict(answer == gold or zlib.crc32(answer.encode()) % 2 == 0, "")

    monkeypatch.setattr(grading, "grade", by_text)
    rows = asked(*"abcdefg")
    one = stage.run(rows, samples=3, shard_rows=7, batch_rows=21)
    other = stage.run(rows, samples=3, shard_rows=2, batch_rows=2)
    assert rows_of(one) == rows_of(other)
    assert 0 < stage.summary["mean"] < 1
    assert rows_of(one) != rows_of(stage.run(rows, samples=3, seed=6))


def test_a_killed_run_goes_on_with_the_shard_it_was_in(
    stage: Stage, answers: Any, tmp_path: Path
) -> None:
    rows = asked("0", "1", "2", "3", "4")
    settings: dict[str, Any] = {"samples": 2, "shard_rows": 2}
    answers(lambda key: assistant(str(key // 2 if key % 2 else 9)))
    whole = stage.run(rows, **settings)

    def killed(key: int) -> Message:
        if key >= 4:
            raise KeyboardInterrupt
        return assistant(str(key // 2 if key % 2 else 9))

    answers(killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(rows, into=tmp_path / "killed", **settings)
    fake = answers(lambda key: assistant(str(key // 2 if key % 2 else 9)))
    assert same_files(whole, stage.run(rows, into=tmp_path / "killed", **settings))
    assert [keys for _, keys in fake.calls] == [[4, 5, 6, 7], [8, 9]]


# --- likelihood ---------------------------------------------------------------------------------


ANSWERED = [
    row("fast", user("How do plants drink?"), assistant("through their roots")),
    row("chain", user("Write"), assistant("around it", "their <roots>"), mode="reasoning"),
    row("prompt", user("How?")),
    row("cut", user("water"), assistant("plants drink wa"), complete=False),
    row("turns", user("a"), assistant("b"), user("How do plants"), assistant("drink water?")),
]


def own_nll(model: Path, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """By the plain forward pass."""
    with torch.inference_mode():
        logits_TV = AutoModelForCausalLM.from_pretrained(model)(
            torch.tensor([[*prompt, *answer]])
        ).logits[0]
    logp_TV = logits_TV.float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return -float(np.mean([float(logp_TV[t, i]) for t, i in zip(places, answer, strict=True)]))


def test_nll_and_ifd_are_the_models_own_for_all_that_training_would_teach(
    stage: Stage, model: Path, chat: ChatFormat
) -> None:
    work = stage.run(ANSWERED, by="likelihood", shard_rows=2)
    found = figures(work)
    assert found[2] == {"unscored": "it does not end with an answer"}
    for one, got in zip(ANSWERED, found, strict=True):
        if one["id"] == "prompt":
            continue
        messages, mode = one["messages"], one["mode"]
        response = chat.response_ids(messages[-1])
        response = response if one["complete"] else response[:-1]
        given = own_nll(model, chat.prompt_ids(messages[:-1], mode), response)
        alone = own_nll(model, chat.prompt_ids([user("")], mode), response)
        assert got["nll"] == pytest.approx(given, rel=1e-4), one["id"]
        assert got["ifd"] == pytest.approx(given / alone, rel=1e-4), one["id"]
    for before, after in zip(ANSWERED, rows_of(work), strict=True):
        assert {**after, "difficulty": None, "meta": None} == before


def test_difficulty_by_likelihood_is_the_rank_by_ifd_over_the_whole_set(stage: Stage) -> None:
    work = stage.run(ANSWERED, by="likelihood", shard_rows=2)
    by_ifd = sorted(
        (one["ifd"], got)
        for one, got in zip(figures(work), scores(work), strict=True)
        if "ifd" in one
    )
    assert [got for _, got in by_ifd] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert scores(work)[2] is None
    assert (stage.summary["scored"], stage.summary["unscored"]) == (4, 1)
    assert stage.summary["mean"] == pytest.approx(0.5)
    assert "truncated_share" not in stage.summary
    assert stage.summary["bands"]["0.9-1.0"] == 1


def test_an_answer_that_does_not_fit_or_cannot_be_written_is_not_scored(stage: Stage) -> None:
    rows = [
        *ANSWERED[:2],
        row("long", user("a"), assistant("x" * 600)),
        row("markers", user("a"), assistant("<think>b")),
    ]
    work = stage.run(rows, by="likelihood")
    assert "longer than the model's 512 tokens" in figures(work)[2]["unscored"]
    assert "content begins with <think>" in figures(work)[3]["unscored"]
    assert scores(work)[2:] == [None, None]
    with pytest.raises(DataError, match="score none of 1 rows, first: r0: it does not end with"):
        stage.run(asked("3"), by="likelihood")


def test_a_certain_answer_has_an_nll_of_0_and_one_certain_by_itself_no_ifd(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Certain:
        """In place of the scorer: sure of every first row's answer, given and alone in turn."""

        def __init__(self, model: Any, **settings: Any) -> None:
            self.calls = 0

        def label_logps(self, sequences: Any, on_tokens: Any) -> list[np.ndarray]:
            self.calls += 1
            sure = np.array([1e-7, 0.0], np.float32)  # float noise above 0
            unsure = np.array([-1.0, -3.0], np.float32)
            return [sure, unsure] if self.calls == 1 else [unsure, sure]

    monkeypatch.setattr(difficulty, "TransformersScorer", Certain)
    work = stage.run(ANSWERED[:2], by="likelihood")
    assert figures(work)[0] == {"nll": 0.0, "ifd": 0.0}
    assert "there is no IFD" in figures(work)[1]["unscored"]
    assert scores(work) == [0.5, None]


@pytest.mark.parametrize("where", ["write_json", "write_rows"])
def test_a_kill_in_either_pass_over_the_likelihoods_leaves_the_same_bytes(
    where: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"by": "likelihood", "shard_rows": 2}
    whole = stage.run(ANSWERED, **settings)
    real, calls = getattr(difficulty, where), []

    def killed(path: Path, *rest: Any) -> Any:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(difficulty, where, killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(ANSWERED, into=tmp_path / "killed", **settings)
    assert same_files(whole, stage.run(ANSWERED, into=tmp_path / "killed", **settings))
    # The first pass goes on where it was; the second, which costs no model, is made again.
    assert len(calls) == (4 if where == "write_json" else 5)


# --- again --------------------------------------------------------------------------------------


def test_another_student_overwrites_what_the_last_one_left(stage: Stage, answers: Any) -> None:
    answers(lambda key: assistant("3"))
    rows = [
        row("both", user("a"), assistant("b"), answer="3"),
        row("gold", user("a"), answer="3"),
        row("said", user("a"), assistant("b")),
    ]
    first = stage.run(rows, student="1" * 64, samples=2)
    assert scores(first) == [0.0, 0.0, None]
    second = stage.run(first, student="2" * 64, by="likelihood")
    last = [json.loads(one["meta"]) for one in rows_of(second)]
    assert [list(meta) for meta in last] == [["difficulty"]] * 3
    assert {meta["difficulty"]["student"] for meta in last} == {"2" * 12}
    assert scores(second) == [0.5, None, 0.5]
    answers(lambda key: assistant("4"))
    assert scores(stage.run(second, samples=2)) == [1.0, 1.0, None]


@pytest.mark.parametrize("given", ["hard", {"num_terms": [2, 6]}])
def test_a_difficulty_that_the_source_gave_is_kept_beside_ours(
    given: Any, stage: Stage, answers: Any
) -> None:
    answers(lambda key: assistant("3"))
    rows = asked("3", meta=json.dumps({"difficulty": given, "page": 7}))
    work = stage.run(stage.run(rows, samples=1), samples=2)
    (meta,) = [json.loads(one["meta"]) for one in rows_of(work)]
    assert (meta["difficulty_of_source"], meta["page"]) == (given, 7)
    assert meta["difficulty"]["samples"] == 2
