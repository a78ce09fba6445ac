"""Decoding over a paged cache: the queries of a few new tokens against all that was cached of their sequence.

    out_th = sum_s softmax(scale q_th . k_s)_s v_s    lse_th = log sum_s exp(scale q_th . k_s)

over the entries s that query t sees. Query heads share key/value heads in groups (multi-query attention,
Shazeer 2019, arXiv 1911.02150; grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245). Entries lie
in pages that a table names (Kwon et al. 2023, arXiv 2309.06180); the work is divided as in `split`.

Floor, for the sum E of all lengths, G key/value heads, M = query tokens times heads and 2-byte numbers:
    bytes = 2 (E G (K + V) + B M (K + V))    FLOPs = 2 E M (K + V)
so M / G FLOPs a byte: memory's business on every card up to some hundred queries a key/value head.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sabrage.kernels.language import KernelError, jit, require, tl
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

# Enough loads in flight on any card, and small enough for 99 KB of shared memory at width 128.
TILES = {16: DecodeTile(16, 64, 4, 3, programs=2), 64: DecodeTile(64, 64, 8, 2)}
FP32 = DecodeTile(16, 16, 4, 1)


def tile_for(dtype: torch.dtype, rows: int) -> DecodeTile:
    """The tile for so many rows a key/value head: a table, because searching would keep readers waiting."""
    return FP32 if dtype == torch.float32 else TILES[16 if rows <= 16 else 64]


def decode_heads_reference(
    q_BTHK: Tensor,
    key_pages_PSX: Tensor,
    value_pages_PSX: Tensor,
    table_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: pages gathered, all scores at once, softmax in fp32 or wider."""
    groups = key_pages_PSX.shape[2] // q_BTHK.shape[3]
    entry_S = torch.arange(table_BN.shape[1] * key_pages_PSX.shape[1], device=q_BTHK.device)
    used_BS = entry_S < lengths_B[:, None]
    keys_BSGK, values_BSGV = (
        pages_PSX[table_BN.long()]
        .flatten(1, 2)
        .masked_fill(~used_BS[..., None], 0)
        .unflatten(2, (groups, -1))
        for pages_PSX in (key_pages_PSX, value_pages_PSX)
    )
    # J heads share a key/value head.
    q_BTGJK = q_BTHK.unflatten(2, (groups, -1))
    scores_BTGJS = torch.einsum("btgjk,bsgk->btgjs", q_BTGJK, keys_BSGK) * scale
    queries = q_BTHK.shape[1]
    behind_T = torch.arange(queries - 1, -1, -1, device=q_BTHK.device) * causal
    seen_BT1 = (lengths_B[:, None] - behind_T)[..., None]
    visible_BTS = entry_S < seen_BT1
    if window is not None:
        visible_BTS &= entry_S >= seen_BT1 - window
    wide_BTGJS = scores_BTGJS.to(torch.promote_types(q_BTHK.dtype, torch.float32))
    wide_BTGJS = wide_BTGJS.masked_fill(~visible_BTS[:, :, None, None], -math.inf)
    lse_BTGJ = wide_BTGJS.logsumexp(-1)
    # A query that sees nothing has weights of exp(-inf - 0) = 0.
    base_BTGJ = lse_BTGJ.masked_fill(lse_BTGJ == -math.inf, 0)
    weights_BTGJS = (wide_BTGJS - base_BTGJ[..., None]).exp().to(q_BTHK.dtype)
    out_BTGJV = torch.einsum("btgjs,bsgv->btgjv", weights_BTGJS, values_BSGV)
    return out_BTGJV.flatten(2, 3), lse_BTGJ.flatten(2, 3)


