"""The chart of a breakdown: a bar for each recipe, as long as its step, cut into what the time went to."""

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

LEFT, WIDTH, HEIGHT, TOP = 220.0, 560, 26, 62
# In the order of the bar; the mixer is drawn as attention and the rest of it.
COLOURS = {
    "head": "#2563a8", "MLP": "#c8540a", "attention": "#2c8a57", "rest of the mixer": "#8cc7a4",
    "embedding": "#8b6a2f", "optimizer": "#7c4dbb", "rest": "#9a9a9a",
}  # fmt: skip


def segments(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by what they went to."""
    attention = row["attention_ms"] or 0.0
    return {
        "head": row["head_ms"],
        "MLP": row["feedforward_ms"],
        "attention": attention,
        "rest of the mixer": row["mixer_ms"] - attention,
        "embedding": row["embedding_ms"],
        "optimizer": row["optimizer_ms"],
        "rest": row["rest_ms"],
    }


def chart(rows: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG; a line marks the floor of each step. A part below zero has no segment: the table tells it."""
    drawn = [row for row in rows if "rest_ms" in row]
    bars = [{name: max(ms, 0.0) for name, ms in segments(row).items()} for row in drawn]
    scale = WIDTH / max((sum(bar.values()) for bar in bars), default=1.0)
    bottom = TOP + HEIGHT * len(bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90} {bottom + 12}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="10" y="20" font-size="13">{escape(title)}; ms of a step, dashed: its floor</text>',
    ]
    for index, (name, colour) in enumerate(COLOURS.items()):
        place = 10 + 118 * index
        lines += [
            f'<rect x="{place}" y="34" width="10" height="10" fill="{colour}"/>',
            f'<text x="{place + 15}" y="43">{name}</text>',
        ]
    for index, (row, bar) in enumerate(zip(drawn, bars, strict=True)):
        y, x = TOP + HEIGHT * index, LEFT
        lines.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(row["recipe"])}</text>')
        for name, ms in bar.items():
            lines.append(
                f'<rect class="part" x="{x:.1f}" y="{y}" width="{scale * ms:.1f}" height="{HEIGHT - 6}" '
                f'fill="{COLOURS[name]}"><title>{name} {ms:.1f} ms</title></rect>'
            )
            x += scale * ms
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{row["step_ms"]:.1f}</text>')
        if row["floor_ms"]:
            floor = LEFT + scale * row["floor_ms"]
            lines.append(
                f'<line x1="{floor:.1f}" x2="{floor:.1f}" y1="{y - 2}" y2="{y + HEIGHT - 4}" '
                'stroke="#222" stroke-dasharray="3 2"/>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"
