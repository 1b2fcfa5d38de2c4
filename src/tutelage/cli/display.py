"""How answers look on a terminal: tables of plans, runs, steps, models and damage."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.bench.pace import Pace
from tutelage.core.artifact import Artifact
from tutelage.estimate import Estimate
from tutelage.pipeline import Planned, Result

STATUS_STYLE = {"cached": "green", "same": "green", "run": "yellow", "resume": "cyan"}


def plan_table(
    console: Console, planned: Sequence[Planned], estimates: Mapping[str, Estimate],
    *, measured: bool = False,
) -> None:  # fmt: skip
    """Each step, whether it will run and why, and what it would cost at most."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "stage", "status", "tokens", "minutes", "disk", "memory"):
        right = name in ("tokens", "minutes", "disk", "memory")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    total, unknown = 0.0, False
    for item in planned:
        cost = estimates[item.node.name]
        waiting = item.status in ("run", "resume")
        total += (cost.minutes or 0) if waiting else 0
        unknown |= waiting and cost.minutes is None
        figures = (
            (_tokens(cost), _minutes(cost), size(cost.disk_bytes), size(cost.memory_bytes))
            if waiting
            else ("", "", "", "")
        )
        status = f"[{STATUS_STYLE.get(item.status, 'dim')}]{item.status}"
        table.add_row(item.node.name, item.node.stage, status, *figures)
    console.print(table)
    for item in planned:
        for line in _mix(estimates[item.node.name]) if item.status in ("run", "resume") else ():
            console.print(f"  {item.node.name}: {line}", highlight=False, soft_wrap=True)
    # Below the table, not in it: a changed setting is too long for a column.
    for item in planned:
        for reason in item.reasons:
            if item.status != "run" or reason != "never run":
                console.print(f"  {item.node.name}: {reason}", highlight=False, soft_wrap=True)
        for note in item.notes:
            console.print(f"  {item.node.name}: {note}", highlight=False, soft_wrap=True)
    count = sum(item.status in ("run", "resume") for item in planned)
    console.print(
        f"\n{count} of {len(planned)} to run"
        + (
            "; ?: minutes of a model that is not on this machine are not known"
            if unknown
            else f", about {total:.0f} minutes at the pace measured here"
            if measured
            else f", at most about {total:.0f} minutes here "
            "(upper bounds: answers mostly end before max_tokens)"
        )
        if count
        else "\nEverything is finished; nothing to run.",
        highlight=False,
    )


