"""Symmetric products of a batch of matrices, computing the tiles on and below the diagonal only.

    out = alpha A A^T + beta C        with C symmetric

Orthogonalisation by matrix products needs two of its three products in this form in every round, the Gram
matrix X X^T and the polynomial b A + c A A of it (Jordan 2024, "Muon"); a tile above the diagonal is the
transpose of one below, so nearly half of each product is only written.
"""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

import torch
from torch import Tensor

from sabrage.kernels.language import KernelError, capability_of, jit, require, tl
from sabrage.kernels.tiles import Tile

# Square tiles, by the tensor core's generation; fp32 products run outside the tensor cores.
HOPPER = Tile(128, 128, 64, num_warps=8, num_stages=3)
AMPERE = Tile(128, 128, 32, num_warps=8, num_stages=4)
FP32 = Tile(64, 64, 16, num_warps=4, num_stages=2)


def tile_for(capability: tuple[int, int], dtype: torch.dtype) -> Tile:
    """The tile of a product: a table, because searching would count as training time."""
    if dtype == torch.float32:
        return FP32
    return HOPPER if capability == (9, 0) else AMPERE


def symmetric_product_reference(
    a_SMK: Tensor, addend_SMM: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """The specification."""
    if addend_SMM is None:
        product_SMM = torch.bmm(a_SMK, a_SMK.mT)
        return product_SMM if alpha == 1.0 else alpha * product_SMM
    return torch.baddbmm(addend_SMM, a_SMK, a_SMK.mT, alpha=alpha, beta=beta)


def symmetric_product(
    a_SMK: Tensor, addend_SMM: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """alpha A A^T + beta C, (S, M, M) for S matrices of any strides; C must be symmetric, and is not checked.

    No gradient: it serves optimizers. Raises KernelError.
    """
    if a_SMK.dim() != 3:
        raise KernelError(
            f"got {tuple(a_SMK.shape)}, allowed: (matrices, rows, columns); use a[None] for one"
        )
    if addend_SMM is not None and addend_SMM.shape != (a_SMK.shape[0], a_SMK.shape[1], a_SMK.shape[1]):
        raise KernelError(f"the addend is {tuple(addend_SMM.shape)}, allowed: the shape of A A^T")
    return _symmetric(a_SMK, addend_SMM, alpha, beta)


@torch.library.custom_op("sabrage::symmetric_product", mutates_args=())
def _symmetric(a_SMK: Tensor, addend_SMM: Tensor | None, alpha: float, beta: float) -> Tensor:
    require(a_SMK.device)
    count, m, k = a_SMK.shape
    out_SMM = torch.empty((count, m, m), device=a_SMK.device, dtype=a_SMK.dtype)
    if not count * m:
        return out_SMM
    tile = tile_for(capability_of(a_SMK.device), a_SMK.dtype)
    tiles = -(-m // tile.m)
    _tiles[(tiles * tiles, count)](
        a_SMK,
        out_SMM if addend_SMM is None else addend_SMM.contiguous(),
        out_SMM,
        m,
        k,
        *a_SMK.stride(),
        alpha,
        beta,
        ADDEND=addend_SMM is not None,
        EVEN=m % tile.m == k % tile.k == 0,
        PRECISION="ieee" if a_SMK.dtype == torch.float32 else "tf32",
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_SMM


@_symmetric.register_fake
def _(a_SMK: Tensor, addend_SMM: Tensor | None, alpha: float, beta: float) -> Tensor:
    count, m, _ = a_SMK.shape
    return a_SMK.new_empty((count, m, m))


@jit
def _tiles(
    a,
    addend,
    out,
    M,
    K,
    stride_s,
    stride_m,
    stride_k,
    alpha,
    beta,
    ADDEND: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile and matrix; programs above the diagonal have nothing to do."""
    tiles = tl.cdiv(M, BLOCK_M)
    tile_row, tile_column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tile_column > tile_row:
        return
    matrix = tl.program_id(1).to(tl.int64)
    lower = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    upper = tile_column * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    base = a + matrix * stride_s
    left_tile = base + lower[:, None] * stride_m + depth[None, :] * stride_k
    right_tile = base + upper[None, :] * stride_m + depth[:, None] * stride_k
    total = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
    for start_k in range(0, K, BLOCK_K):
        if EVEN:
            left, right = tl.load(left_tile), tl.load(right_tile)
        else:
            depth_in = start_k + depth < K
            left = tl.load(left_tile, mask=(lower < M)[:, None] & depth_in[None, :], other=0.0)
            right = tl.load(right_tile, mask=depth_in[:, None] & (upper < M)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_tile += BLOCK_K * stride_k
        right_tile += BLOCK_K * stride_k
    corner = matrix * M * M
    inside = (lower < M)[:, None] & (upper < M)[None, :]
    places = lower[:, None] * M + upper[None, :]
    total *= alpha
    if ADDEND:
        total += beta * tl.load(addend + corner + places, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    tl.store(out + corner + places, result, mask=inside)
    if tile_column < tile_row:
        mirrored = (upper < M)[:, None] & (lower < M)[None, :]
        tl.store(out + corner + upper[:, None] * M + lower[None, :], tl.trans(result), mask=mirrored)
