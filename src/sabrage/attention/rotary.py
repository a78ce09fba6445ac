"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves convention.

With frequencies f_i = base^(-2i/K) and angle a = position * f_i, the halves x1, x2 of a head become
y1 = x1 cos a + x2 sin a and y2 = -x1 sin a + x2 cos a, computed in fp32.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from sabrage.config import Part


@dataclass(frozen=True, kw_only=True)
class Rotary(Part):
    """Rotates queries and keys; `max_length` is the number of positions that the tables hold."""

    base: float = 10000.0
    max_length: int = 16384

    def problems(self) -> list[str]:
        if self.base <= 0 or self.max_length < 1:
            return [f"rotary base={self.base}, max_length={self.max_length}; allowed: above 0, 1 or more"]
        return []

    def build(self, width: int) -> "RotaryTables":
        """Tables for heads of this width (even)."""
        return RotaryTables(self, width)


class RotaryTables(nn.Module):
    """Cosines and sines by position, (max_length, K / 2), fp32, not saved with the weights."""

    cosine_TK: Tensor
    sine_TK: Tensor

    def __init__(self, part: Rotary, width: int) -> None:
        super().__init__()
        cosine_TK, sine_TK = tables(part.base, width, part.max_length)
        self.register_buffer("cosine_TK", torch.from_numpy(cosine_TK), persistent=False)
        self.register_buffer("sine_TK", torch.from_numpy(sine_TK), persistent=False)

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """The rotated heads, in the input's dtype; positions default to 0 .. T-1."""
        if positions_BT is None:
            length = x_BTHK.shape[1]
            if length > self.cosine_TK.shape[0]:
                limit = self.cosine_TK.shape[0]
                raise ValueError(
                    f"a sequence of {length} tokens, rotary tables of {limit}; raise rotary.max_length"
                )
            cosine, sine = self.cosine_TK[:length, None, :], self.sine_TK[:length, None, :]
        else:
            cosine = self.cosine_TK[positions_BT][:, :, None, :]
            sine = self.sine_TK[positions_BT][:, :, None, :]
        first, second = x_BTHK.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cosine + second * sine, second * cosine - first * sine), dim=-1)
        return rotated.to(x_BTHK.dtype)


@cache
def tables(base: float, width: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, (length, width / 2) fp32, computed once for all layers; not to be written to."""
    frequency_K = base ** (-np.arange(0, width, 2) / width)
    angle_TK = np.arange(length)[:, None] * frequency_K
    return np.cos(angle_TK).astype(np.float32), np.sin(angle_TK).astype(np.float32)
