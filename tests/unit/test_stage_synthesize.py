"""Stage `synthesize`: which answers are kept, what is said of the others, and how it goes on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scripted import Scripted, outside
from transformers import AutoTokenizer

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, EngineError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.engines.base import Completion, SamplingParams
from tutelage.evals import graders
from tutelage.evals.grading_text import Verdict
from tutelage.recipe.tables import Synthesize
from tutelage.records import CONVERSATIONS, read_rows, write_rows
from tutelage.stages import synthesize

Says = Callable[[str, int], str]
"""(the prompt's text, the answer's number) -> the answer; one that ends with "..." is cut off."""
JUDGE = "Rating: <number>"
FINGERPRINTS = {"teacher": "a" * 64, "judge": "b" * 64}


def no_judge(prompt: str, key: int) -> str:
    raise AssertionError("there is no judge here")


class Stage(Scripted):
    """The stage over scripted models: `says` answers prompts, `rates` the judge's questions."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.folder = folder
        self.says: Says = lambda prompt, key: "72"
        self.rates: Says = no_judge
        self.calls: list[tuple[list[int], SamplingParams]] = []
        self.console = Console(record=True, width=200, file=(folder / "log").open("w"))
        self.prompts(("1", "What is 70 + 2?", "72"))

    def prompts(self, *rows: tuple[str, str, str | None], meta: str = "{}") -> None:
        records = [
            {
                "id": name, "source": "s", "language": "en", "mode": "fast", "answer": gold,
                "messages": [{"role": "user", "content": text}], "complete": True, "meta": meta,
            }
            for name, text, gold in rows
        ]  # fmt: skip
        write_rows(self.folder / "prompts" / "part-00000.parquet", records, CONVERSATIONS)

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[Completion]:  # fmt: skip
        self.calls.append((list(keys), params))
        made = [
            self.completion(self._text(self.tokenizer.decode(ids), key))
            for ids, key in zip(prompts, keys, strict=True)
        ]
        on_tokens(sum(len(c.response_ids) for c in made))
        return made

    def _text(self, prompt: str, key: int) -> str:
        return (self.rates if JUDGE in prompt else self.says)(prompt, key)

    def run(
        self, name: str = "work", *, judge: str = "", sandbox: str = "bubblewrap", **settings: Any
    ) -> dict[str, float]:
        config = Synthesize.model_validate(
            {
                "stage": "synthesize", "seed": 1, "prompts": "p", "teacher": "t", "mode": "fast",
                "judge": judge, **settings,
            }
        )  # fmt: skip
        work = WorkDir.open(
            self.folder / name, reporter=Reporter(console=self.console), device="cpu",
            sandbox=sandbox,
        )  # fmt: skip
        inputs = {
            "prompts": outside(self.folder / "prompts", ""),
            "teacher": self.model("teacher"),
        }
        if judge:
            inputs["judge"] = self.model(judge)
        return synthesize.run(config, inputs, work)

    def model(self, name: str) -> Artifact:
        return outside(self.folder, FINGERPRINTS[name])

    def rows(self, name: str = "work") -> list[dict[str, Any]]:
        return list(read_rows(sorted((self.folder / name).glob("*.parquet"))))

    def kept(self, name: str = "work") -> dict[str, str]:
        return {row["id"]: row["messages"][-1]["content"] for row in self.rows(name)}

    def aside(self, why: str, name: str = "work") -> list[dict[str, Any]]:
        path = self.folder / name / "quarantine" / f"{why}.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def stage(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Stage(tmp_path, AutoTokenizer.from_pretrained(model_folder))
    made.stand_in(monkeypatch)
    yield made
    made.console.file.close()


def in_turn(*answers: str) -> Says:
    """The n-th sample of every prompt says the n-th of these."""
    return lambda prompt, key: answers[key % len(answers)]


