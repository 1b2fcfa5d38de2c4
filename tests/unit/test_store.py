"""The target store: what is written is what is read, by us and by anyone, or an error says why."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tutelage.core.errors import ArtifactError, DataError
from tutelage.targets import reader as reader_module
from tutelage.targets import writer as writer_module
from tutelage.targets.codec import code_logq, code_nats, nats_code, q_code
from tutelage.targets.reader import TargetReader
from tutelage.targets.schema import StoreMeta, TargetRow, TokenTargets, check_compatible
from tutelage.targets.writer import DECODING_KEY, GROUPS_KEY, META_KEY, write_shard

DOCS = Path(__file__).parents[2] / "docs" / "store.md"
TAU = 0.03
VOCAB = 1 << 20
META = StoreMeta(
    student="a" * 64, teacher="b" * 64, tokenizer="c" * 64, chat_template="d" * 64,
    vocab_size=VOCAB, temperature=1.0, engine="transformers", dtype="float32",
    estimator="threshold", tau=TAU,
)  # fmt: skip


def _row(index: int, tokens: int, *, tau: float | None = TAU, vocab: int = VOCAB) -> TargetRow:
    """Heads and tails of 0 to 5 ids; ids reach to the end of the vocabulary.

    No two q of a token share a code, so that their order is told apart; every second token that has
    a head has been sampled from it.
    """
    rng = np.random.default_rng([index, tokens])
    head_counts_N = rng.integers(0, 6, tokens).astype(np.int32)
    tail_counts_N = rng.integers(0, 6, tokens).astype(np.int32)
    codes = [-np.sort(-rng.choice(np.arange(15, 127), c, replace=False)) for c in head_counts_N]
    heads = [np.sin(np.pi / 254 * (c + rng.uniform(-0.4, 0.4, len(c)))) ** 2 for c in codes]
    head_ids = [rng.choice(vocab, c, replace=False) for c in head_counts_N]
    response_ids = rng.integers(0, vocab, tokens).astype(np.int32)
    label_logp_N = -rng.exponential(2, tokens).astype(np.float32)
    for token in np.flatnonzero(head_counts_N)[::2]:
        place = rng.integers(head_counts_N[token])
        response_ids[token] = head_ids[token][place]
        label_logp_N[token] = np.log(heads[token][place])
    tails = [np.sort(rng.choice(vocab, c, replace=False)) for c in tail_counts_N]
    targets = TokenTargets(
        head_counts_N=head_counts_N,
        head_ids_M=np.concatenate([np.zeros(0, int), *head_ids]).astype(np.int32),
        head_logq_M=np.log(np.concatenate([np.zeros(0), *heads])).astype(np.float32),
        tail_counts_N=tail_counts_N,
        tail_ids_T=np.concatenate([np.zeros(0, int), *tails]).astype(np.int32),
        label_logp_N=label_logp_N,
        entropy_N=rng.exponential(1, tokens).astype(np.float32),
        tau=tau,
    )
    return TargetRow(
        id=f"row-{index}", prompt_id=f"prompt-{index // 2}", source="lab", mode="fast",
        prompt_ids=rng.integers(0, vocab, 5).astype(np.int32),
        response_ids=response_ids,
        finish_reason="stop" if index % 2 else "length", verdict=None if index % 3 else "correct",
        student_logp_N=-rng.exponential(2, tokens).astype(np.float32), targets=targets,
    )  # fmt: skip


def _rows(count: int, *, tokens: int = 20) -> list[TargetRow]:
    return [_row(index, tokens + index) for index in range(count)]


def _assert_equal(found: TargetRow, wanted: TargetRow) -> None:
    """Text and ids exactly, numbers within the stated errors."""
    for name in ("id", "prompt_id", "source", "mode", "finish_reason", "verdict"):
        assert getattr(found, name) == getattr(wanted, name)
    np.testing.assert_array_equal(found.prompt_ids, wanted.prompt_ids)
    np.testing.assert_array_equal(found.response_ids, wanted.response_ids)
    got, want = found.targets, wanted.targets
    for field in fields(TokenTargets):
        if field.name.endswith(("counts_N", "ids_M", "ids_T")):
            np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name))
            assert getattr(got, field.name).dtype == np.int32
        elif field.name != "tau":
            assert getattr(got, field.name).dtype == np.float32
    assert got.tau == want.tau
    for a, b in (
        (-found.student_logp_N, -wanted.student_logp_N),
        (-got.label_logp_N, -want.label_logp_N),
        (got.entropy_N, want.entropy_N),
    ):
        assert (np.abs(a - b) <= np.sqrt(b) / 46 + 1.5e-4).all()
    q, q_hat = np.exp(want.head_logq_M.astype(float)), np.exp(got.head_logq_M.astype(float))
    assert (np.abs(q - q_hat) <= np.pi / 254 * np.sqrt(q * (1 - q)) + 4e-5).all()


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of 100 tokens, and windows of 3 of them."""
    monkeypatch.setattr(writer_module, "ROW_GROUP_TOKENS", 100)
    monkeypatch.setattr(reader_module, "WINDOW", 3)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    rows = _rows(7)
    info = write_shard(tmp_path / "a.parquet", rows, meta=META)
    reader = TargetReader([info.path])
    assert reader.meta == META
    assert len(reader) == info.rows == 7
    assert reader.num_tokens == info.tokens == sum(len(row.response_ids) for row in rows)
    assert info.ids == sum(len(r.targets.head_ids_M) + len(r.targets.tail_ids_T) for r in rows)
    assert info.bytes == info.path.stat().st_size
    for found, wanted in zip(reader, rows, strict=True):
        _assert_equal(found, wanted)


