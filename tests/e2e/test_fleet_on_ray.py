"""Shards over a real Ray cluster on this machine: the bytes of one process, whoever dies."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from digests import digests
from fleet_begins import made, writing
from tiny import write_model

from tutelage.core.artifact import WorkDir
from tutelage.core.errors import DataError, EngineError
from tutelage.core.progress import Reporter
from tutelage.core.shards import run_shards, shards
from tutelage.engines.fleet import RayFleet
from tutelage.recipe.tables import Fleet

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
PATIENCE = 120.0
RAY = Path(sys.executable).with_name("ray")
TESTS = Path(__file__).parents[1]
RECIPE = """
name = "tiny"
seed = 3
[models.teacher]
source = "{teacher}"
[steps.sums]
stage = "data"
[[steps.sums.sources]]
source = "task:modchain"
limit = 12
task_config = {{ steps = [1, 1], prompts_only = true }}
[[steps.sums.sources]]
source = "bundled:prompts"
limit = 4
[steps.answers]
stage = "synthesize"
teacher = "teacher"
prompts = "sums"
mode = "fast"
samples = 2
verifier = "exact"
max_tokens = 24
shard_rows = 8
[steps.rollouts]
stage = "rollout"
model = "teacher"
prompts = "sums"
mode = "fast"
max_tokens = 200
shard_rows = 1
[steps.targets]
stage = "score"
teacher = "teacher"
rollouts = "rollouts"
tau = 0.02
shard_rows = 4
"""


class Head:
    """A Ray cluster of one node, with two CPUs to give and a token of its own."""

    def __init__(self) -> None:
        with socket.socket() as found:
            found.bind(("", 0))
            self.address = f"127.0.0.1:{found.getsockname()[1]}"
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: a socket's path is
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "PYTHONPATH": str(TESTS), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }  # fmt: skip
        command = [
            RAY, "start", "--head", "--block", "--num-cpus=2",
            f"--port={self.address.split(':')[1]}", "--include-dashboard=false",
            f"--temp-dir={self.folder}", f"--object-store-memory={100 * 2**20}",
            "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, env={**os.environ, **self.environment}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes whose command line begins with or holds `name`."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()[:2]):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def is_up(self) -> bool:
        return bool(self.processes("raylet/raylet")) or self._process.poll() is not None

    def lose(self) -> None:
        """As when its machine is gone."""
        for process in [*self.processes("gcs_server"), *self.processes("raylet/raylet")]:
            process.kill()

    def close(self) -> None:
        left = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        self._process.wait(PATIENCE)
        for process in left:
            if process.is_running():
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    head = Head()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in head.environment.items():
            patch.setenv(name, value)
        try:
            wait_for(head.is_up)
            yield head
        finally:
            head.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "tiny.toml").write_text(RECIPE.format(teacher=write_model(folder / "teacher")))
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes."""
    store = tmp_path_factory.mktemp("alone")
    ended(started(recipe, store))
    return digests(store)


def wait_for(there: Callable[[], object]) -> object:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := there():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{there} was waited for in vain")


def started(recipe: Path, store: Path, address: str = "", until: str = "") -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "tutelage", "run", recipe, "--store", store,
        "--set", "runtime.threads=1",
    ]  # fmt: skip
    if address:
        command += ["--set", "runtime.executor=ray", "--set", f"runtime.ray.address={address}"]
    if until:
        command += ["--until", until]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    return said


def run(
    folder: Path, address: str, *, fault: str = "", seconds: float = 0.0, items: int = 16
) -> list[str]:
    """Cheap shards of 4 items in this process; returns what was said."""
    said: list[str] = []

    class Heard(Reporter):
        def say(self, text: str, *, style: str = "") -> None:
            said.append(text)

    work = WorkDir.open(
        folder, reporter=Heard(quiet=True), executor=RayFleet(Fleet(address=address)), device="cpu"
    )
    begin = partial(writing, work.site(), seconds, fault)
    run_shards(work, shards(items, 4), begin, label="x", tokens_each=2)
    return said


