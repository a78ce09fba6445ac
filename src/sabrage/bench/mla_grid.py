"""The grid of FlashMLA's benchmark: its runs, what they cost at least, and how they are judged and drawn.

32 runs: batch 128, mean length 4,096 and 8,192, 16 to 128 query heads, 1 and 2 query tokens, fixed and
varying lengths; a head is 576 wide and its value 512 (github.com/deepseek-ai/FlashMLA, its tests).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from xml.sax.saxutils import escape

WIDTH, VALUE_WIDTH = 576, 512
# Most that the kernel may differ from fp32, in norm; a cosine differs by half of the square.
MOST_ERROR, MOST_COSINE = 1e-2, 5e-5
# What others publish: (who, GB/s in the memory-bound runs, TFLOP/s in the compute-bound ones).
PUBLISHED = (
    ("FlashMLA on an H800", 3000, 660),
    ("the Ampere port on an A100", 464, 59),
    ("the Ampere port on an RTX 3090", 600, 70),
)


@dataclass(frozen=True)
class GridRun:
    """One run of the grid."""

    batch: int
    mean: int
    heads: int
    queries: int
    varying: bool

    def lengths(self, *, seed: int = 0) -> list[int]:
        """Entries of every sequence: all the mean, or normal around it with half of it as deviation."""
        if not self.varying:
            return [self.mean] * self.batch
        draw = random.Random(seed)
        drawn = [round(draw.normalvariate(self.mean, self.mean / 2)) for _ in range(self.batch)]
        return [max(self.queries, length) for length in drawn]

    def flops(self) -> int:
        """Both products, over all entries."""
        return 2 * sum(self.lengths()) * self.heads * self.queries * (WIDTH + VALUE_WIDTH)

    def memory_bytes(self) -> int:
        """Every entry and query once read, every output once written, 2 bytes a number."""
        rows = self.batch * self.queries * self.heads
        return 2 * (sum(self.lengths()) * WIDTH + rows * (WIDTH + VALUE_WIDTH))

    def name(self) -> str:
        kind = "varying" if self.varying else "fixed"
        return f"{self.heads} heads x {self.queries}, {self.mean:,} {kind}"


def grid(*, small: bool = False) -> list[GridRun]:
    """The 32 runs; the small grid's 8 take a quarter of the memory and fewer heads."""
    batch, means, heads = (32, (4096,), (16, 128)) if small else (128, (4096, 8192), (16, 32, 64, 128))
    return [
        GridRun(batch, mean, count, queries, varying)
        for varying, mean, count, queries in product((False, True), means, heads, (1, 2))
    ]


def needed_bytes(runs: Sequence[GridRun]) -> int:
    """Device memory for the largest run: its cache twice, queries and results, and the reference's work."""
    return max(3 * run.memory_bytes() for run in runs) + 2**30


def row(
    index: int, run: GridRun, milliseconds: float, errors: tuple[float, float], rates: tuple[float, float]
) -> dict[str, Any]:
    """One line of the table; `rates` are the device's (bytes a second, FLOP/s)."""
    bytes_rate = run.memory_bytes() / milliseconds * 1e3
    flop_rate = run.flops() / milliseconds * 1e3
    return {
        "index": index,
        "heads": run.heads,
        "queries": run.queries,
        "mean": run.mean,
        "lengths": "varying" if run.varying else "fixed",
        "milliseconds": milliseconds,
        "teraflops": flop_rate / 1e12,
        "gigabytes": bytes_rate / 1e9,
        "of_copy": bytes_rate / rates[0],
        "of_product": flop_rate / rates[1],
        "error": errors[0],
        "cosine": errors[1],
    }


def wrong(error: float, cosine: float) -> bool:
    """Whether a run's result is too far from fp32; NaN is."""
    return not (error <= MOST_ERROR and cosine <= MOST_COSINE)


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on the runs best in GB/s and in TFLOP/s, and their distance to what others publish."""
    fast = max(rows, key=lambda found: found["gigabytes"])
    busy = max(rows, key=lambda found: found["teraflops"])
    sentences = [
        f"most memory: run {fast['index']}, {fast['gigabytes']:,.0f} GB/s, {fast['of_copy']:.0%} of a copy's",
        f"most arithmetic: run {busy['index']}, {busy['teraflops']:.0f} TFLOP/s, "
        f"{busy['of_product']:.0%} of a product's",
    ]
    for who, gigabytes, teraflops in PUBLISHED:
        sentences.append(
            f"against {who}: {fast['gigabytes'] / gigabytes:.2f} of its {gigabytes:,} GB/s, "
            f"{busy['teraflops'] / teraflops:.2f} of its {teraflops} TFLOP/s"
        )
    return sentences


def chart(
    values: Sequence[float], *, label: str, title: str, levels: Sequence[tuple[str, float]] = ()
) -> str:
    """An SVG of values against the run's index, from 0, with the named levels as dashed lines."""
    left, right, top, bottom, width, height = 70, 20, 40, 50, 720, 360
    most = 1.05 * max([*values, *(level for _, level in levels)])

    def x(index: int) -> float:
        return left + (width - left - right) * index / max(1, len(values) - 1)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / most

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="13">{escape(title)}</text>',
    ]
    for tick in (most / 1.05 * share / 4 for share in range(5)):
        lines.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:,.4g}</text>')
        lines.append(f'<path d="M{left},{y(tick):.1f}H{width - right}" stroke="#ddd"/>')
    for index in range(0, len(values), 4):
        lines.append(f'<text x="{x(index):.1f}" y="{height - 30}" text-anchor="middle">{index}</text>')
    for index, (name, level) in enumerate(levels):
        lines.append(
            f'<path d="M{left},{y(level):.1f}H{width - right}" stroke="#b3541e" stroke-dasharray="5 4"/>'
        )
        # Every other name stands at the right end, since levels may be close.
        place, anchor = (width - right - 6, "end") if index % 2 else (left + 6, "start")
        where = f'x="{place}" y="{y(level) - 4:.1f}" text-anchor="{anchor}"'
        lines.append(f'<text {where} fill="#b3541e">{escape(name)}</text>')
    points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
    lines.append(f'<polyline points="{points}" fill="none" stroke="#2a7f62"/>')
    lines += [
        f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="3" fill="#2a7f62"/>'
        for index, value in enumerate(values)
    ]
    lines.append(f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">run</text>')
    middle = (top + height - bottom) / 2
    lines.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(label)}</text>"
    )
    return "\n".join([*lines, "</svg>"]) + "\n"
