"""What each Triton operation is worth: its time beside torch eager, torch.compile and the device's ceiling.

    python -m sabrage.bench.kernels [NAME] --out FILE

Every measured case runs forward and backward in bf16, caches flushed, timed with CUDA events: 20th, 50th and
80th percentile. The ceiling is the larger of bytes over the copy rate and FLOPs over the rate of a large
product, both measured in the same call. A case is timed only if a small copy of it passes the error gate of
`sabrage.kernels.cases`. Writes FILE (JSON) and a chart beside it (SVG). Needs a CUDA device.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from rich.console import Console
from torch import Tensor

from sabrage.bench.result import Column, table, write_result
from sabrage.config import nearest
from sabrage.kernels.cases import Case, Operation, failures, normal
from sabrage.kernels.catalogue import OPERATIONS
from sabrage.kernels.language import KernelError, require
from sabrage.run.device import probe

GIB = 2**30
# Written before every run: empties the L2 cache and lets the host queue the run while the device is busy.
FLUSH_BYTES = 2 * GIB
# A kernel earns its place by this much time or memory against torch.compile.
FASTER, SMALLER = 1.05, 0.8
COLUMNS: list[Column] = [
    {"key": "operation", "title": "operation"},
    {"key": "case", "title": "case"},
    {"key": "kernel_20", "title": "kernel ms, 20%", "format": ".3f"},
    {"key": "kernel_ms", "title": "50%", "format": ".3f"},
    {"key": "kernel_80", "title": "80%", "format": ".3f"},
    {"key": "compile_ms", "title": "compile ms", "format": ".3f"},
    {"key": "eager_ms", "title": "eager ms", "format": ".3f"},
    {"key": "speedup", "title": "against compile", "format": ".2f"},
    {"key": "ceiling", "title": "of the ceiling", "format": ".0%"},
    {"key": "kernel_gib", "title": "kernel GiB", "format": ".2f"},
    {"key": "compile_gib", "title": "compile GiB", "format": ".2f"},
    {"key": "eager_gib", "title": "eager GiB", "format": ".2f"},
    {"key": "verdict", "title": "verdict"},
]
Work = Callable[[], Any]


def times(work: Work, flush: Tensor) -> list[float]:
    """Milliseconds of the 20th, 50th and 80th percentile of repeated runs."""
    work()
    torch.cuda.synchronize()
    events, repeats = [], 20
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    measured = torch.tensor([start.elapsed_time(end) for start, end in events])
    return measured.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


def ceilings(device: torch.device, flush: Tensor) -> tuple[float, float]:
    """(bytes a second of a large copy, FLOP/s of a large bf16 product)."""
    source, target = flush.chunk(2)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copying = times(lambda: target.copy_(source), flush)[1] / 1e3
    multiplying = times(lambda: a @ b, flush)[1] / 1e3
    return 2 * source.nbytes / copying, 2 * 8192**3 / multiplying


def runner(
    function: Callable[..., tuple[Tensor, ...]], operation: Operation, case: Case, device: torch.device
) -> Work:
    """Forward and backward of one function on the case's inputs, which it keeps."""
    arguments = operation.inputs(case, torch.Generator(device).manual_seed(0), torch.bfloat16)
    learning = operation.learning(arguments)
    arguments |= learning
    pulls: list[Tensor] = []

    def run() -> None:
        outputs = function(**arguments, **case.options)
        if learning:
            driven = [output for output in outputs if output.requires_grad]
            if not pulls:
                generator = torch.Generator(device).manual_seed(1)
                pulls.extend(normal(generator, *output.shape, dtype=output.dtype) for output in driven)
            torch.autograd.grad(driven, list(learning.values()), pulls)

    return run


