"""Charts as inline SVG: colours are CSS variables of the page, so both schemes are served.

Owns how a figure is drawn and made deterministic. Knows series and intervals, no artifact.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, DIM, LINE, CARD = "#010101", "#020202", "#030303", "#040404"
ACCENT, SECOND, THIRD = "#050505", "#060606", "#070707"
VARIABLES = {
    INK: "--ink", DIM: "--dim", LINE: "--line", CARD: "--card",
    ACCENT: "--accent", SECOND: "--second", THIRD: "--third",
}  # fmt: skip
"""Stand-in colours of a drawing -> the page's variables that replace them."""
WIDTH = 3.5  # inches: 336 CSS pixels, three beside each other or one on a phone
MAX_POINTS = 150  # of a curve; more is noise over noise at 336 pixels
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "tutelage", "font.size": 8,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK, "axes.labelcolor": DIM, "xtick.color": DIM, "ytick.color": DIM,
    "axes.facecolor": "none", "axes.edgecolor": LINE, "grid.color": LINE, "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "xtick.major.size": 0, "ytick.major.size": 0, "text.parse_math": False,
    "axes.formatter.useoffset": False,
}  # fmt: skip


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of this many inches under the page's style, whatever the user's own style is."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # Text stays text and the reader's browser picks the font, so a glyph missing here is none.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(width, height))


def svg(figure: Figure, key: str, caption: str) -> str:
    """The figure as an `<svg>` element for a page that holds several: `key` keeps ids apart.

    Must be called inside `drawing`. The same figure and key give the same text: a fixed salt, no
    metadata, no date.
    """
    buffer = io.BytesIO()
    figure.patch.set_visible(False)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    for before in (r'\bid="', r'\bhref="#', r"url\(#"):
        text = re.sub(before, lambda m: m.group(0) + key + "-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)


def curves(key: str, caption: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over optimizer steps, in nats per token."""
    with drawing(WIDTH, 2.3) as figure:
        axes = figure.add_axes((0.15, 0.19, 0.82, 0.75))
        for colour, (name, points) in zip((ACCENT, SECOND, THIRD), series.items(), strict=False):
            thinned = thin(points)
            marker = "o" if len(thinned) < 4 else None  # a line of one point would not show
            axes.plot(*zip(*thinned, strict=True), color=colour, label=name, lw=1.4,
                      marker=marker, ms=3)  # fmt: skip
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8, loc="upper right", handlelength=1.2)
        return svg(figure, key, caption)


def bars(key: str, caption: str, title: str, rows: Sequence[tuple[str, int]]) -> str:
    """A bar with its label and its count for each (label, count), the first on top."""
    height = 0.4 + 0.17 * len(rows)
    longest = max((count for _, count in rows), default=0) or 1
    with drawing(WIDTH, height) as figure:
        figure.text(0.03, 1 - 0.16 / height, title, fontsize=8, weight="bold", va="center")
        axes = figure.add_axes((0.36, 0.04 / height, 0.44, (height - 0.36) / height))
        axes.barh(range(len(rows)), [count for _, count in rows], height=0.72, color=ACCENT)
        for index, (label, count) in enumerate(rows):
            axes.text(-0.03 * longest, index, shorten(label, 20), ha="right", va="center",
                      fontsize=7.5)  # fmt: skip
            axes.text(count + 0.03 * longest, index, f"{count:,}", va="center", fontsize=7.5,
                      color=DIM)  # fmt: skip
        axes.set_xlim(0, longest)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_axis_off()
        return svg(figure, key, caption)


def course(
    key: str, caption: str, ends: Sequence[int], shares: Mapping[str, Sequence[float]],
    difficulty: Sequence[float | None], unit: str,
) -> str:  # fmt: skip
    """Stacked shares of windows, and their mean difficulty as a line over them.

    `ends` are where windows end, in `unit`; shares and difficulty lie in [0, 1]. Where no
    difficulty is known the line has a gap.
    """
    edges = [0, *ends]
    with drawing(WIDTH, 2.5) as figure:
        axes = figure.add_axes((0.12, 0.18, 0.84, 0.64))
        below = [0.0] * len(ends)
        for colour, (name, values) in zip((ACCENT, SECOND, DIM), shares.items(), strict=False):
            above = [low + value for low, value in zip(below, values, strict=True)]
            axes.stairs(above, edges, baseline=below, fill=True, color=colour, alpha=0.3, lw=0,
                        label=name)  # fmt: skip
            below = above
        if any(value is not None for value in difficulty):
            middles = [(a + b) / 2 for a, b in pairwise(edges)]
            known = [float("nan") if value is None else value for value in difficulty]
            axes.plot(middles, known, color=THIRD, lw=1.4, label="difficulty",
                      marker="o" if len(known) < 4 else None, ms=3)  # fmt: skip
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(0, 1)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.03, 0.99),
                    ncols=4, handlelength=1.2, columnspacing=1.2)  # fmt: skip
        return svg(figure, key, caption)


def intervals(
    key: str, caption: str, rows: Sequence[tuple[str, float, float, float, str]], unit: str
) -> str:
    """A dot with its interval for each (label, estimate, low, high, text), the first on top."""
    height = 0.45 + 0.42 * len(rows)
    with drawing(WIDTH, height) as figure:
        axes = figure.add_axes((0.04, 0.4 / height, 0.92, (height - 0.45) / height))
        for index, (label, estimate, low, high, text) in enumerate(rows):
            axes.plot([low, high], [index, index], color=ACCENT, lw=2, solid_capstyle="round")
            axes.plot([estimate], [index], "o", color=ACCENT, ms=6)
            _row_text(axes, index, label, text)
        _floor_at_zero(axes, [low for _, _, low, _, _ in rows])
        axes.set_ylim(len(rows) - 0.6, -0.95)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
        axes.set_xlabel(unit)
        return svg(figure, key, caption)


def _row_text(axes: Axes, index: int, label: str, text: str) -> None:
    across = axes.get_yaxis_transform()  # x in [0, 1] over the axes, y in rows
    place = {"transform": across, "va": "center"}
    axes.text(0, index - 0.45, shorten(label, 30), ha="left", fontsize=8, **place)
    axes.text(1, index - 0.45, text, ha="right", fontsize=7.5, color=DIM, **place)


def _floor_at_zero(axes: Axes, lows: Sequence[float]) -> None:
    """A divergence starts at 0, and distances on the axis then mean what they look like."""
    if min(lows) >= 0:
        axes.set_xlim(left=0)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of as many neighbours, so that no peak is picked."""
    width = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def shorten(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
