"""Charts that a study brings along as plain data, drawn for the page and as one file that stands alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from sabrage.report.curve import NUM_COLOURS, Series, draw
from sabrage.report.tables import read_results

WIDTH, HEIGHT, HEAD, LINE = 720, 380, 30, 18
COLOURS = ["#2563a8", "#c8540a", "#2c8a57", "#7c4dbb", "#c2303b", "#0d8390", "#8b6a2f", "#b7378a"]
STYLE = (
    "text{font:12px sans-serif;fill:#626c7d}.title{font-size:15px;fill:#1b2130}"
    "path{fill:none;stroke:var(--c);stroke-width:1.7}circle{fill:var(--c)}"
    ".dashed{stroke-dasharray:6 3}.grid{stroke:#e3e0d6}"
    + "".join(f".c{index}{{--c:{colour}}}" for index, colour in enumerate(COLOURS))
)


def drawn(summary: Mapping[str, Any]) -> Iterator[tuple[str, Markup, list[Series]]]:
    """(title, drawing, its lines) of every chart in a summary."""
    for chart in summary.get("charts", []):
        lines = [
            Series(name, [(float(x), float(y)) for x, y in points], colour=index, look="dots")
            for index, (name, points) in enumerate(chart["lines"].items())
        ]
        yield (
            chart["title"],
            draw(
                lines,
                x_label=chart["x"],
                y_label=chart["y"],
                log_x=chart["log_x"],
                width=WIDTH,
                height=HEIGHT,
            ),
            lines,
        )


def figure(summary: Mapping[str, Any]) -> str:
    """All charts of a summary below each other, each with its legend, as one SVG file."""
    parts, top = [], 0
    for title, drawing, lines in drawn(summary):
        parts.append(f'<text class="title" x="16" y="{top + 20}">{escape(title)}</text>')
        parts.append(f'<svg y="{top + HEAD}" width="{WIDTH}" height="{HEIGHT}">{drawing}</svg>')
        top += HEAD + HEIGHT
        for line in lines:
            dashed = " dashed" if line.colour >= NUM_COLOURS else ""
            parts.append(
                f'<path class="c{line.colour % NUM_COLOURS}{dashed}" d="M16,{top + 8}h24"/>'
                f'<text x="48" y="{top + 12}">{escape(line.name)}</text>'
            )
            top += LINE
        top += LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def figures(root: Path) -> dict[Path, str]:
    """The drawing of every result of `root/results` that has charts, by the file that it belongs in."""
    results = read_results(root / "results")
    return {
        root / "results" / f"{name}.svg": figure(result)
        for name, result in results.items()
        if result.get("charts")
    }


def stale_figures(root: Path) -> dict[Path, str]:
    """Those of `figures` whose files are missing, or not what the results say."""
    return {
        path: text
        for path, text in figures(root).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


def write_figures(root: Path) -> list[Path]:
    """Brings every drawing up to date; those that changed."""
    stale = stale_figures(root)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    return list(stale)
