"""`tutelage targets show`: the store in short, an answer token by token, and damage by its name."""

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_command
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import write_model

from tutelage import pipeline
from tutelage.cli import stores
from tutelage.core.artifact import Artifact
from tutelage.core.errors import ArtifactError
from tutelage.core.progress import Reporter
from tutelage.models.load import load_tokenizer
from tutelage.recipe.load import load
from tutelage.store import Store
from tutelage.targets import writer as writer_module
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import TargetRow, TokenTargets

RECIPE = """
name = "looked-at"
seed = 3
[models.m]
source = "{model}"
[steps.prompts]
stage = "data"
sources = [{{ source = "bundled:prompts", limit = 12 }}]
limit = 7
[steps.rollouts]
stage = "rollout"
model = "m"
prompts = "prompts"
mode = "fast"
max_tokens = 8
[steps.targets]
stage = "score"
teacher = "m"
rollouts = "rollouts"
shard_rows = 4
[steps.distilled]
stage = "distill"
model = "m"
targets = "targets"
max_steps = 1
"""


def peaked_model(folder: Path) -> Path:
    """A random model whose logits were scaled up, so that heads hold none, one or several ids."""
    path = write_model(folder, layers=1) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] *= 12
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `store`, whose targets lie in row groups of one or two rows."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "r.toml").write_text(RECIPE.format(model=peaked_model(folder / "m")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "ROW_GROUP_TOKENS", 60)
        pipeline.run(
            load(folder / "r.toml"), Store(folder / "store"), reporter=Reporter(quiet=True)
        )
    return folder


def shards(store: Path) -> list[Path]:
    return sorted(store.glob("artifacts/score/*/part-*.parquet"))


Show = Callable[..., str]