def test_without_verifier_and_judge_every_answer_is_a_row_in_order(stage: Stage) -> None:
    stage.prompts(("1", "One?", "1"), ("2", "Two?", None))
    stage.says = in_turn("wrong", " both ")
    summary = stage.run(samples=2)
    assert stage.kept() == {"1/fast/0": "wrong", "1/fast/1": "both", "2/fast/0": "wrong",
                            "2/fast/1": "both"}  # fmt: skip
    assert stage.rows()[0] == {
        "id": "1/fast/0", "source": f"teacher:{'a' * 12}", "language": "en", "mode": "fast",
        "messages": [
            {"role": "user", "content": "One?", "thinking": None},
            {"role": "assistant", "content": "wrong", "thinking": None},
        ],
        "complete": True, "answer": "1", "task": None, "difficulty": None, "meta": "{}",
    }  # fmt: skip
    assert (summary["rows"], summary["asked"], summary["truncated_share"]) == (4, 4, 0)
    assert "failed" not in summary
    assert not (stage.folder / "work" / "quarantine").exists()


def test_a_wrong_answer_is_kept_aside_with_the_graders_reason(stage: Stage) -> None:
    stage.says = in_turn("It is 72.", "It is 71.")
    summary = stage.run(samples=2, verifier="numeric")
    assert stage.kept() == {"1/fast/0": "It is 72."}
    (line,) = stage.aside("failed")
    assert (line["place"], line["id"], line["reason"]) == ("1/fast/1", "1/fast/1", "71 is not 72")
    assert line["row"]["messages"][-1]["content"] == "It is 71."
    assert set(line["row"]) == set(stage.rows()[0])
    assert (summary["passed"], summary["failed"], summary["unjudged"]) == (1, 1, 0)


def test_programs_are_judged_by_their_row_s_tests_without_a_gold_answer(stage: Stage) -> None:
    stage.prompts(("1", "f?", None), ("2", "g?", None), meta='{"test_list": ["assert f(2) == 3"]}')
    stage.says = in_turn("def f(x): return x", "```python\ndef f(x): return x + 1\n```", "f = 3")
    summary = stage.run(samples=3, verifier="auto", sandbox="none")
    assert list(stage.kept()) == ["1/fast/1", "2/fast/1"]
    assert (summary["passed"], summary["failed"], summary["unjudged"]) == (2, 4, 0)
    assert stage.aside("failed")[0]["reason"] == (
        "failed: AssertionError in line 1: assert f(2) == 3"
    )


def test_without_bubblewrap_a_prompt_with_tests_stops_the_run_before_an_answer_is_paid_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stage.prompts(("1", "f?", None), meta='{"test_list": ["assert f(2) == 3"]}')
    with pytest.raises(EngineError, match=r'install bubblewrap .*runtime.sandbox = "none" runs'):
        stage.run(verifier="auto")
    assert stage.calls == []


def test_the_chain_is_no_part_of_the_graded_answer(stage: Stage) -> None:
    stage.says = in_turn("It must be 72.\n</think>\n\n12", "Is it 12?\n</think>\n\n72")
    stage.run(samples=2, mode="reasoning", verifier="auto")
    assert stage.kept() == {"1/reasoning/1": "72"}
    assert stage.rows()[0]["messages"][-1]["thinking"] == "Is it 12?"
    assert [line["id"] for line in stage.aside("failed")] == ["1/reasoning/0"]


def test_a_prompt_without_a_gold_answer_passes_unjudged_and_is_counted(stage: Stage) -> None:
    stage.prompts(("1", "One?", None), ("2", "Two?", " "), ("3", "Three?", "3"))
    stage.says = lambda prompt, key: "4"
    summary = stage.run(verifier="exact")
    assert set(stage.kept()) == {"1/fast/0", "2/fast/0"}
    assert (summary["passed"], summary["failed"], summary["unjudged"]) == (0, 1, 2)
    assert "2 of 3 answers have no gold answer" in stage.console.export_text()