@pytest.mark.usefixtures("small_groups")
def test_rows_are_found_by_number_across_row_groups_and_shards(tmp_path: Path) -> None:
    rows = _rows(12)
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_shard(paths[0], rows[:7], meta=META)
    write_shard(paths[1], rows[7:], meta=META)
    reader = TargetReader(paths)
    assert reader.num_groups == 4
    for index in (11, 0, 6, 7):
        _assert_equal(reader.row(index), rows[index])
    for index in (-1, 12):
        with pytest.raises(IndexError):
            reader.row(index)


def test_a_group_holds_flat_arrays_of_all_its_rows(tmp_path: Path) -> None:
    rows = _rows(3)
    write_shard(tmp_path / "a.parquet", rows, meta=META)
    group = TargetReader([tmp_path / "a.parquet"]).group(0)
    wanted = np.concatenate([row.targets.tail_ids_T for row in rows])
    np.testing.assert_array_equal(group.targets.tail_ids_T, wanted)
    assert group.token_starts_R1.tolist() == [0, 20, 41, 63]
    assert np.shares_memory(group.row(1).targets.tail_ids_T, group.targets.tail_ids_T)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("lengths", [[0], [0, 3, 0], [0] * 30, [3, 0, 120, 0, 0, 5]])
def test_empty_responses_keep_their_place(tmp_path: Path, lengths: list[int]) -> None:
    rows = [_row(index, length) for index, length in enumerate(lengths)]
    write_shard(tmp_path / "a.parquet", rows, meta=META)
    for found, wanted in zip(TargetReader([tmp_path / "a.parquet"]), rows, strict=True):
        _assert_equal(found, wanted)


def test_a_shard_of_no_rows_is_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [], meta=META)
    reader = TargetReader([tmp_path / "a.parquet"])
    assert (len(reader), list(reader), reader.order(0, 0).tolist()) == (0, [], [])


def test_a_response_cut_off_is_stored_without_an_end_of_turn(tmp_path: Path) -> None:
    row = replace(_row(0, 4), finish_reason="length")
    write_shard(tmp_path / "a.parquet", [row], meta=META)
    found = TargetReader([tmp_path / "a.parquet"]).row(0)
    assert found.finish_reason == "length"
    np.testing.assert_array_equal(found.response_ids, row.response_ids)


def test_targets_without_a_threshold_keep_small_probabilities_and_repeated_ids(
    tmp_path: Path,
) -> None:
    meta = replace(META, estimator="top-4", tau=None)
    row = _row(0, 1, tau=None)
    q = np.array([0.9, 1e-2, 1e-4, 1e-6])
    targets = replace(
        row.targets, head_counts_N=np.array([4], np.int32),
        head_ids_M=np.arange(4, dtype=np.int32), head_logq_M=np.log(q).astype(np.float32),
        tail_counts_N=np.array([3], np.int32), tail_ids_T=np.array([5, 5, 9], np.int32),
    )  # fmt: skip
    write_shard(tmp_path / "a.parquet", [replace(row, targets=targets)], meta=meta)
    found = TargetReader([tmp_path / "a.parquet"]).row(0).targets
    np.testing.assert_allclose(np.exp(found.head_logq_M), q, rtol=0.03)
    assert found.tail_ids_T.tolist() == [5, 5, 9]
    np.testing.assert_allclose(found.tail_unit_N(), [(1 - q.sum()) / 3], rtol=1e-3)


