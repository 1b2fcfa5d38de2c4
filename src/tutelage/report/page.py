"""The page of a run: one self-contained HTML file, from the artifacts' manifests and files alone.

Gathers what each part shows and renders `page.html.j2`, which escapes all it is given. No clock and
no chance: the same artifacts give the same bytes. No torch.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tutelage.core.artifact import TOKEN_KINDS, Artifact
from tutelage.core.files import write_text
from tutelage.report import charts, figures, funnel, graph
from tutelage.report.run import SHORT, Run, Step, read_json, read_metrics, read_run
from tutelage.report.scores import Evaluation, read_evaluation

TOKEN_TITLES = {
    "student_decoded": "Student decoded", "teacher_decoded": "Teacher decoded",
    "teacher_prefilled": "Teacher prefilled", "trained": "Trained",
}  # fmt: skip
CURVES = ("loss", "forward_kl", "kl", "staleness")
"""Fields of `metrics.jsonl` that are in nats per token and worth a line."""
ENDS = 10  # a curve's beginning and end are told as the mean of a tenth of its steps


def write_page(path: Path, name: str, artifacts: Mapping[str, Artifact]) -> None:
    """Write the page of the run `name` over its artifacts by step name.

    Any subset of steps will do. Raises ArtifactError when a file of an artifact cannot be read.
    """
    run = read_run(name, artifacts)
    evaluations = [
        read_evaluation(run, step, artifact, f"kl{index}")
        for index, (step, artifact) in enumerate(run.of("evaluate"))
    ]
    template = resources.files("tutelage.report").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(
        count=figures.count, duration=figures.duration, size=figures.size, number=figures.number,
        share=figures.share, tenths=figures.tenths, svg=Markup,
    )  # fmt: skip
    page = environment.from_string(template).render(
        run=run, headline=_headline(run, evaluations), totals=run.totals(), kinds=TOKEN_TITLES,
        graph=graph.draw(run), steps=[_step_row(run, step) for step in run.steps],
        data=funnel.sections(run), curricula=funnel.curricula(run),
        curves=_curves(run), evaluations=evaluations, exports=_exports(run),
        provenance=_provenance(run), seeds=_seeds(run), settings=_settings(run),
    )  # fmt: skip
    write_text(path, page)


def _headline(run: Run, evaluations: list[Evaluation]) -> str:
    """The sentence of the evaluation that says most: with a distilled model, then in fast mode."""
    told = [evaluation for evaluation in evaluations if evaluation.sentence]
    if told:
        return max(told, key=lambda evaluation: evaluation.weight).sentence
    finished = sum(step.artifact is not None and step.stage != "external" for step in run.steps)
    if not finished:
        return "No step has finished yet."
    return f"No evaluation has finished yet; {finished} steps have."


def _step_row(run: Run, step: Step) -> dict[str, Any]:
    longest = max((s.seconds for s in run.steps), default=0.0)
    return {
        "label": step.label,
        "stage": step.stage,
        "here": step.artifact is not None,
        "reads": [run.label(mark) for mark in step.reads],
        "seconds": step.seconds,
        "share_of_longest": round(100 * step.seconds / longest) if longest else 0,
        "tokens": [step.tokens(kind) for kind in TOKEN_KINDS],
        "memory": step.manifest.get("peak_memory_bytes", 0),
        "bytes": step.bytes,
        "fingerprint": step.fingerprint[:SHORT],
    }


def _curves(run: Run) -> list[dict[str, Any]]:
    shown = []
    for index, (step, artifact) in enumerate(run.of("sft", "distill")):
        path = artifact.path / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        if not lines:
            continue
        series = {
            key: points
            for key in CURVES
            if (points := [(line["step"], line[key]) for line in lines if key in line])
        }
        facts = [
            f"{key} {figures.number(first)} → {figures.number(last)}"
            for key in (*series, *[k for k in ("agreement", "entropy") if k in lines[0]])
            for first, last in [_ends([line[key] for line in lines if key in line])]
        ]
        caption = f"Loss of {step.label} over {len(lines)} steps"
        shown.append(
            {
                "label": step.label,
                "stage": step.stage,
                "svg": charts.curves(f"curve{index}", caption, series) if series else "",
                "steps": len(lines),
                "facts": facts,
            }
        )
    return shown


def _ends(values: list[float]) -> tuple[float, float]:
    width = max(1, len(values) // ENDS)
    return sum(values[:width]) / width, sum(values[-width:]) / width


def _exports(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "label": step.label,
            "model": run.label(artifact.manifest["inputs"]["model"]["fingerprint"]),
            **read_json(artifact.path / "export.json"),
        }
        for step, artifact in run.of("export")
    ]


def _provenance(run: Run) -> list[dict[str, Any]]:
    """What made the steps, once for all that agree; the command line is each step's own."""
    groups: dict[str, dict[str, Any]] = {}
    for step in run.steps:
        facts = {k: v for k, v in step.manifest.get("provenance", {}).items() if k != "argv"}
        if not facts:
            continue
        rows = {k: v for k, v in facts.items() if k != "versions"} | facts.get("versions", {})
        key = json.dumps(facts, sort_keys=True)
        group = groups.setdefault(key, {"labels": [], "rows": _titled(rows)})
        group["labels"].append(step.label)
    return list(groups.values())


def _titled(rows: Mapping[str, Any]) -> dict[str, str]:
    return {
        key.replace("_", " "): "none recorded" if value is None else str(value)
        for key, value in rows.items()
    }


def _seeds(run: Run) -> dict[str, list[str]]:
    """Seed -> the steps that had it."""
    seeds: dict[str, list[str]] = {}
    for step in run.steps:
        config = step.manifest.get("identity", {}).get("config", {})
        if "seed" in config:
            seeds.setdefault(str(config["seed"]), []).append(step.label)
    return seeds


def _settings(run: Run) -> list[dict[str, str]]:
    """The whole identity (settings, inputs, outside content) of each step, and when it was done."""
    return [
        {
            "label": step.label,
            "stage": step.stage,
            "finished": step.manifest.get("finished", "").replace("T", " ").replace("Z", " UTC"),
            "identity": json.dumps(
                step.manifest["identity"], indent=2, sort_keys=True, ensure_ascii=False
            ),
        }
        for step in run.steps
        if "identity" in step.manifest
    ]
