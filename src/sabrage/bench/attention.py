"""What every attention backend makes of the device: forward and backward TFLOP/s by mask, head and length.

    python -m sabrage.bench.attention --out FILE [--full]

65,536 tokens a call, model width 768, bf16, caches flushed, medians of CUDA events; the backward pass is both
passes less the forward one. Only visible pairs count as work: 4 products of a forward, 10 of a backward pass
(2.5 times as many) for each pair and number of a head. The ceiling is a large bf16 product, measured in the
same call. A cell has numbers only if its first head errs at most twice as much as torch in bf16, both against
the fp32 reference; what fails is a cell that says so. Writes FILE (JSON) after every row, and a chart beside
it (SVG). Needs a CUDA device: about a minute for one length on an H100, about six for all with --full.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from torch import Tensor

from sabrage.attention.backends import KNOWS, Backend, Need, attend, needs_of, refusal
from sabrage.attention.masks import visible
from sabrage.bench.attention_chart import chart
from sabrage.bench.kernels import FLUSH_BYTES, ceilings, times
from sabrage.bench.result import Column, table, write_result
from sabrage.config import ConfigError
from sabrage.context import Context
from sabrage.run.device import DeviceFacts, probe

Mask = Literal["causal", "window", "documents"]
TOKENS, DIM, WINDOW = 65_536, 768, 512
# Lengths of documents, drawn evenly: 512 tokens on average.
DOCUMENTS = (64, 961)
WIDTHS, LENGTHS, QUICK_LENGTHS = (64, 128), (512, 1024, 2048, 4096, 8192, 16_384), (2048,)
BACKENDS: tuple[Backend, ...] = tuple(name for name in get_args(Backend) if name != "auto")
# Beyond twice the error of torch in bf16, so that a perfect torch leaves room for rounding.
SLACK = 5e-4
COLUMNS: list[Column] = [
    {"key": "mask", "title": "mask"},
    {"key": "width", "title": "head width"},
    {"key": "length", "title": "tokens", "format": ","},
    {"key": "backend", "title": "backend"},
    {"key": "forward_tflops", "title": "forward TFLOP/s", "format": ".0f"},
    {"key": "backward_tflops", "title": "backward TFLOP/s", "format": ".0f"},
    {"key": "ceiling", "title": "of the ceiling, both", "format": ".0%"},
    {"key": "error", "title": "error / torch's", "format": ".2f"},
    {"key": "note", "title": "note"},
]


@dataclass(frozen=True)
class Cell:
    """One backend at one mask, head width and length."""

    mask: Mask
    width: int
    length: int
    backend: Backend

    @property
    def heads(self) -> int:
        return DIM // self.width

    @property
    def batch(self) -> int:
        return max(TOKENS // self.length, 1)

    @property
    def window(self) -> int | None:
        return WINDOW if self.mask == "window" else None

    @property
    def needs(self) -> frozenset[Need]:
        return needs_of(window=self.mask == "window", documents=self.mask == "documents")

    def documents(self) -> Tensor | None:
        """(B, T) numbers of documents that follow each other through the rows."""
        if self.mask != "documents":
            return None
        tokens, generator = self.batch * self.length, torch.Generator().manual_seed(0)
        lengths = torch.randint(*DOCUMENTS, (tokens // DOCUMENTS[0] + 1,), generator=generator)
        numbers = torch.arange(len(lengths)).repeat_interleave(lengths)[:tokens]
        return numbers.view(self.batch, self.length)

    def pairs(self) -> int:
        """Visible pairs of a query and a key in the whole batch, of one head."""
        documents_BT = self.documents()
        if documents_BT is None:
            seen = min(self.window or self.length, self.length)
            return self.batch * (seen * (seen + 1) // 2 + (self.length - seen) * seen)
        total = 0
        for row in documents_BT:
            _, sizes = row.unique_consecutive(return_counts=True)
            total += int((sizes * (sizes + 1) // 2).sum())
        return total

    def flops(self) -> tuple[int, int]:
        """(forward, backward): two products of two FLOPs, and five."""
        work = self.pairs() * self.heads * self.width
        return 4 * work, 10 * work


def cells(*, full: bool) -> list[Cell]:
    """All that is measured, in the order of the table; a backend that does not know a mask is left out."""
    return [
        Cell(mask, width, length, backend)
        for mask in get_args(Mask)
        for width in WIDTHS
        for length in (LENGTHS if full else QUICK_LENGTHS)
        for backend in BACKENDS
        if KNOWS[backend].issuperset(needs_of(window=mask == "window", documents=mask == "documents"))
    ]


def inputs(cell: Cell, device: torch.device) -> tuple[list[Tensor], Tensor, Context]:
    """Queries, keys and values that learn, the gradient of the output, and the context of all calls."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (cell.batch, cell.length, cell.heads, cell.width)
    drawn = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4)]
    documents_BT = cell.documents()
    context = Context(documents_BT=None if documents_BT is None else documents_BT.to(device))
    return [x.requires_grad_() for x in drawn[:3]], drawn[3], context