def test_auto_without_a_cluster_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("gcs_server" in process.name() for process in psutil.process_iter()):
        pytest.skip("a Ray cluster runs on this machine")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(EngineError, match=r"no Ray cluster to join .* start one with `ray start"):
        run(tmp_path / "work", "auto")


def test_all_stages_give_the_bytes_of_one_process_also_when_a_worker_is_killed_at_work(
    head: Head, recipe: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    process = started(recipe, tmp_path, head.address)

    def a_worker() -> psutil.Process | None:  # while rollouts are sampled
        if list(tmp_path.glob("artifacts/rollout/*.partial/part-*.parquet")):
            return next(iter(head.processes("ray::Worker.make")), None)
        return None

    victim = wait_for(a_worker)
    assert isinstance(victim, psutil.Process)
    victim.kill()
    said = ended(process)
    assert "was lost at part-" in said
    assert "2 actors on 1 node (1 CPU each)" in said
    assert digests(tmp_path) == alone
    assert {name.split("/")[0] for name in alone} == {"sums", "answers", "rollouts", "targets"}
    assert "answers/quarantine/failed.jsonl" in alone  # the verifier was at work
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_runs_at_once_make_each_step_once(
    head: Head, recipe: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    both = [started(recipe, tmp_path, head.address, until="answers") for _ in range(2)]
    said = "".join(ended(process) for process in both)
    assert said.count("answers (synthesize)") == 1
    assert digests(tmp_path) == {
        name: digest for name, digest in alone.items() if name.startswith(("sums/", "answers/"))
    }


def test_shards_are_handed_out_in_order_to_workers_with_threads_of_their_own(
    head: Head, tmp_path: Path
) -> None:
    run(tmp_path, head.address, seconds=0.1)
    lines = [line.split() for line in (tmp_path / "made.log").read_text().splitlines()]
    assert sorted(name for name, _, _ in lines) == [f"part-{i:05d}" for i in range(4)]
    assert made(tmp_path)[-1] in ("part-00002", "part-00003")
    assert len({pid for _, pid, _ in lines}) == 2
    assert {threads for _, _, threads in lines} == {"1"}
    assert (tmp_path / "part-00003.txt").read_text() == "12\n13\n14\n15\n"


def test_what_a_worker_raises_stops_the_step_as_it_is_and_finished_shards_are_kept(
    head: Head, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: not a conversation; mend it$"):
        run(tmp_path, head.address, fault="data:part-00003", seconds=0.05)
    with pytest.raises(ZeroDivisionError, match="a bug of ours") as caught:
        run(tmp_path, head.address, fault="bug:part-00003")
    assert "fleet_begins.py" in caught.value.__notes__[0]
    assert made(tmp_path).count("part-00000") == 1  # the second run did not make it again
    run(tmp_path, head.address)
    assert (tmp_path / "part-00003.txt").exists()


def test_what_beginning_raises_stops_the_step_as_it_is(head: Head, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: not a conversation; mend it$"):
        run(tmp_path, head.address, fault="begin")


def test_a_killed_workers_shard_is_made_again_and_nothing_of_it_is_left(
    head: Head, tmp_path: Path
) -> None:
    work = WorkDir.open(tmp_path, reporter=Reporter(quiet=True), device="cpu")
    heard: list[int] = []
    said: list[str] = []
    done: list[str] = []
    RayFleet(Fleet(address=head.address)).run(
        shards(16, 4), partial(writing, work.site(), 0.4, "die-once:part-00001"),
        on_tokens=heard.append, on_done=lambda shard, *_: done.append(shard.name), say=said.append,
    )  # fmt: skip
    again = [f"part-0000{i}" for i in (0, 1, 1, 2, 3)]
    assert sorted(made(tmp_path)) == again
    assert sorted(done) == sorted(set(again))
    assert any("lost at part-00001, which is made again" in line for line in said)
    assert min(heard) < 0  # what the lost one had told is taken back,
    assert sum(heard) == 32  # so that nothing counts twice
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("die:part-00001", r"part-00001 took 3 workers with it.*finished shards are kept"),
        ("die-at-begin", r"5 workers were lost and no shard was .*finished shards are kept"),
    ],
)  # fmt: skip
def test_workers_that_die_again_and_again_stop_the_step(
    head: Head, tmp_path: Path, fault: str, line: str
) -> None:
    with pytest.raises(EngineError, match=line):
        run(tmp_path, head.address, fault=fault)


def test_an_actor_that_no_node_can_hold_is_refused_at_once(head: Head, tmp_path: Path) -> None:
    work = WorkDir.open(tmp_path, reporter=Reporter(quiet=True), device="cpu")
    work.executor = RayFleet(Fleet(address=head.address, gpus=1))
    with pytest.raises(EngineError, match=r"no node of the cluster has 1 CPU, 1 GPU for an actor"):
        run_shards(work, shards(4, 4), partial(writing, work.site()), label="x", tokens_each=2)


def test_a_node_that_does_not_see_the_steps_folder_is_refused_by_its_name(
    head: Head, tmp_path: Path
) -> None:
    hidden = tmp_path / "store"
    hidden.mkdir()
    # A mount of its own over the store: what the node sees there is another, empty folder.
    code = f"mount -t tmpfs none {hidden} && exec {RAY} start --address={head.address} --block "
    code += "--num-cpus=1 --resources='{\"blind\": 1}' --min-worker-port=0 --max-worker-port=0"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    node = subprocess.Popen(["unshare", "-m", "sh", "-c", code], stdout=subprocess.DEVNULL)
    work = WorkDir.open(hidden / "work", reporter=Reporter(quiet=True), device="cpu")
    work.executor = RayFleet(Fleet(address=head.address, resources={"blind": 1}))

    def refused() -> str:  # "no node has it" until the node has joined
        with pytest.raises(EngineError) as caught:
            run_shards(work, shards(4, 4), partial(writing, work.site()), label="x", tokens_each=2)
        return str(caught.value) if "no node of the cluster" not in str(caught.value) else ""

    try:
        said = wait_for(refused)
        assert f"the node {socket.gethostname()} does not see {work.path}" in str(said)
    finally:
        node.terminate()
        node.wait(PATIENCE)


def test_a_killed_run_goes_on_where_it_was_and_leaves_no_worker(head: Head, tmp_path: Path) -> None:
    code = f"import test_fleet_on_ray as test, pathlib; test.run(pathlib.Path({str(tmp_path)!r}), "
    code += f"{head.address!r}, seconds=0.3)"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS / 'e2e'}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: "part-00000" in _text(tmp_path / "ledger.json"))
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    wait_for(lambda: not head.processes("ray::Worker"))
    before = made(tmp_path)
    assert before.count("part-00000") == 1
    run(tmp_path, head.address)
    assert made(tmp_path)[len(before) :].count("part-00000") == 0
    assert len(list(tmp_path.glob("part-*.txt"))) == 4


