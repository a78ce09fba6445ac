"""From a fused projection to attention, in one pass over memory each way: QK-norm, rotary positions, values.

    n = x / sqrt(mean(x^2) + eps)    over the head's width (Henry et al. 2020, arXiv 2010.04245)
    y1 = n1 cos + n2 sin,  y2 = n2 cos - n1 sin    on its halves (Su et al. 2021, arXiv 2104.09864)

is made of queries and keys; values get what is to be added to them. Attention then reads three dense tensors,
and the three gradients that it gives come back as one of the projection's own shape. The backward pass turns
gradients back by the same angles and computes the norm again from x.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from typing import Any

import torch
from torch import Tensor

from sabrage.kernels.language import KernelError, jit, require, tl

# Heads that one program turns, and its warps.
ROWS, NUM_WARPS = 32, 4
Heads = tuple[Tensor, Tensor, Tensor]


def rotary_norm_reference(
    qkv_BTHK: Tensor,
    cosine_TK: Tensor,
    sine_TK: Tensor,
    *,
    addend_BTHK: Tensor | None = None,
    eps: float = 1e-6,
) -> Heads:
    """The specification, in fp32 or wider, returned in the dtype of the projection."""
    wide_BTHK = qkv_BTHK.to(torch.promote_types(qkv_BTHK.dtype, torch.float32))
    q_BTHK, k_BTHK, v_BTHK = wide_BTHK.chunk(3, dim=2)
    cosine, sine = cosine_TK[:, None, :], sine_TK[:, None, :]
    found = []
    for x_BTHK in (q_BTHK, k_BTHK):
        normed_BTHK = x_BTHK * torch.rsqrt(x_BTHK.square().mean(-1, keepdim=True) + eps)
        first, second = normed_BTHK.chunk(2, dim=-1)
        found.append(torch.cat((first * cosine + second * sine, second * cosine - first * sine), dim=-1))
    q, k, v = (*found, v_BTHK if addend_BTHK is None else v_BTHK + addend_BTHK)
    return q.to(qkv_BTHK.dtype), k.to(qkv_BTHK.dtype), v.to(qkv_BTHK.dtype)


def rotary_norm(
    qkv_BTHK: Tensor,
    cosine_TK: Tensor,
    sine_TK: Tensor,
    *,
    addend_BTHK: Tensor | None = None,
    eps: float = 1e-6,
) -> Heads:
    """Queries and keys, normed and turned, and values plus the addend: (B, T, H / 3, K) each, contiguous.

    `qkv_BTHK` holds the heads of all queries, then of all keys, then of all values; its last dimension is
    dense. The tables are (T, K / 2) and fp32. Raises KernelError.
    """
    batch, time, heads, width = qkv_BTHK.shape
    wanted = (time, width // 2)
    if heads % 3 or width % 2 or cosine_TK.shape != wanted or sine_TK.shape != wanted:
        raise KernelError(
            f"heads are {tuple(qkv_BTHK.shape)}, tables {tuple(cosine_TK.shape)} and {tuple(sine_TK.shape)}; "
            "allowed: three times as many heads as queries, of even width K, and tables of (T, K / 2)"
        )
    if addend_BTHK is not None and addend_BTHK.shape != (batch, time, heads // 3, width):
        raise KernelError(
            f"what values get is {tuple(addend_BTHK.shape)}; allowed: {(batch, time, heads // 3, width)}"
        )
    return _forward(qkv_BTHK, cosine_TK, sine_TK, addend_BTHK, eps)


@torch.library.custom_op("sabrage::rotary_norm", mutates_args=())
def _forward(
    qkv_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, addend_BTHK: Tensor | None, eps: float
) -> Heads:
    batch, time, heads, width = qkv_BTHK.shape
    shape = (batch, time, heads // 3, width)
    q, k, v = (torch.empty(shape, device=qkv_BTHK.device, dtype=qkv_BTHK.dtype) for _ in range(3))
    addend = None if addend_BTHK is None else addend_BTHK.contiguous()
    _launch(qkv_BTHK, cosine_TK, sine_TK, (q, k, v), addend, None, eps)
    return q, k, v


@_forward.register_fake
def _(qkv_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, addend_BTHK: Tensor | None, eps: float) -> Heads:
    batch, time, heads, width = qkv_BTHK.shape
    q, k, v = (qkv_BTHK.new_empty((batch, time, heads // 3, width)) for _ in range(3))
    return q, k, v


@torch.library.custom_op("sabrage::rotary_norm_backward", mutates_args=())
def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv_BTHK: Tensor,
    cosine_TK: Tensor,
    sine_TK: Tensor,
    eps: float,
) -> Tensor:
    grad_BTHK = torch.empty(qkv_BTHK.shape, device=qkv_BTHK.device, dtype=qkv_BTHK.dtype)
    grads = (grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous())
    _launch(qkv_BTHK, cosine_TK, sine_TK, grads, None, grad_BTHK, eps)
    return grad_BTHK


@_backward.register_fake
def _(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv_BTHK: Tensor, *rest: Any) -> Tensor:
    return qkv_BTHK.new_empty(qkv_BTHK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Heads) -> None:
    *tensors, addend_BTHK, ctx.eps = inputs
    ctx.adds = addend_BTHK is not None
    ctx.save_for_backward(*tensors)


def _pull(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return _backward(*grads, *ctx.saved_tensors, ctx.eps), None, None, grads[2] if ctx.adds else None, None


_forward.register_autograd(_pull, setup_context=_save)


def _launch(
    qkv_BTHK: Tensor,
    cosine_TK: Tensor,
    sine_TK: Tensor,
    parts: Heads,
    addend: Tensor | None,
    back: Tensor | None,
    eps: float,
) -> None:
    """Fills `parts`; or with `back`, the gradient of the projection, from the gradients in `parts`."""
    require(qkv_BTHK.device)
    batch, time, heads, width = qkv_BTHK.shape
    rows = batch * time * heads // 3
    if not rows:
        return
    if qkv_BTHK.stride(3) != 1:
        qkv_BTHK = qkv_BTHK.contiguous()
    _heads[(-(-rows // ROWS), 3)](
        qkv_BTHK,
        cosine_TK.contiguous(),
        sine_TK.contiguous(),
        *parts,
        addend,
        back,
        rows,
        time,
        heads // 3,
        *qkv_BTHK.stride()[:3],
        eps,
        HALF=width // 2,
        ADDS=addend is not None,
        BACK=back is not None,
        ROWS=ROWS,
        BLOCK=max(16, 1 << (width // 2 - 1).bit_length()),
        num_warps=NUM_WARPS,
    )


@jit
def _halves(base, place, inside, HALF: tl.constexpr):
    """Both halves of some heads, in fp32."""
    first = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(base + place + HALF, mask=inside, other=0.0).to(tl.float32)


@jit
def _keep(base, place, first, second, inside, HALF: tl.constexpr):
    tl.store(base + place, first.to(base.dtype.element_ty), mask=inside)
    tl.store(base + place + HALF, second.to(base.dtype.element_ty), mask=inside)


@jit
def _turn(first, second, c, s, eps, HALF: tl.constexpr):
    factor = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]
    first *= factor
    second *= factor
    return first * c + second * s, second * c - first * s


@jit
def _turn_back(first, second, pulled, other, c, s, eps, HALF: tl.constexpr):
    factor = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]
    first *= factor
    second *= factor
    back_first = pulled * c - other * s
    back_second = pulled * s + other * c
    mean = (tl.sum(back_first * first + back_second * second, 1) / (2 * HALF))[:, None]
    return factor * (back_first - first * mean), factor * (back_second - second * mean)


@jit
def _heads(
    x, cosine, sine, q, k, v, addend, back,
    rows, time, heads, x_batch, x_time, x_head, eps,
    HALF: tl.constexpr, ADDS: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS heads of whatever tokens they belong to; the second program number says of what kind."""
    kind = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < HALF)
    head, token = row % heads, row // heads
    moment, sequence = token % time, (token // time).to(tl.int64)
    place = (sequence * x_batch + moment * x_time + (kind * heads + head) * x_head)[:, None] + column
    own = row.to(tl.int64)[:, None] * (2 * HALF) + column
    # Where the projection's gradient goes.
    whole = (token.to(tl.int64) * (3 * heads) + kind * heads + head)[:, None] * (2 * HALF) + column
    if kind == 2:
        if BACK:
            first, second = _halves(v, own, inside, HALF)
            _keep(back, whole, first, second, inside, HALF)
        else:
            first, second = _halves(x, place, inside, HALF)
            if ADDS:
                added_first, added_second = _halves(addend, own, inside, HALF)
                first += added_first
                second += added_second
            _keep(v, own, first, second, inside, HALF)
    else:
        first, second = _halves(x, place, inside, HALF)
        angle = moment[:, None] * HALF + column
        c = tl.load(cosine + angle, mask=inside, other=0.0)
        s = tl.load(sine + angle, mask=inside, other=0.0)
        if BACK:
            if kind == 0:
                pulled, other = _halves(q, own, inside, HALF)
            else:
                pulled, other = _halves(k, own, inside, HALF)
            first, second = _turn_back(first, second, pulled, other, c, s, eps, HALF)
            _keep(back, whole, first, second, inside, HALF)
        else:
            first, second = _turn(first, second, c, s, eps, HALF)
            if kind == 0:
                _keep(q, own, first, second, inside, HALF)
            else:
                _keep(k, own, first, second, inside, HALF)