def errors(cell: Cell, qkv: Sequence[Tensor], pull: Tensor, context: Context) -> tuple[float, str]:
    """(largest error over torch's in bf16, what is out of bounds), of the first head of the first row."""
    q, k, v = qkv
    out = attend(q, k, v, context, backend=cell.backend, window=cell.window)
    found = [out, *torch.autograd.grad(out, qkv, pull)]
    documents_BT = context.documents_BT
    alone = Context(documents_BT=None if documents_BT is None else documents_BT[:1])
    part = [x.detach()[:1, :, :1] for x in qkv]
    mask = visible(alone, cell.length, pull.device, window=cell.window)
    truths, torchs = (
        reference([x.to(dtype) for x in part], pull[:1, :, :1].to(dtype), mask)
        for dtype in (torch.float32, torch.bfloat16)
    )
    largest, said = 0.0, []
    for name, got, truth, other in zip(("out", "dq", "dk", "dv"), found, truths, torchs, strict=True):
        error, allowed = ((x.float() - truth).abs().max().item() for x in (got[:1, :, :1], other))
        largest = max(largest, error / max(allowed, SLACK))
        if not error <= 2 * allowed + SLACK:
            said.append(f"{name}: error {error:.3g}, torch's {allowed:.3g}")
    return largest, "; ".join(said)


def reference(qkv: Sequence[Tensor], pull: Tensor, mask_B1TS: Tensor) -> list[Tensor]:
    """Output and gradients of the plain formula in the inputs' precision; one head in fp32 is the truth."""
    learning = [x.detach().requires_grad_() for x in qkv]
    q, k, v = (x.transpose(1, 2) for x in learning)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask_B1TS, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, learning, pull)]


def row(
    cell: Cell, facts: DeviceFacts, device: torch.device, ceiling: float, flush: Tensor
) -> dict[str, Any]:
    """One line of the table; without numbers where the backend is refused, wrong, or fails."""
    found: dict[str, Any] = {"mask": cell.mask, "width": cell.width, "length": cell.length}
    found["backend"] = cell.backend
    refused = refusal(cell.backend, facts, cell.needs, width=cell.width)
    if refused:
        return found | {"note": refused}
    try:
        return found | measured(cell, device, ceiling, flush)
    except torch.cuda.OutOfMemoryError:
        return found | {"note": "out of memory"}
    # Whatever a backend raises, its compilers' own errors included, is what this cell has to say.
    except Exception as error:
        return found | {"note": f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"}
    finally:
        # Otherwise the compiler gives up after a few shapes.
        torch.compiler.reset()
        torch.cuda.empty_cache()


def measured(cell: Cell, device: torch.device, ceiling: float, flush: Tensor) -> dict[str, Any]:
    """Error and rates of one cell."""
    qkv, pull, context = inputs(cell, device)
    q, k, v = qkv
    error, broken = errors(cell, qkv, pull, context)
    if broken:
        return {"error": error, "note": f"fails the gate: {broken}"}

    def forward() -> Tensor:
        return attend(q, k, v, context, backend=cell.backend, window=cell.window)

    def both() -> None:
        torch.autograd.grad(forward(), qkv, pull)

    forward_ms, both_ms = times(forward, flush)[1], times(both, flush)[1]
    first, second = cell.flops()
    return {
        "error": error,
        "forward_tflops": first / forward_ms / 1e9,
        "backward_tflops": second / max(both_ms - forward_ms, 1e-6) / 1e9,
        "ceiling": (first + second) / both_ms * 1e3 / ceiling,
        "note": "",
    }


def measure(*, full: bool = False, out: Path | None = None, commit: str | None = None) -> list[dict]:
    """Measures all cells, prints the table and, with `out`, writes it there with its chart.

    Raises ConfigError where there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("benchmarks need a CUDA device and torch sees none; check nvidia-smi")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = probe(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    flush = torch.empty(FLUSH_BYTES, device=device, dtype=torch.uint8)
    ceiling = ceilings(device, flush)[1]
    title = f"{facts.name}: bf16 product {ceiling / 1e12:.0f} TFLOP/s; {TOKENS:,} tokens, width {DIM}, bf16"
    rows: list[dict[str, Any]] = []
    for cell in cells(full=full):
        rows.append(row(cell, facts, device, ceiling, flush))
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        # After every row: what was measured outlasts what stops the rest.
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_result(out, name=out.stem, device=title, columns=COLUMNS, rows=rows, commit=commit)
            out.with_suffix(".svg").write_text(chart(rows, title, ceiling / 1e12), encoding="utf-8")
    Console().print(table(rows, title, COLUMNS))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the attention backends on a CUDA device.")
    parser.add_argument("--out", type=Path, help="result file (JSON); the chart lies beside it")
    parser.add_argument("--full", action="store_true", help="all lengths, 512 to 16,384")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    given = parser.parse_args(arguments)
    try:
        measure(full=given.full, out=given.out, commit=given.commit)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
