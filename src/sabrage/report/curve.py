"""Line charts as inline SVG: round ticks, labelled axes with units, linear or logarithmic x.

Colours come from the page's style sheet (classes `line-0`, `line-1`, ...), so that one drawing serves the
light and the dark page. The numbers that a reader may point at travel with the drawing, in `data-` fields.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 48


@dataclass(frozen=True)
class Series:
    """One line: (x, y) in the axes' units, x rising; a y that is not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis from `low` to `high`; `first` and `last` are its ends on the drawing."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def place(self, value: float) -> float:
        """The position on the drawing of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(max(value, self.low)) if self.log else value) - low) / (high - low)
        return self.first + share * (self.last - self.first)


def linear_ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """About `count` values at 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounded, since 3 * 0.1 is not 0.3.
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The values 1, 2 and 5 times a power of ten within [low, high], the powers alone over four decades."""
    factors = (1, 2, 5) if high / low < 1e4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high
    ]


def label(value: float) -> str:
    """A tick's number: 1,000 with its comma, 3.4 without trailing noise."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.10g}"


def draw(
    series: Sequence[Series], *, x_label: str, y_label: str, log_x: bool = False, target: float | None = None
) -> Markup:
    """The chart as an `<svg>` element; `target` is a dashed horizontal line.

    With linear x the first 4% of the range may lie above the frame, so that the rest can be read.
    """
    drawn = {index: one for index, one in enumerate(series) if any(math.isfinite(y) for _, y in one.points)}
    if not drawn:
        return Markup('<p class="empty">Nothing has been logged yet.</p>')
    x_axis, y_axis = _axes(list(drawn.values()), log_x=log_x, target=target)
    parts = [*_grid(x_axis, y_axis, x_label, y_label)]
    if target is not None:
        level = f"{y_axis.place(target):.1f}"
        parts.append(f'<line class="target" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level}" y2="{level}"/>')
    # The inner svg clips what lies above the frame, and keeps the outer coordinates.
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    box = f'x="{LEFT}" y="{TOP}" width="{width}" height="{height}"'
    parts.append(f'<svg {box} viewBox="{LEFT} {TOP} {width} {height}">')
    shown = []
    for index, one in drawn.items():
        points = thin([(x, y) for x, y in one.points if x > 0 or not log_x], x_axis)
        shown.append({"name": one.name, "points": [[x, _rounded(y)] for x, y in points]})
        parts += _line(points, x_axis, y_axis, index=index, dots=one.dots)
    parts.append("</svg>")
    cursor = f'<line y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    parts.append(f'<g class="cursor" visibility="hidden">{cursor}</g>')
    scale = {"low": x_axis.low, "high": x_axis.high, "first": x_axis.first, "last": x_axis.last, "log": log_x}
    name = escape(f"{y_label} against {x_label}")
    data = f'data-x="{escape(json.dumps(scale))}" data-series="{escape(json.dumps(shown))}"'
    opening = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" {data}>'
    return Markup(opening + "".join(parts) + "</svg>")


def thin(points: Sequence[tuple[float, float]], axis: Axis) -> list[tuple[float, float]]:
    """First, lowest, highest and last point of every pixel column: the same drawing from fewer points."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int(axis.place(point[0])), []).append(point)
    kept = []
    for column in columns.values():
        finite = [point for point in column if math.isfinite(point[1])] or column
        ends = {column[0], column[-1], min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(ends, key=lambda point: point[0])
    return kept


def _axes(series: Sequence[Series], *, log_x: bool, target: float | None) -> tuple[Axis, Axis]:
    points = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    if log_x:
        x_low = max(1.0, x_low)
        x_high = max(x_high, 10 * x_low)
    elif x_high <= x_low:
        x_high = x_low + 1
    settled = [y for x, y in points if log_x or x >= x_low + 0.04 * (x_high - x_low)]
    heights = settled + ([] if target is None else [target])
    y_low, y_high = min(heights), max(heights)
    margin = 0.05 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin
    ticks = log_ticks(x_low, x_high) if log_x else linear_ticks(x_low, x_high, count=8)
    return (
        Axis(x_low, x_high, LEFT, WIDTH - RIGHT, log_x, ticks),
        Axis(y_low, y_high, HEIGHT - BOTTOM, TOP, ticks=linear_ticks(y_low, y_high)),
    )


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    bottom, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
    parts = []
    for tick in x_axis.ticks:
        place = f"{x_axis.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 18}" text-anchor="middle">{label(tick)}</text>')
    for tick in y_axis.ticks:
        level = y_axis.place(tick)
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    center = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{center}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return parts


def _line(
    points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, *, index: int, dots: bool
) -> list[str]:
    commands, pen = [], "M"
    circles = []
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        place = f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}"
        commands.append(pen + place)
        pen = "L"
        if dots:
            left, top = place.split(",")
            circles.append(f'<circle class="line-{index}" cx="{left}" cy="{top}" r="3"/>')
    return [f'<path class="line-{index}" d="{"".join(commands)}"/>', *circles]


def _rounded(value: float) -> float | str:
    return round(value, 5) if math.isfinite(value) else str(value)
