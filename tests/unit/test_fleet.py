"""The fleet without a cluster: its worker, what it tells and refuses; see e2e/test_fleet_on_ray."""

import os
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
from fleet_begins import writing

from tutelage.core import errors
from tutelage.core.artifact import WorkDir
from tutelage.core.errors import DataError, EngineError
from tutelage.core.fault import Fault
from tutelage.core.files import is_disk_full
from tutelage.core.progress import Reporter
from tutelage.core.shards import Shard, run_shards, shards
from tutelage.engines import fleet, fleet_cluster, fleet_driver
from tutelage.engines.fleet import RayFleet
from tutelage.engines.fleet_worker import Facts, Made, Worker, facts
from tutelage.recipe.tables import Fleet


@pytest.fixture
def work(tmp_path: Path) -> WorkDir:
    return WorkDir.open(tmp_path / "work", reporter=Reporter(quiet=True), device="cpu")


def run(work: WorkDir, **table: object) -> None:
    work.executor = RayFleet(Fleet(**table))  # type: ignore[arg-type]
    run_shards(work, shards(8, 4), partial(writing, work.site()), label="x", tokens_each=4)


def begun(work: WorkDir, fault: str = "") -> Worker:
    worker = Worker({"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]})
    assert worker.open(pickle.dumps(partial(writing, work.site(), 0.0, fault)), []) is None
    return worker


def test_without_ray_the_line_names_the_extra(
    work: WorkDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'tutelage\[ray\]'"):
        run(work)


def test_a_worker_makes_a_shard_and_tells_of_its_tokens(work: WorkDir) -> None:
    worker = begun(work)
    made = worker.make(Shard(2, range(4, 7)))
    assert isinstance(made, Made)
    assert (made.shard, made.tokens, made.heard) == ("part-00002", {"student_decoded": 6}, 6)
    assert worker.heard() == ("part-00002", 6)
    assert (work.path / "part-00002.txt").read_text() == "4\n5\n6\n"


def test_a_worker_returns_its_faults_as_they_are(work: WorkDir) -> None:
    fault = begun(work, "data:part-00000").make(Shard(0, range(2)))
    assert isinstance(fault, Fault)
    assert type(fault.error()) is DataError
    assert str(fault.error()) == "rows.jsonl:7: not a conversation; mend it"
    broken = Worker({}).open(pickle.dumps(partial(writing, work.site(), 0.0, "begin:")), [])
    assert broken is not None
    assert type(broken.error()) is DataError


def test_a_worker_that_does_not_see_the_steps_folder_names_its_node_and_the_folder(
    work: WorkDir,
) -> None:
    begin = partial(writing, work.site())
    with fleet._mark(begin) as paths:
        here = Worker({}).open(pickle.dumps(begin), paths)
    gone = Worker({}).open(pickle.dumps(begin), paths)  # as a folder of its own would look
    assert here is None
    assert gone is not None
    assert gone.kind == "EngineError"
    assert facts().node in gone.text
    assert str(work.path) in gone.text


def test_what_a_lost_worker_left_of_a_file_is_removed(work: WorkDir) -> None:
    stale = work.path / ".part-00001.parquet.x1.tmp"
    with fleet._mark(partial(writing, work.site())):
        stale.touch()
    assert not stale.exists()


@pytest.mark.parametrize(
    "error",
    [
        DataError("a.jsonl:3: no"), errors.ModelError("x"), ZeroDivisionError("a bug"),
        MemoryError("out"), KeyError("name"),
    ],
)  # fmt: skip
def test_a_fault_comes_back_as_the_type_it_was(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(Fault.of(error))).error()  # noqa: S301 - our own bytes
    assert type(again) is type(error)
    assert error.args[0] in str(again)


def test_a_full_disk_is_known_as_one_on_the_other_side() -> None:
    again = Fault.of(OSError(28, "No space left on device", "/s/part")).error()
    assert isinstance(again, OSError)
    assert again.errno == 28
    assert "/s/part" in str(again)
    assert is_disk_full(again)


def test_a_bug_keeps_where_it_was_and_a_users_fault_does_not() -> None:
    def broken() -> Exception:
        try:
            raise _Odd("x")
        except _Odd as error:
            return Fault.of(error).error()

    found = broken()
    assert type(found) is RuntimeError
    assert "_Odd: x" in str(found)
    assert "in broken" in found.__notes__[0]
    assert not hasattr(Fault.of(DataError("x")).error(), "__notes__")


class _Odd(Exception):
    """Of a library that the driver does not have."""


def test_a_worker_of_another_version_is_refused_by_its_node() -> None:
    here = facts()
    fleet_driver.check_version(here)
    with pytest.raises(EngineError, match=r"node n7 has tutelage 0\.0\.1, and this one"):
        fleet_driver.check_version(Facts("n7", 1, "0.0.1", here.python))
    with pytest.raises(EngineError, match=r"node n7 has Python 3\.9, and this one 3\.1"):
        fleet_driver.check_version(Facts("n7", 1, here.version, "3.9"))


def test_room_is_counted_by_node_and_shares_are_exact() -> None:
    node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "NPU": 3.0}}
    dead = {**node, "Alive": False}
    room = fleet_cluster.whole_room
    assert room([node, node, dead], Fleet(cpus=3)) == 4  # not 16 / 3
    assert room([node], Fleet(cpus=0.5, gpus=0.1)) == 10
    assert room([node], Fleet(resources={"NPU": 2})) == 1
    assert room([node], Fleet(cpus=9)) == 0


def test_threads_are_those_of_the_recipe_or_the_actors_cpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUTELAGE_KEY", "k")
    monkeypatch.setenv("OTHER_KEY", "k")
    given = RayFleet(Fleet(cpus=4), threads=2)._environment()
    assert given["OMP_NUM_THREADS"] == "2"
    assert RayFleet(Fleet(cpus=4))._environment()["OMP_NUM_THREADS"] == "4"
    assert RayFleet(Fleet(cpus=0.5))._environment()["OMP_NUM_THREADS"] == "1"
    assert given["TUTELAGE_KEY"] == "k"
    assert given["HF_HUB_OFFLINE"] == "1"
    assert "OTHER_KEY" not in given


def test_nothing_at_the_address_is_said_at_once_and_nothing_is_lost(
    work: WorkDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(EngineError, match=r"nothing answers at 127\.0\.0\.1:1; set runtime\.ray"):
        run(work, address="127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(EngineError, match=r"nothing answers at 127\.0\.0\.1:2"):
        run(work, address="auto")
    assert not list(work.scratch("fleet").iterdir())


def test_of_rays_many_lines_the_one_that_says_why_is_left() -> None:
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\nThe actor "
        "is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: End of file. Some common causes include: (1) the OOM killer."
    )
    assert fleet_driver._why(RuntimeError(text)) == "End of file"
    assert fleet_driver._why(RuntimeError("")) == "RuntimeError"