@pytest.fixture
def show(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Show:
    """What `tutelage targets show` prints; where it fails, the one line on stderr."""

    def run(*words: object, store: Path | None = None, code: int = 0) -> str:
        arguments = ["targets", "show", *words, "--store", store or project / "store"]
        monkeypatch.setenv("COLUMNS", "200")
        return run_command(monkeypatch, capsys, *arguments, code=code)

    return run


@pytest.fixture
def damaged(project: Path, tmp_path: Path) -> Path:
    """A copy of the store with one bit flipped in the second row group of the first shard."""
    store = Path(shutil.copytree(project / "store", tmp_path / "store"))
    path = shards(store)[0]
    group = TargetReader([path])._groups[1].info
    data = bytearray(path.read_bytes())
    data[group.offset + group.bytes // 2] ^= 1
    path.write_bytes(data)
    return store


def test_the_summary_says_what_the_store_is(show: Show, project: Path) -> None:
    said = show("targets")
    reader = TargetReader(shards(project / "store"))
    for line in (
        "estimator = threshold", "tau = 0.02", "vocab_size = 320", f"rows = {len(reader)}",
        f"response_tokens = {reader.num_tokens}", "temperature = 1.0",
    ):  # fmt: skip
        assert f"  {line}\n" in said
    for row in reader:
        assert re.search(
            rf"^ *\d+ +{re.escape(row.id)} +fast +{len(row.response_ids)} ", said, re.M
        )
    assert "left out" not in said


def test_the_summary_as_json_holds_the_same(show: Show, project: Path) -> None:
    shown = json.loads(show("targets", "--json"))
    reader = TargetReader(shards(project / "store"))
    assert shown["rows"] == len(reader) == 7
    assert shown["response_tokens"] == reader.num_tokens
    assert shown["damaged"] == []
    assert shown["tokenizer"] == reader.meta.tokenizer
    first = reader.row(0)
    gain = float((first.targets.label_logp_N - first.student_logp_N).mean())
    assert shown["first_rows"][0]["logq_minus_logp"] == pytest.approx(gain)
    assert [row["row"] for row in shown["first_rows"]] == list(range(7))


def test_only_the_first_rows_are_listed(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LISTED_ROWS", 3)
    assert len(json.loads(show("targets", "--json"))["first_rows"]) == 3


def test_a_row_as_json_says_of_each_token_what_is_stored(show: Show, project: Path) -> None:
    reader = TargetReader(shards(project / "store"))
    tokenizer = load_tokenizer(project / "m")
    assert max(max(row.targets.head_counts_N) for row in reader) > 1
    for index in (0, 6):
        row = reader.row(index)
        shown = json.loads(show("targets", "--row", index, "--json"))
        assert shown["id"] == row.id
        assert [token["token"] for token in shown["tokens"]] == row.response_ids.tolist()
        targets = row.targets
        heads = np.split(targets.head_logq_M, targets.head_counts_N.cumsum()[:-1])
        best = np.split(targets.head_ids_M, targets.head_counts_N.cumsum()[:-1])
        for n, token in enumerate(shown["tokens"]):
            assert token["text"] == tokenizer.decode([row.response_ids[n]])
            assert token["teacher"] == pytest.approx(math.exp(targets.label_logp_N[n]))
            assert token["student"] == pytest.approx(math.exp(row.student_logp_N[n]))
            assert token["entropy"] == pytest.approx(float(targets.entropy_N[n]))
            assert token["head_ids"] == targets.head_counts_N[n]
            assert token["tail_ids"] == targets.tail_counts_N[n]
            assert token["head_mass"] == pytest.approx(float(np.exp(heads[n]).sum()), abs=1e-6)
            wanted = tokenizer.decode([best[n][0]]) if len(best[n]) else None
            assert token["teacher_best"] == wanted


def test_a_row_is_shown_with_its_prompt_its_answer_and_a_line_a_token(
    show: Show, project: Path
) -> None:
    row = TargetReader(shards(project / "store")).row(2)
    tokenizer = load_tokenizer(project / "m")
    said = show("targets", "--row", 2)
    assert said.startswith(f"{row.id} (fast, {row.finish_reason})\n")
    assert str(tokenizer.decode(row.prompt_ids.tolist())).splitlines()[0] in said
    assert "the teacher's probability of the token:" in said
    table = said.split("its best\n")[1].splitlines()
    assert len(table) == len(row.response_ids)
    for n, line in enumerate(table):
        assert f"{math.exp(row.targets.label_logp_N[n]):.4f}" in line
        assert repr(tokenizer.decode([row.response_ids[n]])) in line


def test_without_the_tokenizer_ids_are_shown(show: Show, project: Path, tmp_path: Path) -> None:
    """Only the distilled model carries it, and it was removed."""
    store = Path(shutil.copytree(project / "store", tmp_path / "store"))
    shutil.rmtree(store / "artifacts" / "distill")
    row = TargetReader(shards(store)).row(0)
    shown = json.loads(show("targets", "--row", 0, "--json", store=store))
    assert [token["text"] for token in shown["tokens"]] == [f"<{i}>" for i in row.response_ids]


@pytest.mark.parametrize("row", [7, 100])
def test_a_row_that_is_not_there_is_one_line(show: Show, row: int) -> None:
    assert "the store has 7 rows, 0 to 6" in show("targets", "--row", row, code=2)


def test_a_step_that_stored_no_targets_is_one_line(show: Show) -> None:
    said = show("rollouts", code=2)
    assert "the step is of stage rollout: it stored no targets" in said
    assert "did you mean 'targets'?" in show("target", code=2)


def test_a_flipped_bit_is_named_by_file_and_row_group(show: Show, damaged: Path) -> None:
    said = show("targets", code=2, store=damaged)
    assert re.search(r"part-00000\.parquet: row group 1 \(\d rows\) is damaged", said)
    assert "skip_damaged" in said


def test_skip_damaged_reads_the_rest_and_says_what_is_left_out(
    show: Show, damaged: Path, project: Path
) -> None:
    lost = TargetReader(shards(project / "store"))._groups[1].info
    whole = json.loads(show("targets", "--json"))
    shown = json.loads(show("targets", "--json", "--skip-damaged", store=damaged))
    assert shown["rows"] == 7 - lost.rows
    assert shown["response_tokens"] == whole["response_tokens"] - lost.tokens
    (reason,) = shown["damaged"]
    assert "part-00000.parquet: row group 1" in reason
    kept = {row["id"] for row in shown["first_rows"]}
    assert len({row["id"] for row in whole["first_rows"]} - kept) == lost.rows
    said = show("targets", "--skip-damaged", store=damaged)
    assert re.search(r"^  left out: .*part-00000\.parquet: row group 1", said, re.M)
    show("targets", "--skip-damaged", "--row", shown["rows"] - 1, store=damaged)


def test_a_shard_that_was_cut_short_is_named(show: Show, project: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(project / "store", tmp_path / "store"))
    path = shards(store)[1]
    path.write_bytes(path.read_bytes()[:-20])
    assert "part-00001.parquet has" in show("targets", code=2, store=store)


# How a row looks


def printed(row: TargetRow, decode: stores.Decode, prompt: str = "prompt") -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=120)
    stores.print_row(console, row, stores.tokens(row, decode), prompt)
    return stream.getvalue()


def answer(*probabilities: float) -> TargetRow:
    count = len(probabilities)
    blank = TokenTargets.blank(count, 0.02)
    logp_N = np.log(np.array(probabilities, np.float32))
    return TargetRow(
        id="a", prompt_id="p", source="s", mode="fast", finish_reason="stop", verdict=None,
        prompt_ids=np.zeros(1, np.int32), response_ids=np.arange(count, dtype=np.int32),
        student_logp_N=logp_N,
        targets=TokenTargets(**{**vars(blank), "label_logp_N": logp_N}),
    )  # fmt: skip


def backgrounds(said: str) -> Iterator[str]:
    """(token's text, its background) of the answer's line, as ANSI codes."""
    names = {"41": "red", "48;5;208": "dark_orange", "43": "yellow", "42": "green"}
    for code, text in re.findall(r"\x1b\[30;([\d;]+)m(t\d)", said):
        yield f"{text} {names[code]}"


def test_colours_follow_the_teachers_probability() -> None:
    said = printed(answer(0.0099, 0.011, 0.099, 0.11, 0.49, 0.51), lambda token: f"t{token}")
    shades = ["red", "dark_orange", "dark_orange", "yellow", "yellow", "green"]
    assert list(backgrounds(said)) == [f"t{n} {shade}" for n, shade in enumerate(shades)]


def test_what_a_token_or_a_prompt_says_is_never_markup() -> None:
    said = printed(answer(0.5), lambda token: "[/bold]", "[red]prompt[/nothing]")
    assert "[red]prompt[/nothing]" in said
    assert said.count("[/bold]") == 2  # in the answer and in its line


def test_an_empty_answer_is_shown() -> None:
    assert "fast, stop" in printed(answer(), str)


def test_a_step_without_shards_is_refused(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {"stage": "score"}
    with pytest.raises(ArtifactError, match="stored no targets"):
        stores.open_reader(Artifact(tmp_path, manifest), skip_damaged=False)
