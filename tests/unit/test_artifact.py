"""Finished or not, whole or damaged: what the store accepts, and what a kill costs."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tutelage.core import artifact as artifacts
from tutelage.core import files
from tutelage.core.artifact import (
    LEDGER,
    MANIFEST,
    SCRATCH,
    Artifact,
    WorkDir,
    finish,
    open_artifact,
    several,
    verify,
)
from tutelage.core.errors import ArtifactError
from tutelage.core.fingerprint import fingerprint
from tutelage.core.progress import Reporter
from tutelage.core.shards import MakeShard, Shard, run_shards, shards
from tutelage.store import Store

IDENTITY = {"stage": "data", "version": 1, "config": {"seed": 1}, "inputs": {}}
MARK = fingerprint(IDENTITY)
QUIET = Reporter(quiet=True)


def opened(store: Store) -> WorkDir:
    return WorkDir.open(store.partial("data", MARK), reporter=QUIET, device="cpu")


def finished(work: WorkDir, store: Store) -> Artifact:
    return finish(
        work, store.place("data", MARK), identity=IDENTITY, inputs={}, summary={"rows": 2},
        provenance={}, peak_memory_bytes=5,
    )  # fmt: skip


def made(store: Store) -> Artifact:
    work = opened(store)
    files.write_text(work.path / "a.txt", "hello")
    files.write_text(work.path / "model" / "b.txt", "world")
    work.commit("rows", seconds=1.5, tokens={"trained": 7})
    return finished(work, store)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_finished_artifact_lists_its_files_and_costs(store: Store) -> None:
    found = made(store)
    assert found.path == store.place("data", MARK)
    assert found.fingerprint == MARK
    assert (found.stage, found.summary, found.config) == ("data", {"rows": 2}, {"seed": 1})
    assert list(found.manifest["files"]) == ["a.txt", "model/b.txt"]
    assert found.manifest["files"]["a.txt"]["bytes"] == 5
    assert found.manifest["tokens"]["trained"] == 7
    assert found.manifest["seconds"] == 1.5
    assert verify(found) == []
    assert not store.partial("data", MARK).exists()


def test_ledger_and_scratch_are_no_part_of_a_result(store: Store) -> None:
    work = opened(store)
    files.write_text(work.scratch("training") / "step.bin", "x")
    files.write_text(work.path / "a.txt", "hello")
    work.commit("rows", seconds=0, tokens={})
    found = finished(work, store)
    assert sorted(p.name for p in found.path.iterdir()) == ["a.txt", MANIFEST]
    assert verify(found) == []


def test_what_was_made_is_told_apart_by_content_not_by_time(tmp_path: Path) -> None:
    first, again = made(Store(tmp_path / "one")), made(Store(tmp_path / "two"))
    assert first.manifest["content"] == again.manifest["content"]


def test_the_manifest_is_the_last_file_before_the_rename(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace, fsync = os.replace, files.fsync
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(f"replace {Path(b).name}"), replace(a, b))
    )
    monkeypatch.setattr(files, "fsync", lambda p: (events.append(f"fsync {p.name}"), fsync(p)))
    work = opened(store)
    (work.path / "a.txt").write_text("hello")
    finished(work, store)
    renames = [event for event in events if event.startswith("replace")]
    assert renames == [f"replace {MANIFEST}", f"replace {MARK}"]
    assert events.index("fsync a.txt") < events.index(f"replace {MANIFEST}")


def test_a_folder_without_a_manifest_is_not_finished(store: Store) -> None:
    place = store.place("data", MARK)
    place.mkdir(parents=True)
    (place / "a.txt").write_text("hello")
    assert store.find("data", MARK) is None
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        open_artifact(place)


def test_what_an_interrupted_removal_left_does_not_stop_the_next_attempt(store: Store) -> None:
    found = made(store)
    (found.path / MANIFEST).unlink()  # Store.remove was killed after its first line
    again = made(store)
    assert verify(again) == []


def test_a_removed_artifact_is_gone(store: Store) -> None:
    store.remove(made(store).path)
    assert store.find("data", MARK) is None


@pytest.mark.parametrize("name", ["a.txt", "model/b.txt"])
def test_a_truncated_file_is_refused_on_opening(store: Store, name: str) -> None:
    path = made(store).path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has 4 bytes instead of 5; .*--repair"):
        store.find("data", MARK)


def test_a_missing_file_is_refused_on_opening(store: Store) -> None:
    (made(store).path / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a\.txt is missing"):
        store.find("data", MARK)


def test_a_flipped_bit_is_found_by_verify(store: Store) -> None:
    found = made(store)
    path = found.path / "a.txt"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert store.find("data", MARK)  # of the same size: only its sha256 tells
    assert verify(found) == [f"{path} has other contents than when it was made"]


def test_verify_tells_a_strange_file_and_a_changed_identity(store: Store) -> None:
    found = made(store)
    (found.path / "extra.txt").write_text("x")
    manifest = dict(found.manifest)
    manifest["identity"] = {**manifest["identity"], "version": 2}
    problems = verify(Artifact(found.path, manifest))
    assert len(problems) == 2
    assert "extra.txt does not belong to it" in problems[0]
    assert "does not match its own identity" in problems[1]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": []}', '{"files": {"a": 3}}', "\xff"])
def test_a_damaged_manifest_is_refused_in_one_line(store: Store, text: str) -> None:
    (made(store).path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        store.find("data", MARK)
    assert "\n" not in str(caught.value)


def test_leftovers_of_a_kill_are_cleaned_and_finished_parts_kept(store: Store) -> None:
    work = opened(store)
    files.write_text(work.path / "part-00000.txt", "whole")
    work.commit("part-00000", seconds=1, tokens={"teacher_decoded": 5})
    (work.path / ".part-00001.txt.abc.tmp").write_text("half")
    (work.scratch("training") / ".x.tmp").write_text("half")
    again = opened(store)
    assert not list(again.path.rglob("*.tmp"))
    assert again.done("part-00000")
    assert not again.done("part-00001")
    assert again.tokens()["teacher_decoded"] == 5


def test_a_part_that_is_under_way_is_not_done(store: Store) -> None:
    work = opened(store)
    work.commit("train", seconds=1, tokens={"trained": 3}, done=False, step=4)
    assert not opened(store).done("train")
    assert opened(store).ledger["train"]["step"] == 4


def test_an_unknown_kind_of_tokens_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="eaten"):
        opened(store).commit("rows", seconds=0, tokens={"eaten": 1})


KILLED = """
import os, signal, sys
from pathlib import Path
from tutelage.core import files
from tutelage.core.artifact import WorkDir
from tutelage.core.progress import Reporter
from contextlib import nullcontext
from tutelage.core.shards import run_shards, shards
work = WorkDir.open(Path(sys.argv[1]), reporter=Reporter(quiet=True), device="cpu")
def make(shard, on_tokens):
    files.write_text(work.path / f"{shard.name}.txt", "first")
    if shard.index == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the file is there, its ledger entry is not
    return {"teacher_decoded": 10}
