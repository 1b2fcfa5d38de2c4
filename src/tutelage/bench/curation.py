"""What the funnel costs and finds: synthetic instruction rows with planted faults, all counted.

Honest rows fill phrases of TEMPLATES with random words, so that they share wording as real ones do;
a fifth are edits of an earlier row (1 to 3 words, case, punctuation), some hold a real-looking
evaluation item, some are damaged. What is planted is written beside the rows, so that recall and
false drops are exact.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.core.artifact import WorkDir, measure_peak
from tutelage.core.progress import Reporter
from tutelage.recipe.curation import Data
from tutelage.stages import data

DUPLICATE_SHARE, LEAK_SHARE, DAMAGE_SHARE = 0.20, 0.01, 0.02
SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "ter",
    "ven",
    "dra",
    "sol",
    "pe",
    "ri",
    "nu",
    "gath",
    "el",
    "os",
    "qui",
]
TEMPLATES = (
    "Explain to a beginner how the {} of a {} differs from its {} and give two examples about {}",
    "Write a short letter to the {} in which you ask politely for {} and mention the {} of {}",
    "Summarise the following notes on {} in three sentences and keep what is said about {} and {}",
    "A shop sells {} and {} every week; describe how the owner should count {} before {}",
    "Translate this remark about {} for a {} reader and keep the tone of the {} and the {}",
    "List the steps by which a {} becomes a {} and say which of them needs {} or {}",
)  # fmt: skip
WORDS_A_SLOT = 8
ITEMS = 500


def run(*, rows: int, workers: int, folder: Path) -> dict[str, Any]:
    """Write the rows, run the data stage on them, and compare what it dropped with the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    source, evaluation, truth = folder / "rows.jsonl", folder / "items.jsonl", folder / "truth.json"
    if not truth.exists():
        _write(source, evaluation, truth, rows)
    config = Data.model_validate(
        {
            "stage": "data", "seed": 0, "max_bad_share": 0.05,
            "sources": [{"source": str(source)}],
            "filters": [{"name": "encoding"}, {"name": "repetition"}, {"name": "think-markers"},
                        {"name": "answer-missing"}, {"name": "refusal"}],
            "decontaminate": [{"source": str(evaluation)}], "duplicates": {},
        }
    )  # fmt: skip
    shutil.rmtree(folder / "work", ignore_errors=True)
    work = WorkDir.open(
        folder / "work", reporter=Reporter(quiet=True), device="cpu", workers=workers
    )
    peak, started = measure_peak(), time.monotonic()
    summary = data.run(config, {}, work)
    seconds = time.monotonic() - started
    found = _found(folder / "work" / "quarantine", json.loads(truth.read_text()))
    return {
        "rows": rows, "workers": workers, "seconds": seconds, "rows_s": rows / seconds,
        "peak_main_mib": peak() / 2**20, **found, "kept": summary["rows"],
    }  # fmt: skip


def _found(quarantine: Path, truth: dict[str, str]) -> dict[str, Any]:
    """Recall of each planted fault by the step that is for it, and honest rows dropped."""
    by_step: dict[str, set[str]] = {}
    for path in sorted(quarantine.glob("*.jsonl")):
        with path.open(encoding="utf-8") as stream:
            by_step[path.stem] = {json.loads(line)["place"].partition(":")[2] for line in stream}
    planted = Counter(truth.values())
    dropped = set().union(*by_step.values())
    duplicates = {row for row, kind in truth.items() if kind == "duplicate"}
    leaks = {row for row, kind in truth.items() if kind == "leak"}
    damage = {row for row, kind in truth.items() if kind == "damage"}
    caught = dropped - by_step.get("duplicates", set()) - by_step.get("contamination", set())
    honest = truth_rows(quarantine) - len(truth)
    return {
        "planted": dict(planted),
        "duplicates_found": len(duplicates & dropped) / max(1, len(duplicates)),
        "leaks_found": len(leaks & by_step.get("contamination", set())) / max(1, len(leaks)),
        "damage_found": len(damage & caught) / max(1, len(damage)),
        "false_drops": len(dropped - set(truth)) / max(1, honest),
    }


def truth_rows(quarantine: Path) -> int:
    """Rows that were read."""
    return json.loads((quarantine.parent / "funnel.json").read_text())["read"]


def _write(source: Path, evaluation: Path, truth: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    items = [_sentence(rng) + " and why?" for _ in range(ITEMS)]
    evaluation.write_text(
        "".join(json.dumps({"question": item}) + "\n" for item in items), encoding="utf-8"
    )
    planted: dict[str, str] = {}
    with source.open("w", encoding="utf-8") as stream:
        for number, (kind, line) in enumerate(_lines(rng, items, rows), 1):
            stream.write(line + "\n")
            if kind:
                planted[str(number)] = kind
    truth.write_text(json.dumps(planted))


def _lines(rng: np.random.Generator, items: list[str], rows: int) -> Iterator[tuple[str, str]]:
    """(kind of fault or "", line of JSON) for each row; an edit follows its original anywhere."""
    recent: list[str] = []
    chances = rng.random(rows)
    for chance in chances.tolist():
        answer = _sentence(rng)
        if chance < DUPLICATE_SHARE and recent:
            prompt = _edited(recent[rng.integers(len(recent))], rng)
            yield "duplicate", json.dumps({"prompt": prompt, "response": answer})
        elif chance < DUPLICATE_SHARE + LEAK_SHARE:
            leak = items[rng.integers(len(items))]
            prompt = f"{_sentence(rng)}. {leak} {_sentence(rng)}"
            yield "leak", json.dumps({"prompt": prompt, "response": answer})
        elif chance < DUPLICATE_SHARE + LEAK_SHARE + DAMAGE_SHARE:
            yield "damage", _damaged(_sentence(rng), answer, rng)
        else:
            prompt = _sentence(rng)
            recent.append(prompt)
            if len(recent) > 50_000:
                recent[rng.integers(len(recent))] = recent.pop()
            yield "", json.dumps({"prompt": prompt, "response": answer})


def _sentence(rng: np.random.Generator) -> str:
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    slots = [
        " ".join("".join(SYLLABLES[s] for s in word) for word in slot)
        for slot in rng.integers(0, len(SYLLABLES), (4, WORDS_A_SLOT, 3)).tolist()
    ]
    return template.format(*slots)


def _edited(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    for place in rng.integers(0, len(words), rng.integers(1, 4)).tolist():
        words[place] = "".join(SYLLABLES[s] for s in rng.integers(0, len(SYLLABLES), 3))
    edited = " ".join(words)
    return edited.upper() + "!" if rng.random() < 0.2 else edited


def _damaged(prompt: str, answer: str, rng: np.random.Generator) -> str:
    kind = rng.integers(5)
    if kind == 0:
        return json.dumps({"prompt": prompt, "response": answer[:20] + "\ufffd" + answer[20:]})
    if kind == 1:
        return json.dumps({"prompt": prompt, "response": (answer[:40] + " ") * 40})
    if kind == 2:
        return json.dumps({"prompt": prompt, "response": answer + " <think> and so"})
    if kind == 3:
        return json.dumps({"prompt": prompt, "response": "I'm sorry, but I can't help with that."})
    return json.dumps({"prompt": prompt, "response": answer})[:-12]  # not JSON any more
