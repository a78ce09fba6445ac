"""Two linear layers with the activation in the first one's epilogue, both ways.

    y = act(x U^T) D^T        act(z) = relu(z)^2 (So et al. 2021, arXiv 2109.08668) or exact GELU

Forward, act is applied to the tile while it is still in registers. Backward, the product g D is the gradient
of act(z), and its epilogue multiplies by act'(z) before anything is written. relu(z)^2 does not keep z:
act'(z) = 2 relu(z) = 2 sqrt(act(z)), and the root halves the relative rounding error of what is kept. GELU
keeps z and computes GELU(z) again in the epilogue. The other products are torch's own.

On Hopper relu(z)^2 has a kernel of its own, whose tiles the copy engine brings and takes away: one program a
multiprocessor goes through all tiles, and the next one is on its way while an epilogue runs.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.kernels.language import KernelError, capability_of, jit, require, tl
from sabrage.kernels.narrow_forward import narrow_factors, narrow_forward
from sabrage.kernels.narrow_gradients import narrow_gradients
from sabrage.kernels.tiles import Tile, in_halves, place_of, product_of

Activation = Literal["relu_squared", "gelu"]


# By the tensor core's generation. Hopper has 227 KB of shared memory and these tiles let two programs share a
# multiprocessor, one computing while the other writes; the cards with 8.6 and 8.9 have 99 KB. GELU's epilogue
# holds more in registers and takes half the columns; full fp32 products run outside the tensor cores.
TILES = {
    ("hopper", "gelu"): Tile(128, 64, 64, num_warps=8, num_stages=4),
    ("hopper", "other"): Tile(128, 128, 64, num_warps=8, num_stages=3),
    ("ampere", "gelu"): Tile(128, 64, 32, num_warps=8, num_stages=4),
    ("ampere", "other"): Tile(128, 128, 32, num_warps=8, num_stages=4),
}
FP32_TILE = Tile(64, 64, 16, num_warps=4, num_stages=2)
# For the copy engine. On an H200, 65,536 tokens of width 768: 0.43 ms and 0.59 ms back, the other kernel 0.56
# and 0.64, torch's product with the compiler's activation 0.60 and 0.70. Of twenty tiles the fastest.
MAPPED_TILE = Tile(128, 256, 64, num_warps=8, num_stages=3)
# Bytes that the copy engine wants rows to be multiples of.
ALIGNMENT = 16


def tile_for(capability: tuple[int, int], dtype: torch.dtype, epilogue: str) -> Tile:
    """The tile of a product: a table, because searching would count as training time."""
    if dtype == torch.float32:
        return FP32_TILE
    generation = "hopper" if capability == (9, 0) else "ampere"
    return TILES[generation, "gelu" if epilogue.startswith("gelu") else "other"]


def perceptron_reference(
    x_ND: Tensor, up_FD: Tensor, down_DF: Tensor, *, activation: Activation = "relu_squared"
) -> Tensor:
    """The specification."""
    z_NF = F.linear(x_ND, up_FD)
    return F.linear(F.gelu(z_NF) if activation == "gelu" else F.relu(z_NF).square(), down_DF)


def perceptron(
    x_ND: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    *,
    activation: Activation = "relu_squared",
    fp8_forward: bool = False,
    fp8_gradients: bool = False,
) -> Tensor:
    """y (..., D) for x (..., D); all three in one dtype, which is autocast's where it is on.

    The weights are those of two torch Linears without biases. `fp8_forward` and `fp8_gradients` are for
    relu_squared on Hopper: see `narrow_forward` and `narrow_gradients`. Raises KernelError.
    """
    kind = x_ND.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_ND, up_FD, down_DF = x_ND.to(dtype), up_FD.to(dtype), down_DF.to(dtype)
    dtypes = {x_ND.dtype, up_FD.dtype, down_DF.dtype}
    if len(dtypes) > 1:
        raise KernelError(f"got {sorted(map(str, dtypes))}, allowed: one dtype; cast, or run under autocast")
    if activation not in ("relu_squared", "gelu"):
        raise KernelError(f"activation={activation!r}, allowed: 'relu_squared', 'gelu'")
    uneven = any(width % ALIGNMENT for width in up_FD.shape)
    narrow, tokens_ND = fp8_forward or fp8_gradients, x_ND.flatten(0, -2)
    if narrow and (uneven or not maps(capability_of(x_ND.device), activation, tokens_ND, up_FD, down_DF)):
        raise KernelError(
            f"FP8 products are for relu_squared in 16 bits, widths that {ALIGNMENT} divides and compute "
            f"capability 9.0, and this is {activation} in {x_ND.dtype} of {tuple(up_FD.shape)} on "
            f"{capability_of(x_ND.device)}; use fp8_forward=False and fp8_gradients=False"
        )
    if fp8_forward:
        factors = narrow_factors(tokens_ND.detach(), up_FD.detach(), down_DF.detach())
        y_ND, _ = _forward_fp8(tokens_ND, up_FD, down_DF, *factors, fp8_gradients)
        return y_ND.view(x_ND.shape)
    learning = x_ND.requires_grad or up_FD.requires_grad or down_DF.requires_grad
    learns = torch.is_grad_enabled() and learning
    y_ND, _, _ = _forward(tokens_ND, up_FD, down_DF, activation, learns, fp8_gradients)
    return y_ND.view(x_ND.shape)


@torch.library.custom_op("sabrage::perceptron", mutates_args=())
def _forward(
    x_ND: Tensor, up_FD: Tensor, down_DF: Tensor, activation: str, learns: bool, fp8_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, act(z), z), the last one empty unless it is kept."""
    require(x_ND.device)
    shape = (x_ND.shape[0], up_FD.shape[0])
    post_NF = torch.empty(shape, device=x_ND.device, dtype=x_ND.dtype)
    keeps = learns and activation == "gelu"
    pre_NF = torch.empty(shape if keeps else 0, device=x_ND.device, dtype=x_ND.dtype)
    _launch(activation, x_ND.contiguous(), up_FD.contiguous(), post_NF, second=pre_NF if keeps else None)
    return F.linear(post_NF, down_DF), post_NF, pre_NF


