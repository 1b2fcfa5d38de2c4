"""DistillKit captures, written here by their description, become stores that `distill` learns from.

A capture's settings keep its values exactly (k float32 values, no curve), except where the curve is
the subject, so that what arrives can be told to the code's own error.
"""

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import write_model

from tutelage import pipeline
from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ArtifactError, DataError
from tutelage.core.progress import Reporter
from tutelage.recipe.load import parse
from tutelage.recipe.tables import Convert
from tutelage.stages import convert
from tutelage.store import Store
from tutelage.targets import distillkit
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import TargetRow
from tutelage.targets.topk import targets_of_top_k

VOCAB, ID_BITS = 320, 9
QUIET = Reporter(quiet=True)
K = 3
EXACT: dict[str, Any] = {
    "d": VOCAB, "k": K, "exact_k": K, "exact_dtype": "float32", "residual_bins": [],
    "delta_encoding": False,
}  # fmt: skip
Top = Sequence[tuple[int, float]]
"""(id, probability) of a token's k entries, by falling probability."""


def entry(top: Top) -> tuple[list[int], list[int]]:
    """The bytes of log-probabilities and of ids of one token under EXACT."""
    values = b"".join(struct.pack("<f", math.log(q)) for _, q in top)
    bits = "".join(format(token, f"0{ID_BITS}b") for token, _ in top)
    bits += "0" * (-len(bits) % 8)
    return list(values), [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def text_row(ids: Sequence[int], tops: Sequence[Top]) -> dict[str, Any]:
    pairs = [entry(top) for top in tops]
    return {
        "input_ids": list(ids),
        "compressed_logprobs": [pair[0] for pair in pairs],
        "bytepacked_indices": [pair[1] for pair in pairs],
    }


SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.uint64())),
        ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
        ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
    ]
)


def telling(ids: Sequence[int], *, behind: bool = False) -> dict[str, Any]:
    """A text whose entry t gives 0.5 + t / 100 to token t + 1; the rest to ids far from any.

    `behind` adds the entry that whole texts have for what follows their last token.
    """
    tops = [[(ids[t + 1], 0.5 + t / 100), (301, 0.2), (302, 0.1)] for t in range(len(ids) - 1)]
    if behind:
        tops.append([(303, 0.9), (304, 0.05), (305, 0.01)])
    return text_row(ids, tops)


GOOD = telling([10, 20, 30, 40])


def write_capture(
    folder: Path, *files: Sequence[dict[str, Any]], values: dict[str, Any] | None = None,
    group: int = 2,
) -> Path:  # fmt: skip
    folder.mkdir(exist_ok=True)
    for index, rows in enumerate(files):
        table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
        pq.write_table(table, folder / f"data-{index}.parquet", row_group_size=group)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(values or EXACT))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", layers=1)


Run = Callable[..., tuple[dict[str, float], list[TargetRow]]]


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """The stage over a folder of captures: its summary, and the rows of its store."""

    def stage(folder: Path, **options: Any) -> tuple[dict[str, float], list[TargetRow]]:
        config = Convert.model_validate(
            {"stage": "convert", "source": str(folder / "*.parquet"), "model": "m", **options}
        )
        work = WorkDir.open(tmp_path / "work", reporter=QUIET, device="cpu")
        external = Artifact(model, {"stage": "external", "fingerprint": "f", "identity": {}})
        summary = convert.run(config, {"model": external}, work)
        return summary, list(TargetReader(sorted(work.path.glob("part-*.parquet"))))

    return stage


def test_entry_t_says_what_follows_token_t(run: Run, tmp_path: Path) -> None:
    """Every label is in its own entry and in no neighbour's: one place off, and none would be."""
    ids = [10, 20, 30, 40, 50, 60]
    _, (row,) = run(write_capture(tmp_path / "c", [telling(ids)]))
    assert row.prompt_ids.tolist() == ids[:1]
    assert row.response_ids.tolist() == ids[1:]
    assert row.targets.head_ids_M.reshape(-1, K)[:, 0].tolist() == ids[1:]
    wanted = np.log(0.5 + np.arange(5) / 100)
    np.testing.assert_allclose(row.targets.label_logp_N, wanted, atol=5e-4)
    np.testing.assert_allclose(row.student_logp_N, wanted, atol=0.02)


