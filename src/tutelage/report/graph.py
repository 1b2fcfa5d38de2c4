"""The run's graph as a drawing, left to right: layers, few crossings, then boxes and curves.

Owns the layout (layers by longest path, order by barycentres, as Sugiyama did); knows no costs
but the line it writes in a box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from tutelage.report import charts
from tutelage.report.figures import duration
from tutelage.report.run import Run, Step

BOX_WIDTH, BOX_HEIGHT, PITCH_X, PITCH_Y = 1.08, 0.36, 1.34, 0.5  # inches
BEND_ROOM = 0.6  # of a row, for a line that only passes through a layer
SWEEPS = 8
COLOURS = {
    "synthesize": charts.SECOND, "rollout": charts.SECOND, "score": charts.SECOND,
    "sft": charts.ACCENT, "distill": charts.ACCENT,
    "evaluate": charts.THIRD, "export": charts.THIRD,
}  # fmt: skip

Place = tuple[str, int]
"""A box (its fingerprint, 0), or where an edge passes a layer (`from>`, layer)."""


@dataclass(frozen=True)
class Layout:
    """Layers of places, the height of each place in rows, and each edge as the places it visits."""

    layers: Sequence[Sequence[Place]]
    rows: Mapping[Place, float]
    edges: Sequence[Sequence[Place]]


def layout(steps: Sequence[Step]) -> Layout:
    """Places of the steps, which must come after what they read."""
    layer = _layer_of(steps)
    layers: list[list[Place]] = [[] for _ in range(1 + max(layer.values()))]
    edges: list[list[Place]] = []
    for step in steps:
        layers[layer[step.fingerprint]].append((step.fingerprint, 0))
        for mark in step.reads:
            between = range(layer[mark] + 1, layer[step.fingerprint])
            # All readers of a step share its way through a layer: one line that branches off.
            bends: list[Place] = [(f"{mark}>", index) for index in between]
            for index, bend in zip(between, bends, strict=True):
                if bend not in layers[index]:
                    layers[index].append(bend)
            edges.append([(mark, 0), *bends, (step.fingerprint, 0)])
    before: dict[Place, list[Place]] = {}
    after: dict[Place, list[Place]] = {}
    for edge in edges:
        for left, right in pairwise(edge):
            if left not in before.setdefault(right, []):
                before[right].append(left)
                after.setdefault(left, []).append(right)
    rows = _settle(layers, before, after)
    return Layout(layers, rows, edges)


def _layer_of(steps: Sequence[Step]) -> dict[str, int]:
    layer: dict[str, int] = {}
    for step in steps:
        layer[step.fingerprint] = 1 + max((layer[mark] for mark in step.reads), default=-1)
    for step in steps:  # what reads nothing stands right before its first reader
        readers = [layer[s.fingerprint] for s in steps if step.fingerprint in s.reads]
        if not step.reads and readers:
            layer[step.fingerprint] = min(readers) - 1
    return layer


def _settle(
    layers: list[list[Place]], before: Mapping[Place, list[Place]],
    after: Mapping[Place, list[Place]],
) -> dict[Place, float]:  # fmt: skip
    """Sweep to and fro: each place wants the mean row of the neighbours the sweep comes from.

    The last two sweeps keep the order and straighten the lines, by the neighbours on both sides.
    """
    rows = {place: float(i) for places in layers for i, place in enumerate(places)}
    both = {place: [*before.get(place, ()), *after.get(place, ())] for place in rows}
    for sweep in range(SWEEPS):
        forth, ordering = sweep % 2 == 0, sweep < SWEEPS - 2
        side = before if forth else after
        for places in layers if forth else reversed(layers):
            wanted = {}
            for place in places:
                near = (side.get(place) if ordering else None) or both[place]
                wanted[place] = sum(rows[p] for p in near) / len(near) if near else rows[place]
            if ordering:
                places.sort(key=lambda p, wanted=wanted: (wanted[p], rows[p]))
            rows.update(_apart(places, wanted))
    top = min(rows.values())
    return {place: row - top for place, row in rows.items()}


def _apart(places: Sequence[Place], wanted: Mapping[Place, float]) -> dict[Place, float]:
    """Rows in the given order, boxes at least one apart, as near to the wanted as can be."""
    placed: list[float] = []
    for index, place in enumerate(places):
        room = BEND_ROOM if index and ">" in place[0] + places[index - 1][0] else 1.0
        placed.append(max(wanted[place], placed[-1] + room) if placed else wanted[place])
    drift = sum(wanted[p] - row for p, row in zip(places, placed, strict=True)) / len(placed)
    return {place: row + drift for place, row in zip(places, placed, strict=True)}


def draw(run: Run) -> str:
    """The graph as SVG; empty when there is no step."""
    if not run.steps:
        return ""
    found = layout(run.steps)
    column = {place: index for index, places in enumerate(found.layers) for place in places}
    width = PITCH_X * (len(found.layers) - 1) + BOX_WIDTH + 0.1
    height = PITCH_Y * max(found.rows.values()) + BOX_HEIGHT + 0.1
    with charts.drawing(width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-0.05, width - 0.05)
        axes.set_ylim(height - BOX_HEIGHT / 2 - 0.05, -BOX_HEIGHT / 2 - 0.05)
        axes.set_axis_off()
        points = {p: (column[p] * PITCH_X, row * PITCH_Y) for p, row in found.rows.items()}
        for edge in found.edges:
            _line(axes, [points[place] for place in edge])
        for step in run.steps:
            _box(axes, step, *points[step.fingerprint, 0])
        return charts.svg(
            figure, "graph", "Steps of the run, each joined to what it reads on its left"
        )


def _line(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    (x, y), vertices, codes = points[0], [], []
    vertices.append((x + BOX_WIDTH, y))
    codes.append(Curve.MOVETO)
    for x, y in points[1:]:
        start_x, start_y = vertices[-1]
        middle = (start_x + x) / 2
        vertices += [(middle, start_y), (middle, y), (x, y), (x + BOX_WIDTH, y)]
        codes += [Curve.CURVE4] * 3 + [Curve.LINETO]
    curve = Curve(vertices[:-1], codes[:-1])  # the last one ends at the box, not behind it
    axes.add_patch(PathPatch(curve, fill=False, edgecolor=charts.LINE, lw=1.3))


def _box(axes: Axes, step: Step, x: float, y: float) -> None:
    colour = COLOURS.get(step.stage, charts.DIM)
    axes.add_patch(
        FancyBboxPatch(
            (x, y - BOX_HEIGHT / 2), BOX_WIDTH, BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=charts.CARD, edgecolor=colour, lw=1.2,
            linestyle="-" if step.artifact else (0, (3, 2)),
        )
    )  # fmt: skip
    cost = f" · {duration(step.seconds)}" if step.seconds else ""
    axes.text(
        x + 0.07, y - 0.075, charts.shorten(step.label, 17), va="center", fontsize=7, weight="bold"
    )
    axes.text(x + 0.07, y + 0.085, step.stage + cost, va="center", fontsize=6.8, color=charts.DIM)