@pytest.mark.parametrize("levels", [127, 65535])
def test_every_probability_is_stored_within_the_stated_error(levels: int) -> None:
    logq_M = np.log(np.linspace(TAU, 1, 5000))
    q, code_M = np.exp(logq_M), q_code(logq_M, levels)
    assert code_M.max() == levels
    q_hat = np.exp(code_logq(code_M, levels))
    bound = np.pi / (2 * levels) * np.sqrt(q * np.maximum(1 - q, 0)) + (np.pi / 4 / levels) ** 2
    assert (np.abs(q_hat - q) <= bound + 1e-12).all()
    assert q_code(np.array([-80.0]), levels) == 1  # a stored probability is never 0


def test_nats_are_stored_within_the_stated_error_and_without_a_ceiling() -> None:
    nats = np.concatenate([np.geomspace(1e-7, 900, 5000), [0.0, -1e-6]])
    error = np.abs(code_nats(nats_code(nats)) - np.maximum(nats, 0))
    assert (error <= np.sqrt(np.maximum(nats, 0)) / 48 + 1.1e-4).all()


def test_quantising_again_changes_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", _rows(3), meta=META)
    once = list(TargetReader([tmp_path / "a.parquet"]))
    write_shard(tmp_path / "b.parquet", once, meta=META)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_polars_and_duckdb_see_the_same_columns_as_pyarrow(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, _rows(5), meta=META)
    ours = pq.read_table(path)
    assert pl.read_parquet(path).to_dicts() == ours.to_pylist()
    found = duckdb.connect().execute(f"SELECT * FROM '{path}'").fetchall()
    assert [list(row) for row in found] == [list(row.values()) for row in ours.to_pylist()]


@pytest.mark.parametrize("tool", ["pyarrow", "polars", "duckdb"])
def test_the_snippet_of_the_docs_rebuilds_a_token(tmp_path: Path, tool: str) -> None:
    rows = _rows(3)
    write_shard(tmp_path / "part-00000.parquet", rows, meta=META)
    snippet = re.search(rf"```python\n(# {tool}.*?)```", DOCS.read_text(), re.DOTALL)
    assert snippet, f"docs/store.md shows no snippet that begins with '# {tool}'"
    program = snippet[1] + "\nimport json\nprint(json.dumps({int(k): v for k, v in q_hat.items()}))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    token = 7  # the snippets' row 0, token 7
    targets = TargetReader([tmp_path / "part-00000.parquet"]).row(0).targets
    head = slice(*np.cumsum([0, *targets.head_counts_N])[[token, token + 1]])
    tail = slice(*np.cumsum([0, *targets.tail_counts_N])[[token, token + 1]])
    wanted = dict(
        zip(targets.head_ids_M[head].tolist(), np.exp(targets.head_logq_M[head]), strict=True)
    ) | dict.fromkeys(targets.tail_ids_T[tail].tolist(), TAU)
    found = {int(key): value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    assert found == pytest.approx(wanted, rel=1e-5)
    assert len(found) > 2


def test_the_snippet_of_the_docs_reads_a_store_with_tutelage(tmp_path: Path) -> None:
    write_shard(tmp_path / "targets" / "part-00000.parquet", _rows(3), meta=META)
    snippet = re.search(r"```python\n(from pathlib.*?)```", DOCS.read_text(), re.DOTALL)
    assert snippet
    program = snippet[1] + "\n    print(row.id, padded.valid_NK.sum() > 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.splitlines()) == ["row-0 True", "row-1 True", "row-2 True"]


def test_a_failing_generator_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[TargetRow]:
        yield _row(0, 5)
        raise RuntimeError("teacher ran out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_shard(tmp_path / "a.parquet", rows(), meta=META)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_groups")
def test_the_writer_holds_one_row_group_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = written = 0
    to_table = writer_module.to_table

    def rows() -> Iterator[TargetRow]:
        nonlocal asked
        for asked in range(1, 41):
            assert asked - written <= 5  # rows of 25 tokens, prompt included
            yield _row(asked, 20)

    def counted(group: object, meta: StoreMeta) -> pa.Table:
        nonlocal written
        written = asked
        return to_table(group, meta)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "to_table", counted)
    assert write_shard(tmp_path / "a.parquet", rows(), meta=META).rows == 40