@_forward.register_fake
def _(
    x_ND: Tensor, up_FD: Tensor, down_DF: Tensor, activation: str, learns: bool, fp8_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x_ND.shape[0], up_FD.shape[0])
    keeps = learns and activation == "gelu"
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(shape), x_ND.new_empty(shape if keeps else 0)


@torch.library.custom_op("sabrage::perceptron_backward", mutates_args=())
def _backward(grad_ND: Tensor, down_DF: Tensor, kept_NF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(gradient of z, act(z)), the last one empty where it is what was kept."""
    require(grad_ND.device)
    grad_z_NF = torch.empty_like(kept_NF)
    again = activation == "gelu"
    post_NF = torch.empty_like(kept_NF) if again else kept_NF.new_empty(0)
    _launch(
        f"{activation}_back",
        grad_ND.contiguous(),
        down_DF.contiguous(),
        grad_z_NF,
        second=post_NF if again else None,
        kept=kept_NF,
    )
    return grad_z_NF, post_NF


@_backward.register_fake
def _(grad_ND: Tensor, down_DF: Tensor, kept_NF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return kept_NF.new_empty(kept_NF.shape), kept_NF.new_empty(kept_NF.shape if activation == "gelu" else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_ND, up_FD, down_DF, ctx.activation, _, ctx.fp8_gradients = inputs
    _, post_NF, pre_NF = output
    ctx.save_for_backward(x_ND, up_FD, down_DF, pre_NF if ctx.activation == "gelu" else post_NF)
    ctx.mark_non_differentiable(post_NF, pre_NF)


def _pull(ctx: Any, grad_ND: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x_ND, up_FD, down_DF, kept_NF = ctx.saved_tensors
    if ctx.fp8_gradients:
        return *narrow_gradients(grad_ND, x_ND, up_FD, down_DF, kept_NF), None, None, None
    grad_z_NF, post_NF = _backward(grad_ND, down_DF, kept_NF, ctx.activation)
    if ctx.activation != "gelu":
        post_NF = kept_NF
    return grad_z_NF @ up_FD, grad_z_NF.t() @ x_ND, grad_ND.t() @ post_NF, None, None, None


_forward.register_autograd(_pull, setup_context=_save)


@torch.library.custom_op("sabrage::perceptron_fp8", mutates_args=())
def _forward_fp8(
    x_ND: Tensor,
    up_FD: Tensor,
    down_DF: Tensor,
    narrow_ND: Tensor,
    narrow_FD: Tensor,
    narrow_DF: Tensor,
    scale_N: Tensor,
    up_scale: Tensor,
    post_scale: Tensor,
    down_scale: Tensor,
    fp8_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """(y, act(z)), of the factors in FP8; the first three are what gradients are made of."""
    factors = (narrow_ND, narrow_FD, narrow_DF, scale_N, up_scale, post_scale, down_scale)
    return narrow_forward(*factors, x_ND.dtype)


@_forward_fp8.register_fake
def _(x_ND: Tensor, up_FD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty((x_ND.shape[0], up_FD.shape[0]))


def _save_fp8(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.activation, ctx.fp8_gradients = "relu_squared", inputs[-1]
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _pull_fp8(ctx: Any, grad_ND: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return *_pull(ctx, grad_ND)[:3], *[None] * 8


_forward_fp8.register_autograd(_pull_fp8, setup_context=_save_fp8)


def _launch(
    epilogue: str,
    a_MK: Tensor,
    b: Tensor,
    out_MN: Tensor,
    *,
    second: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    (m, k), n = a_MK.shape, out_MN.shape[1]
    if not m:
        return
    if maps(capability_of(a_MK.device), epilogue, a_MK, b, out_MN):
        _launch_mapped(a_MK, b, out_MN, kept)
        return
    tile = tile_for(capability_of(a_MK.device), a_MK.dtype, epilogue)
    _product[(-(-m // tile.m) * -(-n // tile.n),)](
        a_MK,
        b,
        out_MN,
        out_MN if second is None else second,
        out_MN if kept is None else kept,
        m,
        n,
        k,
        EPILOGUE=epilogue,
        SECOND=second is not None,
        EVEN=m % tile.m == n % tile.n == k % tile.k == 0,
        PRECISION="ieee" if a_MK.dtype == torch.float32 else "tf32",
        **tile.options(),
    )


def maps(capability: tuple[int, int], epilogue: str, *tensors: Tensor) -> bool:
    """Whether the kernel for the copy engine takes this product."""
    narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in tensors)
    aligned = all(x.shape[1] * x.element_size() % ALIGNMENT == 0 for x in tensors)
    return capability == (9, 0) and epilogue.startswith("relu_squared") and narrow and aligned


def _launch_mapped(a_MK: Tensor, b: Tensor, out_MN: Tensor, kept: Tensor | None) -> None:
    """relu(a b^T)^2; with what was kept of it, the product a b times its derivative."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n, tile, back = a_MK.shape, out_MN.shape[1], MAPPED_TILE, kept is not None
    programs = tile.programs(m, n, a_MK.device)
    half = [tile.m, tile.n // 2]
    out_map = TensorDescriptor.from_tensor(out_MN, half)
    _mapped_product[(programs,)](
        TensorDescriptor.from_tensor(a_MK, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(b, [tile.k, tile.n] if back else [tile.n, tile.k]),
        out_map,
        out_map if kept is None else TensorDescriptor.from_tensor(kept, half),
        m,
        n,
        k,
        BACK=back,
        PROGRAMS=programs,
        **tile.options(),
    )


@jit
def _mapped_product(
    a,
    b,
    out,
    kept,
    M,
    N,
    K,
    BACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Every PROGRAMS-th tile of relu(a b^T)^2, or of a b times 2 sqrt(kept); beyond an edge all is 0."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = place_of(tile, tiles_m, tiles_n, GROUP)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        if BACK:
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for depth in range(0, K, BLOCK_K):
                total = tl.dot(a.load([row, depth]), b.load([depth, column]), total)
        else:
            total = product_of(a, b, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K)
        first, second = in_halves(total, BLOCK_M, BLOCK_N)
        if BACK:
            first *= 2 * tl.sqrt(kept.load([row, column]).to(tl.float32))
            out.store([row, column], first.to(out.dtype))
            second *= 2 * tl.sqrt(kept.load([row, column + BLOCK_N // 2]).to(tl.float32))
        else:
            first = tl.maximum(first, 0.0)
            first *= first
            out.store([row, column], first.to(out.dtype))
            second = tl.maximum(second, 0.0)
            second *= second
        out.store([row, column + BLOCK_N // 2], second.to(out.dtype))


@jit
def _normal(z):
    """(share of a normal distribution below z, its density at z): GELU(z) = z P(z), GELU'(z) = P(z) + z p(z).

    Abramowitz and Stegun 7.1.26, off by 1.5e-7 at most; the library's erf takes so many registers that it
    spills, and the density is needed anyway.
    """
    bell = tl.exp(-0.5 * z * z)
    t = 1 / (1 + 0.3275911 * 0.7071067811865476 * tl.abs(z))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * bell
    return tl.where(z < 0, tail, 1 - tail), 0.3989422804014327 * bell


@jit
def _product(
    a,
    b,
    out,
    second,
    kept,
    M,
    N,
    K,
    EPILOGUE: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = epilogue(a B): a (M, K); B is b (N, K) transposed, or b (K, N) itself when going back."""
    BACK: tl.constexpr = EPILOGUE == "relu_squared_back" or EPILOGUE == "gelu_back"
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = place_of(tl.program_id(0), tiles_m, tiles_n, GROUP)
    start_m, start_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    rows, columns, depth = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_in, column_in = start_m + rows < M, columns < N
    a_tile = a + start_m.to(tl.int64) * K + rows[:, None] * K + depth[None, :]
    if BACK:
        b_tile = b + depth[:, None] * N + columns[None, :]
        b_step = BLOCK_K * N
    else:
        b_tile = b + columns[None, :] * K + depth[:, None]
        b_step = BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, K, BLOCK_K):
        if EVEN:
            left, right = tl.load(a_tile), tl.load(b_tile)
        else:
            depth_in = start_k + depth < K
            left = tl.load(a_tile, mask=row_in[:, None] & depth_in[None, :], other=0.0)
            right = tl.load(b_tile, mask=depth_in[:, None] & column_in[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        b_tile += b_step
    # 64-bit places for a whole tile would spill: the tile's corner is 64 bits wide, places within it 32.
    corner = start_m.to(tl.int64) * N
    places = rows[:, None] * N + columns[None, :]
    inside = row_in[:, None] & column_in[None, :]
    if BACK:
        held = tl.load(kept + corner + places, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == "relu_squared":
        positive = tl.maximum(total, 0.0)
        result = positive * positive
    elif EPILOGUE == "relu_squared_back":
        result = total * 2 * tl.sqrt(held)
    elif EPILOGUE == "gelu":
        if SECOND:
            tl.store(second + corner + places, total.to(second.dtype.element_ty), mask=inside)
        share, _ = _normal(total)
        result = total * share
    else:
        share, density = _normal(held)
        tl.store(second + corner + places, (held * share).to(second.dtype.element_ty), mask=inside)
        result = total * (share + held * density)
    tl.store(out + corner + places, result.to(out.dtype.element_ty), mask=inside)