def decode_heads(
    q_BTHK: Tensor,
    key_pages_PSX: Tensor,
    value_pages_PSX: Tensor,
    table_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out_BTHV in the dtype of q, lse_BTH in fp32, natural logarithm).

    An entry's keys are G heads of width K one after the other, X = G K, its values G heads of width V; G
    divides H, and query head h reads head h // (H / G). The T queries are each sequence's last entries: with
    `causal`, query t sees the first length - T + t + 1, and of those the last `window`. `table_BN` and
    `lengths_B` are int32, on the device; entry s of sequence b lies at [table_BN[b, s // S], s % S] of the
    pages, and nothing beyond a length is used. A query that sees nothing gets zeros and -inf. No gradient.
    Raises KernelError.
    """
    check_pages(q_BTHK, key_pages_PSX, table_BN, lengths_B, window)
    heads, width = q_BTHK.shape[2:]
    groups = key_pages_PSX.shape[2] // width
    if (
        not groups
        or heads % groups
        or key_pages_PSX.shape[2] % width
        or value_pages_PSX.shape[2] % groups
        or value_pages_PSX.shape[:2] != key_pages_PSX.shape[:2]
        or value_pages_PSX.dtype != q_BTHK.dtype
    ):
        raise KernelError(
            f"queries are {tuple(q_BTHK.shape)}, key pages {tuple(key_pages_PSX.shape)}, value pages "
            f"{value_pages_PSX.dtype} {tuple(value_pages_PSX.shape)}; allowed: G heads as wide as a query "
            "in the keys, G heads in the values, all of one dtype, and G a divisor of the query heads"
        )
    return _decode_heads(
        q_BTHK, key_pages_PSX, value_pages_PSX, table_BN, lengths_B, scale, causal, window or NO_WINDOW
    )


def check_pages(
    q_BTHK: Tensor, pages_PSX: Tensor, table_BN: Tensor, lengths_B: Tensor, window: int | None
) -> None:
    """Raises KernelError for queries, pages, tables and lengths that do not fit each other."""
    if q_BTHK.dim() != 4 or pages_PSX.dim() != 3 or pages_PSX.dtype != q_BTHK.dtype:
        raise KernelError(
            f"queries are {q_BTHK.dtype} {tuple(q_BTHK.shape)}, pages {pages_PSX.dtype} "
            f"{tuple(pages_PSX.shape)}; allowed: (B, T, H, K) and (P, S, X) of one dtype"
        )
    batch, page = q_BTHK.shape[0], pages_PSX.shape[1]
    if table_BN.dim() != 2 or (table_BN.shape[0], lengths_B.shape) != (batch, (batch,)):
        raise KernelError(
            f"the table is {tuple(table_BN.shape)}, lengths {tuple(lengths_B.shape)}; "
            f"allowed: ({batch}, N) and ({batch},)"
        )
    if not table_BN.dtype == lengths_B.dtype == torch.int32:
        raise KernelError(f"got a table of {table_BN.dtype}, lengths of {lengths_B.dtype}; allowed: int32")
    if page < 16 or page & (page - 1):
        raise KernelError(f"pages hold {page} entries; allowed: a power of two from 16 on, 64 in our caches")
    if window is not None and window < 1:
        raise KernelError(f"window={window}, allowed: 1 and up, or None for all entries")


@torch.library.custom_op("sabrage::paged_attention_decode", mutates_args=())
def _decode_heads(
    q_BTHK: Tensor,
    key_pages_PSX: Tensor,
    value_pages_PSX: Tensor,
    table_BN: Tensor,
    lengths_B: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    groups = key_pages_PSX.shape[2] // q_BTHK.shape[3]
    return launch(
        q_BTHK,
        key_pages_PSX,
        value_pages_PSX,
        table_BN,
        lengths_B,
        scale=scale,
        causal=causal,
        window=window,
        tile=tile_for(q_BTHK.dtype, q_BTHK.shape[1] * q_BTHK.shape[2] // groups),
    )


@_decode_heads.register_fake
def _(
    q_BTHK: Tensor, key_pages_PSX: Tensor, value_pages_PSX: Tensor, *plain: object
) -> tuple[Tensor, Tensor]:
    groups = key_pages_PSX.shape[2] // q_BTHK.shape[3]
    return empty_results(q_BTHK, value_pages_PSX.shape[2] // groups)


def empty_results(q_BTHK: Tensor, value_width: int) -> tuple[Tensor, Tensor]:
    """(out_BTHV, lse_BTH), not yet written."""
    shape, device = q_BTHK.shape[:3], q_BTHK.device
    return (
        torch.empty((*shape, value_width), device=device, dtype=q_BTHK.dtype),
        torch.empty(shape, device=device, dtype=torch.float32),
    )


def launch(
    q_BTHK: Tensor,
    key_pages_PSX: Tensor,
    value_pages_PSX: Tensor,
    table_BN: Tensor,
    lengths_B: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int,
    tile: DecodeTile,
) -> tuple[Tensor, Tensor]:
    """`decode_heads` by a tile of one's choice, unchecked."""
    require(q_BTHK.device)
    batch, queries, heads, width = q_BTHK.shape
    groups = key_pages_PSX.shape[2] // width
    value_width = value_pages_PSX.shape[2] // groups
    out_BTHV, lse_BTH = empty_results(q_BTHK, value_width)
    if not out_BTHV.numel():
        return out_BTHV, lse_BTH
    keys_PSX, values_PSX = dense(key_pages_PSX), dense(value_pages_PSX)
    table_BN, lengths_B = table_BN.contiguous(), lengths_B.contiguous()
    page = keys_PSX.shape[1]
    tile = replace(tile, entries=min(tile.entries, page))
    row_tiles = groups * -(-queries * heads // groups // tile.rows)
    divided = divide(out_BTHV, table_BN, page=page, tile=tile, row_tiles=row_tiles)
    _parts[(divided.parts * row_tiles,)](
        q_BTHK.contiguous(),
        keys_PSX,
        values_PSX,
        table_BN,
        lengths_B,
        out_BTHV,
        lse_BTH,
        divided.partial_CMV,
        divided.partial_lse_CM,
        batch,
        queries,
        heads,
        divided.parts,
        table_BN.shape[1],
        keys_PSX.stride(0),
        values_PSX.stride(0),
        scale * math.log2(math.e),
        window,
        GROUPS=groups,
        CAUSAL=causal,
        # Constants, so that the addresses within a tile are one register and immediate offsets.
        KEY_STRIDE=keys_PSX.stride(1),
        VALUE_STRIDE=values_PSX.stride(1),
        KEY=width,
        VALUE=value_width,
        PAGE=page,
        ROWS=tile.rows,
        ENTRIES=tile.entries,
        BLOCK_B=power_of_two(batch),
        BLOCK_K=power_of_two(width),
        BLOCK_V=power_of_two(value_width),
        PRECISION="ieee" if q_BTHK.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    combine(divided, lengths_B, out_BTHV, lse_BTH, window=window, causal=causal, entries=tile.entries)
    return out_BTHV, lse_BTH


def dense(pages_PSX: Tensor) -> Tensor:
    """Pages whose entries are dense; a layer's slice of a larger cache is, and is not copied."""
    return pages_PSX if pages_PSX.stride(2) == 1 else pages_PSX.contiguous()


@partial(jit, do_not_specialize=(*COUNTS, "heads", "table_width"))
def _parts(
    q, keys, values, table, lengths, out, lse, partial, partial_lse, batch, queries, heads, parts,
    table_width, key_page, value_page, scale, window,
    GROUPS: tl.constexpr, CAUSAL: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program a part, group and tile of its rows."""
    sharing = heads // GROUPS
    row_tiles = tl.cdiv(queries * sharing, ROWS)
    part, turn = tl.program_id(0) // (row_tiles * GROUPS), tl.program_id(0) % (row_tiles * GROUPS)
    group = turn // row_tiles
    member = (turn % row_tiles) * ROWS + tl.arange(0, ROWS)
    query = member // sharing
    real = query < queries
    # The row's place in a sequence's queries and results, (T, H).
    row = (query * heads + group * sharing + member % sharing).to(tl.int64)
    key_column, value_column, entry_row = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, ENTRIES)
    sequence, skipped, tiles = spans(lengths, batch, queries, window, CAUSAL, ENTRIES, BLOCK_B)
    begin, end, first, last = part_of(part, parts, tiles)
    for b in range(first, last + 1):
        low, high, whole = piece_of(b, begin, end, sequence, skipped, tiles)
        length = tl.load(lengths + b)
        seen = length - tl.zeros((ROWS,), dtype=tl.int32)
        if CAUSAL:
            seen += query + 1 - queries
        place = b * queries * heads + row
        q_tile = load_tile(q + place * KEY, key_column, real, KEY, BLOCK_K)
        largest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        sums = tl.zeros((ROWS, BLOCK_V), dtype=tl.float32)
        # The number of the next tile's page is on its way while this tile is computed.
        numbers = table + b * table_width
        page = tl.load(numbers + low * ENTRIES // PAGE, mask=low < high, other=0).to(tl.int64)
        for index in range(low, high):
            entry = index * ENTRIES + entry_row
            inside = entry < length
            in_page = index * ENTRIES % PAGE
            key_rows = keys + page * key_page + in_page * KEY_STRIDE + group * KEY
            key = load_tile(key_rows + entry_row * KEY_STRIDE, key_column, inside, KEY, BLOCK_K)
            scores = tl.dot(q_tile, tl.trans(key), input_precision=PRECISION)
            value_rows = values + page * value_page + in_page * VALUE_STRIDE + group * VALUE
            value = load_tile(value_rows + entry_row * VALUE_STRIDE, value_column, inside, VALUE, BLOCK_V)
            page = tl.load(numbers + (index + 1) * ENTRIES // PAGE, mask=index + 1 < high, other=0).to(
                tl.int64
            )
            visible = (entry[None, :] < seen[:, None]) & (entry[None, :] >= (seen - window)[:, None])
            scores = tl.where(visible, scores * scale, -float("inf"))
            weights, decay, largest, total = softmax_step(scores, largest, total)
            sums = tl.dot(weights.to(value.dtype), value, sums * decay[:, None], input_precision=PRECISION)
        total, found = log_sum(largest, total)
        sums = sums / total[:, None]
        if whole:
            store_tile(out + place * VALUE, value_column, sums, real, VALUE, BLOCK_V)
            tl.store(lse + place, found, mask=real)
        else:
            piece = (part + b) * queries * heads + row
            store_tile(partial + piece * VALUE, value_column, sums, real, VALUE, BLOCK_V)
            tl.store(partial_lse + piece, found, mask=real)
