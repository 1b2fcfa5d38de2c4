"""`tutelage bench store | loss | sample | score | pack | train | data`: what it costs here.

Parses, calls `tutelage.bench`, prints a table or JSON; torch is imported when a bench runs.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tutelage.cli.options import AsJson, print_json
from tutelage.core.progress import Reporter

if TYPE_CHECKING:
    from tutelage.bench.fidelity import Measured

app = typer.Typer(
    no_args_is_help=True,
    help="Measure on this machine, on the bundled teacher's real logits over its T = 1 answers.",
)
Repeats = Annotated[int, typer.Option(min=1, help="Rounds after the warm-up; medians are shown.")]
BUDGETS = (8, 12, 16, 24, 32, 37, 48, 64, 96, 128)
CHECKPOINTS = (2_048, 4_096, 16_384, 131_072)
MEMORY_TOKENS = (1_024, 4_096, 16_384, 65_536)


@app.command("store", epilog="Example: tutelage bench store --tokens 16384")
def store(
    tokens: Annotated[int, typer.Option(min=2_048, help="Answer tokens measured.")] = 4_096,
    peaked: Annotated[
        bool, typer.Option(help="Also the teacher at temperature 0.5, a confident one.")
    ] = True,
    directions: Annotated[
        int, typer.Option(min=0, help="Estimate errors along so many random directions; 0: exact.")
    ] = 0,
    disk: Annotated[
        int, typer.Option(min=0, help="Synthetic tokens for writing and reading; 0: skip.")
    ] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Gradient error against bytes a token: threshold sampling beside top-k, draws, DistillKit.

    At 131072 tokens bias, which does not average away, stands clear of noise; with 144 directions
    that takes about half an hour on two cores, and half an hour more to sample the answers once.
    """
    from tutelage.bench import disk as disk_bench
    from tutelage.bench import fidelity, material

    reporter = Reporter()
    teacher = material.load_teacher(reporter)
    answers = material.answers(teacher, tokens, reporter=reporter)
    hidden = material.hidden(teacher, answers, reporter=reporter)
    counts = sorted({count for count in CHECKPOINTS if count < tokens} | {tokens})
    found: list[Measured] = []
    temperatures = (1.0, 0.5) if peaked else (1.0,)
    with reporter.bar(tokens * len(temperatures), "gradients", unit="tokens") as bar:
        for temperature in temperatures:
            found += fidelity.measure(
                hidden,
                answers,
                temperature=temperature,
                counts=counts,
                bar=bar,
                directions=directions,
            )
    with tempfile.TemporaryDirectory() as folder:
        speed = disk_bench.run(Path(folder), tokens=disk) if disk else {}
    if as_json:
        print_json({"fidelity": [asdict(point) for point in found], "disk": speed})
        return
    for temperature in temperatures:
        points = [point for point in found if point.temperature == temperature]
        _fidelity_tables(Console(), points, temperature, counts)
    for name, value in speed.items():
        Console().print(f"{name.replace('_', ' ')}: {value:,.1f}", highlight=False)


@app.command("loss", epilog="Example: tutelage bench loss --repeats 5")
def loss(
    repeats: Repeats = 5,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of a step.")] = 4_096,
    as_json: AsJson = False,
) -> None:
    """Time and memory of a head-and-loss step: fused distillation, fused SFT, naive full logits.

    The naive step at the larger size needs about 15 GB of memory.
    """
    from tutelage.bench import loss as bench

    rows = bench.run(repeats=repeats, tokens=tokens)
    if as_json:
        print_json(rows)
    else:
        _table(Console(), rows, "head-and-loss step (medians of ratios within a round)")


