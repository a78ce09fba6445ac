"""Decoding over a paged cache of latents: all heads share one cached vector, and its beginning is the value.

    out_th = sum_s softmax(scale q_th . c_s)_s c_s[:V]    with c_s = (latent, rotated key) of entry s

Multi-head latent attention whose matrices are absorbed into query and output (DeepSeek-V2 2024, arXiv
2405.04434, section 2.1) decodes in this form: K = V + rotary width numbers are cached a token, whatever the
number of heads. An entry is loaded once and used twice; latents are computed in halves, which keeps Hopper's
compiler from spilling the addresses of operands. The work is divided as in `split`.

Floor, for the sum E of all lengths, M = query tokens times heads and 2-byte numbers:
    bytes = 2 (E K + B M (K + V))    FLOPs = 2 E M (K + V)
so M (1 + V / K) FLOPs a byte: 30 at 16 heads, which is memory's, and 483 at 128 heads x 2 queries, the tensor
cores'. For 128 sequences of 8,192 (1.21 GB): 0.40 ms at 3.0 TB/s; 584 GFLOP at 128 heads x 2, 0.73 ms at 800
TFLOP/s. Rows in tiles of R read the cache M / R times, from the second time on out of L2.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sabrage.kernels.language import KernelError, capability_of, jit, require, tl
from sabrage.kernels.paged_attention import check_pages, decode_heads_reference, dense, empty_results
from sabrage.kernels.split import (
    COUNTS,
    NO_WINDOW,
    DecodeTile,
    combine,
    divide,
    load_tile,
    log_sum,
    part_of,
    piece_of,
    power_of_two,
    softmax_step,
    spans,
    store_tile,
)

# By the most rows a tile is for. An accumulator of 64 rows by 512 values takes 128 registers of 8 warps. On
# Ampere the queries take registers too, which leaves room for 32 rows.
HOPPER = {16: DecodeTile(16, 32, 4, 3, programs=2), 64: DecodeTile(64, 64, 8, 2)}
# Shared memory of 163 KB, and of 99 KB.
AMPERE = {16: DecodeTile(16, 32, 4, 3), 32: DecodeTile(32, 32, 8, 3)}
SMALL = {16: DecodeTile(16, 32, 4, 3), 32: DecodeTile(32, 16, 8, 3)}
FP32 = {16: DecodeTile(16, 16, 4, 1)}


def tiles_for(capability: tuple[int, int], dtype: torch.dtype) -> dict[int, DecodeTile]:
    """Tiles by the most rows they are for: a table, because searching would keep readers waiting."""
    if dtype == torch.float32:
        return FP32
    return {(8, 0): AMPERE, (9, 0): HOPPER}.get(capability, SMALL)


def tile_for(capability: tuple[int, int], dtype: torch.dtype, rows: int) -> DecodeTile:
    """The tile for so many rows; beyond the largest they come in several tiles."""
    tiles = tiles_for(capability, dtype)
    return tiles[min((most for most in tiles if rows <= most), default=max(tiles))]


def decode_reference(
    q_BTHK: Tensor,
    pages_PSK: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    value_width: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: one key/value head, whose value is the beginning of its key."""
    values_PSV = pages_PSK[..., :value_width]
    return decode_heads_reference(
        q_BTHK, pages_PSK, values_PSV, block_table, lengths, scale=scale, causal=causal, window=window
    )


