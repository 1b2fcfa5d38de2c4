"""This machine: what is installed, what is free, and what can be had with one line."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tutelage.core.errors import TutelageError
from tutelage.doctor.engines import installed
from tutelage.doctor.findings import Finding, ok, unchecked, warn
from tutelage.doctor.room import existing_folder, gigabytes
from tutelage.evals.sandbox import available
from tutelage.models import catalog
from tutelage.store import Store

EXTRAS = {
    "tasks": (("reasoning_gym", "math_verify"), "procedural tasks and maths, with graders"),
    "data": (("py3langid",), "the language filter"),
    "edge": (("xllamacpp",), "runs the exported GGUF"),
    "evals": (("lm_eval", "math_verify"), "standard benchmarks"),
    "lora": (("peft",), "adapters: training with the table lora, models with adapter"),
    "qlora": (("peft", "bitsandbytes"), "adapters over a base in 4 or 8 bits"),
    "ray": (("ray",), "shards over a cluster"),
    "trackers": (("tensorboard",), "curves of a training while it runs"),
    "vllm": (("vllm",), "the engine vllm, for GPUs and NPUs"),
}
"""The extras of this package: their modules and what they are for."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LITTLE_DISK = 5e9
LITTLE_MEMORY = 3e9


def examine(store: Store) -> list[Finding]:
    """What there is; nothing here advises against, as no recipe asks for it yet."""
    return [*_python(), *_size(store), *_extras(), *_programs(), *_models(), _store(store)]


def _python() -> Iterator[Finding]:
    yield ok("python", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    import torch

    from tutelage.models.load import pick_device

    try:
        device = pick_device("auto")
    except TutelageError as error:
        yield warn("torch", str(error), "see its own installation page")
        return
    where = "no accelerator, the CPU" if device.type == "cpu" else str(device.type)
    yield ok("torch", f"{torch.__version__}, {where}")


def _size(store: Store) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    text = f"{gigabytes(memory.available)} of {gigabytes(memory.total)} free"
    yield ok("cores", str(os.cpu_count()))
    if memory.available < LITTLE_MEMORY:
        yield warn("memory", text, "close programs: the quickstart needs about 3 GB")
    else:
        yield ok("memory", text)
    folder = existing_folder(store.root)
    free = psutil.disk_usage(str(folder)).free
    text = f"{gigabytes(free)} free in {folder}"
    if free < LITTLE_DISK:
        yield warn("disk", text, "make room, or take another disk with --store")
    else:
        yield ok("disk", text)


def _extras() -> Iterator[Finding]:
    for extra, (modules, use) in EXTRAS.items():
        missing = [module for module in modules if not installed(module)]
        if missing:
            yield unchecked(f"extra {extra}", f"not installed ({', '.join(missing)}): {use}",
                            f"pip install 'tutelage[{extra}]'")  # fmt: skip
        else:
            yield ok(f"extra {extra}", use)


def _programs() -> Iterator[Finding]:
    if problem := available():
        yield warn("bubblewrap", f"no sandbox for programs: {problem}",
                   "apt-get install bubblewrap util-linux")  # fmt: skip
    else:
        yield ok("bubblewrap", "the sandbox for programs works")
    browser = next((name for name in BROWSERS if shutil.which(name)), "")
    if browser:
        yield ok("chromium", f"{browser}, for pictures of pages")
    else:
        yield unchecked("chromium", "not found: only pictures of pages want it",
                        "apt-get install chromium")  # fmt: skip


def _models() -> Iterator[Finding]:
    for status in catalog.status():
        name = f"bundled:{status.model.name}"
        if status.path:
            yield ok(name, f"in {status.path}")
        else:
            yield unchecked(name, f"not fetched yet ({gigabytes(status.model.gguf_bytes)})",
                            f"tutelage models pull {status.model.name}")  # fmt: skip


def _store(store: Store) -> Finding:
    if not store.root.exists():
        return ok("store", f"none at {store.root} yet")
    return ok("store", f"{gigabytes(_bytes(store.root))} in {store.root}, "
                       f"{len(store.run_names())} runs")  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
