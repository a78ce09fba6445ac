"""What one program of a matrix product computes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows M by columns N, K at a time, with so many loads in flight."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
