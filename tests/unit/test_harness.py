"""Standard tasks through lm-evaluation-harness: prompts, answers and what they are worth."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny import write_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install tutelage[evals]")

from tutelage.core.errors import DataError, EngineError, RecipeError
from tutelage.evals.harness import TaskResult, gold_answers, run_task
from tutelage.evals.sandbox import Limits, Unsafe
from tutelage.recipe.evaluation import Task
from tutelage.text.chat import ChatFormat, Message, Mode
from tutelage.text.tokenizer import load_tokenizer

SUMS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"question": "What is 40 + 2?", "answer": "It is 42.\n#### 42"},
    {"question": "What is 999 + 1?", "answer": "It is 1,000.\n#### 1,000"},
]
CHOICE = {"A": "一", "B": "二", "C": "三", "D": "四"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": SUMS,
    "mgsm_zh": [
        {"question": "二加三等于几？", "answer_number": "5"},
        {"question": "一千加一等于几？", "answer_number": "1,001"},
    ],
    "math500": [
        {"problem": "Halve $x$.", "solution": r"So $x/2$, which is \boxed{\frac{x}{2}}."},
        {"problem": "Find $3^2$.", "solution": r"It is \boxed{9}."},
    ],
    "humaneval": [
        {
            "task_id": "Own/0",
            "prompt": 'def double(x):\n    """ Twice x. """\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(4) == 8\n",
        }
    ],
    "mbpp": [
        {
            "task_id": 11,
            "text": "Write a function sum of two numbers.",
            "code": "def sum(a, b):\r\n    return a + b",
            "test_setup_code": "two = 2",
            "test_list": ["assert sum(1, 1) == two", "assert sum(0, 0) == 0", "assert sum(1, 2)"],
        }
    ],
    "cmmlu_agronomy": [
        {"Question": question, **CHOICE, "Answer": answer}
        for question, answer in (("一加一？", "B"), ("零加一？", "A"), ("二加二？", "D"))
    ],
    "ceval_law": [{"id": 0, "question": "几？", **CHOICE, "answer": "C", "explanation": ""}],
    "mmlu_anatomy": [{"question": "Which?", "choices": [*"wxyz"], "answer": 3}],
    "clue-wsc": [
        {
            "text": "小明丢了球，因为它很旧。",
            "target": {"span1_text": span, "span1_index": 0, "span2_text": "它", "span2_index": 7},
            "label": label,
        }
        for span, label in (("球", "true"), ("小明", "false"))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = write_model(tmp_path_factory.mktemp("tiny") / "model", layers=1)
    return ChatFormat.from_tokenizer(load_tokenizer(folder))


@pytest.fixture(scope="module")
def runner() -> Iterator[Unsafe]:
    with Unsafe(Limits(), 1) as pool:  # the programs here are our own
        yield pool


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., Task]:
    """A task over rows of a file, those of ROWS if none are given."""

    def made(name: str, rows: list[dict[str, Any]] | None = None, **more: Any) -> Task:
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps(row) for row in (ROWS[name] if rows is None else rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return Task(name=name, source=str(path), **more)

    return made


@dataclass
class Fake:
    """A model that says what it is told, and remembers what it was asked."""

    chat: ChatFormat
    answers: list[str]
    chain: str = ""
    prefers: Callable[[int, str], float] = lambda item, option: -1.0
    """The log-probability of an option of an item."""
    asked: list[tuple[list[str], int, float]] = field(default_factory=list)

    def generate(self, prompts, max_tokens: int, temperature: float) -> list[tuple[list[int], str]]:
        texts = [self._text(ids) for ids in prompts]
        self.asked.append((texts, max_tokens, temperature))
        made = []
        for text, answer in zip(texts, self.answers, strict=True):
            message: Message = {"role": "assistant", "content": answer}
            if text.endswith("<think>\n"):
                message["thinking"] = self.chain or "hm"
            made.append((self.chat.response_ids(message), "stop"))
        return made

    def logps(self, prompts, responses) -> list[np.ndarray]:
        self.asked.append(([self._text(ids) for ids in prompts], 0, 0.0))
        options = [self._text(ids) for ids in responses]
        each = len(responses) // len(self.answers)
        total = [self.prefers(n // each, option) for n, option in enumerate(options)]
        return [np.full(len(r), t / len(r)) for t, r in zip(total, responses, strict=True)]

    def _text(self, ids: list[int]) -> str:
        return str(self.chat.tokenizer.decode(ids))

    def run(self, task: Task, *, mode: Mode = "fast", **more: Any) -> TaskResult:
        more = {"max_tokens": 50, **more}
        return run_task(
            task, chat=self.chat, generate=self.generate, logps=self.logps, mode=mode, **more
        )


def golden(chat: ChatFormat, task: Task) -> Fake:
    answers = [str(gold) for gold in gold_answers(task)]
    fake = Fake(chat, answers)
    fake.prefers = lambda item, option: -1.0 if option == answers[item] else -9.0
    return fake


def scores(result: TaskResult) -> list[float]:
    return [item.correct for item in result.items]


@pytest.mark.parametrize("mode", ["fast", "reasoning"])
@pytest.mark.parametrize("name", ROWS)
def test_the_gold_answer_scores_1_on_every_row(
    name: str, mode: Mode, chat: ChatFormat, runner: Unsafe, local: Callable[..., Task]
) -> None:
    task = local(name)
    result = golden(chat, task).run(task, mode=mode, runner=runner)
    assert scores(result) == [1.0] * len(ROWS[name])


@pytest.mark.parametrize("name", ["gsm8k", "mgsm_zh", "math500", "humaneval", "mbpp"])
def test_an_empty_answer_scores_0(
    name: str, chat: ChatFormat, runner: Unsafe, local: Callable[..., Task]
) -> None:
    result = Fake(chat, [""] * len(ROWS[name])).run(local(name), runner=runner)
    assert scores(result) == [0.0] * len(ROWS[name])


@pytest.mark.parametrize("name", ["cmmlu_agronomy", "ceval_law", "mmlu_anatomy", "clue-wsc"])
def test_any_other_option_than_the_gold_one_scores_0(
    name: str, chat: ChatFormat, local: Callable[..., Task]
) -> None:
    task = local(name)
    fake = golden(chat, task)
    fake.prefers = lambda item, option: -9.0 if option == fake.answers[item] else -1.0
    assert scores(fake.run(task)) == [0.0] * len(ROWS[name])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gsm8k", "#### 50"),
        ("gsm8k", "#### -5"),
        ("mgsm_zh", "答案是 6。"),
        ("math500", r"$\frac{x}{3}$"),
        ("humaneval", "\n    return 2 + x\n```"),
        ("mbpp", "\ndef add(a, b):\n    return a + b\n```"),
        ("mbpp", "\ndef sum(a, b):\n    raise SystemExit(0)\n```"),
    ],
)
def test_a_near_miss_scores_0(
    name: str, wrong: str, chat: ChatFormat, runner: Unsafe, local: Callable[..., Task]
) -> None:
    assert scores(Fake(chat, [wrong]).run(local(name, limit=1), runner=runner)) == [0.0]


def test_a_boxed_answer_behind_other_formulas_is_right(
    chat: ChatFormat, local: Callable[..., Task]
) -> None:
    answer = r"Since $a = 1$ and $b = 2$, it is $\boxed{\frac{2x}{4}}$."
    result = Fake(chat, [answer]).run(local("math500", limit=1))
    assert (scores(result), result.metric) == ([1.0], "math_verify")


class TestPrompts:
    def test_lm_evals_context_is_the_users_message_and_there_is_no_system_message(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""] * 3)
        fake.run(local("gsm8k"))
        wanted: list[Message] = [{"role": "user", "content": "Question: What is 2 + 3?\nAnswer:"}]
        assert fake.asked[0][0][0] == chat.tokenizer.decode(chat.prompt_ids(wanted, "fast"))

    def test_a_system_message_comes_first(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""] * 3)
        fake.run(local("gsm8k"), system="Be short.")
        assert fake.asked[0][0][0].startswith("<|im_start|>system\nBe short.<|im_end|>")

    def test_a_tasks_description_stands_in_the_users_message(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        (item, *_) = Fake(chat, [""] * 3).run(local("cmmlu_agronomy")).items
        assert item.prompt == (
            "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
            "一加一？\nA. 一\nB. 二\nC. 三\nD. 四\n答案："
        )

    def test_an_answer_that_the_task_opens_goes_on_behind_the_fence(
        self, chat: ChatFormat, runner: Unsafe, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""])
        fake.run(local("humaneval"), runner=runner)
        fence = "Here is the completed function:\n```python\n"
        assert fake.asked[0][0][0].endswith(
            f'</think>\n\n{fence}def double(x):\n    """ Twice x. """'
        )

    def test_solved_examples_stand_in_the_users_message_in_front_of_the_question(
        self, chat: ChatFormat, local: Callable[..., Task], tmp_path: Path
    ) -> None:
        shots = tmp_path / "shots.jsonl"
        shots.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "#### 2"}))
        task = local("gsm8k", shots=1, shots_source=str(shots))
        result = Fake(chat, [""] * 3).run(task)
        assert (result.items[0].prompt, result.shots) == (
            "Question: What is 1 + 1?\nAnswer: #### 2\n\nQuestion: What is 2 + 3?\nAnswer:", 1,
        )  # fmt: skip

    def test_examples_from_the_same_rows_are_never_the_item_itself(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        result = Fake(chat, [""] * 3).run(local("gsm8k", shots=2))
        for item, row in zip(result.items, SUMS, strict=True):
            assert item.prompt.count(row["question"]) == 1

    def test_the_seed_draws_the_examples(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(20)]
        drawn = {
            Fake(chat, [""]).run(local("gsm8k", rows, shots=3, limit=1), seed=seed).items[0].prompt
            for seed in (1, 2)
        }
        assert len(drawn) == 2

    def test_limit_and_max_tokens_of_the_task_hold(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""] * 2)
        result = fake.run(local("gsm8k", limit=2, max_tokens=7))
        assert (len(result.items), fake.asked[0][1:]) == (2, (7, 0.0))


class TestAnswers:
    def test_what_stands_behind_a_tasks_stop_string_is_cut_and_nothing_is_truncated(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, ["#### 5\n\nQuestion: What is 1 + 1?\nAnswer: 2"])
        generate = fake.generate
        fake.generate = lambda *asked: [(ids, "length") for ids, _ in generate(*asked)]  # type: ignore[method-assign]
        (item,) = fake.run(local("gsm8k", limit=1)).items
        assert (item.answer, item.correct, item.finish_reason) == ("#### 5\n\n", 1.0, "stop")

    def test_an_answer_that_is_cut_off_says_so(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, ["It is 5"])
        generate = fake.generate
        fake.generate = lambda *asked: [(ids[:-1], "length") for ids, _ in generate(*asked)]  # type: ignore[method-assign]
        (item,) = fake.run(local("gsm8k", limit=1)).items
        assert (item.answer, item.finish_reason) == ("It is 5", "length")

    def test_the_chain_is_split_off_before_grading(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, ["I do not know."], chain="Surely #### 5")
        (item,) = fake.run(local("gsm8k", limit=1), mode="reasoning").items
        assert (item.thinking, item.answer, item.correct) == (
            "Surely #### 5", "I do not know.", 0.0,
        )  # fmt: skip

    def test_a_chain_that_is_never_closed_is_an_empty_answer(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""])
        fake.generate = lambda prompts, *_: [(chat.opening_ids("It is 5"), "length")]  # type: ignore[method-assign]
        (item,) = fake.run(local("gsm8k", limit=1), mode="reasoning").items
        assert (item.correct, item.reason) == (0.0, "empty answer")

    def test_tokens_count_the_chain(self, chat: ChatFormat, local: Callable[..., Task]) -> None:
        fake = Fake(chat, ["5"], chain="2, 3")
        (item,) = fake.run(local("gsm8k", limit=1), mode="reasoning").items
        message: Message = {"role": "assistant", "content": "5", "thinking": "2, 3"}
        assert item.tokens == len(chat.response_ids(message))

    def test_a_choice_shows_the_option_and_costs_no_token(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""] * 3, prefers=lambda item, option: -1.0 - (option != "D"))
        (item, *_) = fake.run(local("cmmlu_agronomy")).items
        assert (item.answer, item.gold, item.reason, item.tokens, item.finish_reason) == (
            "D", "B", "D is not B", 0, "choice",
        )  # fmt: skip

    def test_a_choice_in_reasoning_mode_stands_behind_the_models_own_chain(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, ["A"], chain="one, two")
        fake.run(local("cmmlu_agronomy", limit=1), mode="reasoning")
        assert fake.asked[1][0][0].endswith("<think>\none, two\n</think>\n\n")

    def test_log_probabilities_that_are_no_numbers_stop_the_run(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, [""] * 3, prefers=lambda item, option: float("nan"))
        with pytest.raises(EngineError, match="not finite"):
            fake.run(local("cmmlu_agronomy"))

    def test_a_task_of_greedy_continuations_asks_for_them(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, ["", ""])
        fake.generate = (
            lambda prompts, count, _: [  # type: ignore[method-assign]
                (chat.opening_ids(" cat")[:count], "length") for _ in prompts
            ]
        )
        rows = [{"text": "I see a cat"}, {"text": "I see a cow"}]
        result = fake.run(local("lambada_openai", rows))
        assert (scores(result), result.metric) == ([1.0, 0.0], "acc")


class TestResult:
    def test_it_says_what_was_measured_and_by_which_version(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        import lm_eval

        result = Fake(chat, ["5", "42", "#### 1,000"]).run(local("gsm8k"))
        assert (result.task, result.lm_eval_task, result.metric, result.filter) == (
            "gsm8k", "gsm8k", "exact_match", "flexible-extract",
        )  # fmt: skip
        assert (result.version, result.lm_eval) == ("3.0", lm_eval.__version__)

    def test_it_holds_every_metric_that_lm_eval_gives(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        result = Fake(chat, ["5", "42", "#### 1,000"]).run(local("gsm8k"))
        assert dict(result.all) == {
            "exact_match,flexible-extract": 1.0,
            "exact_match,strict-match": pytest.approx(1 / 3),
        }

    def test_a_code_items_reason_is_the_sandboxs(
        self, chat: ChatFormat, runner: Unsafe, local: Callable[..., Task]
    ) -> None:
        fake = Fake(chat, ["\n    return 1 / 0\n```"])
        (item,) = fake.run(local("humaneval"), runner=runner).items
        assert item.reason.startswith("failed: ZeroDivisionError")

    def test_a_grader_that_raises_costs_the_item_and_is_shown(
        self, chat: ChatFormat, local: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tutelage.evals.harness_model import GradedTask

        judge = GradedTask.judge

        def fragile(self: Any, doc: Any, results: Any) -> Any:
            if results[0] == "42":
                raise RuntimeError("what a number")
            return judge(self, doc, results)

        monkeypatch.setattr(GradedTask, "judge", fragile)
        result = Fake(chat, ["5", "42", "1,000"]).run(local("gsm8k"))
        assert scores(result) == [1.0, 0.0, 1.0]
        assert result.items[1].reason == "grader raised RuntimeError: what a number"


class TestRefusals:
    def test_code_without_a_sandbox_is_refused(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        with pytest.raises(RecipeError, match="mbpp runs code and was given no sandbox"):
            Fake(chat, [""]).run(local("mbpp"))

    def test_lm_evals_runner_of_code_is_left_as_it_was(
        self, chat: ChatFormat, runner: Unsafe, local: Callable[..., Task]
    ) -> None:
        import evaluate

        before = evaluate.load
        Fake(chat, [""]).run(local("mbpp"), runner=runner)
        assert evaluate.load is before
        assert "lm_eval.tasks.mbpp.utils" not in sys.modules

    @pytest.mark.parametrize(
        ("name", "more", "reason"),
        [
            ("humaneval_64", {}, "wants 64 answers an item"),
            ("wikitext", {}, "perplexity"),
            ("cruxeval_input", {}, "runs code in a way of its own"),
            ("squadv2", {}, "a program of its own"),
            ("humaneval", {"shots": 2}, "no solved examples"),
        ],
    )
    def test_a_task_that_cannot_be_run_is_refused_with_the_reason(
        self, name: str, more: dict[str, Any], reason: str, chat: ChatFormat
    ) -> None:
        with pytest.raises(RecipeError, match=reason):
            Fake(chat, [""]).run(Task(name=name, **more))

    def test_local_rows_for_a_group_of_tasks_are_refused(
        self, chat: ChatFormat, tmp_path: Path
    ) -> None:
        task = Task(name="mmlu_stem", source=str(tmp_path / "a.csv"))
        with pytest.raises(RecipeError, match="group of 19 tasks: .*'mmlu_abstract_algebra'"):
            Fake(chat, [""]).run(task)

    def test_more_examples_than_there_are_is_refused(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        with pytest.raises(DataError, match="3 solved examples are wanted and 2 are there"):
            Fake(chat, [""]).run(local("gsm8k", shots=3))

    def test_rows_of_a_type_that_changes_are_refused(
        self, chat: ChatFormat, local: Callable[..., Task]
    ) -> None:
        rows = [SUMS[0], {"question": 7, "answer": "#### 7"}]
        with pytest.raises(DataError, match="task gsm8k cannot be made of"):
            Fake(chat, [""]).run(local("gsm8k", rows))

    def test_without_a_network_the_hub_is_named_with_the_way_around(
        self, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        def unreachable(**_: Any) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        with pytest.raises(DataError, match=r"gsm8k \(Hub\): no route; or give a local file"):
            Fake(chat, [""]).run(Task(name="gsm8k"))


class TestIfeval:
    ROW: ClassVar = {
        "key": 1, "prompt": "Say it without a comma.",
        "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
    }  # fmt: skip

    def test_without_nltks_data_one_is_told_how_to_get_it(
        self, chat: ChatFormat, local: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import nltk

        def nothing(name: str) -> None:
            raise LookupError(name)

        monkeypatch.setattr(nltk.data, "find", nothing)
        with pytest.raises(DataError, match="python -m nltk.downloader punkt_tab"):
            Fake(chat, [""]).run(local("ifeval", [self.ROW]))

    @pytest.mark.parametrize(("answer", "score"), [("No comma", 1.0), ("One, two", 0.0), ("", 0.0)])
    def test_the_score_is_whether_all_instructions_are_followed(
        self, answer: str, score: float, chat: ChatFormat, local: Callable[..., Task],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        pytest.importorskip("langdetect")
        import nltk

        monkeypatch.setattr(nltk.data, "find", lambda name: name)  # this instruction needs none
        result = Fake(chat, [answer]).run(local("ifeval", [self.ROW]))
        assert (scores(result), result.metric) == ([score], "prompt_level_strict_acc")


@pytest.mark.parametrize(("answer", "score"), [("Rome", 1.0), ("Old Rome", 0.67), ("Paris", 0.0)])
def test_drop_gives_an_answer_the_share_of_words_that_are_right(
    answer: str, score: float, chat: ChatFormat, local: Callable[..., Task]
) -> None:
    empty = {"number": [], "date": [], "spans": []}
    gold = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Rome"]}
    row = {
        "query_id": "q", "passage": "She lived in Rome.", "question": "Where?",
        "answer": gold, "validated_answers": empty,
    }  # fmt: skip
    result = Fake(chat, [answer]).run(local("drop", [row]))
    assert scores(result) == [score]


@pytest.mark.parametrize(("closed", "ended"), [(True, "choice"), (False, "length")])
def test_a_choice_whose_chain_was_cut_off_counts_as_cut_off(
    chat: ChatFormat, local: Callable[..., Task], closed: bool, ended: str
) -> None:
    class Cut(Fake):
        def generate(self, prompts, max_tokens: int, temperature: float) -> Any:
            text = "I think" + (" so.\n</think>\n\nIt is" if closed else "")
            ids = chat.tokenizer.encode(text, add_special_tokens=False)
            return [(ids, "length") for _ in prompts]

    task = local("cmmlu_agronomy")
    result = Cut(chat, [""] * 3).run(task, mode="reasoning")
    assert {item.finish_reason for item in result.items} == {ended}
    assert result.items[0].thinking == ("I think so." if closed else "I think")
