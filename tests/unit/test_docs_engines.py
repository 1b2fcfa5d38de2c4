"""What docs/engines.md shows: its tables are read, and its example of an engine works."""

import importlib.util
import math
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.progress import Reporter
from tutelage.engines.base import SamplingParams, Scorable
from tutelage.recipe import engines as tables
from tutelage.recipe.tables import Score
from tutelage.records import ROLLOUTS, write_rows
from tutelage.stages import score
from tutelage.targets.estimator import Fixed
from tutelage.targets.reader import TargetReader

PAGE = (Path(__file__).parents[2] / "docs/engines.md").read_text()
VOCAB = 320


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("toml"))
def test_a_shown_table_is_an_engine(block: str) -> None:
    for values in tomllib.loads(block)["engines"].values():
        table = tables.ENGINE_TYPES[values["kind"]].model_validate(values)
        assert "url" not in table.meaning()


@pytest.fixture
def uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as the file of the package that it says it would be."""
    example, table = blocks("python")
    (tmp_path / "uniform.py").write_text(example)
    (tmp_path / "uniform_table.py").write_text(
        "from typing import Any, Literal\nfrom tutelage.recipe.engines import TopEngine\n" + table
    )
    found = _imported("tutelage.engines.uniform", tmp_path / "uniform.py")
    made: Any = _imported("uniform_table", tmp_path / "uniform_table.py")
    monkeypatch.setitem(__import__("sys").modules, "tutelage.engines.uniform", found)
    monkeypatch.setattr(found, "table", made.UniformTable(kind="uniform", top=4), raising=False)
    return found


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_answers_and_reads(uniform: Any, model_folder: Path) -> None:
    artifact = Artifact(model_folder, {"stage": "external", "fingerprint": "t", "identity": {}})
    engine = uniform.open_engine(artifact, uniform.table, device="cpu")
    params = SamplingParams(5, 1.0, 3, (318,))
    heard: list[int] = []
    one, two = engine.sampler(batch_rows=1).sample(
        [[1], [2]], params, keys=[0, 1], on_tokens=heard.append
    )
    assert one.response_ids != two.response_ids
    assert engine.sample([[2]], params, keys=[1], on_tokens=heard.append) == [two]
    read = [Scorable([1], [2, 3]), Scorable([1], [4])]
    found = engine.scorer(chunk_bytes=1).score(
        read, estimator=Fixed(4, 0), seed=0, keys=[0, 1], on_tokens=heard.append
    )
    assert [len(targets) for targets in found] == [2, 1]
    labels = np.concatenate(engine.label_logps(read, on_tokens=heard.append))
    np.testing.assert_allclose(labels, -math.log(VOCAB), rtol=1e-6)


def test_a_stage_runs_on_the_example(uniform: Any, model_folder: Path, tmp_path: Path) -> None:
    row = {"id": "a", "prompt_id": "p", "source": "lab", "mode": "fast", "prompt_ids": [1],
           "response_ids": [2, 3], "student_logp": [-1.0, -1.0], "finish_reason": "stop",
           "text": ""}  # fmt: skip
    (tmp_path / "rollouts").mkdir()
    write_rows(tmp_path / "rollouts" / "part-00000.parquet", [row], ROLLOUTS)
    made = {"inputs": {"model": {"fingerprint": "student"}}, "fingerprint": "r"}
    external = {"stage": "external", "fingerprint": "t", "identity": {}}
    inputs = {
        "rollouts": Artifact(tmp_path / "rollouts", made),
        "teacher": Artifact(model_folder, external),
    }
    config = Score.model_validate({"stage": "score", "teacher": "t", "rollouts": "r", "seed": 0})
    work = WorkDir.open(
        tmp_path / "work", reporter=Reporter(quiet=True), engines={"teacher": uniform.table}
    )
    score.run(config, inputs, work)
    [stored] = TargetReader(sorted(work.path.glob("part-*.parquet")))
    assert stored.targets.head_counts_N.tolist() == [4, 4]
    assert TargetReader(sorted(work.path.glob("part-*.parquet"))).meta.estimator == "top-4"
