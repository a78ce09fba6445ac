"""The paged latent decoding kernel on FlashMLA's grid: right first, then latency, TFLOP/s and GB/s.

    sabrage bench mla [--small] [--out FILE]

Every run is compared with fp32, sequence by sequence, before it is timed; calls, replayed as a CUDA graph,
read two disjoint sets of pages in turn, each several times the L2 cache. The copy rate and the rate of a bf16
product are measured in the same call. Writes FILE (JSON) and three charts beside it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sabrage.bench.kernels import FLUSH_BYTES, ceilings
from sabrage.bench.mla_grid import (
    PUBLISHED,
    VALUE_WIDTH,
    WIDTH,
    GridRun,
    chart,
    grid,
    needed_bytes,
    row,
    verdict,
    wrong,
)
from sabrage.bench.result import Column, table, write_result
from sabrage.kernels.language import KernelError, require
from sabrage.kernels.paged_latent import decode, decode_reference
from sabrage.run.device import free_memory, probe

PAGE, DTYPE = 64, torch.bfloat16
SCALE = WIDTH**-0.5
COLUMNS: list[Column] = [
    {"key": "index", "title": "run"},
    {"key": "heads", "title": "heads"},
    {"key": "queries", "title": "queries"},
    {"key": "mean", "title": "mean length", "format": ",d"},
    {"key": "lengths", "title": "lengths"},
    {"key": "milliseconds", "title": "ms", "format": ".3f"},
    {"key": "teraflops", "title": "TFLOP/s", "format": ".0f"},
    {"key": "gigabytes", "title": "GB/s", "format": ",.0f"},
    {"key": "of_copy", "title": "of a copy", "format": ".0%"},
    {"key": "of_product", "title": "of a product", "format": ".0%"},
    {"key": "error", "title": "error", "format": ".1e"},
    {"key": "cosine", "title": "1 - cosine", "format": ".1e"},
]


@dataclass(frozen=True)
class Inputs:
    """A run's tensors: one pool of pages, and two tables that name disjoint halves of it."""

    q_BTHK: Tensor
    pages_PSK: Tensor
    tables_BN: tuple[Tensor, Tensor]
    lengths_B: Tensor


def make_inputs(run: GridRun, pool_PSK: Tensor, dtype: torch.dtype) -> Inputs:
    """Fresh queries, and pages of the pool in random order."""
    lengths, device = run.lengths(), pool_PSK.device
    generator = torch.Generator(device).manual_seed(run.heads + run.queries)
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(len(pool_PSK), generator=generator, device=device).int()
    tables = []
    for half in order[: 2 * sum(counts)].chunk(2):
        table_BN = torch.zeros(run.batch, max(counts), device=device, dtype=torch.int32)
        for b, numbers in enumerate(half.split(counts)):
            table_BN[b, : len(numbers)] = numbers
        tables.append(table_BN)
    q_BTHK = torch.randn(run.batch, run.queries, run.heads, WIDTH, generator=generator, device=device)
    return Inputs(q_BTHK.to(dtype), pool_PSK, (tables[0], tables[1]), torch.tensor(lengths).int().to(device))