def decode(
    q_BTHK: Tensor,
    pages_PSK: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    value_width: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_BTHV in the dtype of q, lse_BTH in fp32, natural logarithm).

    The T queries are each sequence's last entries: with `causal`, query t sees the first length - T + t + 1,
    and of those the last `window`. `block_table` (B, N) and `lengths` (B) are int32, on the device; entry s
    of sequence b is `pages_PSK[block_table[b, s // S], s % S]`, and nothing beyond a length is used. A query
    that sees nothing gets zeros and -inf. No gradient. Raises KernelError.
    """
    check_pages(q_BTHK, pages_PSK, block_table, lengths, window)
    if pages_PSK.shape[2] != q_BTHK.shape[3] or not 0 < value_width <= q_BTHK.shape[3]:
        raise KernelError(
            f"queries are {tuple(q_BTHK.shape)}, pages {tuple(pages_PSK.shape)}, value_width={value_width}; "
            "allowed: pages as wide as a query, values no wider"
        )
    return _decode(q_BTHK, pages_PSK, block_table, lengths, value_width, scale, causal, window or NO_WINDOW)


@torch.library.custom_op("sabrage::paged_latent_decode", mutates_args=())
def _decode(
    q_BTHK: Tensor,
    pages_PSK: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    value_width: int,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    tile = tile_for(capability_of(q_BTHK.device), q_BTHK.dtype, q_BTHK.shape[1] * q_BTHK.shape[2])
    return launch(q_BTHK, pages_PSK, block_table, lengths, value_width, scale, causal, window, tile=tile)


@_decode.register_fake
def _(
    q_BTHK: Tensor,
    pages_PSK: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    value_width: int,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    return empty_results(q_BTHK, value_width)


def launch(
    q_BTHK: Tensor,
    pages_PSK: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    value_width: int,
    scale: float,
    causal: bool,
    window: int,
    *,
    tile: DecodeTile,
) -> tuple[Tensor, Tensor]:
    """`decode` by a tile of one's choice, unchecked: what tuning calls."""
    require(q_BTHK.device)
    batch, queries, heads, width = q_BTHK.shape
    out_BTHV, lse_BTH = empty_results(q_BTHK, value_width)
    if not out_BTHV.numel():
        return out_BTHV, lse_BTH
    pages_PSK, block_table, lengths = dense(pages_PSK), block_table.contiguous(), lengths.contiguous()
    page = pages_PSK.shape[1]
    tile = replace(tile, entries=min(tile.entries, page))
    row_tiles = -(-queries * heads // tile.rows)
    divided = divide(out_BTHV, block_table, page=page, tile=tile, row_tiles=row_tiles)
    half = -(-value_width // 2)
    _parts[(divided.parts * row_tiles,)](
        q_BTHK.contiguous(),
        pages_PSK,
        block_table,
        lengths,
        out_BTHV,
        lse_BTH,
        divided.partial_CMV,
        divided.partial_lse_CM,
        batch,
        queries,
        heads,
        divided.parts,
        block_table.shape[1],
        pages_PSK.stride(0),
        scale * math.log2(math.e),
        window,
        CAUSAL=causal,
        # A constant, so that the addresses within a tile are one register and immediate offsets.
        STRIDE=pages_PSK.stride(1),
        LEFT=half,
        RIGHT=value_width - half,
        ROTARY=width - value_width,
        PAGE=page,
        ROWS=tile.rows,
        ENTRIES=tile.entries,
        BLOCK_B=power_of_two(batch),
        BLOCK_L=power_of_two(half),
        BLOCK_R=power_of_two(max(1, width - value_width)),
        PRECISION="ieee" if q_BTHK.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    combine(divided, lengths, out_BTHV, lse_BTH, window=window, causal=causal, entries=tile.entries)
    return out_BTHV, lse_BTH


@partial(jit, do_not_specialize=(*COUNTS, "heads", "table_width"))
def _parts(
    q, pages, table, lengths, out, lse, partial, partial_lse, batch, queries, heads, parts, table_width,
    page_stride, scale, window,
    CAUSAL: tl.constexpr, STRIDE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    ROTARY: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a part and tile of rows; the tiles of rows of a part run side by side, for L2's sake.

    A latent is a left and a right half, each padded to BLOCK_L.
    """
    VALUE: tl.constexpr = LEFT + RIGHT
    row_tiles = tl.cdiv(queries * heads, ROWS)
    part = tl.program_id(0) // row_tiles
    row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    query = row // heads
    real = query < queries
    column, rotary_column, entry_row = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R), tl.arange(0, ENTRIES)
    sequence, skipped, tiles = spans(lengths, batch, queries, window, CAUSAL, ENTRIES, BLOCK_B)
    begin, end, first, last = part_of(part, parts, tiles)
    for b in range(first, last + 1):
        low, high, whole = piece_of(b, begin, end, sequence, skipped, tiles)
        length = tl.load(lengths + b)
        seen = length - tl.zeros((ROWS,), dtype=tl.int32)
        if CAUSAL:
            seen += query + 1 - queries
        place = b * queries * heads + row.to(tl.int64)
        q_rows = q + place * (VALUE + ROTARY)
        q_left = load_tile(q_rows, column, real, LEFT, BLOCK_L)
        q_right = load_tile(q_rows + LEFT, column, real, RIGHT, BLOCK_L)
        if ROTARY:
            q_rotary = load_tile(q_rows + VALUE, rotary_column, real, ROTARY, BLOCK_R)
        largest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        left_sums = tl.zeros((ROWS, BLOCK_L), dtype=tl.float32)
        right_sums = tl.zeros((ROWS, BLOCK_L), dtype=tl.float32)
        # The number of the next tile's page is on its way while this tile is computed.
        numbers = table + b * table_width
        page = tl.load(numbers + low * ENTRIES // PAGE, mask=low < high, other=0).to(tl.int64)
        for index in range(low, high):
            entry = index * ENTRIES + entry_row
            inside = entry < length
            rows = pages + page * page_stride + (index * ENTRIES % PAGE) * STRIDE
            rows += entry_row * STRIDE
            left = load_tile(rows, column, inside, LEFT, BLOCK_L)
            right = load_tile(rows + LEFT, column, inside, RIGHT, BLOCK_L)
            scores = tl.dot(q_left, tl.trans(left), input_precision=PRECISION)
            scores = tl.dot(q_right, tl.trans(right), scores, input_precision=PRECISION)
            if ROTARY:
                rotary = load_tile(rows + VALUE, rotary_column, inside, ROTARY, BLOCK_R)
                scores = tl.dot(q_rotary, tl.trans(rotary), scores, input_precision=PRECISION)
            page = tl.load(numbers + (index + 1) * ENTRIES // PAGE, mask=index + 1 < high, other=0).to(
                tl.int64
            )
            visible = (entry[None, :] < seen[:, None]) & (entry[None, :] >= (seen - window)[:, None])
            scores = tl.where(visible, scores * scale, -float("inf"))
            weights, decay, largest, total = softmax_step(scores, largest, total)
            weights = weights.to(left.dtype)
            left_sums = tl.dot(weights, left, left_sums * decay[:, None], input_precision=PRECISION)
            right_sums = tl.dot(weights, right, right_sums * decay[:, None], input_precision=PRECISION)
        total, found = log_sum(largest, total)
        left_sums, right_sums = left_sums / total[:, None], right_sums / total[:, None]
        if whole:
            store_tile(out + place * VALUE, column, left_sums, real, LEFT, BLOCK_L)
            store_tile(out + place * VALUE + LEFT, column, right_sums, real, RIGHT, BLOCK_L)
            tl.store(lse + place, found, mask=real)
        else:
            piece = (part + b) * queries * heads + row.to(tl.int64)
            store_tile(partial + piece * VALUE, column, left_sums, real, LEFT, BLOCK_L)
            store_tile(partial + piece * VALUE + LEFT, column, right_sums, real, RIGHT, BLOCK_L)
            tl.store(partial_lse + piece, found, mask=real)