@app.command("sample", epilog="Example: tutelage bench sample --repeats 3")
def sample(
    repeats: Repeats = 3,
    rows: Annotated[int, typer.Option(min=1, help="Answers at a time, for both.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Useful tokens/s of the sampler beside plain generate, on 64 answers of up to 256 tokens."""
    from tutelage.bench import sampling

    found = asdict(sampling.run(repeats=repeats, batch_rows=rows, reporter=Reporter()))
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            Console().print(f"{name.replace('_', ' ')}: {value:,.2f}", highlight=False)


@app.command("score", epilog="Example: tutelage bench score --json")
def score(
    repeats: Repeats = 5,
    tokens: Annotated[int, typer.Option(min=256, help="Answer tokens a round reads.")] = 4_096,
    memory: Annotated[bool, typer.Option(help="Also memory, 1k to 64k tokens.")] = True,
    as_json: AsJson = False,
) -> None:
    """The teacher's reading: tokens/s against a bare forward, and memory as more is read."""
    from tutelage.bench import material, scoring

    reporter = Reporter()
    teacher = material.load_teacher(reporter)
    answers = material.answers(teacher, tokens, reporter=reporter)
    found: dict[str, Any] = scoring.speed(teacher, answers, repeats=repeats)
    if memory:
        material.answers(teacher, MEMORY_TOKENS[-1], reporter=reporter)  # sampled once, kept
        peaks = scoring.memory(MEMORY_TOKENS)
        found["peak_mib"] = {count: peak / 2**20 for count, peak in peaks.items()}
        found["peak_ratio"] = max(peaks.values()) / peaks[MEMORY_TOKENS[0]]
    if as_json:
        print_json(found)
        return
    console = Console()
    console.print(
        f"scorer {found['scorer_tokens_s']:,.0f} tokens/s, bare forward "
        f"{found['forward_tokens_s']:,.0f}: {found['ratio']:.2f} of it",
        highlight=False,
    )
    for count, peak in found.get("peak_mib", {}).items():
        console.print(f"{count:>7,} tokens scored: peak {peak:,.0f} MiB", highlight=False)


@app.command("pack", epilog="Example: tutelage bench pack --pack-tokens 512 --pack-tokens 2048")
def pack(
    repeats: Repeats = 3,
    batch_tokens: Annotated[int, typer.Option(min=64, help="Tokens of a step.")] = 4_096,
    pack_tokens: Annotated[
        list[int] | None, typer.Option(min=64, help="Length of a packed row; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Useful tokens/s of packed training beside padded batches and one mask over a whole row."""
    from tutelage.bench import packing

    found = packing.run(
        repeats=repeats, batch_tokens=batch_tokens, pack_tokens=pack_tokens or (2_048,),
        reporter=Reporter(),
    )  # fmt: skip
    rows = [asdict(line) for line in found]
    if as_json:
        print_json(rows)
    else:
        _table(Console(), rows, "a training step (medians over the rounds)")


@app.command("train", epilog="Example: tutelage bench train --tokens 1024")
def train(
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of a step, in one row.")] = 1_024,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed, after two that warm up.")] = 8,
    as_json: AsJson = False,
) -> None:
    """An SFT step beside a bare PyTorch loop, and its memory beside transformers' Trainer."""
    from tutelage.bench import training

    found = {
        "time": training.speed(steps=steps, tokens=tokens),
        "memory": training.memory(tokens=tokens),
    }
    if as_json:
        print_json(found)
        return
    for what, figures in found.items():
        _table(Console(), [figures], f"{what} of an SFT step of {tokens:,} tokens")


@app.command("data", epilog="Example: tutelage bench data --rows 100000")
def data(
    rows: Annotated[int, typer.Option(min=1_000, help="Synthetic rows.")] = 100_000,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    as_json: AsJson = False,
) -> None:
    """The data funnel: speed, memory, and what it finds of planted faults."""
    from tutelage.bench import curation

    with tempfile.TemporaryDirectory() as folder:
        found = curation.run(rows=rows, workers=workers, folder=Path(folder))
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else value
        Console().print(f"{name} = {shown}", highlight=False)


def _fidelity_tables(
    console: Console, points: Sequence["Measured"], temperature: float, counts: Sequence[int]
) -> None:
    from tutelage.bench import fidelity

    table = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left",
        title=f"teacher at T = {temperature:g}: error of the head-weight gradient",
    )  # fmt: skip
    for name in ("method", "setting", "ids", "bytes", *(f"{count:,} tokens" for count in counts)):
        table.add_column(name, justify="left" if name in ("method", "setting") else "right")
    for point in points:
        errors = [f"{point.errors[count]:.4f}" for count in counts]
        table.add_row(
            point.method, point.setting, f"{point.ids:.1f}", f"{point.bytes:.1f}", *errors
        )
    console.print(table, "")
    methods = (
        fidelity.OURS, fidelity.RENORMALISED, fidelity.TRUNCATED, fidelity.PURE_SAMPLING,
    )  # fmt: skip
    curve = Table(
        box=None, pad_edge=False, header_style="bold", title_justify="left",
        title=f"the same at equal bytes, {counts[-1]:,} tokens (interpolated between settings)",
    )  # fmt: skip
    for name in ("bytes a token", *methods):
        curve.add_column(name, justify="right")
    for budget in BUDGETS:
        cells = []
        for method in methods:
            of_method = [point for point in points if point.method == method]
            error = fidelity.interpolated(of_method, count=counts[-1], bytes_=budget)
            cells.append("-" if error is None else f"{error:.4f}")
        curve.add_row(str(budget), *cells)
    console.print(curve, "")


def _table(console: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title=title, title_justify="left"
    )  # fmt: skip
    for name in rows[0]:
        is_text = name in ("variant", "spread", "way")
        table.add_column(name.replace("_", " "), justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
