"""Decoding's work divided evenly over the multiprocessors, and its partial results combined.

Every sequence of a paged cache is so many tiles of entries; the tiles of all sequences in a row are cut into
equal parts, and a program takes one part, which may hold several sequences and pieces of sequences (as
FlashMLA's scheduler does, DeepSeek 2025; the combination is Flash-Decoding's, Dao et al. 2023). Program and
combination find their share from the lengths on the device, so that the host never waits. Parts and sequences
both rise along the row: the number part + sequence tells the pieces apart and is where a piece's result lies.

    out = sum_i exp(lse_i - lse) out_i    with lse = log sum_i exp(lse_i)
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.kernels.language import jit, num_processors, tl

# A window that no sequence is longer than.
NO_WINDOW = 2**30
COMBINE_WARPS = 4


@dataclass(frozen=True)
class DecodeTile:
    """Rows (query tokens times heads) by entries of a tile, and how many programs share a multiprocessor."""

    rows: int
    entries: int
    num_warps: int
    num_stages: int
    programs: int = 1


@dataclass(frozen=True)
class Parts:
    """How one launch is divided, and where pieces of sequences lie until they are combined.

    `partial_CMV` and `partial_lse_CM` have room for every piece C; M is query tokens times heads.
    """

    parts: int
    partial_CMV: Tensor
    partial_lse_CM: Tensor


def divide(out_BTHV: Tensor, table_BN: Tensor, *, page: int, tile: DecodeTile, row_tiles: int) -> Parts:
    """As many parts as programs fit the device at once, and no more than the table has tiles."""
    batch, queries, heads, width = out_BTHV.shape
    device = out_BTHV.device
    programs = num_processors(device) * tile.programs
    parts = max(1, min(programs // row_tiles, table_BN.numel() * page // tile.entries))
    pieces = (parts + batch - 1, queries * heads)
    return Parts(
        parts,
        torch.empty((*pieces, width), device=device, dtype=torch.float32),
        torch.empty(pieces, device=device, dtype=torch.float32),
    )


def combine(
    divided: Parts,
    lengths_B: Tensor,
    out_BTHV: Tensor,
    lse_BTH: Tensor,
    *,
    window: int,
    causal: bool,
    entries: int,
) -> None:
    """Writes what no program wrote whole: sequences in several pieces, and those without entries."""
    batch, queries, heads, width = out_BTHV.shape
    _combine[(batch * queries * heads,)](
        divided.partial_CMV,
        divided.partial_lse_CM,
        lengths_B,
        out_BTHV,
        lse_BTH,
        batch,
        queries,
        queries * heads,
        divided.parts,
        window,
        CAUSAL=causal,
        ENTRIES=entries,
        WIDTH=width,
        BLOCK_B=power_of_two(batch),
        BLOCK_V=power_of_two(width),
        num_warps=COMBINE_WARPS,
    )


def power_of_two(size: int, *, least: int = 16) -> int:
    """The smallest power of two that holds `size`, at least `least`: what tiles are made of."""
    return max(least, 1 << (size - 1).bit_length())


@jit
def load_tile(rows, column, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of rows (pointers) by columns; zeros outside, whatever memory holds there."""
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)


@jit
def store_tile(rows, column, values, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Stores values in the rows' dtype."""
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(rows.dtype.element_ty), mask=mask)


@jit
def spans(
    lengths, batch, queries, window, CAUSAL: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_B: tl.constexpr
):
    """(sequence, the first tile that any of its rows sees, tiles from there on) of every sequence."""
    sequence = tl.arange(0, BLOCK_B)
    length = tl.load(lengths + sequence, mask=sequence < batch, other=0)
    earliest = length - window
    if CAUSAL:
        earliest += 1 - queries
    skipped = tl.maximum(earliest, 0) // ENTRIES
    return sequence, skipped, (length + ENTRIES - 1) // ENTRIES - skipped


@jit
def part_of(part, parts, tiles):
    """(first tile, tile after the last, first sequence, last sequence) of a part; an empty part has none."""
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    share = (total + parts - 1) // parts
    begin = tl.minimum(part * share, total)
    end = tl.minimum(begin + share, total)
    first = tl.sum((ends <= begin).to(tl.int32), 0)
    last = tl.sum((ends < end).to(tl.int32), 0)
    return begin, end, first, last


@jit
def piece_of(b, begin, end, sequence, skipped, tiles):
    """(first tile, tile after the last, whether that is all) of sequence b within a part's tiles."""
    start = tl.sum(tl.where(sequence < b, tiles, 0), 0)
    count = tl.sum(tl.where(sequence == b, tiles, 0), 0)
    skip = tl.sum(tl.where(sequence == b, skipped, 0), 0)
    low = tl.maximum(begin - start, 0)
    high = tl.minimum(end - start, count)
    return skip + low, skip + high, high - low == count


@jit
def softmax_step(scores, largest, total):
    """A tile's step of the online softmax, in powers of two: (weights, earlier sums' decay, largest, total).

    A row that has seen nothing yet keeps a largest score of -inf and weights of 0.
    """
    new = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.math.exp2(scores - base[:, None])
    decay = tl.math.exp2(largest - base)
    return weights, decay, new, total * decay + tl.sum(weights, 1)


@jit
def log_sum(largest, total):
    """(what a row's sums are divided by, its log-sum-exp): 1 and -inf for a row that saw nothing."""
    total = tl.where(total > 0, total, 1.0)
    # Times log(2): from powers of two back to the natural logarithm.
    return total, (largest + tl.math.log2(total)) * 0.6931471805599453


@jit
def _combine(
    partial,
    partial_lse,
    lengths,
    out,
    lse,
    batch,
    queries,
    rows,
    parts,
    window,
    CAUSAL: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row of one sequence."""
    b, row = tl.program_id(0) // rows, (tl.program_id(0) % rows).to(tl.int64)
    sequence, _, tiles = spans(lengths, batch, queries, window, CAUSAL, ENTRIES, BLOCK_B)
    start = tl.sum(tl.where(sequence < b, tiles, 0), 0)
    count = tl.sum(tl.where(sequence == b, tiles, 0), 0)
    share = tl.maximum((tl.sum(tiles, 0) + parts - 1) // parts, 1)
    first = start // share
    last = tl.where(count > 0, (start + count - 1) // share, first - 1)
    # A sequence in one piece was written by the program that had it; one without entries has no piece.
    if first != last:
        column = tl.arange(0, BLOCK_V)
        largest = -float("inf")
        total = 0.0
        sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for part in range(first, last + 1):
            piece = (part + b) * rows + row
            found = tl.load(partial_lse + piece)
            values = tl.load(partial + piece * WIDTH + column, mask=column < WIDTH, other=0.0)
            new = tl.maximum(largest, found)
            base = tl.where(new == -float("inf"), 0.0, new)
            decay, weight = tl.exp(largest - base), tl.exp(found - base)
            total = total * decay + weight
            sums = sums * decay + weight * values
            largest = new
        place = b * rows + row
        total = tl.where(total > 0, total, 1.0)
        tl.store(out + place * WIDTH + column, (sums / total).to(out.dtype.element_ty), mask=column < WIDTH)
        tl.store(lse + place, largest + tl.log(total))
