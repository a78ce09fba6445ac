"""Causal attention in which each query sees one span of keys: documents, windows, and both at once.

    s_ij = q_i k_j / sqrt(K)  for  start_i <= j <= i,    out_i = sum_j softmax_j(s_ij) v_j

Where documents follow each other in a row and windows slide, the first key that a query sees never moves
back, so that one number a query says the whole mask, and one number a tile where its work ends: nothing
outside is read, and a pair is compared once. FlashAttention-2's recurrences (Dao 2023,
arXiv 2307.08691); the backward pass computes scores again, once for the gradients of queries and once for
those of keys and values, so that no sum depends on the order in which programs run.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sabrage.kernels.language import KernelError, capability_of, jit, require, tl

# The widest head.
WIDEST = 128
# Queries are told in whole tiles of this many keys how far they are seen.
SPAN = 64
LOG2E = 1.4426950408889634
# What a pair that is not seen scores: finite, so that a row whose first tiles hold nothing for it stays a
# number. What it sums up there is wiped out by the first pair that it does see.
UNSEEN = -1e9


@dataclass(frozen=True)
class SpanTile:
    """Queries by keys of one step of a loop, the warps of a program and the loads in flight."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SpanTiles:
    """What each of the three kernels works on."""

    forward: SpanTile
    queries: SpanTile
    keys: SpanTile


# Measured on an H200, heads of 128, documents of the corpus: of some thirty tiles these are the fastest.
HOPPER = SpanTiles(SpanTile(64, 32, 4, 3), SpanTile(64, 32, 4, 3), SpanTile(32, 64, 4, 3))
AMPERE = SpanTiles(SpanTile(64, 64, 4, 2), SpanTile(64, 32, 4, 2), SpanTile(32, 64, 4, 2))
# fp32, which takes twice the memory; and the interpreter.
WIDE = SpanTiles(SpanTile(32, 32, 4, 1), SpanTile(32, 32, 4, 1), SpanTile(32, 32, 4, 1))


def tiles_for(capability: tuple[int, int], dtype: torch.dtype) -> SpanTiles:
    """The tiles of a device."""
    if dtype == torch.float32:
        return WIDE
    return HOPPER if capability == (9, 0) else AMPERE


@torch.library.custom_op("sabrage::spans", mutates_args=())
def spans(like_BT: Tensor, documents_BT: Tensor | None, window: int | None) -> tuple[Tensor, Tensor]:
    """(B, T) the first key that each query sees; (B, T / 64) behind which query nobody sees any key of a tile
    of 64, counted from 1; int32.

    Tokens of a document lie side by side in their row; `window` counts the token itself. Shape and device are
    those of `like_BT`.
    """
    batch, length = like_BT.shape
    index_T = torch.arange(length, device=like_BT.device)
    starts_BT = index_T.new_zeros(batch, length)
    if documents_BT is not None:
        new_BT = torch.zeros_like(documents_BT, dtype=torch.bool)
        new_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        starts_BT = torch.where(new_BT, index_T, 0).cummax(1).values
    if window is not None:
        starts_BT = starts_BT.maximum(index_T - (window - 1))
    last_N = (index_T[::SPAN] + (SPAN - 1)).clamp(max=length - 1).expand(batch, -1).contiguous()
    ends_BN = torch.searchsorted(starts_BT, last_N, right=True)
    return starts_BT.to(torch.int32), ends_BN.to(torch.int32)


