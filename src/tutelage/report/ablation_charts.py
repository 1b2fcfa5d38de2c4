"""The figures of an ablation's page: arms as dots with intervals, and accuracy against FLOPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tutelage.report.charts import ACCENT, DIM, INK, LINE, SECOND, THIRD, drawing, shorten, svg

COLOURS = (ACCENT, SECOND, THIRD, INK)
WIDTH = 5.4  # inches: two figures beside each other on the page
LABELS = 2.15  # inches of them for the arms' names
MANY_TICKS = 100.0
"""Factor between the ends of a log axis from which powers of ten are ticks enough."""
APART = 9.0  # points between numbers at dots


@dataclass(frozen=True)
class Dot:
    """An arm in a figure: accuracies in percent, FLOPs beyond its start."""

    number: int
    label: str
    group: str
    estimate: float
    low: float
    high: float
    seeds: Sequence[float]
    flops: float


def dots(key: str, caption: str, arms: Sequence[Dot]) -> str:
    """A row an arm: its interval, its mean, and each seed's own mean as a ring."""
    colours = group_colours(arms)
    height = 0.42 + 0.24 * len(arms)
    with drawing(WIDTH, height) as figure:
        axes = figure.add_axes(
            (
                LABELS / WIDTH,
                0.38 / height,
                (WIDTH - LABELS - 0.15) / WIDTH,
                (height - 0.42) / height,
            )
        )
        across = axes.get_yaxis_transform()
        for row, arm in enumerate(arms):
            colour = colours[arm.group]
            axes.plot([arm.low, arm.high], [row, row], color=colour, lw=2, solid_capstyle="round")
            axes.plot(arm.seeds, [row] * len(arm.seeds), "o", mfc="none", mec=DIM, mew=0.7, ms=3.5)
            axes.plot([arm.estimate], [row], "o", color=colour, ms=5.5)
            axes.text(-0.03, row, f"{shorten(arm.label, 34)}  {arm.number}", ha="right",
                      va="center", fontsize=7.5, transform=across)  # fmt: skip
            if row and arm.group != arms[row - 1].group:
                axes.axhline(row - 0.5, color=LINE, lw=0.8, xmin=-0.5, clip_on=False)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="x")
        axes.set_xlabel("accuracy, %")
        return svg(figure, key, caption)


def against_flops(key: str, caption: str, arms: Sequence[Dot]) -> str:
    """Accuracy over FLOPs on a log axis; arms in no group, and what cost none, are dashed lines.

    Those (a start, a teacher) were made from nothing: their FLOPs are none beyond a start, and
    would squeeze the others together. Without any group all are drawn. Empty where nothing is paid.
    """
    grouped = any(arm.group for arm in arms)
    paid = [arm for arm in arms if arm.flops and (arm.group or not grouped)]
    if not paid:
        return ""
    colours = group_colours(arms)
    groups = {arm.group: colours[arm.group] for arm in paid}
    above = 0.1 + (0.17 * len(groups) if len(groups) > 1 else 0)
    height = max(2.6, 0.42 + 0.24 * len(arms))
    with drawing(WIDTH, height) as figure:
        axes = figure.add_axes((0.5 / WIDTH, 0.38 / height, (WIDTH - 0.6) / WIDTH,
                                (height - 0.38 - above) / height))  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for arm in arms:
            if arm not in paid:
                axes.axhline(arm.estimate, color=DIM, lw=0.9, ls=(0, (4, 3)))
                axes.text(1.0, arm.estimate, f"{arm.number}", color=DIM, fontsize=7.5, ha="right",
                          va="bottom", transform=axes.get_yaxis_transform())  # fmt: skip
        for arm in paid:
            colour = colours[arm.group]
            axes.plot([arm.flops] * 2, [arm.low, arm.high], color=colour, lw=1.2, alpha=0.6)
            axes.plot([arm.flops], [arm.estimate], "o", color=colour, ms=5)
        _limits(axes, [arm.flops for arm in paid])
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y")
        axes.set_xlabel("FLOPs beyond the start, log scale")
        axes.set_ylabel("accuracy, %")
        _numbers(axes, paid)
        if len(groups) > 1:
            for group, colour in groups.items():
                axes.plot(
                    [], [], "o", color=colour, ms=5, label=shorten(group or "in no group", 70)
                )
            axes.legend(frameon=False, fontsize=7.5, loc="lower left", handlelength=0.8,
                        bbox_to_anchor=(-0.02, 0.99), labelspacing=0.2, borderpad=0)  # fmt: skip
        return svg(figure, key, caption)


def group_colours(arms: Sequence[Dot]) -> Mapping[str, str]:
    """A colour a group, in the order of the table; a fifth group begins again."""
    groups = dict.fromkeys(arm.group for arm in arms)
    return {group: COLOURS[index % len(COLOURS)] for index, group in enumerate(groups)}


def _power(value: float) -> str:
    """A power of ten, or a step between two where the axis is short, without math markup."""
    exponent = floor(log10(value) + 1e-9)
    factor = value / 10**exponent
    power = "10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if abs(factor - 1) < 1e-6 else f"{factor:.3g} · {power}"


def _limits(axes: Axes, flops: Sequence[float]) -> None:
    """Room at both ends, a factor of 4 at least: arms that cost the same stand in the middle."""
    room = max(1.35, 2 * (min(flops) / max(flops)) ** 0.5)
    low, high = min(flops) / room, max(flops) * room
    axes.set_xlim(low, high)
    if high / low < MANY_TICKS:  # a power of ten or two on the axis would leave it without a scale
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _numbers(axes: Axes, arms: Sequence[Dot]) -> None:
    """Each arm's number at the nearest free place beside its dot; a line leads to one far off."""
    places = axes.transData.transform([(arm.flops, arm.estimate) for arm in arms])
    dots_N2 = places * 72 / axes.figure.dpi
    taken = [(float(x), float(y)) for x, y in dots_N2]
    for arm, (x, y) in sorted(zip(arms, dots_N2, strict=True), key=lambda pair: pair[0].number):
        right, up = _free(float(x), float(y), taken)
        taken.append((x + right, y + up))
        line = {"arrowstyle": "-", "color": DIM, "lw": 0.4, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            f"{arm.number}", (arm.flops, arm.estimate), xytext=(right, up), ha="center",
            va="center", textcoords="offset points", fontsize=7.5,
            arrowprops=line if max(abs(right), abs(up)) > 1.5 * APART else None,
        )  # fmt: skip


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The offset in points, of a ring of them that grows, at which nothing stands yet."""
    offsets = [
        (side * APART * column, up * APART * 0.5)
        for column in range(1, 12)
        for up in (0, 1, -1, 2, -2, 3, -3)
        for side in (1, -1)
    ]
    for right, up in offsets:
        if all(abs(x + right - a) > 0.95 * APART or abs(y + up - b) > 0.85 * APART
               for a, b in taken):  # fmt: skip
            return right, up
    return offsets[0]
