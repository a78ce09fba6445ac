"""The backward pass of linear + ReLU^2 with two of its four products in FP8, on Hopper.

    y = act(z) D^T,  z = x U^T,  act(z) = relu(z)^2
    dz = (g D) 2 sqrt(act(z)),  dx = dz U        in FP8: e5m2 for gradients, e4m3 for weights
    dD = g^T act(z),  dU = dz^T x                in 16 bits, as the sums over all tokens that they are

Gradients are noisy anyhow: a batch says little of the direction in which the loss falls, and rounding by an
eighth adds little to that. What the forward pass computes stays as it is. FP8 halves the time of a product
and the energy that it takes, which a card at its limit of power has to spare neither.

The gradient g has one scale, by its largest value. That of dz must be known before dz is: e5m2 spans 32
powers of two, so that HEADROOM times the scale of g is neither too small nor too large, and what is beyond is
cut off.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

import torch
from torch import Tensor

from sabrage.kernels.fp8 import quantised, traced_product
from sabrage.kernels.language import jit, require, tl
from sabrage.kernels.tiles import Tile, in_halves, place_of, product_of

# Two programs a multiprocessor: one multiplies while the other writes. On an H200, 65,536 tokens of width
# 768: 0.45 ms; a single one with tiles twice as wide 0.47, and 0.51 where it asks for act(z) half by half.
TILE = Tile(128, 128, 64, num_warps=4, num_stages=4)
PROGRAMS_A_PROCESSOR = 2
HEADROOM = 16.0
LARGEST = torch.finfo(torch.float8_e5m2).max


def narrow_gradients(
    grad_ND: Tensor, x_ND: Tensor, up_FD: Tensor, down_DF: Tensor, post_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, U and D; `post_NF` is act(z). All in one 16-bit format, widths multiples of 16."""
    narrow_ND, scale = quantised(grad_ND, torch.float8_e5m2)
    down_FD, down_scale = quantised(down_DF.t().contiguous())
    narrow_scale = scale * HEADROOM
    scales_2 = torch.stack((scale * down_scale, narrow_scale))
    grad_z_NF, narrow_NF = _hidden_gradient(narrow_ND, down_FD, post_NF, scales_2)
    up_DF, up_scale = quantised(up_FD.t().contiguous())
    grad_x_ND = traced_product(narrow_NF, up_DF.t(), narrow_scale, up_scale, grad_ND.dtype, fast=True)
    return grad_x_ND, grad_z_NF.t() @ x_ND, grad_ND.t() @ post_NF


def narrow_gradients_reference(
    grad_ND: Tensor, x_ND: Tensor, up_FD: Tensor, down_DF: Tensor, post_NF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, without rounding."""
    grad_z_NF = (grad_ND @ down_DF) * 2 * post_NF.sqrt()
    return grad_z_NF @ up_FD, grad_z_NF.t() @ x_ND, grad_ND.t() @ post_NF


@torch.library.custom_op("sabrage::hidden_gradient_fp8", mutates_args=())
def _hidden_gradient(
    narrow_ND: Tensor, down_FD: Tensor, post_NF: Tensor, scales_2: Tensor
) -> tuple[Tensor, Tensor]:
    """(dz in the dtype of act(z), dz in e5m2 over its scale); scales are those of the product and of dz."""
    require(narrow_ND.device)
    grad_z_NF = torch.empty(post_NF.shape, device=post_NF.device, dtype=post_NF.dtype)
    narrow_NF = torch.empty(post_NF.shape, device=post_NF.device, dtype=torch.float8_e5m2)
    (m, k), n = narrow_ND.shape, down_FD.shape[0]
    if not m:
        return grad_z_NF, narrow_NF
    from triton.tools.tensor_descriptor import TensorDescriptor

    programs = TILE.programs(m, n, post_NF.device, each=PROGRAMS_A_PROCESSOR)
    half = [TILE.m, TILE.n // 2]
    _mapped_product[(programs,)](
        TensorDescriptor.from_tensor(narrow_ND.contiguous(), [TILE.m, TILE.k]),
        TensorDescriptor.from_tensor(down_FD.contiguous(), [TILE.n, TILE.k]),
        TensorDescriptor.from_tensor(grad_z_NF, half),
        TensorDescriptor.from_tensor(narrow_NF, half),
        TensorDescriptor.from_tensor(post_NF.contiguous(), half),
        scales_2,
        m,
        n,
        k,
        LARGEST=LARGEST,
        PROGRAMS=programs,
        **TILE.options(),
    )
    return grad_z_NF, narrow_NF


@_hidden_gradient.register_fake
def _(narrow_ND: Tensor, down_FD: Tensor, post_NF: Tensor, scales_2: Tensor) -> tuple[Tensor, Tensor]:
    return post_NF.new_empty(post_NF.shape), post_NF.new_empty(post_NF.shape, dtype=torch.float8_e5m2)


@jit
def _mapped_product(
    a,
    b,
    out,
    narrow,
    kept,
    scales,
    M,
    N,
    K,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Every PROGRAMS-th tile of a b^T times 2 sqrt(kept), in both formats; beyond an edge all is 0."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    factor, back = 2 * tl.load(scales), 1 / tl.load(scales + 1)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        total = product_of(a, b, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K)
        first, second = in_halves(total, BLOCK_M, BLOCK_N)
        # Both are asked for before either is waited for.
        left, right = kept.load([row, column]), kept.load([row, column + BLOCK_N // 2])
        first *= factor * tl.sqrt(left.to(tl.float32))
        second *= factor * tl.sqrt(right.to(tl.float32))
        out.store([row, column], first.to(out.dtype))
        narrow.store([row, column], tl.clamp(first * back, -LARGEST, LARGEST).to(narrow.dtype))
        out.store([row, column + BLOCK_N // 2], second.to(out.dtype))
        cut = tl.clamp(second * back, -LARGEST, LARGEST)
        narrow.store([row, column + BLOCK_N // 2], cut.to(narrow.dtype))
