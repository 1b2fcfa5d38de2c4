"""Whether memory and disk hold what the steps need at most (`tutelage plan` has the figures)."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from tutelage.doctor.case import Case
from tutelage.doctor.findings import Finding, against, ok, unchecked, warn
from tutelage.estimate import estimate
from tutelage.models import catalog

WAITING = ("run", "resume")


def check(case: Case) -> list[Finding]:
    """Every check of this file. Raises RecipeError for a curriculum that cannot be."""
    costs = estimate(list(case.planned.values()), case.store)
    by_name = {
        name: costs[item.node.name]
        for name, item in case.planned.items() if item.status in WAITING
    }  # fmt: skip
    if not by_name:
        return [ok("room", "every step is finished: nothing more is needed")]
    return [
        *_disk(case, sum(cost.disk_bytes for cost in by_name.values())),
        _memory(case, {name: cost.memory_bytes for name, cost in by_name.items()}),
    ]


def gigabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def _disk(case: Case, steps: int) -> Iterator[Finding]:
    fetched = sum(_to_fetch(case, name) for name in case.outside)
    store = existing_folder(case.store.root)
    cache = existing_folder(catalog.cache_directory())
    needs = {store: float(steps)}
    if fetched:
        same = store.stat().st_dev == cache.stat().st_dev
        needs[store if same else cache] = needs.get(store if same else cache, 0.0) + fetched
    for folder, needed in needs.items():
        name = "disk of the store" if folder == store else "disk of the cache"
        free = psutil.disk_usage(str(folder)).free
        text = f"up to {gigabytes(needed)} are written, {gigabytes(free)} are free"
        if needed > free:
            yield against(
                name, f"{text} in {folder}",
                "make room, or take another disk (--store, TUTELAGE_CACHE)",
            )  # fmt: skip
        elif needed > 0.8 * free:
            yield warn(name, f"{text} in {folder}", "make room before a long run")
        else:
            yield ok(name, text)
    if unknown := [name for name, one in case.outside.items() if not _size(case, name)]:
        why = f"the size of {', '.join(unknown)} is known once it is fetched"
        yield unchecked("disk of the models", why)


def _memory(case: Case, needs: dict[str, int]) -> Finding:
    name = "memory"
    from tutelage.models.load import pick_device  # torch, for the one question where a model goes

    device = pick_device(case.recipe.runtime.device)
    if device.type != "cpu":
        return unchecked(name, f"the models go to {device.type}: what is free there is not known")
    step, needed = max(needs.items(), key=lambda item: item[1])
    if not needed:
        return unchecked(name, "the models' sizes are known once they are fetched")
    memory = psutil.virtual_memory()
    text = (
        f"{step} needs up to {gigabytes(needed)}; {gigabytes(memory.available)} of "
        f"{gigabytes(memory.total)} are free"
    )
    do = "a smaller model, lower batch_rows or pack_tokens, or a larger machine"
    if needed > memory.total:
        return against(name, text, do)
    jobs = case.recipe.runtime.jobs
    if needed > memory.available:
        return warn(name, text, "close other programs before the run")
    if jobs > 1 and needed * jobs > memory.available:
        return warn(name, f"{text}, and {jobs} steps run at a time", "lower runtime.jobs")
    return ok(name, text)


def _size(case: Case, name: str) -> int:
    facts = case.outside[name].facts
    return facts.bytes if facts else 0


def _to_fetch(case: Case, name: str) -> int:
    located = case.outside[name]
    return 0 if located.path else _size(case, name)