def _broken(name: str) -> TargetRow:
    row = _row(3, 6)
    targets = row.targets
    nan = np.array([np.nan] * 6, np.float32)
    match name:
        case "5 student_logp where 6":
            return replace(row, student_logp_N=row.student_logp_N[:5])
        case "tail ids where":
            return replace(row, targets=replace(targets, tail_ids_T=targets.tail_ids_T[1:]))
        case "response_ids outside the vocabulary":
            return replace(row, response_ids=row.response_ids + VOCAB)
        case "head ids outside the vocabulary":
            return replace(row, targets=replace(targets, head_ids_M=targets.head_ids_M - VOCAB))
        case "label_logp that are not finite":
            return replace(row, targets=replace(targets, label_logp_N=nan))
        case "student_logp that are not finite or of the wrong sign":
            return replace(row, student_logp_N=-row.student_logp_N)
        case _:
            return replace(row, targets=replace(targets, tau=0.5))


@pytest.mark.parametrize(
    "message",
    [
        "5 student_logp where 6", "tail ids where", "response_ids outside the vocabulary",
        "head ids outside the vocabulary", "label_logp that are not finite",
        "student_logp that are not finite or of the wrong sign", "made with tau 0.5",
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_right_is_named(tmp_path: Path, message: str) -> None:
    with pytest.raises(DataError, match=re.escape("row row-3: ") + ".*" + re.escape(message)):
        write_shard(tmp_path / "a.parquet", [_row(1, 3), _broken(message), _row(2, 3)], meta=META)


@pytest.mark.usefixtures("small_groups")
def test_an_order_is_a_permutation_from_seed_and_epoch_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", _rows(40), meta=META)
    orders = [TargetReader([tmp_path / "a.parquet"]).order(seed, 1) for seed in (5, 5, 6)]
    orders.append(TargetReader([tmp_path / "a.parquet"]).order(5, 2))
    assert sorted(orders[0].tolist()) == list(range(40))
    assert orders[0].tolist() == orders[1].tolist()
    assert len({tuple(order.tolist()) for order in orders}) == 3


@pytest.mark.usefixtures("small_groups")
def test_a_shuffled_epoch_decodes_each_row_group_once_and_mixes_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.parquet", _rows(60), meta=META)
    reader = TargetReader([tmp_path / "a.parquet"])
    loaded = []
    load = reader_module._load
    monkeypatch.setattr(
        reader_module, "_load", lambda group, meta: loaded.append(group.index) or load(group, meta)
    )
    ids = [row.id for row in reader.iterate(0, 0)]
    assert sorted(loaded) == list(range(reader.num_groups))
    assert sorted(ids) == sorted(f"row-{index}" for index in range(60))
    neighbours = sum(int(b.split("-")[1]) == int(a.split("-")[1]) + 1 for a, b in pairwise(ids))
    assert neighbours < 20


@pytest.mark.usefixtures("small_groups")
def test_an_epoch_goes_on_from_a_position(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", _rows(30), meta=META)
    whole = [row.id for row in TargetReader([tmp_path / "a.parquet"]).iterate(3, 2)]
    resumed = TargetReader([tmp_path / "a.parquet"]).iterate(3, 2, position=17)
    assert [row.id for row in resumed] == whole[17:]


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.usefixtures("small_groups")
def test_a_damaged_row_group_is_named_and_the_rest_is_read_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = _rows(20)
    write_shard(path, rows, meta=META)
    groups = json.loads(pq.read_metadata(path).metadata[GROUPS_KEY])
    _flip(path, groups[2]["offset"] + groups[2]["bytes"] // 2)
    reader = TargetReader([path])
    _assert_equal(reader.row(0), rows[0])
    with pytest.raises(ArtifactError, match=r"a\.parquet: row group 2 .*damaged.*skip_damaged"):
        list(reader)
    rest = TargetReader([path], skip_damaged=True)
    (damage,) = rest.damaged
    assert (damage.path, damage.row_group, damage.rows) == (path, 2, groups[2]["rows"])
    assert len(rest) == 20 - groups[2]["rows"] == len(list(rest)) == len(rest.order(0, 0))
    first = sum(group["rows"] for group in groups[:2])
    lost = {row.id for row in rows[first : first + groups[2]["rows"]]}
    assert {row.id for row in rest} == {row.id for row in rows} - lost


@pytest.mark.usefixtures("small_groups")
def test_a_changed_tau_in_the_metadata_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, _rows(5), meta=META)
    path.write_bytes(path.read_bytes().replace(b'"tau": 0.03', b'"tau": 0.08'))
    assert TargetReader([path]).meta.tau == 0.08
    with pytest.raises(ArtifactError, match=r"row group 0 .*damaged"):
        TargetReader([path]).row(0)


@pytest.mark.usefixtures("small_groups")
def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    """Anywhere in the file: either an ArtifactError, or the rows as they were written."""
    path = tmp_path / "a.parquet"
    rows = _rows(4)
    write_shard(path, rows, meta=META)
    whole = path.read_bytes()
    written = list(TargetReader([path]))
    noticed = 0
    offsets = np.random.default_rng(0).integers(0, len(whole), 80).tolist()
    for offset in [0, 3, len(whole) - 1, len(whole) - 6, *offsets]:
        path.write_bytes(whole)
        _flip(path, offset)
        try:
            found = list(TargetReader([path]))
        except ArtifactError:
            noticed += 1
        else:
            for a, b in zip(found, written, strict=True):
                _assert_equal(a, b)
    assert noticed > 60


@pytest.mark.parametrize("keep", [0, 3, 500, -8])
def test_a_file_cut_short_is_not_a_shard(tmp_path: Path, keep: int) -> None:
    whole, cut = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_shard(whole, _rows(2), meta=META)
    cut.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"b\.parquet is not a whole shard"):
        TargetReader([whole, cut])
    reader = TargetReader([whole, cut], skip_damaged=True)
    assert len(reader) == 2
    assert [(d.path, d.row_group, d.rows) for d in reader.damaged] == [(cut, None, None)]
    with pytest.raises(ArtifactError, match="no readable target shard"):
        TargetReader([cut], skip_damaged=True)


def test_any_other_parquet_file_is_not_a_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ArtifactError, match="not a whole shard"):
        TargetReader([tmp_path / "a.parquet"])
    with pytest.raises(ArtifactError, match=r"missing\.parquet"):
        TargetReader([tmp_path / "missing.parquet"])
    with pytest.raises(ArtifactError, match="no readable"):
        TargetReader([])


def test_a_shard_rewritten_without_a_column_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", _rows(2), meta=META)
    table = pq.read_table(tmp_path / "a.parquet").drop_columns(["verdict"])
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(ArtifactError, match=r"b\.parquet: its footer is damaged, or not of"):
        TargetReader([tmp_path / "b.parquet"])


def test_shards_of_two_stores_are_not_mixed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", _rows(1), meta=META)
    other = replace(META, teacher="e" * 64, temperature=0.5)
    write_shard(tmp_path / "b.parquet", _rows(1), meta=other)
    with pytest.raises(ArtifactError, match="teacher, temperature differ"):
        TargetReader([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_a_store_fits_only_its_own_tokenizer_template_and_vocabulary() -> None:
    ours = {"tokenizer": "c" * 64, "vocab_size": VOCAB, "chat_template": "d" * 64}
    check_compatible(META, **ours)  # type: ignore[arg-type]
    for name, value in {"tokenizer": "f" * 64, "vocab_size": 7, "chat_template": "g" * 64}.items():
        with pytest.raises(ArtifactError, match=f"{name} is .* in the store and {value}") as caught:
            check_compatible(META, **ours | {name: value})  # type: ignore[arg-type]
        assert not any(other in str(caught.value) for other in ours if other != name)


def test_metadata_survives_json_and_another_version_is_refused(tmp_path: Path) -> None:
    for meta in (META, replace(META, tau=None, chat_template='{"ü"}')):
        assert StoreMeta.from_json(meta.to_json()) == meta
    write_shard(tmp_path / "a.parquet", [], meta=META)
    keys = pq.read_schema(tmp_path / "a.parquet").metadata
    assert json.loads(keys[META_KEY])["tau"] == TAU
    assert json.loads(keys[DECODING_KEY])["head_q_code"] == "q = sin(pi / 2 * code / 127)^2"
    with pytest.raises(ArtifactError, match="format 3"):
        StoreMeta.from_json(META.to_json().replace('"format": 2', '"format": 3'))
    with pytest.raises(ArtifactError, match="not the metadata"):
        StoreMeta.from_json("{}")
