"""Line charts as inline SVG: round ticks, labelled axes with units, linear or logarithmic x.

The drawing stands on paper and without JavaScript. It carries its points in `data-chart`, from which the
page's script draws it again at the reader's width, zoomed, with runs left out or with another axis. Colours
come from the page's style sheet (classes `c0`, `c1`, ...), so that one drawing serves light and dark.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

RIGHT, TOP, BOTTOM = 20, 16, 48
CHARACTER = 7.2
NUM_COLOURS = 8
Look = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Series:
    """One line: (x, y) in the axes' units, x rising; a y that is not finite leaves a gap.

    `run` is what the page can leave out, `colour` a number from 0; a faint line lies behind the others.
    """

    name: str
    points: Sequence[tuple[float, float]]
    run: str = ""
    colour: int = 0
    look: Look = "line"

    @property
    def style(self) -> str:
        """The classes of its marks: past the last colour the first ones come again, dashed."""
        again = " dashed" if self.colour >= NUM_COLOURS else ""
        return f"c{self.colour % NUM_COLOURS} {self.look}{again}"


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
    """A tick's number: 4,000 with its comma, 50k, 20M and 1.5B, 3.4 without trailing noise."""
    for most, divisor, suffix in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= most:
            return f"{value / divisor:.10g}{suffix}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.10g}"


def draw(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    from_zero: bool = False,
    target: float | None = None,
    width: int = 640,
    height: int = 360,
    most: int = 1000,
) -> Markup:
    """The chart as an `<svg>` element; `target` is a dashed horizontal line, `most` the points of a line.

    With linear x a run's first steps may lie above the frame, so that the rest can be read.
    """
    drawn = [one for one in series if any(math.isfinite(y) for _, y in one.points)]
    if not drawn:
        return Markup('<p class="empty">Nothing has been logged yet.</p>')
    x_axis, y_axis = _axes(drawn, width, height, log_x=log_x, from_zero=from_zero, target=target)
    parts = _grid(x_axis, y_axis, x_label, y_label)
    if target is not None:
        level = f"{y_axis.place(target):.1f}"
        parts.append(
            f'<line class="target" x1="{x_axis.first}" x2="{x_axis.last}" y1="{level}" y2="{level}"/>'
        )
    # The inner svg clips what lies above the frame, and keeps the outer coordinates; dots at the sides stay.
    box = f"{x_axis.first - 4} {TOP} {x_axis.last - x_axis.first + 8} {height - TOP - BOTTOM}"
    x, y, inner_width, inner_height = box.split()
    parts.append(f'<svg x="{x}" y="{y}" width="{inner_width}" height="{inner_height}" viewBox="{box}">')
    lines = []
    for one in sorted(drawn, key=lambda one: one.look != "faint"):
        points = thin([(x, y) for x, y in one.points if x > 0 or not log_x], most)
        parts += _line(points, x_axis, y_axis, one)
        lines.append([one.name, one.run, one.style, [[_short(x), _short(y)] for x, y in points]])
    carried = {"x": x_label, "y": y_label, "logX": log_x, "zero": from_zero, "target": target, "lines": lines}
    opening = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(f"{y_label} against {x_label}")}" '
        f'data-chart="{escape(json.dumps(carried, separators=(",", ":")))}">'
    )
    return Markup(opening + "".join(parts) + "</svg></svg>")


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, x rising, that look the same drawn with linear and with logarithmic x.

    Of every column of a narrow drawing the first, lowest, highest and last point stay.
    """
    if len(points) <= most:
        return list(points)
    low, high = points[0][0], points[-1][0]
    kept: set[tuple[float, float]] = set()
    for log in (False, True):
        # The last point has a column of its own, and the halves share the first and the last point.
        axis = Axis(max(low, high / 1e6) if log else low, high, 0, most // 8 - 1, log)
        columns: dict[int, list[tuple[float, float]]] = {}
        for point in points:
            columns.setdefault(int(axis.place(point[0])), []).append(point)
        for column in columns.values():
            finite = [point for point in column if math.isfinite(point[1])] or column
            kept |= {column[0], column[-1], min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
    return sorted(kept, key=lambda point: point[0])


def _axes(
    series: Sequence[Series],
    width: int,
    height: int,
    *,
    log_x: bool,
    from_zero: bool,
    target: float | None,
) -> tuple[Axis, Axis]:
    points = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    if log_x:
        x_low = max(1.0, x_low)
        x_high = max(x_high, 10 * x_low)
    elif x_high <= x_low:
        x_high = x_low + 1
    settled = [y for x, y in points if log_x or x >= x_low + 0.04 * (x_high - x_low)]
    # That is for curves which fall steeply at first, not for a handful of points.
    heights = settled if len(settled) >= 0.9 * len(points) else [y for _, y in points]
    heights = [*heights, *([] if target is None else [target]), *([0.0] if from_zero else [])]
    y_low, y_high = min(heights), max(heights)
    # A level line is no reason to draw its rounding errors.
    margin = max(0.05 * (y_high - y_low), 1e-3 * abs(y_high)) or 0.5
    y_low, y_high = y_low - (0 if from_zero else margin), y_high + margin
    y_ticks = linear_ticks(y_low, y_high, count=height // 60)
    left = round(30 + CHARACTER * max(len(label(tick)) for tick in y_ticks))
    count = max(3, width // 110)
    ticks = log_ticks(x_low, x_high) if log_x else linear_ticks(x_low, x_high, count=count)
    return (
        Axis(x_low, x_high, left, width - RIGHT, log_x, ticks),
        Axis(y_low, y_high, height - BOTTOM, TOP, ticks=y_ticks),
    )


def _grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> list[str]:
    left, bottom, middle = x_axis.first, y_axis.first, (y_axis.first + y_axis.last) / 2
    parts = []
    for tick in x_axis.ticks:
        place = f"{x_axis.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{place}" x2="{place}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 18}" text-anchor="middle">{label(tick)}</text>')
    for tick in y_axis.ticks:
        level = y_axis.place(tick)
        ends = f'x1="{left}" x2="{x_axis.last}" y1="{level:.1f}" y2="{level:.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(f'<text x="{left - 8}" y="{level + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    center = (left + x_axis.last) / 2
    parts.append(f'<text x="{center}" y="{bottom + 40}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return parts


def _line(points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, one: Series) -> list[str]:
    commands, pen = [], "M"
    circles = []
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"
            continue
        left, top = f"{x_axis.place(x):.1f}", f"{y_axis.place(y):.1f}"
        commands.append(f"{pen}{left},{top}")
        pen = "L"
        if one.look == "dots":
            circles.append(f'<circle class="{one.style}" cx="{left}" cy="{top}" r="3"/>')
    return [f'<path class="{one.style}" d="{"".join(commands)}"/>', *circles]


def _short(value: float) -> float | None:
    """Six figures, None for what is not finite: what a reader can point at."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded == int(rounded) else rounded
