"""Products of groups of rows with a matrix for each group: what sorted tokens and their experts need.

    y_m = x_m W_e^T for the rows m of group e        dx_m = g_m W_e,    dW_e = sum over them of g_m^T x_m

Rows of group e are those from ends[e - 1] (0 for the first) up to ends[e]. How large the groups are is known
on the device alone: M rows are cut into at most ceil(M / BLOCK_M) + E tiles of one group each, so many
programs start, and each finds its own group; those that are left over end at once. Nothing waits.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.kernels.language import KernelError, capability_of, jit, require, tl
from sabrage.kernels.tiles import Tile, place_of

# As for a dense product; of the weights' gradient a tile is (outputs, inputs), so many rows at a time.
HOPPER = Tile(128, 128, 64, num_warps=8, num_stages=3)
AMPERE = Tile(128, 128, 32, num_warps=8, num_stages=4)
FP32 = Tile(64, 64, 16, num_warps=4, num_stages=2)


def tile_for(capability: tuple[int, int], dtype: torch.dtype) -> Tile:
    """The tile of a product: a table, because searching would count as training time."""
    if dtype == torch.float32:
        return FP32
    return HOPPER if capability == (9, 0) else AMPERE


def grouped_product_reference(x_MD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """The specification; it waits for the device."""
    ends = ends_E.tolist()
    groups = zip([0, *ends[:-1]], ends, weight_EOD, strict=True)
    return torch.cat([F.linear(x_MD[begin:end], weight_OD) for begin, end, weight_OD in groups])


def grouped_product(x_MD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """y (M, O): each row times the matrix of its group; x and weight in one dtype, `ends_E` int32.

    The ends rise and the last one is M, which is not checked. Raises KernelError.
    """
    if x_MD.dim() != 2 or weight_EOD.dim() != 3 or x_MD.shape[1] != weight_EOD.shape[2]:
        raise KernelError(
            f"got rows {tuple(x_MD.shape)} and matrices {tuple(weight_EOD.shape)}, allowed: (M, D), (E, O, D)"
        )
    if x_MD.dtype != weight_EOD.dtype:
        raise KernelError(f"got {x_MD.dtype} and {weight_EOD.dtype}, allowed: one dtype; cast one of them")
    if ends_E.shape != weight_EOD.shape[:1] or ends_E.dtype != torch.int32:
        raise KernelError(
            f"got ends {tuple(ends_E.shape)} {ends_E.dtype}, allowed: ({len(weight_EOD)},) torch.int32"
        )
    return _grouped(x_MD, weight_EOD, ends_E, False)


@torch.library.custom_op("sabrage::grouped_product", mutates_args=())
def _grouped(x_MK: Tensor, weight: Tensor, ends_E: Tensor, back: bool) -> Tensor:
    """x W^T, or x W with `back`: weight is (E, N, K), or (E, K, N) then."""
    require(x_MK.device)
    (m, k), experts = x_MK.shape, len(weight)
    n = weight.shape[2 if back else 1]
    out_MN = torch.empty((m, n), device=x_MK.device, dtype=x_MK.dtype)
    if not m:
        return out_MN
    tile = tile_for(capability_of(x_MK.device), x_MK.dtype)
    tiles_m = -(-m // tile.m) + experts
    _rows[(tiles_m * -(-n // tile.n),)](
        x_MK.contiguous(),
        weight.contiguous(),
        ends_E,
        out_MN,
        tiles_m,
        n,
        k,
        experts,
        BACK=back,
        EVEN=n % tile.n == k % tile.k == 0,
        PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32",
        EXPERTS=max(2, 1 << (experts - 1).bit_length()),
        **tile.options(),
    )
    return out_MN


@_grouped.register_fake
def _(x_MK: Tensor, weight: Tensor, ends_E: Tensor, back: bool) -> Tensor:
    return x_MK.new_empty((x_MK.shape[0], weight.shape[2 if back else 1]))


@torch.library.custom_op("sabrage::grouped_outer_product", mutates_args=())
def _outer(a_MN: Tensor, b_MK: Tensor, ends_E: Tensor) -> Tensor:
    """a^T b of the rows of each group, (E, N, K)."""
    require(a_MN.device)
    experts, n, k = len(ends_E), a_MN.shape[1], b_MK.shape[1]
    out_ENK = torch.empty((experts, n, k), device=a_MN.device, dtype=a_MN.dtype)
    tile = tile_for(capability_of(a_MN.device), a_MN.dtype)
    _sums[(-(-n // tile.m) * -(-k // tile.n), experts)](
        a_MN.contiguous(),
        b_MK.contiguous(),
        ends_E,
        out_ENK,
        n,
        k,
        EVEN=n % tile.m == k % tile.n == 0,
        PRECISION="ieee" if a_MN.dtype == torch.float32 else "tf32",
        BLOCK_N=tile.m,
        BLOCK_K=tile.n,
        BLOCK_M=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_ENK


@_outer.register_fake
def _(a_MN: Tensor, b_MK: Tensor, ends_E: Tensor) -> Tensor:
    return a_MN.new_empty((ends_E.shape[0], a_MN.shape[1], b_MK.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_MK, weight, ends_E, ctx.back = inputs
    ctx.save_for_backward(x_MK, weight, ends_E)


def _pull(ctx: Any, grad_MN: Tensor) -> tuple[Any, ...]:
    x_MK, weight, ends_E = ctx.saved_tensors
    grad_x = _grouped(grad_MN, weight, ends_E, not ctx.back)
    grad_weight = _outer(x_MK, grad_MN, ends_E) if ctx.back else _outer(grad_MN, x_MK, ends_E)
    return grad_x, grad_weight, None, None


_grouped.register_autograd(_pull, setup_context=_save)


@jit
def _rows(
    x,
    weight,
    ends,
    out,
    tiles_m,
    N,
    K,
    experts,
    BACK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile of rows of one group and columns; weight is (E, N, K), or (E, K, N) going back."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    tile_m, tile_n = place_of(program, tiles_m, tiles_n, GROUP)
    start_n = tile_n * BLOCK_N

    numbers = tl.arange(0, EXPERTS)
    is_expert = numbers < experts
    end = tl.load(ends + numbers, mask=is_expert, other=0)
    begin = tl.load(ends + numbers - 1, mask=is_expert & (numbers > 0), other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    tiles_up_to = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_up_to <= tile_m).to(tl.int32), 0)
    if expert >= experts:
        return
    mine = numbers == expert
    tile_of_group = tile_m - tl.sum(tl.where(mine, tiles_up_to - tiles, 0), 0)
    start_m = tl.sum(tl.where(mine, begin, 0), 0) + tile_of_group * BLOCK_M
    num_rows = tl.sum(tl.where(mine, end, 0), 0) - start_m

    rows, columns, depth = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    column_in = columns < N
    # Rows beyond the group repeat its last one: they are computed and not written, and need no mask.
    read = tl.minimum(rows, num_rows - 1)
    x_tile = x + start_m.to(tl.int64) * K + read[:, None] * K + depth[None, :]
    matrix = weight + expert.to(tl.int64) * N * K
    if BACK:
        weight_tile = matrix + depth[:, None] * N + columns[None, :]
        weight_step = BLOCK_K * N
    else:
        weight_tile = matrix + columns[None, :] * K + depth[:, None]
        weight_step = BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_k in range(0, K, BLOCK_K):
        if EVEN:
            left, right = tl.load(x_tile), tl.load(weight_tile)
        else:
            depth_in = start_k + depth < K
            left = tl.load(x_tile, mask=depth_in[None, :], other=0.0)
            right = tl.load(weight_tile, mask=depth_in[:, None] & column_in[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_tile += BLOCK_K
        weight_tile += weight_step
    corner = start_m.to(tl.int64) * N
    places = rows[:, None] * N + columns[None, :]
    inside = (rows < num_rows)[:, None] & column_in[None, :]
    tl.store(out + corner + places, total.to(out.dtype.element_ty), mask=inside)


@jit
def _sums(
    a,
    b,
    ends,
    out,
    N,
    K,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program a tile of one group's a^T b; a group without rows has a sum of zero."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    start_n = tl.program_id(0) // tiles_k * BLOCK_N
    start_k = tl.program_id(0) % tiles_k * BLOCK_K
    expert = tl.program_id(1)
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    rows = tl.arange(0, BLOCK_M)
    n, k = start_n + tl.arange(0, BLOCK_N), start_k + tl.arange(0, BLOCK_K)
    a_tile = a + begin.to(tl.int64) * N + rows[:, None] * N + n[None, :]
    b_tile = b + begin.to(tl.int64) * K + rows[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start_m in range(begin, end, BLOCK_M):
        row_in = start_m + rows < end
        if EVEN:
            left = tl.load(a_tile, mask=row_in[:, None], other=0.0)
            right = tl.load(b_tile, mask=row_in[:, None], other=0.0)
        else:
            left = tl.load(a_tile, mask=row_in[:, None] & (n < N)[None, :], other=0.0)
            right = tl.load(b_tile, mask=row_in[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        a_tile += BLOCK_M * N
        b_tile += BLOCK_M * K
    corner = expert.to(tl.int64) * N * K
    inside = (n < N)[:, None] & (k < K)[None, :]
    places = n[:, None] * K + k[None, :]
    tl.store(out + corner + places, total.to(out.dtype.element_ty), mask=inside)