def test_the_entry_behind_the_last_token_is_left_out(run: Run, tmp_path: Path) -> None:
    ids = [10, 20, 30, 40]
    _, (short, whole) = run(
        write_capture(tmp_path / "c", [telling(ids), telling(ids, behind=True)])
    )
    assert 303 not in whole.targets.head_ids_M
    for name in ("head_ids_M", "head_logq_M", "label_logp_N", "entropy_N"):
        np.testing.assert_array_equal(getattr(short.targets, name), getattr(whole.targets, name))


def test_rows_are_numbered_over_files_and_counted(run: Run, tmp_path: Path) -> None:
    texts = [telling(range(10 * n, 10 * n + 2 + n)) for n in range(7)]
    folder = write_capture(tmp_path / "c", texts[:3], texts[3:], group=2)
    summary, rows = run(folder, shard_rows=2)
    assert summary == {"rows": 7, "response_tokens": sum(1 + n for n in range(7))}
    assert [row.id for row in rows] == [f"{n:08d}" for n in range(7)]
    assert [row.prompt_ids.tolist() for row in rows] == [[10 * n] for n in range(7)]
    assert [len(row.response_ids) for row in rows] == [1 + n for n in range(7)]


def test_a_text_of_one_token_is_an_empty_response(run: Run, tmp_path: Path) -> None:
    summary, rows = run(write_capture(tmp_path / "c", [telling([7], behind=True), GOOD]))
    assert [len(row.response_ids) for row in rows] == [0, 3]
    assert summary == {"rows": 2, "response_tokens": 3}


def test_a_text_of_one_token_and_no_entry_is_one_too(run: Run, tmp_path: Path) -> None:
    _, rows = run(write_capture(tmp_path / "c", [telling([7]), GOOD]))
    assert [len(row.response_ids) for row in rows] == [0, 3]


def test_the_store_says_what_it_is_not(run: Run, tmp_path: Path, model: Path) -> None:
    run(write_capture(tmp_path / "c", [telling([1, 2, 3])]))
    meta = TargetReader([tmp_path / "work/part-00000.parquet"]).meta
    assert (meta.estimator, meta.tau, meta.engine) == ("distillkit-3", None, "distillkit")
    assert not meta.has_tail
    assert meta.has_head
    assert not meta.has_label
    assert meta.vocab_size == VOCAB


def test_settings_may_stand_in_the_recipe(run: Run, tmp_path: Path) -> None:
    folder = write_capture(tmp_path / "c", [telling([1, 2, 3])])
    (folder / "compression_config.yaml").unlink()
    _, (row,) = run(folder, settings=EXACT)
    assert row.targets.head_ids_M.reshape(-1, K)[:, 0].tolist() == [2, 3]


