"""Tokens a second of the generation engine against batch and length, with a dense and with a paged cache.

Models of random weights write from caches of random entries, since what they hold changes no time. A step is
the engine's own: uploads, a token for every row, and reading the tokens back. Per step at least all weights
and all entries are read, which gives the rate in GB/s. Writes FILE (JSON) and a chart beside it (SVG).
"""

import statistics
import time
from collections.abc import Sequence
from itertools import product
from math import floor, log2, log10
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from rich.console import Console

from sabrage.bench.result import Column, table, write_result
from sabrage.config import ConfigError, resolve
from sabrage.generate.cache import streams_of
from sabrage.generate.engine import Engine, Request, Running
from sabrage.generate.paged import PAGE_SIZE
from sabrage.generate.sampling import Sampling
from sabrage.generate.text import narrow
from sabrage.model.lm import LM, build_model
from sabrage.recipe import Recipe
from sabrage.run.device import free_memory, probe

GIB = 2**30
# The first of them record the step, or warm the caches up.
STEPS, TIMED = 16, 12
CACHES = ("dense", "paged")
TOO_LARGE = "does not fit into the device's memory"
COLUMNS: list[Column] = [
    {"key": "recipe", "title": "recipe"},
    {"key": "cache", "title": "cache"},
    {"key": "length", "title": "length", "format": ",d"},
    {"key": "batch", "title": "batch", "format": ",d"},
    {"key": "tokens_per_second", "title": "tokens/s", "format": ",.0f"},
    {"key": "step_ms", "title": "step ms", "format": ".2f"},
    {"key": "read_gbs", "title": "GB/s", "format": ",.0f"},
    {"key": "cache_gib", "title": "cache GiB", "format": ".2f"},
    {"key": "note", "title": "note"},
]
# Sizes of a panel of the chart, and what lies between two.
LEFT, TOP, WIDTH, HEIGHT, GAP = 70, 60, 220, 240, 80
COLOURS = ("#2a7f62", "#b5533c", "#3b5b92", "#8a6d1f", "#6b4a8a", "#444444")


def engine_at(model: LM, *, batch: int, length: int, paged: bool) -> Engine:
    """An engine whose every row is some steps short of `length` tokens."""
    pages = -(-length // PAGE_SIZE) * batch
    engine = Engine(model, rows=batch, capacity=length, num_pages=pages if paged else None)
    generator = torch.Generator(engine.device).manual_seed(0)
    for stored in engine.cache.layers:
        for pages_PSX in stored.values():
            pages_PSX.normal_(generator=generator)
    request = Request(prompt=(0,), max_tokens=length, sampling=Sampling(temperature=0))
    for row, sequence in enumerate(engine.idle):
        engine.cache.reserve(sequence, length)
        sequence.length = length - STEPS
        engine.sampler.place(row, request.sampling, row)
        engine.rows[row] = Running(row, request, sequence, 0, length)
    return engine


def timed(model: LM, *, batch: int, length: int, paged: bool) -> dict[str, Any]:
    """What a step takes, the median of the later ones; only a note where memory is too small."""
    weight, seconds = next(model.parameters()), []
    widths = sum(sum(streams_of(model.spec, layer).values()) for layer in range(model.spec.layers))
    # Asked beforehand, since a process that fills the main memory is not told, but ended.
    if batch * length * widths * weight.element_size() > free_memory(weight.device):
        return {"note": TOO_LARGE}
    try:
        engine = engine_at(model, batch=batch, length=length, paged=paged)
        for _ in range(STEPS):
            began = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - began)
    except torch.cuda.OutOfMemoryError:
        return {"note": TOO_LARGE}
    step = statistics.median(seconds[-TIMED:])
    weights = sum(weight.nbytes for weight in model.parameters())
    entries = engine.cache.page_bytes() / engine.cache.page_size * batch * length
    return {
        "tokens_per_second": batch / step,
        "step_ms": 1e3 * step,
        "read_gbs": (weights + entries) / step / 1e9,
        "cache_gib": engine.cache.bytes() / GIB,
        "note": "",
    }


