"""Which tile suits the paged latent decoding kernel on this card: every candidate on three telling runs.

    sabrage bench mla --tune [--out FILE]

The candidates are compiled in several processes first, into Triton's cache, so that the whole takes a minute
or two. The winners go into the tables of `sabrage.kernels.paged_latent` by hand.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sabrage.bench.mla import (
    COLUMNS,
    DTYPE,
    PAGE,
    SCALE,
    errors,
    find_device,
    make_inputs,
    make_pool,
    milliseconds,
)
from sabrage.bench.mla_grid import VALUE_WIDTH, WIDTH, GridRun, row, wrong
from sabrage.bench.result import Column, table, write_result
from sabrage.kernels.paged_latent import launch
from sabrage.kernels.split import NO_WINDOW, DecodeTile

# By rows: entries, warps, stages, programs a multiprocessor.
CANDIDATES = {
    16: (
        (16, 4, 5, 2), (32, 2, 3, 2), (32, 4, 2, 2), (32, 4, 3, 2), (32, 4, 4, 1), (32, 4, 5, 1),
        (32, 8, 4, 1), (32, 8, 5, 1), (64, 4, 2, 2), (64, 4, 3, 1), (64, 8, 2, 2), (64, 8, 3, 1),
    ),
    32: ((32, 8, 2, 1), (32, 8, 3, 1), (64, 8, 2, 1), (64, 8, 3, 1)),
    64: ((16, 8, 4, 1), (32, 8, 2, 1), (32, 8, 3, 1), (32, 8, 4, 1), (64, 8, 1, 1), (64, 8, 2, 1)),
}  # fmt: skip
TRIED = tuple(DecodeTile(rows, *rest) for rows, candidates in CANDIDATES.items() for rest in candidates)
TELLING = (
    GridRun(128, 8192, 16, 1, False),
    GridRun(128, 8192, 64, 1, True),
    GridRun(128, 8192, 128, 2, False),
)
TUNED: list[Column] = [
    {"key": "run", "title": "run"},
    *({"key": key, "title": key, "format": "d"} for key in asdict(TRIED[0])),
    *(column for column in COLUMNS if column["key"] in ("milliseconds", "teraflops", "gigabytes", "error")),
    {"key": "note", "title": "note"},
]


def tune(*, out: Path | None = None, workers: int = 8) -> list[dict[str, Any]]:
    """Times every candidate on the telling runs; prints them, fastest first, and writes them with `out`."""
    device, title, rates = find_device()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        refused = dict(zip(TRIED, pool.map(compile_tile, TRIED), strict=True))
    pool_PSK = make_pool(TELLING, device, DTYPE)
    rows = [time_tile(run, tile, refused[tile], pool_PSK, rates) for run in TELLING for tile in TRIED]
    rows.sort(key=lambda found: (found["run"], found.get("milliseconds", math.inf)))
    Console(width=140).print(table(rows, title, TUNED))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_result(out, name=out.stem, device=title, columns=TUNED, rows=rows)
    return rows


def compile_tile(tile: DecodeTile) -> str:
    """Compiles for one tile, by a run over a single page; says why where that cannot be."""
    # Triton is not there on every machine that reads this module.
    from triton.runtime.errors import OutOfResources

    run, device = TELLING[0], torch.device("cuda", 0)
    made: dict[str, Any] = {"device": device, "dtype": DTYPE}
    q_BTHK = torch.zeros(run.batch, run.queries, run.heads, WIDTH, **made)
    pages_PSK = torch.zeros(1, PAGE, WIDTH, **made)
    table_BN = torch.zeros(run.batch, 1, device=device, dtype=torch.int32)
    try:
        launch(
            q_BTHK, pages_PSK, table_BN, table_BN[:, 0] + PAGE, VALUE_WIDTH, SCALE, True, NO_WINDOW, tile=tile
        )
        torch.cuda.synchronize()
    except OutOfResources as error:
        return str(error).partition(".")[0]
    return ""


def time_tile(
    run: GridRun, tile: DecodeTile, refusal: str, pool_PSK: Tensor, rates: tuple[float, float]
) -> dict[str, Any]:
    """One line of the table; a refused tile has no numbers, a wrong one says so."""
    found: dict[str, Any] = {"run": run.name(), **asdict(tile), "note": refusal}
    if refusal:
        return found
    inputs = make_inputs(run, pool_PSK, DTYPE)
    call = partial(
        launch,
        inputs.q_BTHK,
        pool_PSK,
        lengths=inputs.lengths_B,
        value_width=VALUE_WIDTH,
        scale=SCALE,
        causal=True,
        window=NO_WINDOW,
        tile=tile,
    )
    apart = errors(inputs, call(inputs.tables_BN[0])[0])
    taken = milliseconds(call, inputs.tables_BN)
    return found | row(0, run, taken, apart, rates) | {"note": "wrong" if wrong(*apart) else ""}