@spans.register_fake
def _(like_BT: Tensor, documents_BT: Tensor | None, window: int | None) -> tuple[Tensor, Tensor]:
    batch, length = like_BT.shape
    starts_BT, ends_BN = (
        like_BT.new_empty((batch, n), dtype=torch.int32) for n in (length, -(-length // SPAN))
    )
    return starts_BT, ends_BN


def span_attention_reference(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, starts_BT: Tensor, *, scale: float | None = None
) -> Tensor:
    """The specification, with products in the dtype of its inputs and the softmax in fp32 or wider."""
    wide = torch.promote_types(q_BTHK.dtype, torch.float32)
    scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK).to(wide) * scale
    index_T = torch.arange(q_BTHK.shape[1], device=q_BTHK.device)
    seen_BTS = (index_T <= index_T[:, None]) & (index_T >= starts_BT[..., None])
    weights_BHTS = scores_BHTS.masked_fill(~seen_BTS[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights_BHTS.to(v_BTHK.dtype), v_BTHK)


def span_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    starts_BT: Tensor,
    ends_BN: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Each head's output, (B, T, H, K), contiguous, in the dtype of q; `spans` makes starts and ends.

    Scores are multiplied by `scale`, by default one over the root of K. Inputs may be views whose last
    dimension is dense, such as the thirds of a fused projection. Raises KernelError.
    """
    if k_BTHK.shape != q_BTHK.shape or v_BTHK.shape != q_BTHK.shape or q_BTHK.shape[3] > WIDEST:
        told = ", ".join(str(tuple(x.shape)) for x in (q_BTHK, k_BTHK, v_BTHK))
        raise KernelError(f"q, k and v are {told}; allowed: one shape, heads of {WIDEST} at most")
    wanted = (q_BTHK.shape[0], -(-q_BTHK.shape[1] // SPAN))
    if starts_BT.shape != q_BTHK.shape[:2] or ends_BN.shape != wanted:
        raise KernelError(
            f"starts are {tuple(starts_BT.shape)} and ends {tuple(ends_BN.shape)} for rows of "
            f"{tuple(q_BTHK.shape[:2])}; make both with spans()"
        )
    scale = q_BTHK.shape[3] ** -0.5 if scale is None else scale
    return _forward(q_BTHK, k_BTHK, v_BTHK, starts_BT, ends_BN, scale)[0]


@torch.library.custom_op("sabrage::span_attention", mutates_args=())
def _forward(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, starts_BT: Tensor, ends_BN: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    require(q_BTHK.device)
    batch, time, heads, width = q_BTHK.shape
    out_BTHK = torch.empty(q_BTHK.shape, device=q_BTHK.device, dtype=q_BTHK.dtype)
    lse_BHT = torch.empty((batch, heads, time), device=q_BTHK.device, dtype=torch.float32)
    if not out_BTHK.numel():
        return out_BTHK, lse_BHT
    q, k, v = _dense(q_BTHK, k_BTHK, v_BTHK)
    tile = tiles_for(capability_of(q.device), q.dtype).forward
    _outputs[(-(-time // tile.queries), heads, batch)](
        q, k, v, starts_BT, out_BTHK, lse_BHT,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        time, heads, scale * LOG2E,
        **_constants(tile, time, width, q.dtype),
    )  # fmt: skip
    return out_BTHK, lse_BHT


@_forward.register_fake
def _(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, starts_BT: Tensor, ends_BN: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, time, heads, _ = q_BTHK.shape
    return q_BTHK.new_empty(q_BTHK.shape), q_BTHK.new_empty((batch, heads, time), dtype=torch.float32)


@torch.library.custom_op("sabrage::span_attention_backward", mutates_args=())
def _backward(
    grad_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    starts_BT: Tensor,
    ends_BN: Tensor,
    out_BTHK: Tensor,
    lse_BHT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, each contiguous."""
    batch, time, heads, width = q_BTHK.shape
    grad_q, grad_k, grad_v = (
        torch.empty(q_BTHK.shape, device=q_BTHK.device, dtype=q_BTHK.dtype) for _ in range(3)
    )
    if not grad_BTHK.numel():
        return grad_q, grad_k, grad_v
    q, k, v, grad = _dense(q_BTHK, k_BTHK, v_BTHK, grad_BTHK)
    tiles = tiles_for(capability_of(q.device), q.dtype)
    strides = tuple(stride for x in (q, k, v, grad) for stride in x.stride()[:3])
    numbers = (time, heads, scale, scale * LOG2E)
    # What the softmax takes from each row's gradient: made by the first kernel, read by the second.
    delta_BHT = torch.empty_like(lse_BHT)
    _queries[(-(-time // tiles.queries.queries), heads, batch)](
        q, k, v, grad, out_BTHK, lse_BHT, starts_BT, delta_BHT, grad_q, *strides, *numbers,
        **_constants(tiles.queries, time, width, q.dtype),
    )  # fmt: skip
    _keys[(-(-time // tiles.keys.keys), heads, batch)](
        q, k, v, grad, lse_BHT, starts_BT, ends_BN, delta_BHT, grad_k, grad_v, *strides, *numbers,
        SPAN=SPAN, **_constants(tiles.keys, time, width, q.dtype),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(
    grad_BTHK: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in (q_BTHK, k_BTHK, v_BTHK))
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _pull(ctx: Any, grad_BTHK: Tensor, grad_lse: Any) -> tuple[Any, ...]:
    return *_backward(grad_BTHK, *ctx.saved_tensors, ctx.scale), None, None, None


_forward.register_autograd(_pull, setup_context=_save)


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors, with a last dimension that is dense."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def _constants(tile: SpanTile, time: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "BLOCK": max(16, 1 << (width - 1).bit_length()),
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "EVEN": time % max(tile.queries, tile.keys) == 0,
        "UNSEEN": UNSEEN,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@jit
def _rows(base, row, stride, time, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Rows of a head, (rows, BLOCK); zero beyond the row's end and beyond the width."""
    column = tl.arange(0, BLOCK)
    place = base + row[:, None] * stride + column[None, :]
    if EVEN and WIDTH == BLOCK:
        return tl.load(place)
    return tl.load(place, mask=(row < time)[:, None] & (column < WIDTH)[None, :], other=0.0)


@jit
def _reach(starts, row, time, EVEN: tl.constexpr):
    """How far back each row sees; unsigned, so that one comparison refuses what is farther or follows."""
    start = tl.load(starts + row) if EVEN else tl.load(starts + row, mask=row < time, other=0)
    return (row - start).to(tl.uint32, bitcast=True)


@jit
def _seen(row, column, reach):
    """Which columns are no farther back than their rows reach, and not behind them."""
    return (row - column).to(tl.uint32, bitcast=True) <= reach


@jit
def _store(base, row, stride, value, time, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = (row < time)[:, None] & (column < WIDTH)[None, :]
    tl.store(base + row[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=inside)


@jit
def _outputs(
    q, k, v, starts, out, lse,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head,
    time, heads, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, UNSEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: its outputs, and the logarithm (base 2) of each row's sum."""
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * QUERIES
    row = first + tl.arange(0, QUERIES)
    reach = _reach(starts + sequence * time, row, time, EVEN)
    q_rows = _rows(q + sequence * q_batch + head * q_head, row, q_time, time, WIDTH, BLOCK, EVEN)
    keys, values = k + sequence * k_batch + head * k_head, v + sequence * v_batch + head * v_head
    largest = tl.full((QUERIES,), UNSEEN, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    begin = tl.load(starts + sequence * time + first) // KEYS * KEYS
    for key in range(begin, tl.minimum(first + QUERIES, time), KEYS):
        column = key + tl.arange(0, KEYS)
        k_rows = _rows(keys, column, k_time, time, WIDTH, BLOCK, EVEN)
        score = tl.dot(q_rows, k_rows.T, input_precision=PRECISION) * scale
        seen = _seen(row[:, None], column[None, :], reach[:, None])
        score = tl.where(seen, score, UNSEEN)
        larger = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weight, 1)
        v_rows = _rows(values, column, v_time, time, WIDTH, BLOCK, EVEN)
        sums = sums * shrink[:, None]
        sums = tl.dot(weight.to(v_rows.dtype), v_rows, sums, input_precision=PRECISION)
        largest = larger
    base = out + (sequence * time * heads + head) * WIDTH
    _store(base, row, heads * WIDTH, sums / total[:, None], time, WIDTH, BLOCK)
    tl.store(lse + (sequence * heads + head) * time + row, largest + tl.log2(total), mask=row < time)


@jit
def _queries(
    q, k, v, grad, out, lse, starts, delta, grad_q,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, g_batch, g_time, g_head,
    time, heads, plain_scale, scale,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, UNSEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: their gradients, and each row's product of output and gradient."""
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * QUERIES
    row = first + tl.arange(0, QUERIES)
    reach = _reach(starts + sequence * time, row, time, EVEN)
    q_rows = _rows(q + sequence * q_batch + head * q_head, row, q_time, time, WIDTH, BLOCK, EVEN)
    g_rows = _rows(grad + sequence * g_batch + head * g_head, row, g_time, time, WIDTH, BLOCK, EVEN)
    base = (sequence * time * heads + head) * WIDTH
    o_rows = _rows(out + base, row, heads * WIDTH, time, WIDTH, BLOCK, EVEN)
    taken = tl.sum(o_rows.to(tl.float32) * g_rows.to(tl.float32), 1)
    place = (sequence * heads + head) * time + row
    tl.store(delta + place, taken, mask=row < time)
    log_sum = tl.load(lse + place, mask=row < time, other=0.0)
    keys, values = k + sequence * k_batch + head * k_head, v + sequence * v_batch + head * v_head
    sums = tl.zeros((QUERIES, BLOCK), tl.float32)
    begin = tl.load(starts + sequence * time + first) // KEYS * KEYS
    for key in range(begin, tl.minimum(first + QUERIES, time), KEYS):
        column = key + tl.arange(0, KEYS)
        k_rows = _rows(keys, column, k_time, time, WIDTH, BLOCK, EVEN)
        v_rows = _rows(values, column, v_time, time, WIDTH, BLOCK, EVEN)
        score = tl.dot(q_rows, k_rows.T, input_precision=PRECISION) * scale
        seen = _seen(row[:, None], column[None, :], reach[:, None])
        weight = tl.exp2(tl.where(seen, score - log_sum[:, None], UNSEEN))
        pulled = tl.dot(g_rows, v_rows.T, input_precision=PRECISION)
        change = weight * (pulled - taken[:, None])
        sums = tl.dot(change.to(k_rows.dtype), k_rows, sums, input_precision=PRECISION)
    _store(grad_q + base, row, heads * WIDTH, sums * plain_scale, time, WIDTH, BLOCK)


@jit
def _keys(
    q, k, v, grad, lse, starts, ends, delta, grad_k, grad_v,
    q_batch, q_time, q_head, k_batch, k_time, k_head, v_batch, v_time, v_head, g_batch, g_time, g_head,
    time, heads, plain_scale, scale,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, UNSEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one head: gradients of keys and values."""
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * KEYS
    column = first + tl.arange(0, KEYS)
    k_rows = _rows(k + sequence * k_batch + head * k_head, column, k_time, time, WIDTH, BLOCK, EVEN)
    v_rows = _rows(v + sequence * v_batch + head * v_head, column, v_time, time, WIDTH, BLOCK, EVEN)
    queries, grads = q + sequence * q_batch + head * q_head, grad + sequence * g_batch + head * g_head
    numbers = (sequence * heads + head) * time
    sums_k = tl.zeros((KEYS, BLOCK), tl.float32)
    sums_v = tl.zeros((KEYS, BLOCK), tl.float32)
    last = tl.minimum(first + KEYS, time) - 1
    end = tl.load(ends + sequence * tl.cdiv(time, SPAN) + last // SPAN)
    for query in range(first // QUERIES * QUERIES, end, QUERIES):
        row = query + tl.arange(0, QUERIES)
        q_rows = _rows(queries, row, q_time, time, WIDTH, BLOCK, EVEN)
        g_rows = _rows(grads, row, g_time, time, WIDTH, BLOCK, EVEN)
        reach = _reach(starts + sequence * time, row, time, EVEN)
        log_sum = tl.load(lse + numbers + row, mask=row < time, other=0.0)
        taken = tl.load(delta + numbers + row, mask=row < time, other=0.0)
        score = tl.dot(k_rows, q_rows.T, input_precision=PRECISION) * scale
        seen = _seen(row[None, :], column[:, None], reach[None, :])
        weight = tl.exp2(tl.where(seen, score - log_sum[None, :], UNSEEN))
        sums_v = tl.dot(weight.to(g_rows.dtype), g_rows, sums_v, input_precision=PRECISION)
        pulled = tl.dot(v_rows, g_rows.T, input_precision=PRECISION)
        change = weight * (pulled - taken[None, :])
        sums_k = tl.dot(change.to(q_rows.dtype), q_rows, sums_k, input_precision=PRECISION)
    base = (sequence * time * heads + head) * WIDTH
    _store(grad_k + base, column, heads * WIDTH, sums_k * plain_scale, time, WIDTH, BLOCK)
    _store(grad_v + base, column, heads * WIDTH, sums_v, time, WIDTH, BLOCK)
