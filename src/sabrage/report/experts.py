"""The page of a run's experts: which kind of text goes to whom, by layer, and how the routers learned.

It draws what `sabrage.study.experts.examine` found; the entropies over training come from the run's log.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sabrage.report import history
from sabrage.report.curve import Series, draw
from sabrage.run.folder import Run

PAGE = "experts.html"
SIGNIFICANT = 0.05
# Sizes of a picture: the cells, the bars of the load above them, the names to their left, and the widest row.
CELL_HEIGHT, BARS, NAMES, WIDEST = 24, 60, 110, 700
# Columns of the table before those of the kinds.
MEASURES = 6
READINGS = {
    "router_entropy": "Entropy of a token's scores, of the largest",
    "load_entropy": "Entropy of the load, of the largest",
}


def write_experts(found: Mapping[str, Any], run: Run, *, out: Path) -> Path:
    """Writes the page to `out` and returns it."""
    environment = Environment(
        loader=PackageLoader("sabrage.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    titles, rows = table(found)
    page = environment.get_template("experts.html").render(
        title=f"Experts of {run.manifest['recipe']['name']}",
        run=run,
        sentence=verdict(found),
        titles=titles,
        rows=rows,
        measures=MEASURES,
        shuffles=found["shuffles"],
        pictures=[(f"Layer {layer['layer']}", picture(found, layer)) for layer in found["layers"]],
        charts=list(_charts(run)),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def verdict(found: Mapping[str, Any]) -> str:
    """Whether experts take kinds of text, in a sentence."""
    layers = found["layers"]
    telling = [layer for layer in layers if layer["p"] < SIGNIFICANT]
    if not telling:
        return (
            f"In none of {len(layers)} layers does the kind of a text tell its expert (p >= {SIGNIFICANT})."
        )
    best = max(telling, key=lambda layer: layer["information"])
    told = ", ".join(
        f"{kind} to {expert} ({share:.0%} of it, {lift:.1f} times its share of all text)"
        for kind, expert, share, lift in favourites(found, best)
    )
    return (
        f"In {len(telling)} of {len(layers)} layers the kind of a text tells its expert (p < {SIGNIFICANT}); "
        f"most in layer {best['layer']}, {best['information']:.3f} of {found['most']:.3f} bits: {told}."
    )


def favourites(found: Mapping[str, Any], layer: Mapping[str, Any]) -> Iterator[tuple[str, int, float, float]]:
    """(kind, expert, share, lift) of the expert that each kind exceeds the load of the most."""
    for kind, shares in zip(found["kinds"], layer["shares"], strict=True):
        excess = [share - load for share, load in zip(shares, layer["load"], strict=True)]
        expert = excess.index(max(excess))
        load = layer["load"][expert]
        yield kind["name"], expert, shares[expert], shares[expert] / load if load else 1.0


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of the layers: what the kind tells, what chance does, and who takes each kind."""
    kinds = [kind["name"] for kind in found["kinds"]]
    titles = ["layer", "bits", "by chance", "p", "most loaded", "least loaded", *kinds]
    rows = [
        [
            str(layer["layer"]),
            f"{layer['information']:.4f}",
            f"{layer['chance']:.4f}",
            f"{layer['p']:.4f}",
            f"{max(layer['load']):.1%}",
            f"{min(layer['load']):.1%}",
            *(f"{expert}: {share:.0%}" for _, expert, share, _ in favourites(found, layer)),
        ]
        for layer in found["layers"]
    ]
    return titles, rows


def picture(found: Mapping[str, Any], layer: Mapping[str, Any]) -> Markup:
    """The load of each expert as bars, and below them the share of each kind that it takes, as SVG."""
    load, kinds = layer["load"], found["kinds"]
    cell = min(44.0, WIDEST / len(load))
    width, bottom = NAMES + cell * len(load) + 6, BARS + 22
    height = bottom + CELL_HEIGHT * len(kinds) + 4
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="experts of layer {layer["layer"]} by kind of text">',
        f'<text x="{NAMES - 8}" y="{BARS}" text-anchor="end">load</text>',
    ]
    for expert, share in enumerate(load):
        x, tall = NAMES + cell * expert, (BARS - 14) * share / max(load)
        parts.append(
            f'<rect class="c0 share" x="{x + cell / 6:.1f}" y="{BARS - tall:.1f}" width="{cell / 1.5:.1f}" '
            f'height="{tall:.1f}"><title>expert {expert}: {share:.1%} of all tokens</title></rect>'
        )
        if cell > 16:
            place = f'x="{x + cell / 2:.1f}" y="{BARS + 15}" text-anchor="middle"'
            parts.append(f"<text {place}>{expert}</text>")
    for row, (kind, shares) in enumerate(zip(kinds, layer["shares"], strict=True)):
        y, name = bottom + CELL_HEIGHT * row, escape(kind["name"])
        parts.append(f'<text x="{NAMES - 8}" y="{y + 16}" text-anchor="end">{name}</text>')
        for expert, share in enumerate(shares):
            x = NAMES + cell * expert
            parts.append(
                f'<rect class="c1 share" x="{x + 1:.1f}" y="{y + 1}" width="{cell - 2:.1f}" '
                f'height="{CELL_HEIGHT - 2}" fill-opacity="{share:.3f}"><title>{name}: {share:.1%} to expert '
                f"{expert}</title></rect>"
            )
            if cell > 16:
                place = f'x="{x + cell / 2:.1f}" y="{y + 16}" text-anchor="middle"'
                parts.append(f"<text {place}>{100 * share:.0f}</text>")
    return Markup("".join(parts) + "</svg>")


def _charts(run: Run) -> Iterator[tuple[str, Markup]]:
    """(title, drawing) of the entropies over training, as far as they are in the log."""
    shown = dict(history.readings(run))
    for name, title in READINGS.items():
        if name in shown:
            series = [Series("", shown[name])]
            yield title, draw(series, x_label="step", y_label="share of log E", from_zero=True, height=240)
