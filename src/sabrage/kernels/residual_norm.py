"""Residual, dropout and norm in one pass over memory, each way; then the linear layer that reads the norm.

    r = x + scale * keep * y / (1 - p)
    n = r / sqrt(mean(r^2) + eps)                  RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)
    n = (r - mean r) / sqrt(var r + eps)           LayerNorm (Ba et al. 2016, arXiv 1607.06450)

times a learned weight and plus a learned bias where given. Whether element (row, column) is kept depends on
the seed and its place alone (Philox 4x32-10; Salmon et al. 2011): the backward pass computes the mask again
and none is stored. With p = 0 no random number is drawn and r = x + scale * y. A row's statistics are
also computed again, from r, which the network keeps anyway.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.kernels.language import KernelError, jit, num_processors, require, tl

# Backward programs per multiprocessor; each sums the weight's gradient over the rows that it walks.
PROGRAMS = 8


def dropout_keep(seed: Tensor, num_rows: int, dim: int, *, p: float) -> Tensor:
    """(rows, dim) bool: the mask, in plain torch; four columns share one Philox counter."""
    quarter = _block(dim) // 4
    counter = torch.arange(num_rows * quarter, device=seed.device)
    low, key_low, key_high = 0xFFFFFFFF, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = [counter & low, counter * 0, counter * 0, counter * 0]
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        high_first, high_second = (first >> 32) & low, (second >> 32) & low
        words = [
            high_second ^ words[1] ^ key_low,
            second & low,
            high_first ^ words[3] ^ key_high,
            first & low,
        ]
        key_low, key_high = (key_low + 0x9E3779B9) & low, (key_high + 0xBB67AE85) & low
    bits = torch.stack(words, dim=-1).view(num_rows, 4 * quarter)[:, :dim]
    return (bits >> 8) >= _threshold(p)


def residual_norm_reference(
    x_ND: Tensor,
    y_ND: Tensor,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
    p: float = 0.0,
    scale: float = 1.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: the norm in fp32 or wider, r in the dtype of x, n in the dtype of y."""
    if p:
        assert seed is not None
        kept_ND = dropout_keep(seed, y_ND.shape[:-1].numel(), y_ND.shape[-1], p=p).view(y_ND.shape)
        branch_ND = torch.where(kept_ND, y_ND, 0) * (scale / (1 - p))
    else:
        branch_ND = y_ND * scale if scale != 1 else y_ND
    r_ND = (x_ND + branch_ND).to(x_ND.dtype)
    wide_ND = r_ND.to(torch.promote_types(r_ND.dtype, torch.float32))
    if kind == "layer":
        wide_ND = wide_ND - wide_ND.mean(-1, keepdim=True)
    n_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        n_ND = n_ND * weight_D
    if bias_D is not None:
        n_ND = n_ND + bias_D
    return r_ND, n_ND.to(y_ND.dtype)