def test_a_grader_that_raises_costs_the_answer_not_the_run(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(answer: str, gold: str, *, row: Any) -> Verdict:
        if answer == "b":
            raise ZeroDivisionError("by b")
        return Verdict(True, "fine")

    monkeypatch.setitem(graders.GRADERS, "exact", broken)  # type: ignore[arg-type]
    stage.says = in_turn("a", "b")
    assert stage.run(samples=2, verifier="exact")["failed"] == 1
    assert stage.kept() == {"1/fast/0": "a"}
    assert stage.aside("failed")[0]["reason"] == "grader raised ZeroDivisionError: by b"


def test_an_unknown_verifier_is_told_before_a_model_is_loaded(stage: Stage) -> None:
    with pytest.raises(RecipeError, match=r"no grader 'numerc'; did you mean 'numeric'\?"):
        stage.run(verifier="numerc")
    assert stage.loaded == []


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        (("It is surely 72.", "72", "It is 72."), 1),
        (("It is 72.", "So: 72", "So: 72"), 1),  # equally long: the earlier sample
        (("It is surely 72.", "72...", "So it is 72."), 2),  # a cut one is shorter, but not whole
        (("It is surely 72...", "72...", "71"), 1),  # only cut ones are right
        (("72 of them", "71", "70"), 0),
    ],
)
def test_the_shortest_answer_that_passed_is_kept(
    stage: Stage, answers: tuple[str, ...], kept: int
) -> None:
    stage.says = in_turn(*answers)
    stage.run(samples=3, verifier="numeric", keep="shortest")
    assert list(stage.kept()) == [f"1/fast/{kept}"]