def timed(work: Work, flush: Tensor) -> tuple[list[float], float] | None:
    """(percentiles in ms, peak GiB beyond the inputs), or None where the device's memory is too small."""
    try:
        work()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / GIB
        return times(work, flush), peak
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def row(
    operation: Operation, case: Case, device: torch.device, rates: tuple[float, float], flush: Tensor
) -> dict:
    """One line of the table; a case that fails the gate has no numbers."""
    found: dict[str, Any] = {"operation": operation.name, "case": case.name}
    broken = failures(operation, case.shrunk(), device, torch.bfloat16)
    if broken:
        return found | {"verdict": "fails the gate: " + "; ".join(broken)}
    rival = operation.rival or operation.plain
    compiled = torch.compile(lambda **arguments: rival(**arguments), fullgraph=True, dynamic=False)
    results = {}
    for name, function in (("kernel", operation.fused), ("compile", compiled), ("eager", rival)):
        result = timed(runner(function, operation, case, device), flush)
        torch.compiler.reset()
        if result is None:
            continue
        results[name] = result
        found |= {f"{name}_ms": result[0][1], f"{name}_gib": result[1]}
    if "kernel" not in results:
        return found | {"verdict": "the kernel ran out of memory"}
    found |= {"kernel_20": results["kernel"][0][0], "kernel_80": results["kernel"][0][2]}
    least = max(operation.memory_bytes(case, 2) / rates[0], operation.flops(case) / rates[1])
    found["ceiling"] = 1e3 * least / found["kernel_ms"]
    if "compile" not in results:
        return found | {"verdict": "torch.compile ran out of memory"}
    found["speedup"] = found["compile_ms"] / found["kernel_ms"]
    won = ["faster"] if found["speedup"] >= FASTER else []
    won += ["smaller"] if found["kernel_gib"] <= SMALLER * found["compile_gib"] else []
    return found | {"verdict": " and ".join(won) or "neither faster nor smaller"}


def measure(
    name: str | None = None, *, out: Path | None = None, commit: str | None = None
) -> list[dict[str, Any]]:
    """Measures one operation, or all; prints the table and, with `out`, writes it there with its chart.

    Raises KernelError for an unknown name and where there is no CUDA device that can run the kernels.
    """
    names = [operation.name for operation in OPERATIONS]
    if name is not None and name not in names:
        raise KernelError(f"no kernel is called {name!r}{nearest(name, names)}; allowed: {', '.join(names)}")
    if not torch.cuda.is_available():
        raise KernelError("kernel benchmarks need a CUDA device and torch sees none; check nvidia-smi")
    device = torch.device("cuda", torch.cuda.current_device())
    require(device)
    facts = probe(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    flush = torch.empty(FLUSH_BYTES, device=device, dtype=torch.uint8)
    rates = ceilings(device, flush)
    title = (
        f"{facts.name}: copy {rates[0] / 1e12:.2f} TB/s, bf16 product {rates[1] / 1e12:.0f} TFLOP/s; "
        "forward and backward, bf16"
    )
    chosen = [
        (operation, case)
        for operation in OPERATIONS
        if name in (None, operation.name) and (facts.has_fp8 or "fp8" not in operation.name)
        for case in operation.cases
        if case.measured
    ]
    rows: list[dict[str, Any]] = []
    for operation, case in chosen:
        rows.append(row(operation, case, device, rates, flush))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        # After every row: what was measured outlasts what stops the rest.
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_result(out, name=out.stem, device=title, columns=COLUMNS, rows=rows, commit=commit)
            out.with_suffix(".svg").write_text(chart(rows, title), encoding="utf-8")
    Console().print(table(rows, title, COLUMNS))
    return rows


def chart(rows: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG of bars: time of torch.compile over the kernel's time; the line is 1, equally fast."""
    timed_rows = [found for found in rows if "speedup" in found]
    left, width, height = 330, 420, 22
    scale = width / max([1.5, *(found["speedup"] for found in timed_rows)])
    bottom = 40 + height * len(timed_rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {bottom + 30}" '
        'font-family="sans-serif" font-size="12">',
        f'<text x="10" y="20" font-size="13">{escape(title)}</text>',
    ]
    for index, found in enumerate(timed_rows):
        y, length = 40 + height * index, scale * found["speedup"]
        label = escape(f"{found['operation']}: {found['case']}")
        colour = "#2a7f62" if found["speedup"] >= FASTER else "#9a9a9a"
        lines += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{height - 6}" fill="{colour}"/>',
            f'<text x="{left + length + 5:.1f}" y="{y + 13}">{found["speedup"]:.2f}</text>',
        ]
    one = left + scale
    lines += [
        f'<line x1="{one:.1f}" y1="32" x2="{one:.1f}" y2="{bottom}" stroke="#222" stroke-dasharray="3 3"/>',
        f'<text x="{left}" y="{bottom + 18}">times as fast as torch.compile</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the Triton operations against torch on a CUDA device.")
    parser.add_argument("name", nargs="?", choices=[operation.name for operation in OPERATIONS])
    parser.add_argument("--out", type=Path, help="result file (JSON); the chart lies beside it")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    given = parser.parse_args(arguments)
    try:
        measure(given.name, out=given.out, commit=given.commit)
    except KernelError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