def test_a_cluster_that_vanishes_is_said_and_the_run_goes_on_with_another_executor(
    head: Head, tmp_path: Path
) -> None:
    code = f"import test_fleet_on_ray as test, pathlib; test.run(pathlib.Path({str(tmp_path)!r}), "
    code += f"{head.address!r}, seconds=1.0)"
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS / 'e2e'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: "part-00000" in _text(tmp_path / "ledger.json"))
    head.lose()
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "EngineError: the Ray cluster is gone" in said
    assert "finished shards are kept: run again" in said
    before = made(tmp_path)
    work = WorkDir.open(tmp_path, reporter=Reporter(quiet=True), device="cpu")
    run_shards(work, shards(16, 4), partial(writing, work.site()), label="x", tokens_each=2)
    assert "part-00000" not in made(tmp_path)[len(before) :]
    assert len(list(tmp_path.glob("part-*.txt"))) == 4


def test_a_ray_of_our_own_is_started_for_the_step_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = set(psutil.Process().children(recursive=True))  # the shared cluster's
    said = run(tmp_path / "work", "local", items=8)
    assert len(list((tmp_path / "work").glob("part-*.txt"))) == 2
    assert any("on 1 node (1 CPU each)" in line for line in said)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]
    assert not (tmp_path / "home/.ray").exists()  # a token there would change later clusters


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
