"""What one program of a matrix product computes, and in which order programs go through the tiles."""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from dataclasses import dataclass

import torch

from sabrage.kernels.language import jit, num_processors, tl

# Tiles this many rows apart run together and share columns in the L2 cache.
GROUP = 8


@dataclass(frozen=True)
class Tile:
    """Rows M by columns N, K at a time, with so many loads in flight."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """What a launch is told of it, and the order of tiles."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": GROUP}
        return sizes | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def programs(self, rows: int, columns: int, device: torch.device, *, each: int = 1) -> int:
        """Programs that go through all tiles of a product: `each` a multiprocessor, no more than tiles."""
        return min(-(-rows // self.m) * -(-columns // self.n), each * num_processors(device))


@jit
def place_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column), both in tiles, of the tile with this number."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    return first_m + tile % (GROUP * tiles_n) % height, tile % (GROUP * tiles_n) // height


@jit
def product_of(a, b, row, column, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile of a b^T whose corner is (row, column), brought by the copy engine, fp32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for depth in range(0, K, BLOCK_K):
        total = tl.dot(a.load([row, depth]), b.load([column, depth]).T, total)
    return total


@jit
def in_halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile, whose way out needs half of the shared memory."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
