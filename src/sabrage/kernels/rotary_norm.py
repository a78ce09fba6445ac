"""QK-norm and rotary embedding of the heads in one pass over memory, each way.

    n = x / sqrt(mean(x^2) + eps)    over the head's width (Henry et al. 2020, arXiv 2010.04245)
    y1 = n1 cos + n2 sin,  y2 = n2 cos - n1 sin    on its halves (Su et al. 2021, arXiv 2104.09864)

The backward pass turns the gradient back by the same angles and computes the norm again from x.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from typing import Any

import torch
from torch import Tensor

from sabrage.kernels.language import KernelError, jit, require, tl

# Heads that one program turns, and its warps.
ROWS, NUM_WARPS = 32, 4


def rotary_norm_reference(x_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The specification, in fp32 or wider, returned in the dtype of x."""
    wide_BTHK = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    normed_BTHK = wide_BTHK * torch.rsqrt(wide_BTHK.square().mean(-1, keepdim=True) + eps)
    first, second = normed_BTHK.chunk(2, dim=-1)
    cosine, sine = cosine_TK[:, None, :], sine_TK[:, None, :]
    turned = torch.cat((first * cosine + second * sine, second * cosine - first * sine), dim=-1)
    return turned.to(x_BTHK.dtype)


def rotary_norm(x_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The heads of queries, keys or both, normed and turned: contiguous, in the dtype of x.

    The tables are (T, K / 2) and fp32. x may be a view whose last dimension is dense, such as the queries and
    keys inside a fused projection. Raises KernelError.
    """
    wanted = (x_BTHK.shape[1], x_BTHK.shape[3] // 2)
    if x_BTHK.shape[3] % 2 or cosine_TK.shape != wanted or sine_TK.shape != wanted:
        raise KernelError(
            f"heads are {tuple(x_BTHK.shape)}, tables {tuple(cosine_TK.shape)} and {tuple(sine_TK.shape)}; "
            "allowed: an even head width K and tables of (T, K / 2)"
        )
    return _forward(x_BTHK, cosine_TK, sine_TK, eps)


@torch.library.custom_op("sabrage::rotary_norm", mutates_args=())
def _forward(x_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, eps: float) -> Tensor:
    y_BTHK = torch.empty(x_BTHK.shape, device=x_BTHK.device, dtype=x_BTHK.dtype)
    _launch(x_BTHK, x_BTHK, cosine_TK, sine_TK, y_BTHK, eps, back=False)
    return y_BTHK


@_forward.register_fake
def _(x_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, eps: float) -> Tensor:
    return x_BTHK.new_empty(x_BTHK.shape)


@torch.library.custom_op("sabrage::rotary_norm_backward", mutates_args=())
def _backward(grad_BTHK: Tensor, x_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, eps: float) -> Tensor:
    grad_x_BTHK = torch.empty(x_BTHK.shape, device=x_BTHK.device, dtype=x_BTHK.dtype)
    _launch(x_BTHK, grad_BTHK, cosine_TK, sine_TK, grad_x_BTHK, eps, back=True)
    return grad_x_BTHK


@_backward.register_fake
def _(grad_BTHK: Tensor, x_BTHK: Tensor, cosine_TK: Tensor, sine_TK: Tensor, eps: float) -> Tensor:
    return x_BTHK.new_empty(x_BTHK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _pull(ctx: Any, grad_BTHK: Tensor) -> tuple[Any, ...]:
    return _backward(grad_BTHK, *ctx.saved_tensors, ctx.eps), None, None, None


_forward.register_autograd(_pull, setup_context=_save)


def _launch(
    x_BTHK: Tensor,
    grad_BTHK: Tensor,
    cosine_TK: Tensor,
    sine_TK: Tensor,
    out_BTHK: Tensor,
    eps: float,
    *,
    back: bool,
) -> None:
    require(x_BTHK.device)
    batch, time, heads, width = x_BTHK.shape
    rows = batch * time * heads
    if not rows:
        return
    x_BTHK, grad_BTHK = (part if part.stride(3) == 1 else part.contiguous() for part in (x_BTHK, grad_BTHK))
    _heads[(-(-rows // ROWS),)](
        x_BTHK,
        grad_BTHK,
        cosine_TK.contiguous(),
        sine_TK.contiguous(),
        out_BTHK,
        rows,
        time,
        heads,
        *x_BTHK.stride()[:3],
        *grad_BTHK.stride()[:3],
        eps,
        HALF=width // 2,
        BACK=back,
        ROWS=ROWS,
        BLOCK=max(16, 1 << (width // 2 - 1).bit_length()),
        num_warps=NUM_WARPS,
    )


@jit
def _heads(
    x,
    grad,
    cosine,
    sine,
    out,
    rows,
    time,
    heads,
    x_batch,
    x_time,
    x_head,
    grad_batch,
    grad_time,
    grad_head,
    eps,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS heads of whatever tokens they belong to; forward out = y, back out = gradient of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < HALF)
    head, token = row % heads, row // heads
    moment, sequence = token % time, token // time
    x_row = x + (sequence * x_batch + moment * x_time + head * x_head)[:, None] + column
    first = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_row + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = moment[:, None] * HALF + column
    c = tl.load(cosine + angle, mask=inside, other=0.0)
    s = tl.load(sine + angle, mask=inside, other=0.0)
    factor = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)[:, None]
    first *= factor
    second *= factor
    if BACK:
        grad_row = grad + (sequence * grad_batch + moment * grad_time + head * grad_head)[:, None] + column
        pulled = tl.load(grad_row, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(grad_row + HALF, mask=inside, other=0.0).to(tl.float32)
        back_first = pulled * c - other * s
        back_second = pulled * s + other * c
        mean = (tl.sum(back_first * first + back_second * second, 1) / (2 * HALF))[:, None]
        result_first = factor * (back_first - first * mean)
        result_second = factor * (back_second - second * mean)
    else:
        result_first = first * c + second * s
        result_second = second * c - first * s
    out_row = out + row[:, None] * (2 * HALF) + column
    tl.store(out_row, result_first.to(out.dtype.element_ty), mask=inside)
    tl.store(out_row + HALF, result_second.to(out.dtype.element_ty), mask=inside)
