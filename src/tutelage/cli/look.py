"""`tutelage data look STEP`: the rows of a step on the terminal; what there is to see is not here.

Prints nothing of a row as markup: all its text goes through `rich.text.Text`.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage.cli import runs
from tutelage.cli.options import STORE, AsJson, RunName, StorePath, print_json
from tutelage.store import Store

if TYPE_CHECKING:
    from tutelage.report.histograms import Histogram
    from tutelage.report.look import Dropped, Look, Sample

app = typer.Typer(no_args_is_help=True, help="Rows of a step: counts, figures, samples, drops.")
LABEL, COUNT = 20, 11  # columns of a terminal; the bars take what is left of its width
SAMPLE_LINES = 3  # of a question, a chain and an answer each
INDENT = 10  # of what stands behind a label of 7
SHORT = 40  # characters of a note that shares its line with others


@app.callback()
def _rows_of_a_step() -> None: ...  # with a callback, the one verb keeps its name


@app.command(epilog="Example: tutelage data look prompts --dropped duplicates --samples 20")
def look(
    step: Annotated[str, typer.Argument(help="A step of the run that made conversations.")],
    samples: Annotated[int, typer.Option(min=0, help="Rows shown, of each kind.")] = 3,
    dropped: Annotated[
        str, typer.Option(metavar="NAME", help="Page through what this one dropped, and why.")
    ] = "",
    start: Annotated[int, typer.Option(min=0, help="With --dropped: from this row.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Another one shows other rows.")] = 0,
    run: RunName = "",
    store: StorePath = STORE,
    as_json: AsJson = False,
) -> None:
    """Show a step's rows: the funnel, lengths and the like, rows kept, rows dropped and why."""
    from tutelage.report.look import dropped as dropped_rows
    from tutelage.report.look import look as look_at

    name, found = runs.artifacts(Store(store), run)
    again = f"tutelage data look {step} --run {name} --store {store}"
    artifact = runs.pick(found, step, name)
    if dropped:
        page = dropped_rows(artifact, dropped, start=start, count=samples)
        print_json(asdict(page)) if as_json else print_page(
            Console(), page, again=again, start=start
        )
        return
    shown = look_at(artifact, samples=samples, seed=seed)
    print_json(asdict(shown)) if as_json else print_look(
        Console(), shown, f"{step} ({artifact.stage})", again=again
    )


def print_look(console: Console, shown: "Look", title: str, *, again: str) -> None:
    """Funnel, histograms, then samples; `again` is the command that asked for them."""
    console.print(Text(f"{title}: {shown.rows:,} rows", style="bold"))
    if shown.read is not None:
        console.print(_funnel(shown, shown.read))
    for histogram in shown.histograms:
        _print_histogram(console, histogram)
    if shown.kept:
        _print_title(console, f"kept: {len(shown.kept)} of {shown.rows:,}")
    for sample in shown.kept:
        _print_sample(console, sample)
    for group in shown.dropped:
        _print_title(console, f"dropped by {group.name}: {len(group.samples)} of {group.count:,}")
        for sample in group.samples:
            _print_sample(console, sample)
    if shown.dropped:
        _print_next(console, f"more: {again} --dropped {shown.dropped[0].name}")


def print_page(console: Console, page: "Dropped", *, again: str, start: int) -> None:
    """Some rows of one quarantine file, and how to see those after them."""
    stop = start + len(page.samples)
    which = f"rows {start:,} to {stop - 1:,}" if page.samples else "no row there"
    _print_title(console, f"dropped by {page.name}: {which} of {page.count:,}")
    for sample in page.samples:
        _print_sample(console, sample)
    if page.samples and stop < page.count:
        which = f"--dropped {page.name} --samples {len(page.samples)} --start {stop}"
        _print_next(console, f"next: {again} {which}")


def _funnel(shown: "Look", read: int) -> Table:
    table = _bars_table()
    table.add_column(justify="right", no_wrap=True)
    table.add_row("", Text("left", style="dim"), "", Text("dropped", style="dim"))
    table.add_row("read", f"{read:,}", Bar(read, 0, read), "")
    for step in shown.funnel:
        fallen = f"-{step.dropped:,}" if step.dropped else ""
        table.add_row(Text(step.name), f"{step.left:,}", Bar(read, 0, step.left), fallen)
    return table


def _bars_table() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    table.add_column(justify="right", width=LABEL, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", width=COUNT, no_wrap=True)
    table.add_column(ratio=1)
    return table


def _print_histogram(console: Console, shown: "Histogram") -> None:
    title = Text(f"\n{shown.name}", style="bold")
    facts = [shown.unit] if shown.unit else []
    if shown.mean is not None:
        facts += [f"mean {shown.mean:,.1f}", f"most {shown.most:,}"]
    if len(shown.bars) <= 1:
        facts = [*shown.unit.split(",")[:1], *(f"{label} in all" for label, _ in shown.bars)]
    title.append(f"  {', '.join(filter(None, facts))}", style="dim")
    console.print(title)
    if len(shown.bars) <= 1:
        return
    table = _bars_table()
    longest = max(count for _, count in shown.bars)
    for label, count in shown.bars:
        table.add_row(Text(label), f"{count:,}", Bar(max(longest, 1), 0, count, color="cyan"))
    console.print(table)


def _print_title(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", style="bold"))


def _print_next(console: Console, command: str) -> None:
    console.print(Text(f"\n{command}", style="dim"), soft_wrap=True)


def _print_sample(console: Console, sample: "Sample") -> None:
    head = Text(sample.id or sample.place, style="cyan")
    if sample.id and sample.place != sample.id:  # a row without an id is called by its place
        head.append(f"  {sample.place}", style="dim")
    console.print(head)
    _print_cut(console, "why", sample.reason, style="yellow")
    short = [f"{name} {value}" for name, value in sample.notes if len(value) <= SHORT]
    _print_cut(console, "", ", ".join(short), style="dim")
    for name, value in sample.notes:
        if len(value) > SHORT:
            _print_cut(console, name, value, style="dim")
    _print_cut(console, "asked", sample.prompt)
    _print_cut(console, "thought", sample.thinking, style="dim")
    _print_cut(console, "said", sample.answer)


def _print_cut(console: Console, label: str, text: str, *, style: str = "") -> None:
    """The first lines of a text, behind its label; nothing for no text."""
    if not text:
        return
    width = max(console.width - INDENT, 20)
    lines = Text(text.strip("\n").expandtabs(4)).wrap(console, width)
    shown = [line.plain.rstrip() for line in lines[:SAMPLE_LINES]]
    if len(lines) > SAMPLE_LINES:
        shown[-1] = f"{shown[-1][: width - 2]} …"
    for number, line in enumerate(shown):
        row = Text(f"  {label if number == 0 else '':<7.7} ", style="dim")
        console.print(row.append_text(Text(line, style=style or "default")), soft_wrap=True)
