"""Stage `sft` over a tiny model: what order a curriculum is met in, at which rates, and again."""

import io
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import MIXTURE_THEN_FAST
from rich.console import Console
from tiny import write_model

from tutelage import pipeline
from tutelage.cli import display
from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import DataError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.estimate import estimate
from tutelage.recipe.load import load
from tutelage.recipe.training import Sft
from tutelage.records import CONVERSATIONS, write_rows
from tutelage.stages import sft
from tutelage.store import Store
from tutelage.train import checkpoint, loop
from tutelage.train.batches import PackedRow, pack
from tutelage.train.optim import rate

TWO_STAGES = f"""
lr = 1e-3
batch_tokens = 100
pack_tokens = 64
{MIXTURE_THEN_FAST}
replay = 0.25
"""
REASONING, FAST = 24, 16


def row(number: int, *, thinking: bool = False, words: int = 3, **more: Any) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"q{number}?", "thinking": None},
        {"role": "assistant", "content": "so " * words, "thinking": "hm, hm" if thinking else None},
    ]
    mode = "reasoning" if thinking else "fast"
    return {"id": f"row-{number}", "source": "hand", "mode": mode, "messages": turns,
            "complete": True, **more}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return Artifact(
        write_model(tmp_path_factory.mktemp("model")), {"stage": "external", "identity": {}}
    )


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    known = [0.1 * (number % 10) for number in range(REASONING + FAST)]
    return [
        row(number, thinking=number < REASONING, difficulty=hard)
        for number, hard in enumerate(known)
    ]


def settings(text: str = TWO_STAGES, **more: Any) -> Sft:
    fixed = {"stage": "sft", "model": "m", "data": ["d"], "seed": 5}
    return Sft.model_validate(fixed | tomllib.loads(text) | more)


def run(
    where: Path, model: Artifact, config: Sft, *sources: Sequence[dict[str, Any]], say: Any = None
) -> dict[str, float]:
    inputs = {"model": model}
    for number, source in enumerate(sources):
        data = where / f"data-{number}"
        write_rows(data / "conversations.parquet", source, CONVERSATIONS)
        inputs[f"data.{number}"] = Artifact(data, {})
    reporter = Reporter(Console(file=say)) if say else Reporter(quiet=True)
    work = WorkDir.open(where / "work", reporter=reporter, device="cpu")
    return sft.run(config, inputs, work)


def metrics(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "work/metrics.jsonl").read_text().splitlines()]