def test_a_curve_is_read_and_put_in_order(run: Run, tmp_path: Path) -> None:
    """The format's own curve may rise: the head is by falling probability all the same."""
    made = distillkit.Settings(
        d=VOCAB, k=20, exact_k=2, exact_dtype="bfloat16", delta_encoding=False,
        polynomial_terms=(0, 1, "sqrt"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    ids_NK = np.stack([rng.choice(VOCAB, 20, replace=False) for _ in range(5)])
    logp_NK = -np.sort(rng.exponential(2, (5, 20)), axis=1) - 0.7
    logp_NK[:, -1] = -9.0  # a cliff at the end, which lifts the curve before it
    logps, ids = distillkit.encode(ids_NK, logp_NK.astype(np.float32), made)
    text = {
        "input_ids": [1, *ids_NK[:, 4].tolist()], "compressed_logprobs": logps.tolist(),
        "bytepacked_indices": ids.tolist(),
    }  # fmt: skip
    values = {
        "d": VOCAB, "k": 20, "exact_k": 2, "exact_dtype": "bfloat16", "delta_encoding": False,
        "polynomial_terms": [0, 1, "sqrt"], "residual_bins": [],
    }  # fmt: skip
    _, (row,) = run(write_capture(tmp_path / "c", [text], values=values))
    found_NK = row.targets.head_ids_M.reshape(5, 20)
    head_q_NK = np.exp(row.targets.head_logq_M.reshape(5, 20))
    assert (np.diff(head_q_NK) <= 0).all()
    q_NK = np.exp(distillkit.decode_logp(logps, made).astype(np.float64))
    q_NK /= np.maximum(q_NK.sum(1, keepdims=True), 1)
    assert (np.diff(q_NK) > 0).any()
    for n in range(5):
        found = dict(zip(found_NK[n].tolist(), head_q_NK[n].tolist(), strict=True))
        assert found == pytest.approx(dict(zip(ids_NK[n].tolist(), q_NK[n], strict=True)), abs=1e-4)


# What is known of label and entropy


def top(ids: list[int], q: list[float], label: int) -> Any:
    return targets_of_top_k(np.array([ids]), np.log(np.array([q], np.float32)), np.array([label]))


def test_a_label_among_the_k_has_its_probability_wherever_it_stands() -> None:
    for label, q in ((5, 0.5), (6, 0.3), (7, 0.1)):
        assert math.isclose(top([5, 6, 7], [0.5, 0.3, 0.1], label).label_logp_N[0], math.log(q),
                            abs_tol=1e-6)  # fmt: skip


@pytest.mark.parametrize(("q", "bound"), [([0.5, 0.3, 0.1], 0.1), ([0.6, 0.3, 0.08], 0.02)])
def test_a_label_outside_has_at_most_the_rest_and_at_most_the_smallest(
    q: list[float], bound: float
) -> None:
    assert math.isclose(math.exp(top([5, 6, 7], q, 9).label_logp_N[0]), bound, rel_tol=1e-4)


def test_the_entropy_is_that_of_the_head_and_one_bucket() -> None:
    found = top([5, 6, 7], [0.5, 0.3, 0.1], 5).entropy_N[0]
    wanted = -sum(x * math.log(x) for x in (0.5, 0.3, 0.1, 0.1))
    assert math.isclose(found, wanted, rel_tol=1e-5)


def test_a_top_k_that_sums_to_more_than_one_is_normalised() -> None:
    found = top([5, 6], [0.9, 0.6], 6)
    np.testing.assert_allclose(np.exp(found.head_logq_M), [0.6, 0.4], rtol=1e-5)
    assert np.isfinite(found.entropy_N).all()
    assert math.isclose(math.exp(found.label_logp_N[0]), 0.4, rel_tol=1e-5)


def test_a_probability_that_is_nothing_stays_finite() -> None:
    logp_NK = np.array([[0.0, -np.inf]], np.float32)
    found = targets_of_top_k(np.array([[5, 6]]), logp_NK, np.array([6]))
    for values in (found.head_logq_M, found.label_logp_N, found.entropy_N):
        assert np.isfinite(values).all()


# What cannot be


def broken(row: dict[str, Any], column: str, change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    return {**row, column: change(row[column])}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (broken(GOOD, "compressed_logprobs", lambda x: [*x[:2], x[2][:-1]]),
         "tokens of 11 and of 12 bytes in one row"),
        (broken(GOOD, "bytepacked_indices", lambda x: [*x[:2], [*x[2], 0]]),
         "tokens of 4 and of 5 bytes in one row"),
        (broken(GOOD, "compressed_logprobs", lambda x: [v[:-4] for v in x]),
         "has 8 bytes of log-probabilities, and the settings make 12"),
        (broken(GOOD, "bytepacked_indices", lambda x: [v[:-1] for v in x]),
         "has 3 bytes where 4 are"),
        (broken(GOOD, "compressed_logprobs", lambda x: x[:-1]),
         "4 tokens, but 2 log-probabilities and 3 ids"),
        (broken(GOOD, "input_ids", lambda x: [*x, 50, 60]),
         "6 tokens, but 3 log-probabilities and 3 ids"),
        (broken(GOOD, "input_ids", lambda x: x[:2]), "2 tokens, but 3"),
        (broken(GOOD, "input_ids", lambda x: []), "0 tokens, but 3"),
        (broken(GOOD, "input_ids", lambda x: [*x[:3], 320]), "outside the vocabulary of 320"),
        (text_row([1, 2], [[(400, 0.5), (3, 0.2), (4, 0.1)]]), "head ids outside the vocabulary"),
        (text_row([1, 2], [[(2, math.nan), (3, 0.2), (4, 0.1)]]), "not finite"),
        (broken(GOOD, "input_ids", lambda x: [*x[:3], 2**32 + 5]), "outside the vocabulary"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_together_is_told_by_its_number(
    run: Run, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    folder = write_capture(tmp_path / "c", [GOOD, GOOD], [GOOD, row])
    with pytest.raises(DataError, match=said) as caught:
        run(folder)
    assert "row 3" in str(caught.value) or "row 00000003" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("d: [1,", "compression_config.yaml: not YAML"),
        ("- 1\n", "compression_config.yaml: not a mapping"),
        ("polynomial_degree: 3\nk: 5\n", "legacy format"),
        (None, "compression_config.yaml is not there: give the capture's settings"),
    ],
)
def test_settings_that_are_missing_or_no_settings_are_told(
    run: Run, tmp_path: Path, text: str | None, said: str
) -> None:
    folder = write_capture(tmp_path / "c", [GOOD])
    path = folder / "compression_config.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DataError, match=said):
        run(folder)


def test_a_capture_of_a_larger_vocabulary_is_refused(run: Run, tmp_path: Path) -> None:
    folder = write_capture(tmp_path / "c", [GOOD], values={**EXACT, "d": VOCAB + 1})
    with pytest.raises(DataError, match="capture has 321 ids and the model 320"):
        run(folder)


def test_a_capture_without_a_row_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row"):
        run(write_capture(tmp_path / "c", []))


def test_files_of_another_kind_are_refused(run: Run, tmp_path: Path) -> None:
    folder = write_capture(tmp_path / "c", [GOOD])
    with pytest.raises(DataError, match="no Parquet file"):
        run(folder, source=str(folder / "*.yaml"))
    pq.write_table(pa.table({"input_ids": [[1]], "text": ["x"]}), folder / "data-1.parquet")
    with pytest.raises(ArtifactError, match=r"data-1\.parquet has no column 'compressed_logprobs'"):
        run(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("input_ids", pa.array([None], pa.list_(pa.uint64()))),
        ("input_ids", pa.array(["text"])),
        ("compressed_logprobs", pa.array([[1, 2, 3]], pa.list_(pa.uint8()))),
    ],
)
def test_columns_of_another_type_or_null_are_refused(
    run: Run, tmp_path: Path, name: str, values: pa.Array
) -> None:
    folder = write_capture(tmp_path / "c", [GOOD])
    table = pq.read_table(folder / "data-0.parquet")
    table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, folder / "data-0.parquet")
    with pytest.raises((DataError, ArtifactError), match=name):
        run(folder)


# As steps of a recipe


def recipe(model: Path, folder: Path, **distill: Any) -> Any:
    return parse(
        {
            "name": "converted", "seed": 1, "models": {"student": {"source": str(model)}},
            "steps": {
                "targets": {"stage": "convert", "source": str(folder / "*.parquet"),
                            "model": "student"},
                "distilled": {"stage": "distill", "model": "student", "targets": "targets",
                              "lr": 1e-3, "batch_tokens": 16, "pack_tokens": 16, **distill},
            },
        },
        "test",
    )  # fmt: skip


def test_a_converted_capture_is_trained_on(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [telling(rng.choice(300, 9, replace=False).tolist()) for _ in range(8)]
    folder = write_capture(tmp_path / "c", texts)
    done = pipeline.run([recipe(model, folder, epochs=4)], Store(tmp_path / "s"), reporter=QUIET)
    artifact = done.artifacts["distilled"]
    losses = [
        yaml.safe_load(line)["forward_kl"]
        for line in (artifact.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1
    before = load_file(model / "model.safetensors")
    after = load_file(artifact.path / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in after)
    again = pipeline.run([recipe(model, folder, epochs=4)], Store(tmp_path / "s"), reporter=QUIET)
    assert again.made == ()


def test_other_settings_beside_the_same_files_are_another_store(
    model: Path, tmp_path: Path
) -> None:
    folder = write_capture(tmp_path / "c", [GOOD])
    store = Store(tmp_path / "s")
    first = pipeline.run([recipe(model, folder)], store, until="targets", reporter=QUIET)
    path = folder / "compression_config.yaml"
    path.write_text(yaml.safe_dump({**EXACT, "delta_encoding": True}))
    second = pipeline.run([recipe(model, folder)], store, until="targets", reporter=QUIET)
    assert second.made == ("targets",)
    assert first.artifacts["targets"].path != second.artifacts["targets"].path