def paces(console: Console, found: Mapping[str, Pace]) -> None:
    """What `plan --measure` measured: speeds, and the targets a teacher would give."""
    for name, pace in found.items():
        speeds = [("answers", pace.decode_s), ("reads", pace.read_s), ("trains", pace.train_s)]
        told = ", ".join(f"{verb} {1 / s:,.0f} tokens/s" for verb, s in speeds if s)
        peaks = [("", pace.inference_bytes), (" when training", pace.train_bytes)]
        memory = ", ".join(f"{size(count)}{when}" for when, count in peaks if count)
        console.print(
            f"\n[bold]{name}[/bold]: {told}; peak {memory}; "
            f"{pace.ended} of {pace.answers} answers ended within {pace.tokens:,} tokens",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        if pace.targets:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for head in ("targets", "ids a token", "bytes a token", "exact mass", "unbiased"):
                table.add_column(head, justify="left" if head == "targets" else "right")
            for cost in pace.targets:
                kept = "yes" if cost.unbiased else "no"
                row = (f"{cost.ids:.1f}", f"{cost.bytes:.0f}", f"{100 * cost.mass:.1f} %", kept)
                table.add_row(cost.setting, *row)
            console.print(table)


def plan_rows(
    planned: Sequence[Planned], estimates: Mapping[str, Estimate],
    paces: Mapping[str, Pace],
) -> list[dict[str, Any]]:  # fmt: skip
    """The plan for `--json`; a model that was measured has its pace."""
    return [
        {
            "step": item.node.name,
            "stage": item.node.stage,
            "status": item.status,
            "reasons": list(item.reasons),
            "notes": list(item.notes),
            "fingerprint": item.fingerprint,
            "estimate": asdict(estimates[item.node.name]),
            **({"pace": asdict(paces[item.node.name])} if item.node.name in paces else {}),
        }
        for item in planned
    ]


def run_table(console: Console, name: str, artifacts: Mapping[str, Artifact]) -> None:
    """A run's finished steps with their costs."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"run {name}",
                  title_justify="left")  # fmt: skip
    for head in ("step", "stage", "seconds", "tokens", "memory", "disk"):
        right = head in ("seconds", "tokens", "memory", "disk")
        table.add_column(head, justify="right" if right else "left", no_wrap=True)
    for step, artifact in artifacts.items():
        manifest = artifact.manifest
        table.add_row(
            step, artifact.stage, f"{manifest['seconds']:,.1f}",
            f"{sum(manifest['tokens'].values()):,}", size(manifest["peak_memory_bytes"]),
            size(_bytes(artifact)),
        )  # fmt: skip
    console.print(table)
    seconds = sum(artifact.manifest["seconds"] for artifact in artifacts.values())
    console.print(f"\n{len(artifacts)} steps, {seconds / 60:.1f} minutes", highlight=False)


def step_details(console: Console, step: str, artifact: Artifact) -> None:
    """One step: where it is, what it read, what it cost, its settings and its figures."""
    manifest = artifact.manifest
    console.print(f"[bold]{step}[/bold] ({artifact.stage})  {artifact.path}", soft_wrap=True)
    for role, entry in manifest["inputs"].items():
        console.print(f"  input {role}: {entry['stage']} {entry['fingerprint'][:12]}")
    tokens = ", ".join(f"{count:,} {kind}" for kind, count in manifest["tokens"].items() if count)
    console.print(
        f"  {manifest['seconds']:,.1f} s, peak {size(manifest['peak_memory_bytes'])}, "
        f"{size(_bytes(artifact))} on disk{', ' + tokens if tokens else ''}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for title, values in (("settings", artifact.config), ("summary", artifact.summary)):
        console.print(f"  [bold]{title}")
        for key, value in values.items():
            console.print(f"    {key} = {_value(value)}", highlight=False, markup=False)


def problems(console: Console, found: Mapping[str, Sequence[str]], *, repaired: bool) -> None:
    """What `verify` found."""
    for step, lines in found.items():
        console.print(f"{step}: [green]whole" if not lines else f"{step}: [red]damaged")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if repaired and any(found.values()):
        console.print("Damaged artifacts were removed; run the recipe again to make them.")


def models_table(console: Console, rows: Sequence[Any]) -> None:
    """The bundled models."""
    for row in rows:
        place = row.path or f"not here yet: tutelage models pull {row.model.name}"
        console.print(f"bundled:{row.model.name}  {place}", highlight=False, soft_wrap=True)


def finished(console: Console, result: Result, name: str, store: Path) -> None:
    """The closing lines of a run: what was made, and where to look next."""
    made = len(result.made)
    what = (
        f"{made} {'step' if made == 1 else 'steps'} made"
        if made
        else "nothing to do: every step was finished before"
    )
    console.print(f"\n[bold]{name}[/bold]: {what}, {_clock(result.seconds)}", highlight=False)
    for step, artifact in result.artifacts.items():
        if artifact.stage in ("report", "ablation"):
            console.print(f"{step}: {artifact.path / 'index.html'}", soft_wrap=True)
        if artifact.stage == "export":
            for file in artifact.shards("*.gguf"):
                console.print(f"{step}: {file}", soft_wrap=True)
    if made:
        console.print(
            f"next: tutelage show --store {store}, tutelage chat STEP --store {store}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def size(count: float) -> str:
    """Bytes for people: `1.3 GB`."""
    if not count:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _value(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _bytes(artifact: Artifact) -> int:
    return sum(entry["bytes"] for entry in artifact.manifest["files"].values())


def _tokens(cost: Estimate) -> str:
    count = cost.decoded + cost.read + cost.trained
    return f"{count:,}" if count else ""


def _mix(cost: Estimate) -> list[str]:
    """A line for each stage of a curriculum: its modes, in shares and in tokens."""
    lines = []
    for _, group in groupby(cost.mix, key=lambda part: part.stage):
        parts = list(group)
        first = parts[0]
        modes = ", ".join(
            f"{part.mode} {100 * part.share:.3g} % "
            + ("(no such row)" if part.tokens is None else f"(~{_rounded(part.tokens)} tokens)")
            for part in sorted(parts, key=lambda part: -part.share)
        )
        share = f"{100 * first.stage_share:.3g} %"
        lines.append(f"stage {first.stage} of {first.stages}, {share} of examples: {modes}")
    return lines


def _rounded(count: int) -> str:
    """`640`, `12k`, `3.4M`."""
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 1e6 else f"{count / 1e6:.1f}M"


def _minutes(cost: Estimate) -> str:
    return "?" if cost.minutes is None else f"{cost.minutes:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