def test_each_prompt_keeps_its_own_shortest_and_the_summary_tells_what_it_saves(
    stage: Stage,
) -> None:
    stage.prompts(*((str(n), f"{n}?", "72") for n in range(3)))
    stage.says = lambda prompt, key: ["72", "x 72"][(key + key // 2) % 2]
    summary = stage.run(samples=2, verifier="numeric", keep="shortest")
    assert stage.kept() == {"0/fast/0": "72", "1/fast/1": "72", "2/fast/0": "72"}
    short, long = (len(stage.tokenizer.encode(text)) for text in ("72", "x 72"))
    assert summary["mean_tokens"] == short
    assert summary["mean_tokens_passed"] == (short + long) / 2
    assert (summary["rows"], summary["asked"], summary["passed"]) == (3, 6, 6)


def test_the_chain_counts_towards_the_length(stage: Stage) -> None:
    stage.says = in_turn("I think long about it\n</think>\n\n72", "Hm\n</think>\n\nIt is 72")
    stage.run(samples=2, mode="reasoning", keep="shortest", verifier="numeric")
    assert list(stage.kept()) == ["1/reasoning/1"]


def test_a_chain_closed_for_the_teacher_counts_with_its_answer(stage: Stage) -> None:
    opened = "<think>\n"
    stage.says = lambda prompt, key: (
        ("so " * 9 if key % 2 else "so") + "..." if prompt.endswith(opened) else "72"
    )
    summary = stage.run(samples=2, mode="reasoning", keep="shortest")
    assert list(stage.kept()) == ["1/reasoning/0"]
    assert stage.rows()[0]["messages"][-1] == {
        "role": "assistant", "content": "72", "thinking": "so"
    }  # fmt: skip
    assert summary["mean_tokens"] == len(stage.tokenizer.encode("so\n</think>\n\n72"))


def test_unfinished_answers_are_kept_aside_before_they_are_graded(stage: Stage) -> None:
    stage.says = in_turn("72...", " ", "72")
    summary = stage.run(samples=3, verifier="numeric", keep_truncated=False, max_tokens=9)
    assert stage.kept() == {"1/fast/2": "72"}
    reasons = [line["reason"] for line in stage.aside("unfinished")]
    assert reasons == ["cut off at 9 tokens", "empty answer"]
    assert (summary["unfinished"], summary["passed"], summary["failed"]) == (2, 1, 0)


def test_what_the_judge_rates_low_is_kept_aside_with_rating_and_reply(stage: Stage) -> None:
    stage.says = in_turn("good", "bad")
    stage.rates = lambda prompt, key: "Hm.\nRating: " + ("2" if "ANSWER\nbad" in prompt else "3")
    summary = stage.run(samples=2, judge="judge", rubric="Be good.")
    assert stage.kept() == {"1/fast/0": "good"}
    (line,) = stage.aside("judged")
    assert (line["id"], line["rating"], line["reply"]) == ("1/fast/1", 2, "Hm.\nRating: 2")
    assert line["reason"] == "rated 2 of 5, under 3"
    assert line["row"]["messages"][-1]["content"] == "bad"
    assert (summary["judged_out"], summary["no_opinion"]) == (1, 0)
    assert stage.calls[-1][1].temperature == 0.0


def test_a_judge_that_talks_nonsense_has_no_opinion(stage: Stage) -> None:
    stage.rates = lambda prompt, key: "What a lovely 1 you have there..."
    summary = stage.run(samples=2, judge="judge", judge_least=5)
    assert len(stage.kept()) == 2
    assert (summary["judged_out"], summary["no_opinion"]) == (0, 2)
    assert not stage.aside("judged")


def test_the_judge_sees_only_what_the_verifier_took_and_never_the_chain(stage: Stage) -> None:
    seen: list[str] = []

    def rates(prompt: str, key: int) -> str:
        seen.append(prompt)
        return "Rating: 5"

    stage.says = in_turn("secret\n</think>\n\n72", "secret\n</think>\n\n71")
    stage.rates = rates
    stage.run(samples=2, mode="reasoning", verifier="numeric", judge="judge", rubric="Be kind.")
    (told,) = seen
    assert "Be kind." in told
    assert "What is 70 + 2?" in told
    assert "secret" not in told
    assert "72" in told


def test_the_shortest_is_taken_of_what_the_judge_let_through(stage: Stage) -> None:
    stage.says = in_turn("72", "It is 72.", "It is surely 72.")
    stage.rates = lambda prompt, key: "Rating: 1" if "ANSWER\n72" in prompt else "Rating: 4"
    stage.run(samples=3, verifier="numeric", judge="judge", keep="shortest")
    assert list(stage.kept()) == ["1/fast/1"]


def test_a_teacher_that_judges_itself_is_loaded_once_and_another_judge_beside_it(
    stage: Stage,
) -> None:
    stage.rates = lambda prompt, key: "Rating: 5"
    stage.run(judge="teacher")
    assert stage.loaded == [FINGERPRINTS["teacher"]]
    stage.run("other", judge="judge")
    assert stage.loaded[1:] == [FINGERPRINTS["teacher"], FINGERPRINTS["judge"]]


def test_every_answer_asked_for_is_counted_once(stage: Stage) -> None:
    stage.prompts(*((str(n), f"{n}?", "72" if n else None) for n in range(4)))
    stage.says = in_turn("72", "71", " ", "It is 72.", "72 it is, surely")
    stage.rates = lambda prompt, key: f"Rating: {2 if 'surely' in prompt else 5}"
    summary = stage.run(samples=5, verifier="numeric", judge="judge")
    assert summary["asked"] == 20
    fell = summary["unfinished"] + summary["failed"] + summary["judged_out"]
    assert fell + summary["rows"] == 20
    assert summary["passed"] + summary["unjudged"] == summary["rows"] + summary["judged_out"]
    aside = [len(stage.aside(why)) for why in ("unfinished", "failed", "judged")]
    assert aside == [4, 3, 4]


def test_a_shard_holds_whole_prompts(stage: Stage) -> None:
    stage.prompts(*((str(n), f"{n}?", "72") for n in range(5)))
    stage.run(samples=3, shard_rows=7)
    assert [keys for keys, _ in stage.calls] == [[*range(6)], [*range(6, 12)], [*range(12, 15)]]
    stage.calls.clear()
    stage.run("small", samples=3, shard_rows=2)  # fewer than one prompt's: a prompt a shard
    assert [len(keys) for keys, _ in stage.calls] == [3] * 5


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ledger.json"
    }


def test_a_killed_step_goes_on_with_the_next_shard_and_ends_with_the_same_bytes(
    stage: Stage,
) -> None:
    stage.prompts(*((str(n), f"{n}?", "72") for n in range(6)))
    settings: dict[str, Any] = {
        "samples": 2, "shard_rows": 4, "verifier": "numeric", "judge": "judge", "keep": "shortest",
    }  # fmt: skip
    whole: Says = lambda prompt, key: ["72", "It is 72.", "71"][key % 3]  # noqa: E731
    stage.rates = lambda prompt, key: f"Rating: {1 if 'It is' in prompt else 5}"
    stage.says = whole
    expected = stage.run("whole", **settings)

    def killed(prompt: str, key: int) -> str:
        if key >= 8:
            raise KeyboardInterrupt
        return whole(prompt, key)

    stage.says = killed
    with pytest.raises(KeyboardInterrupt):
        stage.run("killed", **settings)
    assert not (stage.folder / "killed" / "quarantine").exists()
    stage.says = whole
    stage.calls.clear()
    assert stage.run("killed", **settings) == expected
    assert [keys for keys, params in stage.calls if params.temperature] == [[*range(8, 12)]]
    assert files(stage.folder / "killed") == files(stage.folder / "whole")
    assert expected["failed"] == len(stage.aside("failed", "killed")) == 4


def test_shards_of_another_size_change_no_row_and_nothing_kept_aside(stage: Stage) -> None:
    stage.prompts(*((str(n), f"{n}?", "72") for n in range(7)))
    stage.says = in_turn("72", "71", "It is 72.", "so 72", "7")
    settings: dict[str, Any] = {"samples": 3, "verifier": "numeric", "keep": "shortest"}
    first = stage.run("small", shard_rows=3, **settings)
    assert stage.run("large", shard_rows=64, **settings) == first
    assert stage.rows("small") == stage.rows("large")
    assert stage.aside("failed", "small") == stage.aside("failed", "large")


def test_nothing_left_names_what_took_the_answers(stage: Stage) -> None:
    stage.says = in_turn("71", "")
    with pytest.raises(
        DataError, match=r"no answer is left of 2: 1 empty .*, 1 failed by the"
    ) as e:
        stage.run(samples=2, verifier="numeric")
    assert "\n" not in str(e.value)
    assert stage.aside("failed")[0]["reason"] == "71 is not 72"  # to be looked at


def test_a_real_model_gives_the_same_rows_whatever_the_shards(
    tmp_path: Path, model_folder: Path
) -> None:
    prompt = {"role": "user", "content": "How do plants drink?"}
    row = {"source": "s", "mode": "fast", "messages": [prompt], "complete": True}
    names = [{**row, "id": str(n)} for n in range(5)]
    write_rows(tmp_path / "prompts" / "part-00000.parquet", names, CONVERSATIONS)
    inputs = {"prompts": outside(tmp_path / "prompts", ""), "teacher": outside(model_folder, "a")}
    found = []
    for shard_rows in (5, 64):
        config = Synthesize(
            stage="synthesize", seed=1, prompts="p", teacher="t", mode="reasoning", samples=2,
            max_tokens=5, max_think_tokens=5, shard_rows=shard_rows, batch_rows=2,
        )  # fmt: skip
        path = tmp_path / f"work-{shard_rows}"
        work = WorkDir.open(path, reporter=Reporter(quiet=True), device="cpu")
        summary = synthesize.run(config, inputs, work)
        found.append(list(read_rows(sorted(path.glob("*.parquet")))))
        assert summary["asked"] == 10
    assert found[0] == found[1]
    ids = [row["id"] for row in found[0]]
    assert ids == sorted(ids)
