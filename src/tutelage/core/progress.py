"""What a person sees while a step works: a bar with rate and ETA, or plain lines off a terminal."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_SECONDS = 10.0  # off a terminal: one line every ten seconds is enough for a log


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(f"{_rate(task.speed)} {unit}/s" if task.speed else "", style="cyan")


@dataclass
class Bar:
    """One running count; `advance` it, and `note` what a person would ask (loss, KL, length)."""

    total: int
    label: str
    unit: str
    done: int = 0
    text: str = ""
    started: float = field(default_factory=time.monotonic)
    first: int = 0

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        self.show()

    def note(self, text: str) -> None:
        """Put a short text behind the bar."""
        self.text = text
        self.show()

    def show(self) -> None:
        """Draw the present state; the kinds of bar differ only here."""


@dataclass
class _PlainBar(Bar):
    console: Console = field(default_factory=Console)
    shown: float = field(default_factory=time.monotonic)

    def show(self) -> None:
        if time.monotonic() - self.shown < PLAIN_SECONDS:
            return
        self.shown = time.monotonic()
        self.line()

    def line(self) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.first) / seconds
        left = f", about {_clock((self.total - self.done) / rate)} left" if rate > 0 else ""
        self.console.print(
            f"  {self.label}: {self.done:,}/{self.total:,} {self.unit}, "
            f"{_rate(rate)} {self.unit}/s{left}{'  ' + self.text if self.text else ''}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


@dataclass
class _RichBar(Bar):
    progress: Progress = field(default_factory=Progress)
    task: int = 0

    def show(self) -> None:
        self.progress.update(self.task, completed=self.done, total=self.total, note=self.text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reporter:
    """Where a step tells a person what it does."""

    console: Console = field(default_factory=lambda: Console(stderr=True))
    quiet: bool = False

    def say(self, text: str, *, style: str = "") -> None:
        """Print one line as it is: what a model or a row says may look like markup."""
        if not self.quiet:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, total: int, label: str, *, unit: str, done: int = 0) -> Iterator[Bar]:
        """A bar over `total` units of which `done` were finished by an earlier attempt."""
        if self.quiet:
            yield Bar(total, label, unit, done)
        elif not self.console.is_terminal:
            bar = _PlainBar(total, label, unit, done, first=done, console=self.console)
            yield bar
            if time.monotonic() - bar.started > 2:  # short work needs no line of its own
                bar.line()
        else:
            columns = (
                TextColumn("  {task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
                _Rate(), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task(label, total=total, completed=done, unit=unit, note="")
                yield _RichBar(total, label, unit, done, progress=progress, task=task)


def _rate(rate: float) -> str:
    """Steps take seconds each, tokens come by the thousand: two digits at least."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
