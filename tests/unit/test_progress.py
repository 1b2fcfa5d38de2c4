"""What a person sees: plain lines in a log, a bar on a terminal, nothing when quiet."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from tutelage.core import progress
from tutelage.core.progress import Reporter


def reporter(*, terminal: bool, quiet: bool = False) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120, color_system=None)
    return Reporter(console=console, quiet=quiet), stream


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fake clock: tests move it by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def fresh(bar: progress.Bar, now: float) -> None:
    """Start the bar on the fake clock: its fields were bound to the real one at import."""
    bar.started = now
    if isinstance(bar, progress._PlainBar):
        bar.shown = now


def test_off_a_terminal_a_long_task_prints_plain_lines_with_rate_and_time_left(
    clock: list[float],
) -> None:
    voice, stream = reporter(terminal=False)
    with voice.bar(1000, "training", unit="tokens") as bar:
        fresh(bar, clock[0])
        bar.note("loss 1.25")
        clock[0] += 20
        bar.advance(200)
        assert stream.getvalue() == (
            "  training: 200/1,000 tokens, 10 tokens/s, about 1:20 left  loss 1.25\n"
        )
        clock[0] += 1
        bar.advance(10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # not a line for each advance; one at the end
    assert lines[1].startswith("  training: 210/1,000 tokens, 10 tokens/s")
    assert "\x1b" not in stream.getvalue()


def test_what_an_earlier_attempt_finished_counts_as_done_but_not_in_the_rate(
    clock: list[float],
) -> None:
    voice, stream = reporter(terminal=False)
    with voice.bar(1000, "scoring", unit="rows", done=900) as bar:
        fresh(bar, clock[0])
        clock[0] += 20
        bar.advance(20)
    assert "920/1,000 rows, 1 rows/s, about 1:20 left" in stream.getvalue()


def test_short_work_prints_no_line(clock: list[float]) -> None:
    voice, stream = reporter(terminal=False)
    with voice.bar(10, "scoring", unit="rows") as bar:
        fresh(bar, clock[0])
        clock[0] += 1
        bar.advance(10)
    assert stream.getvalue() == ""


def test_on_a_terminal_a_bar_shows_count_rate_and_eta() -> None:
    voice, stream = reporter(terminal=True)
    with voice.bar(100, "training", unit="tokens") as bar:
        bar.advance(10)
        bar.advance(40)
        bar.note("loss 1.25")
        assert isinstance(bar, progress._RichBar)
        bar.progress.refresh()
    shown = stream.getvalue()
    for part in ("training", "50/100", "tokens/s", "eta", "loss 1.25"):
        assert part in shown


def test_quiet_says_nothing_and_still_counts() -> None:
    voice, stream = reporter(terminal=False, quiet=True)
    voice.say("hello")
    with voice.bar(10, "scoring", unit="rows") as bar:
        bar.advance(4)
    assert (stream.getvalue(), bar.done) == ("", 4)


def test_a_line_is_never_wrapped() -> None:
    voice, stream = reporter(terminal=False)
    voice.say("word " * 100)
    assert stream.getvalue().count("\n") == 1


def test_what_a_model_says_is_never_read_as_markup() -> None:
    stream = io.StringIO()
    Reporter(console=Console(file=stream)).say("A: [/INST] and [bold]this[/x]")
    assert stream.getvalue() == "A: [/INST] and [bold]this[/x]\n"