def residual_norm(
    x_ND: Tensor,
    y_ND: Tensor,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
    p: float = 0.0,
    scale: float = 1.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(r, n) of the stream x and the branch y, both (..., D): r in the dtype of x, n in the dtype of y.

    `p` is the share of y that is dropped, in [0, 1); with p > 0 `seed` is one int64 on the device, a new one
    for every call. The gradients of weight and bias are summed in fp32. Raises KernelError.
    """
    if x_ND.shape != y_ND.shape:
        raise KernelError(
            f"the stream is {tuple(x_ND.shape)} and the branch {tuple(y_ND.shape)}; allowed: equal"
        )
    if not 0 <= p < 1:
        raise KernelError(f"dropout p={p}, allowed: 0 <= p < 1")
    if p and seed is None:
        raise KernelError(f"dropout p={p} without a seed; pass seed=torch.randint(2**62, (), device=...)")
    if bias_D is not None and weight_D is None:
        raise KernelError("a bias without a weight; allowed: neither, the weight, or both")
    r_ND, n_ND = _forward(x_ND, y_ND, weight_D, bias_D, seed if p else None, kind == "layer", eps, p, scale)
    return r_ND, n_ND


def residual_norm_linear(
    x_ND: Tensor,
    y_ND: Tensor,
    matrix_FD: Tensor,
    weight_D: Tensor | None = None,
    bias_D: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(r, n matrix^T): `residual_norm` with its options, then the linear layer as torch's own product."""
    r_ND, n_ND = residual_norm(x_ND, y_ND, weight_D, bias_D, **options)
    return r_ND, F.linear(n_ND, matrix_FD)


def _block(dim: int) -> int:
    """Columns that a program holds: the next power of two."""
    return max(16, 1 << (dim - 1).bit_length())


def _num_warps(block: int) -> int:
    """Enough for 8 elements a thread: 16-byte loads of 16-bit values."""
    return max(1, min(16, block // 256))


def _threshold(p: float) -> int:
    """Elements whose top 24 random bits fall below this are dropped."""
    return round(p * 2**24)


@torch.library.custom_op("sabrage::residual_norm", mutates_args=())
def _forward(
    x_ND: Tensor,
    y_ND: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    seed: Tensor | None,
    layer: bool,
    eps: float,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    require(x_ND.device)
    x_ND, y_ND, dim = x_ND.contiguous(), y_ND.contiguous(), x_ND.shape[-1]
    r_ND, n_ND = torch.empty_like(x_ND), torch.empty_like(y_ND)
    if x_ND.numel():
        _forward_rows[(x_ND.numel() // dim,)](
            x_ND,
            y_ND,
            x_ND if weight_D is None else weight_D,
            x_ND if bias_D is None else bias_D,
            x_ND if seed is None else seed,
            r_ND,
            n_ND,
            dim,
            eps,
            _threshold(p),
            scale / (1 - p),
            LAYER=layer,
            WEIGHT=weight_D is not None,
            BIAS=bias_D is not None,
            DROPS=seed is not None,
            BLOCK=_block(dim),
            num_warps=_num_warps(_block(dim)),
        )
    return r_ND, n_ND


@_forward.register_fake
def _(x_ND: Tensor, y_ND: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), y_ND.new_empty(y_ND.shape)


def _branch_differs(grad_r_ND: Tensor, grad_n_ND: Tensor, seed: Tensor | None, scale: float) -> bool:
    """Whether the branch has a gradient of its own, or shares that of the stream."""
    return seed is not None or scale != 1 or grad_n_ND.dtype != grad_r_ND.dtype


@torch.library.custom_op("sabrage::residual_norm_backward", mutates_args=())
def _backward(
    grad_r_ND: Tensor,
    grad_n_ND: Tensor,
    r_ND: Tensor,
    weight_D: Tensor | None,
    seed: Tensor | None,
    layer: bool,
    eps: float,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of x, gradient of y, gradients of weight and bias (2, D) fp32).

    The second is empty where it would equal the first, the third without a weight.
    """
    require(r_ND.device)
    grad_r_ND, grad_n_ND, dim = grad_r_ND.contiguous(), grad_n_ND.contiguous(), r_ND.shape[-1]
    rows = r_ND.numel() // dim if r_ND.numel() else 0
    programs = min(rows, PROGRAMS * num_processors(r_ND.device))
    grad_x_ND = torch.empty_like(grad_r_ND)
    own = _branch_differs(grad_r_ND, grad_n_ND, seed, scale)
    grad_y_ND = torch.empty_like(grad_n_ND) if own else grad_n_ND.new_empty(0)
    sums = (programs, 2, dim) if weight_D is not None else (0, 2, 0)
    sums_P2D = torch.empty(sums, device=r_ND.device, dtype=torch.float32)
    if rows:
        _backward_rows[(programs,)](
            grad_r_ND,
            grad_n_ND,
            r_ND,
            r_ND if weight_D is None else weight_D,
            r_ND if seed is None else seed,
            grad_x_ND,
            grad_y_ND,
            sums_P2D,
            rows,
            dim,
            eps,
            _threshold(p),
            scale / (1 - p),
            LAYER=layer,
            WEIGHT=weight_D is not None,
            DROPS=seed is not None,
            OWN=own,
            BLOCK=_block(dim),
            num_warps=_num_warps(_block(dim)),
        )
    return grad_x_ND, grad_y_ND, sums_P2D.sum(0)


@_backward.register_fake
def _(
    grad_r_ND: Tensor,
    grad_n_ND: Tensor,
    r_ND: Tensor,
    weight_D: Tensor | None,
    seed: Tensor | None,
    *plain: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    own = _branch_differs(grad_r_ND, grad_n_ND, seed, plain[-1])
    sums = (2, r_ND.shape[-1] if weight_D is not None else 0)
    return (
        grad_r_ND.new_empty(grad_r_ND.shape),
        grad_n_ND.new_empty(grad_n_ND.shape if own else 0),
        grad_r_ND.new_empty(sums, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight_D, bias_D, seed, *ctx.options = inputs
    ctx.save_for_backward(output[0], weight_D, bias_D, seed)


def _pull(ctx: Any, grad_r_ND: Tensor, grad_n_ND: Tensor) -> tuple[Any, ...]:
    r_ND, weight_D, bias_D, seed = ctx.saved_tensors
    grad_x_ND, grad_y_ND, sums_2D = _backward(grad_r_ND, grad_n_ND, r_ND, weight_D, seed, *ctx.options)
    if grad_y_ND.shape != grad_x_ND.shape:
        grad_y_ND = grad_x_ND
    grad_weight_D = None if weight_D is None else sums_2D[0].to(weight_D.dtype)
    grad_bias_D = None if bias_D is None else sums_2D[1].to(bias_D.dtype)
    return grad_x_ND, grad_y_ND, grad_weight_D, grad_bias_D, None, None, None, None, None


_forward.register_autograd(_pull, setup_context=_save)


@jit
def _kept(seed, row, threshold, BLOCK: tl.constexpr):
    counters = row * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    first, second, third, fourth = tl.randint4x(tl.load(seed), counters)
    bits = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (BLOCK,))
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.int32) >= threshold


@jit
def _standardised(r, inside, dim, eps, LAYER: tl.constexpr):
    """(r centred and scaled, the factor that scaled it); lanes beyond `dim` hold 0."""
    if LAYER:
        r = tl.where(inside, r - tl.sum(r, 0) / dim, 0.0)
    factor = tl.rsqrt(tl.sum(r * r, 0) / dim + eps)
    return r * factor, factor


@jit
def _forward_rows(
    x,
    y,
    weight,
    bias,
    seed,
    r_out,
    n_out,
    dim,
    eps,
    threshold,
    factor,
    LAYER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    places = row.to(tl.int64) * dim + columns
    branch = tl.load(y + places, mask=inside, other=0.0).to(tl.float32) * factor
    if DROPS:
        branch = tl.where(_kept(seed, row, threshold, BLOCK), branch, 0.0)
    stream = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    rounded = (stream + branch).to(r_out.dtype.element_ty)
    tl.store(r_out + places, rounded, mask=inside)
    n, _ = _standardised(rounded.to(tl.float32), inside, dim, eps, LAYER)
    if WEIGHT:
        n *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        n += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(n_out + places, n.to(n_out.dtype.element_ty), mask=inside)


@jit
def _backward_rows(
    grad_r,
    grad_n,
    r_in,
    weight,
    seed,
    grad_x,
    grad_y,
    sums,
    rows,
    dim,
    eps,
    threshold,
    factor,
    LAYER: tl.constexpr,
    WEIGHT: tl.constexpr,
    DROPS: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program walks rows a grid apart; with g = weight * grad_n a row's gradient is
    grad_r + (g - n mean(g n) - mean(g)) / deviation, the last mean for LayerNorm only."""
    columns = tl.arange(0, BLOCK)
    wide = dim.to(tl.int64)
    inside = columns < dim
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    if WEIGHT:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        places = row * wide + columns
        r = tl.load(r_in + places, mask=inside, other=0.0).to(tl.float32)
        pulled = tl.load(grad_n + places, mask=inside, other=0.0).to(tl.float32)
        straight = tl.load(grad_r + places, mask=inside, other=0.0).to(tl.float32)
        n, scale = _standardised(r, inside, dim, eps, LAYER)
        if WEIGHT:
            weight_sum += pulled * n
            bias_sum += pulled
            pulled *= w
        inner = pulled - n * (tl.sum(pulled * n, 0) / dim)
        if LAYER:
            inner -= tl.sum(pulled, 0) / dim
        grad = straight + scale * inner
        tl.store(grad_x + places, grad.to(grad_x.dtype.element_ty), mask=inside)
        if OWN:
            branch = grad * factor
            if DROPS:
                branch = tl.where(_kept(seed, row, threshold, BLOCK), branch, 0.0)
            tl.store(grad_y + places, branch.to(grad_y.dtype.element_ty), mask=inside)
    if WEIGHT:
        base = sums + tl.program_id(0) * 2 * dim + columns
        tl.store(base, weight_sum, mask=inside)
        tl.store(base + dim, bias_sum, mask=inside)
