"""What the page says of rows: the funnel of each step that narrows or rates them, and a curriculum.

Turns `look.Look` and `curriculum.json` into what the template shows; reads no row itself.
"""

from collections.abc import Mapping
from typing import Any

from tutelage.core.artifact import Artifact
from tutelage.report import charts, figures
from tutelage.report.histograms import Histogram
from tutelage.report.look import FUNNEL, QUARANTINE, Dropped, Look, look
from tutelage.report.run import Run, read_json

SAMPLES = 3  # kept ones, and as many of each reason to drop
SEED = 0
CURRICULUM = "curriculum.json"


def sections(run: Run) -> list[dict[str, Any]]:
    """One a step that kept its counts, put rows aside, or rated them; in the run's order.

    Raises ArtifactError when a file of theirs cannot be read.
    """
    found = run.of("data", "curate", "difficulty", "synthesize")
    shown = [(step, artifact) for step, artifact in found if _tells(artifact)]
    return [
        {
            "label": step.label,
            "stage": step.stage,
            **_section(look(artifact, samples=SAMPLES, seed=SEED), f"data{index}"),
        }
        for index, (step, artifact) in enumerate(shown)
    ]


def _tells(artifact: Artifact) -> bool:
    """Answers that all stayed are no funnel; a page over many such steps would drown in them."""
    if artifact.stage == "difficulty":
        return bool(artifact.shards())
    return any((artifact.path / name).exists() for name in (FUNNEL, QUARANTINE))


def _section(shown: Look, key: str) -> dict[str, Any]:
    several = [histogram for histogram in shown.histograms if len(histogram.bars) > 1]
    return {
        "sentence": _sentence(shown),
        "read": shown.read,
        "funnel": [
            {
                "name": step.name,
                "dropped": step.dropped,
                "share": figures.share(step.dropped / (step.dropped + step.left))
                if step.dropped else "",
                "left": step.left,
                "part": round(100 * step.left / shown.read, 2) if shown.read else 0,
            }
            for step in shown.funnel
        ],
        "charts": [_chart(histogram, f"{key}-{n}") for n, histogram in enumerate(several)],
        "same": [f"{h.name} {h.bars[0][0]}" for h in shown.histograms if len(h.bars) == 1],
        "groups": [
            {"title": f"{len(shown.kept):,} of {shown.rows:,} rows kept", "samples": shown.kept},
            *map(_group, shown.dropped),
        ],
    }  # fmt: skip


def _sentence(shown: Look) -> str:
    if not shown.read:
        return f"{shown.rows:,} rows."
    left = (
        f"{shown.rows:,} of {shown.read:,} rows are left ({figures.share(shown.rows / shown.read)})"
    )
    most = max(shown.funnel, key=lambda step: step.dropped, default=None)
    if most is None or not most.dropped:
        return f"{left}."
    return f"{left}; {most.name} took most of the others, {most.dropped:,}."


def _group(dropped: Dropped) -> dict[str, Any]:
    title = f"{len(dropped.samples):,} of {dropped.count:,} rows dropped by {dropped.name}"
    return {"title": title, "samples": dropped.samples}


def _chart(histogram: Histogram, key: str) -> str:
    facts = [histogram.name, histogram.unit]
    if histogram.mean is not None:
        facts.append(f"mean {figures.tenths(histogram.mean)}")
    title = ", ".join(filter(None, facts))
    return charts.bars(key, f"Rows by {title}", title, histogram.bars)


def curricula(run: Run) -> list[dict[str, Any]]:
    """What each training step with a curriculum met: over its examples, and in each stage.

    Raises ArtifactError when the file cannot be read.
    """
    found = run.of("sft")
    with_one = [(s, a) for s, a in found if (a.path / CURRICULUM).exists()]
    return [
        {"label": step.label, **_curriculum(read_json(artifact.path / CURRICULUM), index)}
        for index, (step, artifact) in enumerate(with_one)
    ]


def _curriculum(told: Mapping[str, Any], index: int) -> dict[str, Any]:
    series, examples = told["series"], sum(part["examples"] for part in told["parts"])
    caption = "Share of each mode, and mean difficulty, over the examples met"
    # Over examples: of a short training several windows end in one step, and would have no width.
    unit = f"examples, in {series['step'][-1]:,} optimizer steps"
    return {
        "svg": charts.course(
            f"course{index}", caption, series["examples"], series["shares"], series["difficulty"],
            unit,
        ),
        "parts": [
            {**part, "share": figures.share(part["examples"] / examples)} for part in told["parts"]
        ],
    }  # fmt: skip
