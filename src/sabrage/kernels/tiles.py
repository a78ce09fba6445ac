"""What one program of a matrix product computes, and in which order programs go through the tiles."""

# Kernels take pointers, which Python has no types for.
# mypy: allow-untyped-defs

from dataclasses import dataclass

from sabrage.kernels.language import jit, tl

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


@jit
def place_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column), both in tiles, of the tile with this number."""
    first_m = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    return first_m + tile % (GROUP * tiles_n) % height, tile % (GROUP * tiles_n) // height
