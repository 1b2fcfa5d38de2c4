"""A file is whole or absent, and a full disk is recognised whoever reports it."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.core import files


def test_a_block_that_raises_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError, match="boom"), files.atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("boom")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_writing_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tutelage.core import files\n"
        "with files.atomic_path(Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "a.json"
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]


def test_bytes_are_flushed_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = files.fsync, os.replace
    monkeypatch.setattr(files, "fsync", lambda p: (events.append(f"fsync {p.suffix}"), fsync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    files.write_text(tmp_path / "a.json", "x")
    assert events == ["fsync .tmp", "replace", "fsync "]  # the file, its name, its folder


def test_text_is_utf8_with_lf_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "below" / "a.txt"
    files.write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert path.stat().st_mode & 0o777 == 0o644


def test_json_without_a_text_form_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sha256_of_a_file_larger_than_a_read_is_that_of_its_bytes(tmp_path: Path) -> None:
    contents = os.urandom(files.READ_BYTES + 17)
    (tmp_path / "a").write_bytes(contents)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(contents).hexdigest()


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        # the words of safetensors, whose error is a type of its own
        (RuntimeError("Error while serializing: IoError(No space left on device (os error 28))"),
         True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("something else"), False),
    ],
)  # fmt: skip
def test_a_full_disk_is_known_by_number_or_by_text(error: Exception, is_full: bool) -> None:
    assert files.is_disk_full(error) is is_full