def make_pool(runs: Sequence[GridRun], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pages for the largest of the runs, twice."""
    pages = max(sum(-(-length // PAGE) for length in run.lengths()) for run in runs)
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(2 * pages, PAGE, WIDTH, generator=generator, device=device, dtype=dtype)


def errors(inputs: Inputs, out_BTHV: Tensor) -> tuple[float, float]:
    """(error in norm, 1 - cosine) against the specification in fp32, a sequence at a time."""
    sums = torch.zeros(4, device=out_BTHV.device, dtype=torch.float64)
    for b, length in enumerate(inputs.lengths_B.tolist()):
        numbers_N = inputs.tables_BN[0][b, : -(-length // PAGE)]
        expected, _ = decode_reference(
            inputs.q_BTHK[b : b + 1].float(),
            inputs.pages_PSK[numbers_N.long()].float(),
            torch.arange(len(numbers_N), device=out_BTHV.device, dtype=torch.int32)[None],
            inputs.lengths_B[b : b + 1],
            VALUE_WIDTH,
            SCALE,
        )
        expected, found = expected[0].double(), out_BTHV[b].double()
        sums += torch.stack(
            [
                (found - expected).square().sum(),
                expected.square().sum(),
                found.square().sum(),
                (found * expected).sum(),
            ]
        )
    difference, own, other, both = sums.tolist()
    return (difference / own) ** 0.5, 1 - both / (own * other) ** 0.5


def milliseconds(call: Callable[[Tensor], Any], tables_BN: tuple[Tensor, Tensor]) -> float:
    """Median device time of a call, over five rounds of calls back to back, tables in turn."""
    rounds, calls, found = 5, 6, []
    call(tables_BN[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            call(tables_BN[turn % 2])
    graph.replay()
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / calls)
    return statistics.median(found)


def measure(*, small: bool = False, out: Path | None = None) -> list[dict[str, Any]]:
    """Checks and times every run; prints the table and, with `out`, writes it with its charts.

    Takes the small grid by itself where memory is short. Raises KernelError where a result is wrong, before
    any number is printed, and where there is no CUDA device that can run the kernel.
    """
    device, title, rates = find_device()
    runs = grid(small=small or free_memory(device) < needed_bytes(grid()))
    pool_PSK = make_pool(runs, device, DTYPE)
    rows = []
    for index, run in enumerate(runs):
        inputs = make_inputs(run, pool_PSK, DTYPE)
        call = partial(
            decode,
            inputs.q_BTHK,
            pool_PSK,
            lengths=inputs.lengths_B,
            value_width=VALUE_WIDTH,
            scale=SCALE,
        )
        found = errors(inputs, call(inputs.tables_BN[0])[0])
        if wrong(*found):
            raise KernelError(
                f"run {index} ({run.name()}) is wrong: error {found[0]:.3g}, 1 - cosine {found[1]:.3g}; "
                "nothing was timed; pytest -m gpu tests/kernels tells more"
            )
        taken = milliseconds(call, inputs.tables_BN)
        rows.append(row(index, run, taken, found, rates))
    Console().print(table(rows, title, COLUMNS))
    print("\n".join(verdict(rows)))
    if out is not None:
        write(out, rows, title, rates)
    return rows


def write(out: Path, rows: list[dict[str, Any]], title: str, rates: tuple[float, float]) -> None:
    """The result file and its three charts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_result(out, name=out.stem, device=title, columns=COLUMNS, rows=rows)
    who, gigabytes, teraflops = PUBLISHED[0]
    drawn: dict[str, tuple[str, tuple[tuple[str, float], ...]]] = {
        "milliseconds": ("latency, ms", ()),
        "teraflops": ("TFLOP/s", (("bf16 product here", rates[1] / 1e12), (who, teraflops))),
        "gigabytes": ("GB/s", (("copy here", rates[0] / 1e9), (who, gigabytes))),
    }
    for key, (label, levels) in drawn.items():
        text = chart([found[key] for found in rows], label=label, title=title, levels=levels)
        out.with_name(f"{out.stem}-{key}.svg").write_text(text, encoding="utf-8")


def find_device() -> tuple[torch.device, str, tuple[float, float]]:
    """(device, a title, (bytes a second of a copy, FLOP/s of a product)). Raises KernelError without one."""
    if not torch.cuda.is_available():
        raise KernelError("benchmarks of decoding need a CUDA device and torch sees none; check nvidia-smi")
    device = torch.device("cuda", torch.cuda.current_device())
    require(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    flush = torch.empty(FLUSH_BYTES, device=device, dtype=torch.uint8)
    rates = ceilings(device, flush)
    name = probe(device).name
    return (
        device,
        f"{name}: copy {rates[0] / 1e12:.2f} TB/s, bf16 product {rates[1] / 1e12:.0f} TFLOP/s",
        rates,
    )
