"""Ways to make a few keys and values out of a block of them, for attention that sees far blocks pooled.

A pool's module maps keys and values before norm and rotation, (B, N, S, H, K) for N blocks of S tokens, to
(B, N, E, H, K) entries, and says at which offset of its block each entry stands: offset_NE, (N, E) or (1, E).

- `Mean` and `Max`: over the block, number by number.
- `Reservoir`: E of the block's tokens, each set of E equally likely, kept as a stream would be sampled: every
  token draws a number and the E largest stay (Efraimidis and Spirakis 2006; Vitter 1985 for the problem).
  The draw is a hash of seed, layer and position: the same in training and in decoding, for every sequence.
- `Latents`: E learned queries per head attend to the block's tokens alone (a small Perceiver, Jaegle et al.
  2021, arXiv 2103.03206); keys and values are averaged with the same weights.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.config import Part
from sabrage.norms import rms_norm

LOW_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Pool(Part, ABC):
    """Pools each block into `num_entries` keys and values."""

    @abstractmethod
    def build(self, *, heads: int, width: int, layer: int) -> nn.Module:
        """The module: forward(k_BNSHK, v_BNSHK) -> (k_BNEHK, v_BNEHK, offset_NE)."""

    @property
    def num_entries(self) -> int:
        return 1

    def flops(self, dim: int) -> int:
        """Matrix-product FLOPs of pooling, for each of the block's tokens."""
        return 0


def middle(k_BNSHK: Tensor) -> Tensor:
    """The offset of an entry that stands for a whole block, (1, 1)."""
    return torch.full((1, 1), k_BNSHK.shape[2] // 2, device=k_BNSHK.device)


@dataclass(frozen=True, kw_only=True)
class Mean(Pool):
    """The mean of the block."""

    def build(self, *, heads: int, width: int, layer: int) -> nn.Module:
        return MeanPool()


class MeanPool(nn.Module):
    """The module of `Mean`."""

    def forward(self, k_BNSHK: Tensor, v_BNSHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k_BNSHK.mean(2, keepdim=True), v_BNSHK.mean(2, keepdim=True), middle(k_BNSHK)


@dataclass(frozen=True, kw_only=True)
class Max(Pool):
    """The largest value of every number in the block."""

    def build(self, *, heads: int, width: int, layer: int) -> nn.Module:
        return MaxPool()


class MaxPool(nn.Module):
    """The module of `Max`."""

    def forward(self, k_BNSHK: Tensor, v_BNSHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k_BNSHK.amax(2, keepdim=True), v_BNSHK.amax(2, keepdim=True), middle(k_BNSHK)


@dataclass(frozen=True, kw_only=True)
class Reservoir(Pool):
    """`entries` tokens of the block, drawn without replacement, evenly; other layers draw others."""

    entries: int = 1
    seed: int = 0

    def problems(self) -> list[str]:
        found = [] if self.entries >= 1 else [f"pool.entries={self.entries} must be at least 1"]
        return found if 0 <= self.seed < 2**31 else [*found, f"pool.seed={self.seed} must lie in [0, 2^31)"]

    def build(self, *, heads: int, width: int, layer: int) -> nn.Module:
        return ReservoirPool(self, layer=layer)

    @property
    def num_entries(self) -> int:
        return self.entries


class ReservoirPool(nn.Module):
    """The module of `Reservoir`."""

    def __init__(self, part: Reservoir, *, layer: int) -> None:
        super().__init__()
        self.entries, self.seed, self.layer = part.entries, part.seed, layer

    def forward(self, k_BNSHK: Tensor, v_BNSHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, num_blocks, size = k_BNSHK.shape[:3]
        offset_NE = self.draw(num_blocks, size, k_BNSHK.device)
        index = offset_NE[None, :, :, None, None].expand(batch, -1, -1, *k_BNSHK.shape[3:])
        return k_BNSHK.gather(2, index), v_BNSHK.gather(2, index), offset_NE

    def draw(self, num_blocks: int, size: int, device: torch.device) -> Tensor:
        """The offsets kept of each block, (N, E); those of a block do not depend on how many there are."""
        position_NS = torch.arange(num_blocks * size, device=device).view(num_blocks, size)
        number_NS = scatter(position_NS ^ scatter(self.layer ^ scatter(self.seed)))
        # The offset settles ties, so that every device keeps the same tokens.
        number_NS = number_NS * size + position_NS % size
        return number_NS.topk(self.entries, dim=1).indices


def scatter(number: int | Tensor) -> int | Tensor:
    """A number below 2^32 mapped to another, one to one, near and far alike; wraps nowhere beyond 63 bits.

    The constants are from the search for mixing functions by C. Wellons (hash-prospector, public domain).
    """
    number = ((number ^ (number >> 16)) * 0x21F0AAAD) & LOW_32_BITS
    number = ((number ^ (number >> 15)) * 0x735A2D97) & LOW_32_BITS
    return number ^ (number >> 15)


@dataclass(frozen=True, kw_only=True)
class Latents(Pool):
    """`entries` learned latent tokens per head and block, drawn normal at the start."""

    entries: int = 4

    def problems(self) -> list[str]:
        return [] if self.entries >= 1 else [f"pool.entries={self.entries} must be at least 1"]

    def build(self, *, heads: int, width: int, layer: int) -> nn.Module:
        return LatentPool(self, heads=heads, width=width)

    @property
    def num_entries(self) -> int:
        return self.entries

    def flops(self, dim: int) -> int:
        return 2 * 3 * self.entries * dim


class LatentPool(nn.Module):
    """The module of `Latents`; its queries are vectors and not a matrix, for AdamW and not for Muon."""

    def __init__(self, part: Latents, *, heads: int, width: int) -> None:
        super().__init__()
        self.latents_EHK = nn.Parameter(torch.randn(part.entries, heads, width))

    def forward(self, k_BNSHK: Tensor, v_BNSHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents_EHK = self.latents_EHK.to(k_BNSHK.dtype) * k_BNSHK.shape[-1] ** -0.5
        scores = torch.einsum("ehk,bnshk->bnhes", latents_EHK, rms_norm(k_BNSHK))
        weights = scores.float().softmax(-1).to(k_BNSHK.dtype)
        k, v = (torch.einsum("bnhes,bnshk->bnehk", weights, x) for x in (k_BNSHK, v_BNSHK))
        return k, v, middle(k_BNSHK).expand(1, self.latents_EHK.shape[0])