run_shards(work, shards(10, 3), lambda: nullcontext(make), label="x", tokens_each=4)
"""


def test_a_kill_between_file_and_ledger_costs_only_that_part(store: Store) -> None:
    path = store.partial("data", MARK)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    work = opened(store)
    remade: list[str] = []

    def make(shard: Shard, on_tokens: object) -> dict[str, int]:
        remade.append(shard.name)
        files.write_text(work.path / f"{shard.name}.txt", "second")
        return {"teacher_decoded": 10}

    run_shards(work, shards(10, 3), lambda: nullcontext(make), label="x", tokens_each=4)
    assert remade == ["part-00002", "part-00003"]
    assert [p.read_text() for p in finished(work, store).shards("*.txt")] == [
        "first", "first", "second", "second",
    ]  # fmt: skip
    assert open_artifact(store.place("data", MARK)).manifest["tokens"]["teacher_decoded"] == 40


def test_a_full_disk_at_the_manifest_keeps_parts_and_checkpoints(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = opened(store)
    files.write_text(work.path / "a.txt", "hello")
    files.write_text(work.scratch("training") / "step.bin", "x")
    work.commit("rows", seconds=1, tokens={})

    def full(path: Path, value: object) -> None:  # a fake: the fault is injected
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.files, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            finished(work, store)
    assert store.find("data", MARK) is None
    again = opened(store)
    assert again.done("rows")
    assert (again.path / SCRATCH / "training" / "step.bin").exists()
    assert json.loads((again.path / LEDGER).read_text())
    assert verify(finished(again, store)) == []


def test_a_resumed_bar_does_not_count_earlier_shards_as_speed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = opened(store)
    for name in ("part-00000", "part-00001"):
        work.commit(name, seconds=1, tokens={})
    asked: list[tuple[int, int]] = []
    bar = Reporter.bar

    def seen(self: Reporter, total: int, label: str, *, unit: str, done: int = 0) -> object:
        asked.append((total, done))
        return bar(self, total, label, unit=unit, done=done)

    monkeypatch.setattr(Reporter, "bar", seen)
    make: MakeShard = lambda shard, on_tokens: {}  # noqa: E731
    run_shards(work, shards(10, 3), lambda: nullcontext(make), label="x", tokens_each=4)
    assert asked == [(40, 24)]


def test_inputs_of_a_list_come_in_their_own_order(tmp_path: Path) -> None:
    some = [Artifact(tmp_path / str(i), {}) for i in range(12)]
    inputs = {f"data.{i}": some[i] for i in reversed(range(12))} | {"model": some[0]}
    assert several(inputs, "data") == some


def test_the_peak_is_of_what_happened_since_it_was_asked_for() -> None:
    # In a process of its own: in this one, memory that other tests freed would be taken again.
    script = (
        "from tutelage.core.artifact import measure_peak\n"
        "old = bytearray(b'x' * 200_000_000)\n"
        "del old\n"
        "peak = measure_peak()\n"
        "before = peak()\n"
        "block = bytearray(b'x' * 60_000_000)\n"
        "print(before, peak())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before < 200_000_000
    assert after - before > 50_000_000


def test_a_run_file_that_cannot_be_read_says_what_to_do(store: Store) -> None:
    assert store.read_run("r") == {}
    files.write_text(store.run_folder("r") / "run.json", "{")
    with pytest.raises(ArtifactError, match=r"run\.json cannot be read .* remove it and run again"):
        store.read_run("r")
    store.write_run("r", {"a": {"stage": "data"}})
    assert store.read_run("r") == {"a": {"stage": "data"}}
    assert store.run_names() == ["r"]