def problems(recipes: Sequence[Recipe], batches: Sequence[int], lengths: Sequence[int]) -> list[str]:
    """Sentences about sizes that cannot be measured."""
    found = [] if recipes else ["got no recipe to time; name at least one, such as base"]
    if not batches or min(batches) < 1:
        found.append(f"got batches {list(batches)}, allowed: 1 and up")
    if not lengths or min(lengths) <= STEPS:
        found.append(f"got lengths {list(lengths)}, allowed: more than {STEPS} tokens")
    for recipe in recipes:
        limits = recipe.model.max_lengths().items()
        found += [
            f"recipe {recipe.name!r}: {path}={limit} and lengths up to {max(lengths)} were asked for; "
            "ask for shorter ones"
            for path, limit in limits
            if lengths and limit < max(lengths)
        ]
    return found


def measure(
    recipes: Sequence[Recipe],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    device: torch.device,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Times every recipe at every batch and length; prints the table and, with `out`, writes it there.

    In bf16 on CUDA, in fp32 elsewhere. Raises ConfigError for sizes that cannot be measured.
    """
    wrong = problems(recipes, batches, lengths)
    if wrong:
        raise ConfigError("; ".join(wrong))
    facts = probe(device)
    dtype = torch.bfloat16 if device.type == "cuda" and facts.has_bf16 else torch.float32
    title = f"{facts.name}, {str(dtype).removeprefix('torch.')}"
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        model = build_model(resolve(recipe.model, facts), seed=0)
        model = narrow(model.to(device), dtype).eval()
        for cache, length, batch in product(CACHES, lengths, batches):
            row = {"recipe": recipe.name, "cache": cache, "length": length, "batch": batch}
            rows.append(row | timed(model, batch=batch, length=length, paged=cache == "paged"))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    Console().print(table(rows, title, COLUMNS))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_result(out, name=out.stem, device=title, columns=COLUMNS, rows=rows)
        out.with_suffix(".svg").write_text(chart(rows, title), encoding="utf-8")
    return rows


def chart(rows: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG: tokens a second against the batch, both axes logarithmic, a panel for each length.

    Each recipe has a colour; lines are dense and dashes paged.
    """
    lengths, batches, recipes = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("length", "batch", "recipe")
    )
    timed_rows = sorted((row for row in rows if "step_ms" in row), key=lambda row: row["batch"])
    speeds = [row["tokens_per_second"] for row in timed_rows]
    # Whole decades, at least one.
    decades = range(floor(log10(min(speeds, default=1))), floor(log10(max(speeds, default=1))) + 2)
    bottom, lines = TOP + HEIGHT, [text(10, 20, title)]

    def x_of(panel: int, batch: int) -> float:
        first, last = min(batches), max(batches)
        share = log2(batch / first) / log2(last / first) if last > first else 0.5
        return LEFT + panel * (WIDTH + GAP) + share * WIDTH

    def y_of(speed: float) -> float:
        return bottom - (log10(speed) - decades[0]) / (decades[-1] - decades[0]) * HEIGHT

    for panel, length in enumerate(lengths):
        start = LEFT + panel * (WIDTH + GAP)
        lines.append(text(start, TOP - 10, f"length {length:,}"))
        for decade in decades:
            y = y_of(10.0**decade)
            lines.append(f'<line x1="{start}" y1="{y:.1f}" x2="{start + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>')
            lines.append(text(start - 8, y + 4, f"{10**decade:,}", anchor="end"))
        lines += [text(x_of(panel, batch), bottom + 18, str(batch), anchor="middle") for batch in batches]
        for index, recipe in enumerate(recipes):
            for cache, dash in zip(CACHES, ("", ' stroke-dasharray="5 4"'), strict=True):
                points = [
                    (x_of(panel, row["batch"]), y_of(row["tokens_per_second"]))
                    for row in timed_rows
                    if (row["length"], row["recipe"], row["cache"]) == (length, recipe, cache)
                ]
                lines += line(points, COLOURS[index % len(COLOURS)], dash)
    for index, recipe in enumerate(recipes):
        lines.append(text(LEFT + 120 * index, bottom + 45, recipe, colour=COLOURS[index % len(COLOURS)]))
    lines.append(text(LEFT, bottom + 65, "tokens a second against the batch; lines: dense, dashes: paged"))
    across = max(LEFT + len(lengths) * (WIDTH + GAP), LEFT + 120 * len(recipes), 480)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {bottom + 80}" '
        'font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, *lines, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = "#222") -> str:
    """A text of the chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def line(points: Sequence[tuple[float, float]], colour: str, dash: str) -> list[str]:
    """The points, joined."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points),
    ]
