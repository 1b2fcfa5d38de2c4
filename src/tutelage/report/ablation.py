"""The page of an ablation: one self-contained HTML file from the numbers of `ablation.json`.

Owns how arms, costs and verdicts are laid out; computes no statistic. No clock and no chance: the
same record gives the same bytes.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tutelage.core.artifact import TOKEN_KINDS
from tutelage.core.files import write_text
from tutelage.report import ablation_words as words
from tutelage.report import figures
from tutelage.report.ablation_charts import Dot, against_flops, dots
from tutelage.report.ablation_words import Record

SAME_SHARE = 0.02
"""Seeds whose costs differ by no more than this are told by their mean."""
SETTLED = ("holds", "higher", "lower")
KINDS = {
    "student_decoded": "student decoded", "teacher_decoded": "teacher decoded",
    "teacher_prefilled": "teacher prefilled", "trained": "trained",
}  # fmt: skip


def write_page(path: Path, record: Record) -> None:
    """Write the page of a record, as `ablation.json` holds it."""
    folder = resources.files("tutelage.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        count=figures.count, duration=figures.duration, share=figures.share, svg=Markup,
    )  # fmt: skip
    template = folder.joinpath("ablation.html.j2").read_text("utf-8")
    # One style for both pages: it stands in the template of the run's page.
    run_page = folder.joinpath("page.html.j2").read_text("utf-8")
    style = re.search(r"<style>\n(.*?)</style>", run_page, re.DOTALL)
    assert style
    numbers = {name: index + 1 for index, name in enumerate(record["arms"])}
    asked = {_key(claim) for claim in record["claims"]}
    conditions = [
        _condition(record, entry, index, numbers)
        for index, entry in enumerate(record["conditions"])
    ]
    page = environment.from_string(template).render(
        record=record, style=Markup(style.group(1)), headline=words.headline(record),
        paragraphs=[p for p in re.split(r"\n\s*\n", record["description"].strip()) if p],
        tally=words.tally(record), warnings=words.warnings(record),
        claims=[_claim(record, claim) for claim in record["claims"]],
        unseen=[words.plainly(record, c) for c in record["claims"] if c["verdict"] not in SETTLED],
        asked=[c for c in conditions if c["key"] in asked or not asked],
        others=[c for c in conditions if asked and c["key"] not in asked],
        kinds=KINDS, costs=_costs(record, numbers), same=SAME_SHARE, given=words.given(record),
        fairness=words.fairness(record), computed=words.computed(record),
    )  # fmt: skip
    write_text(path, page)


def _claim(record: Record, claim: Record) -> dict[str, Any]:
    sign, kind, _ = words.VERDICTS[claim["verdict"]]
    return {
        **claim,
        "sign": sign,
        "kind": kind,
        "better_label": words.label(record, claim["better"]),
        "than_label": words.label(record, claim["than"]),
        "place": words.place(claim),
        "expected": words.expected(claim),
        "estimate": claim["difference"]["estimate"],
        "shown": words.signed_number(claim["difference"]["estimate"], claim["measure"]),
        "interval": words.bounds(claim["difference"], claim["measure"], signed=True),
        "unit": words.UNITS[claim["measure"]],
        "share_text": words.share_text(record, claim),
        "p_shown": figures.p_value(claim["p"]),
        "p_holm_shown": "" if claim["p_holm"] is None else figures.p_value(claim["p_holm"]),
        "seeds": len(record["cells"]),
    }


def _condition(
    record: Record, entry: Record, index: int, numbers: Mapping[str, int]
) -> dict[str, Any]:
    drawn = [_dot(record, name, arm, numbers[name]) for name, arm in entry["arms"].items()]
    place = words.place(entry)
    return {
        "key": _key(entry),
        "title": place,
        "items": entry["items"],
        "shared": entry["shared_items"],
        "fast": entry["mode"] == "fast",
        "dots": dots(f"dots{index}", f"Accuracy of each arm, {place}, with intervals", drawn),
        "scatter": against_flops(
            f"flops{index}", f"Accuracy of each arm against its FLOPs, {place}", drawn
        ),
        "rows": [_arm_row(record, name, arm, numbers[name]) for name, arm in entry["arms"].items()],
        "absent": [
            arm["label"] for name, arm in record["arms"].items() if name not in entry["arms"]
        ],
    }


def _dot(record: Record, name: str, arm: Record, number: int) -> Dot:
    told = record["arms"][name]
    points = {key: 100 * arm["accuracy"][key] for key in ("estimate", "low", "high")}
    return Dot(
        number, told["label"], told["group"], **points,
        seeds=[100 * mean for mean in arm["seed_means"]], flops=told["flops"],
    )  # fmt: skip


def _arm_row(record: Record, name: str, arm: Record, number: int) -> dict[str, Any]:
    return {
        "number": number,
        "label": record["arms"][name]["label"],
        "group": record["arms"][name]["group"],
        "figures": [
            _figure(arm["accuracy"], "accuracy"),
            _figure(arm["to_start"], "accuracy", signed=True),
            _figure(arm["tokens"], "tokens"),
            _figure(arm["truncated_share"], "accuracy"),
            _figure(arm["thinking_share"], "accuracy"),
            _figure(arm["tokens_per_correct"], "tokens"),
        ],
    }


def _figure(entry: Record | None, measure: str, *, signed: bool = False) -> figures.Figure | None:
    if entry is None:
        return None
    text = (
        words.signed_number(entry["estimate"], measure)
        if signed
        else words.plain(entry["estimate"], measure)
    )
    return figures.Figure(entry["estimate"], text, words.bounds(entry, measure, signed=signed))


def _costs(record: Record, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """An arm's costs, each as the mean of the cells and, where they differ, their range."""
    odd = {name: why for group in record["groups"] for name, why in group["unmatched"].items()}
    rows = []
    for name, arm in record["arms"].items():
        cells = list(arm["costs"].values())
        total = [sum(cell["flops"].values()) for cell in cells]
        stages = dict.fromkeys(stage for cell in cells for stage in cell["flops"])
        by_stage = {
            stage: sum(cell["flops"].get(stage, 0.0) for cell in cells) / len(cells)
            for stage in stages
        }
        taught = [words.label(record, teacher) for teacher in arm["teachers"]]
        rows.append(
            {
                "number": numbers[name],
                "label": arm["label"],
                "group": arm["group"],
                "start": words.label(record, arm["start"]) if arm["start"] else "",
                "steps": _mean_and_range([cell["steps"] for cell in cells], figures.count),
                "examples": _mean_and_range([cell["examples"] for cell in cells], figures.count),
                "tokens": [
                    _mean_and_range([cell["tokens"][kind] for cell in cells], figures.count)
                    for kind in TOKEN_KINDS
                ],
                "flops": _mean_and_range(total, words.flops),
                "by_stage": [f"{stage} {words.flops(value)}" for stage, value in by_stage.items()],
                "relative": _relative(arm["flops_relative"]),
                "reference": words.label(record, arm["flops_of"]) if arm["flops_of"] else "",
                "seconds": _mean_and_range([cell["seconds"] for cell in cells], figures.duration),
                "teachers": taught,
                "odd": odd.get(name, ""),
            }
        )
    return rows


def _mean_and_range(values: Sequence[float | None], write: Any) -> tuple[str, str]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not recorded", ""
    # Counts are whole, their mean need not be: it is shown rounded, the exact ones are in the JSON.
    whole = all(isinstance(value, int) for value in known)
    mean = sum(known) / len(known)
    shown = write(round(mean) if whole else mean)
    if max(known) <= min(known) * (1 + SAME_SHARE):
        return shown, ""
    return shown, f"{write(min(known))} to {write(max(known))}"


def _relative(value: float | None) -> str:
    return figures.MISSING if value is None else f"{value:.2f}×"


def _key(entry: Record) -> tuple[str, str, float]:
    return entry["test"], entry["mode"], entry["temperature"]