def kept(where: Path) -> dict[str, Any]:
    return json.loads((where / "work/curriculum.json").read_text())


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the data that are packed for training, in order."""
    seen: list[int] = []

    def recorded(examples: Sequence[Any], indices: Sequence[int]) -> PackedRow:
        seen.extend(indices)
        return pack(examples, indices)

    monkeypatch.setattr(loop, "pack", recorded)
    return seen


def test_two_stages_are_met_in_their_order_of_modes_and_at_their_rates(
    model: Artifact, rows: list[dict[str, Any]], met: list[int], tmp_path: Path
) -> None:
    config = settings()
    summary = run(tmp_path, model, config, rows)
    modes = [rows[index]["mode"] for index in met]
    assert len(modes) == len(rows)  # one epoch
    first, second = modes[:32], modes[32:]
    assert [first[i : i + 4].count("reasoning") for i in range(0, 32, 4)] == [3] * 8
    # a quarter of 8 replays the first stage, three of four of them reasoning: 1.5 of 8
    assert second.count("reasoning") in (1, 2)
    lines = metrics(tmp_path)
    numbers = [line["stage"] for line in lines]
    assert numbers == sorted(numbers)
    for line in lines:
        schedule = rate(line["step"] - 1, steps=len(lines), config=config)
        assert line["lr"] == schedule * {1: 1.0, 2: 0.5}[line["stage"]]
    assert summary["example_share.reasoning"] == modes.count("reasoning") / 40
    assert summary["example_share.fast"] == modes.count("fast") / 40


def test_no_step_holds_examples_of_two_stages(
    model: Artifact, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans: list[loop.Plan] = []

    def planned(_: Any, plan: loop.Plan, *args: Any, **named: Any) -> dict[str, float]:
        plans.append(plan)
        return {"loss": 0.0}

    monkeypatch.setattr(sft, "train", planned)
    run(tmp_path, model, settings(epochs=2), rows)
    (plan,) = plans
    for number, examples in ((1, 64), (2, 16)):
        steps = [s for s, stage in zip(plan.steps, plan.stages, strict=True)
                 if stage.number == number]  # fmt: skip
        assert sum(len(packed) for step in steps for packed in step) == examples
        # only the stage's last step may have less than batch_tokens
        sizes = [sum(len(plan.load(i).ids_L) for packed in s for i in packed) for s in steps]
        assert all(size >= 100 for size in sizes[:-1])


class Killed(BaseException):
    """Stands for a kill: nothing in the stage catches it."""


def killed_after(saves: int) -> Callable[..., None]:
    save = checkpoint.save
    count = 0

    def counted(*args: Any, **named: Any) -> None:
        nonlocal count
        save(*args, **named)
        count += 1
        if count == saves:
            raise Killed

    return counted


def test_a_curriculum_killed_in_each_stage_goes_on_to_the_same_bits(
    model: Artifact, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "fsync", lambda path: None)  # 60 of them; no test of disks
    config = settings(checkpoint_minutes=0)
    whole, again = tmp_path / "whole", tmp_path / "again"
    expected = run(whole, model, config, rows)
    next_stages = []
    for saves in (3, 10):  # the second attempt goes on from the first one's third step
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", killed_after(saves))
            torch.manual_seed(saves)  # a new process has another state of the generator
            with pytest.raises(Killed):
                run(again, model, config, rows)
        next_stages.append(metrics(whole)[len(metrics(again))]["stage"])
    assert next_stages == [1, 2]
    assert run(again, model, config, rows) == expected
    for name in ("metrics.jsonl", "curriculum.json", "model/model.safetensors"):
        assert (again / "work" / name).read_bytes() == (whole / "work" / name).read_bytes(), name


def test_the_record_counts_the_steps_that_were_run(
    model: Artifact, rows: list[dict[str, Any]], met: list[int], tmp_path: Path
) -> None:
    said = io.StringIO()
    summary = run(tmp_path, model, settings(max_steps=3), rows, say=said)
    assert "max_steps = 3 ends in stage 1 of 2" in said.getvalue()
    record = kept(tmp_path)
    assert summary["steps"] == len(metrics(tmp_path)) == 3
    assert sum(part["examples"] for part in record["parts"]) == len(met) < len(rows)
    assert sum(part["tokens"] for part in record["parts"]) == metrics(tmp_path)[-1]["tokens"]
    assert {part["stage"] for part in record["parts"]} == {1}
    assert record["series"]["examples"][-1] == len(met)
    assert record["series"]["step"][-1] == 3
    known = [rows[index]["difficulty"] for index in met]
    assert np.average(record["series"]["difficulty"]) == pytest.approx(np.mean(known), abs=1e-6)


def test_easy_rows_are_met_first(
    model: Artifact, rows: list[dict[str, Any]], met: list[int], tmp_path: Path
) -> None:
    mix = {"reasoning": 1, "fast": 1}
    one = {"mix": mix, "share": 1, "order": "easy-first", "pacing": "step", "start": 0.3}
    run(tmp_path, model, settings("pack_tokens = 64", curriculum=[one]), rows)
    course = kept(tmp_path)["series"]["difficulty"]
    assert len(course) == 40
    assert np.mean(course[:20]) < 0.2
    assert np.mean(course[20:]) > 0.5
    assert [rows[index]["difficulty"] for index in met] == pytest.approx(course, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": slice(REASONING, None)}, "curriculum.0.mix: no row of data has the mode "
         "'reasoning', only fast; add a step with such rows, or leave the mode out"),
        ({"order": "easy-first"}, "curriculum.0.order: easy-first, but no fast row of data has a "
         "difficulty; put a difficulty step before, or set order = random"),
    ],
)  # fmt: skip
def test_a_curriculum_that_cannot_be_is_told_before_the_first_step(
    model: Artifact, rows: list[dict[str, Any]], change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    unscored = [entry | {"difficulty": None} for entry in rows[change.pop("rows", slice(None))]]
    first = {"mix": {"reasoning": 1, "fast": 1}, "share": 1, **change}
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, model, settings("", curriculum=[first]), unscored)
    assert str(caught.value) == said
    assert not (tmp_path / "work/metrics.jsonl").exists()


def test_without_a_curriculum_nothing_is_said_of_stages(
    model: Artifact, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    long = row(99, thinking=True)
    long["messages"][0]["content"] = "why " * 200
    said = io.StringIO()
    config = settings("pack_tokens = 64\nmixture = [0.5, 0.5]", data=["a", "b"])
    summary = run(tmp_path, model, config, rows[:REASONING], [*rows[REASONING:], long], say=said)
    assert summary["rows"] == 40
    assert summary["left_out"] == 1
    assert "1 rows had no target" in said.getvalue()
    assert not (tmp_path / "work/curriculum.json").exists()
    assert "stage" not in metrics(tmp_path)[0]
    assert not any(name.startswith("example_share") for name in summary)


def test_a_source_without_a_target_is_named_as_such(model: Artifact, tmp_path: Path) -> None:
    long = row(0)
    long["messages"][0]["content"] = "why " * 200
    with pytest.raises(DataError, match="no row with a target within pack_tokens"):
        run(tmp_path, model, settings("pack_tokens = 16"), [long])


PLANNED = """
name = "planned"
[models.m]
source = "{model}"
[steps.rows]
stage = "data"
sources = [{{ source = "./rows.jsonl" }}]
[steps.chains]
stage = "synthesize"
teacher = "m"
prompts = "rows"
mode = "reasoning"
max_think_tokens = 60
max_tokens = 40
keep = "shortest"
samples = 4
[steps.tuned]
stage = "sft"
model = "m"
data = ["rows", "chains"]
epochs = 2
[[steps.tuned.curriculum]]
mix = {{ reasoning = 3, fast = 1 }}
share = 0.8
[[steps.tuned.curriculum]]
mix = {{ fast = 1 }}
share = 0.2
"""


def planned(folder: Path, model: Artifact, change: tuple[str, str] = ("", "")) -> list[str]:
    """The lines of the plan that tell of the curriculum."""
    recipe = folder / "planned.toml"
    recipe.write_text(PLANNED.format(model=model.path).replace(*change))
    steps = pipeline.plan(load(recipe), Store(folder / "store"))
    out = io.StringIO()
    estimates = estimate(steps, Store(folder / "store"))
    display.plan_table(Console(file=out, width=200), steps, estimates)
    json.dumps(display.plan_rows(steps, estimates, {}))
    return [line.strip() for line in out.getvalue().splitlines() if "tuned: stage" in line]


def test_a_plan_tells_the_mix_by_limits_before_and_by_text_after_its_data_is_made(
    model: Artifact, tmp_path: Path
) -> None:
    rows = [{"prompt": "p" * 40 + str(number), "response": "r" * 358} for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    # 40 examples, 24 of them reasoning: 64 tokens of prompt, 0.7 of 100 answered; the length of
    # what nobody has read yet counts as a prompt's
    assert planned(tmp_path, model) == [
        "tuned: stage 1 of 2, 80 % of examples: reasoning 75 % (~3k tokens), "
        "fast 25 % (~512 tokens)",
        "tuned: stage 2 of 2, 20 % of examples: fast 100 % (~512 tokens)",
    ]
    variants = load(tmp_path / "planned.toml")
    pipeline.run(variants, Store(tmp_path / "store"), until="rows", reporter=Reporter(quiet=True))
    # 399 bytes a row are 100 tokens
    assert planned(tmp_path, model)[1] == (
        "tuned: stage 2 of 2, 20 % of examples: fast 100 % (~798 tokens)"
    )


def test_a_plan_names_the_setting_of_a_curriculum_that_cannot_be(
    model: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    with pytest.raises(RecipeError, match="first stage has none before it to ramp from"):
        planned(tmp_path, model, ("share = 0.8", "share = 0.8\nramp = 0.5"))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"mix": {"fast": 0}, "share": 1}, "mix gives no mode a weight"),
        ({"mix": {"fast": 1}, "share": 1, "replay": 0.1}, "none before it to replay from"),
        ({"mix": {"fast": 1}, "share": 0.9}, "do not sum to 1"),
    ],
)
def test_a_curriculum_that_no_data_could_follow_is_no_recipe(
    stage: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        settings("", curriculum=[stage])


def test_a_plan_counts_steps_of_so_many_examples_by_the_tokens_of_an_example(
    model: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "How?", "response": "So."}\n' * 6)

    def trained(settings: str) -> tuple[int, int]:
        recipe = tmp_path / "planned.toml"
        text = PLANNED.format(model=model.path)
        recipe.write_text(text[: text.index("[[steps.tuned.curriculum]]")] + settings)
        store = Store(tmp_path / "store")
        found = estimate(pipeline.plan(load(recipe), store), store)["tuned"]
        return found.trained, found.rows

    tokens, rows = trained("")  # of two epochs
    expected = 5 * tokens / (2 * rows)
    assert trained("max_steps = 1\nbatch_examples = 5\n")[0] == pytest.approx(expected, abs=1)
    assert trained("max_steps = 1\nbatch_tokens = 100\n")[0] == 100


def held_out_run(
    where: Path, model: Artifact, rows: list[dict[str, Any]], held: list[dict[str, Any]], *,
    say: Any = None, **settings: Any,
) -> dict[str, float]:  # fmt: skip
    config = Sft.model_validate(
        {"stage": "sft", "model": "m", "data": ["d"], "held_out": "h", "seed": 5, "lr": 1e-2,
         "batch_tokens": 100, "pack_tokens": 64, "checkpoint_minutes": 0} | settings
    )  # fmt: skip
    for name, some in (("data", rows), ("held", held)):
        write_rows(where / name / "conversations.parquet", some, CONVERSATIONS)
    inputs = {
        "model": model, "data.0": Artifact(where / "data", {}),
        "held_out": Artifact(where / "held", {}),
    }  # fmt: skip
    reporter = Reporter(Console(file=say)) if say else Reporter(quiet=True)
    return sft.run(config, inputs, WorkDir.open(where / "work", reporter=reporter, device="cpu"))


def test_held_out_rows_are_looked_at_and_never_learnt(
    model: Artifact, rows: list[dict[str, Any]], met: list[int], tmp_path: Path
) -> None:
    held = [row(number) for number in (100, 101)]
    summary = held_out_run(tmp_path, model, rows, held, evaluations=3)
    assert set(met) == set(range(len(rows) + 2))  # learnt or looked at
    assert summary["examples"] == summary["rows"] == len(rows)
    looked = [line["held_out_loss"] for line in metrics(tmp_path) if "held_out_loss" in line]
    assert len(looked) == 3
    assert looked[-1] < looked[0]
    assert summary["held_out_loss"] == pytest.approx(looked[-1], abs=1e-6)
    assert sum(index >= len(rows) for index in met) == 2 * len(looked)


def test_held_out_rows_that_are_learnt_too_are_told(
    model: Artifact, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    said = io.StringIO()
    held_out_run(tmp_path, model, rows, [rows[0], row(100)], say=said, max_steps=1)
    assert "1 of 2 held-out rows are learnt from too" in said.getvalue()


def test_held_out_rows_without_a_target_are_refused(
    model: Artifact, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="held_out has no row with a target within pack_tokens"):
        long = row(100)
        long["messages"][0]["content"] = "why? " * 60
        held_out_run(tmp_path, model, rows, [long])


def test_an_early_stop_counts_the_steps_that_were_made(
    model: Artifact, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    held = [row(number, words=9, thinking=True) for number in (100, 101)]
    summary = held_out_run(
        tmp_path, model, rows[-3:], held, epochs=40, evaluations=40, patience=2, keep="best",
        lr=0.1,
    )  # fmt: skip
    lines = metrics(tmp_path)
    assert summary["steps"] == len(lines) < 40
    least = min(lines, key=lambda line: line["held_out_loss"])
    assert summary["best_step"] == least["step"] == len(lines) - 2


def test_a_curriculum_is_not_ended_early() -> None:
    with pytest.raises(ValueError, match="patience would end a curriculum"):
        settings(held_out="h", patience=2)
