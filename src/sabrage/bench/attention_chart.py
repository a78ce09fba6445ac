"""The chart of the attention benchmark: TFLOP/s over the length of the sequence, a panel for each mask."""

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN, GAP = 250, 150, 46, 26
COLOURS = {
    "plain": "#9a9a9a", "sdpa": "#7a5c3e", "flash": "#2a6fb0", "cudnn": "#2a7f62",
    "flex": "#c0562a", "varlen": "#7c4fb0", "fa3": "#b02a6f", "fa4": "#222222",
    "triton": "#17becf",
}  # fmt: skip


def chart(rows: Sequence[dict[str, Any]], title: str, ceiling: float) -> str:
    """An SVG: columns are masks and head widths, the upper row is forward, the lower backward.

    The dashed line is the device's rate for a large product, in TFLOP/s like all.
    """
    panels = list(dict.fromkeys((row["mask"], row["width"]) for row in rows))
    lengths = sorted({row["length"] for row in rows})
    known = [row[key] for row in rows for key in ("forward_tflops", "backward_tflops") if key in row]
    most = max([ceiling, *known])
    names = list(dict.fromkeys(row["backend"] for row in rows if "forward_tflops" in row))
    step_x, step_y = WIDTH + GAP, HEIGHT + GAP + 22
    wide, high = MARGIN + step_x * max(len(panels), 1), 60 + 2 * step_y
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="10" y="18" font-size="13">{escape(title)}; dashed: the product</text>',
    ]
    for index, name in enumerate(names):
        x = 10 + 74 * index
        lines += [
            f'<circle cx="{x + 4}" cy="34" r="4" fill="{COLOURS[name]}"/>',
            f'<text x="{x + 12}" y="38">{name}</text>',
        ]
    for column, (mask, width) in enumerate(panels):
        for line, key in enumerate(("forward_tflops", "backward_tflops")):
            left, top = MARGIN + step_x * column, 66 + step_y * line
            drawn = [row for row in rows if (row["mask"], row["width"]) == (mask, width) and key in row]
            heading = f"{mask}, head {width}, {key.partition('_')[0]}"
            lines += _panel(left, top, heading, drawn, key, lengths, most, ceiling)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(
    left: int,
    top: int,
    heading: str,
    rows: Sequence[dict[str, Any]],
    key: str,
    lengths: Sequence[int],
    most: float,
    ceiling: float,
) -> list[str]:
    """One frame: a line with a dot for each length and backend."""

    def x(length: int) -> float:
        return left + WIDTH * (lengths.index(length) + 0.5) / len(lengths)

    def y(rate: float) -> float:
        return top + HEIGHT * (1 - rate / most)

    made = [
        f'<text x="{left}" y="{top - 6}">{escape(heading)}</text>',
        f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
        f'<line x1="{left}" y1="{y(ceiling):.1f}" x2="{left + WIDTH}" y2="{y(ceiling):.1f}" stroke="#222" '
        'stroke-dasharray="3 3"/>',
        f'<text x="{left - 4}" y="{y(ceiling) + 4:.1f}" text-anchor="end">{ceiling:.0f}</text>',
        f'<text x="{left - 4}" y="{top + HEIGHT}" text-anchor="end">0</text>',
    ]
    made += [
        f'<text x="{x(length):.1f}" y="{top + HEIGHT + 14}" text-anchor="middle">{length:,}</text>'
        for length in lengths
    ]
    for name in dict.fromkeys(row["backend"] for row in rows):
        spots = [(x(row["length"]), y(row[key])) for row in rows if row["backend"] == name]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in spots)
        made.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>')
        made += [
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{COLOURS[name]}"/>'
            for across, down in spots
        ]
    return made
