"""Stage `magpie`: prompts sampled from a user's opening, and what is left out of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, outside
from transformers import AutoTokenizer

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import DataError, ModelError
from tutelage.core.progress import Reporter
from tutelage.engines.base import Completion, SamplingParams
from tutelage.recipe.curation import Magpie
from tutelage.records import read_rows
from tutelage.stages import magpie


class Stage(Scripted):
    """The stage over a scripted model: `says` writes the n-th prompt; "..." at its end cuts it."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.folder = folder
        self.says: Callable[[int], str] = lambda key: f"Question {key}?"
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int],
        on_tokens: Callable[[int], None],
    ) -> list[Completion]:  # fmt: skip
        self.prompts += [self.tokenizer.decode(ids) for ids in prompts]
        self.params.append(params)
        return [self.completion(self.says(key)) for key in keys]

    def run(self, name: str = "work", **settings: Any) -> dict[str, int]:
        return magpie.run(
            config(**settings), {"teacher": outside(self.folder, "c" * 64)}, self.work(name)
        )

    def work(self, name: str) -> WorkDir:
        return WorkDir.open(self.folder / name, reporter=Reporter(quiet=True), device="cpu")

    def rows(self, name: str = "work") -> list[dict[str, Any]]:
        return list(read_rows(sorted((self.folder / name).glob("*.parquet"))))


def config(**settings: Any) -> Magpie:
    return Magpie.model_validate(
        {"stage": "magpie", "teacher": "t", "seed": 4, "count": 3, **settings}
    )


@pytest.fixture
def stage(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage(tmp_path, AutoTokenizer.from_pretrained(model_folder))
    made.stand_in(monkeypatch)
    return made


def test_the_teacher_is_given_a_users_opening_and_its_text_becomes_a_prompt(stage: Stage) -> None:
    stage.says = lambda key: f" What is {key}?\n"
    summary = stage.run(language="en", temperature=0.5)
    assert set(stage.prompts) == {"<|im_start|>user\n"}
    assert stage.rows()[1] == {
        "id": "magpie/4/1", "source": f"teacher:{'c' * 12}", "language": "en", "mode": "fast",
        "messages": [{"role": "user", "content": "What is 1?", "thinking": None}],
        "complete": True, "answer": None, "task": None, "difficulty": None, "meta": None,
    }  # fmt: skip
    assert summary == {"rows": 3, "asked": 3, "empty": 0, "cut_off": 0, "duplicates": 0}
    assert (stage.params[0].temperature, stage.params[0].max_tokens) == (0.5, 128)
    assert stage.tokenizer.eos_token_id in stage.params[0].stop_ids


def test_a_system_message_stands_before_the_turn_and_in_the_rows(stage: Stage) -> None:
    stage.run(system="You are a tutor.")
    opening = "<|im_start|>system\nYou are a tutor.<|im_end|>\n<|im_start|>user\n"
    assert set(stage.prompts) == {opening}
    roles = [[m["role"] for m in row["messages"]] for row in stage.rows()]
    assert roles == [["system", "user"]] * 3
    assert stage.rows()[0]["messages"][0]["content"] == "You are a tutor."
    assert stage.rows()[0]["language"] is None


def test_empty_cut_off_and_repeated_prompts_are_left_out_and_counted(stage: Stage) -> None:
    said = ["One?", " \n", "Cut...", " One? ", "Two?", "Cut...", "One"]
    stage.says = lambda key: said[key]
    summary = stage.run(count=7)
    assert [row["messages"][-1]["content"] for row in stage.rows()] == ["One?", "Two?", "One"]
    assert [row["id"] for row in stage.rows()] == ["magpie/4/0", "magpie/4/4", "magpie/4/6"]
    assert summary == {"rows": 3, "asked": 7, "empty": 1, "cut_off": 2, "duplicates": 1}


def test_a_killed_step_goes_on_with_the_next_shard_and_ends_with_the_same_bytes(
    stage: Stage,
) -> None:
    whole: Callable[[int], str] = lambda key: ["Same?", f"Q{key}?", ""][key % 3]  # noqa: E731
    stage.says = whole
    expected = stage.run("whole", count=9, shard_rows=4)

    def killed(key: int) -> str:
        if key == 6:
            raise KeyboardInterrupt
        return whole(key)

    stage.says = killed
    with pytest.raises(KeyboardInterrupt):
        stage.run("killed", count=9, shard_rows=4)
    stage.says, stage.prompts = whole, []
    assert stage.run("killed", count=9, shard_rows=4) == expected
    assert len(stage.prompts) == 5
    parts = [
        {path.name: path.read_bytes() for path in (stage.folder / name).glob("*.parquet")}
        for name in ("whole", "killed")
    ]
    assert parts[0] == parts[1]
    assert len(parts[0]) == 3


def test_no_prompt_at_all_is_one_line_with_the_reasons(stage: Stage) -> None:
    stage.says = lambda key: ["", "x..."][key % 2]
    with pytest.raises(DataError, match=r"no prompt in 3 tries: 1 cut off at 128 tokens, 2 empty"):
        stage.run()


def test_a_template_without_an_opening_is_a_model_error(stage: Stage) -> None:
    stage.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ModelError, match="does not write anything before a user's text") as e:
        stage.run()
    assert "\n" not in str(e.value)
    assert not stage.prompts


def test_a_real_model_writes_the_same_prompts_whatever_the_shards(
    tmp_path: Path, model_folder: Path
) -> None:
    found = []
    for shard_rows in (13, 64):
        path = tmp_path / f"work-{shard_rows}"
        work = WorkDir.open(path, reporter=Reporter(quiet=True), device="cpu")
        settings = config(count=24, shard_rows=shard_rows, max_tokens=48)
        summary = magpie.run(settings, {"teacher": outside(model_folder, "c" * 64)}, work)
        found.append(list(read_rows(sorted(path.glob("*.parquet")))))
        assert summary["rows"] == len(found[-1]) > 0
        assert work.tokens()["teacher_decoded"] > 0
    assert found[0] == found[1]
