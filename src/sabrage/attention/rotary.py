"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves convention.

With frequencies f_i = base^(-2i/K) and angle a = position * f_i, the halves x1, x2 of a head become
y1 = x1 cos a + x2 sin a and y2 = -x1 sin a + x2 cos a, computed in fp32.

YaRN (Peng et al. 2023, arXiv 2309.00071) stretches the positions of a model trained on L tokens by s:
with r_i = L f_i / 2 pi turns within L, the frequency becomes f_i (g + (1 - g) / s), where g rises from 0 at 1
turn to 1 at 32, and cosines and sines are multiplied by 0.1 ln s + 1, so that scores grow by its square.

A share below 1 turns the fastest frequencies alone: f_i = 0 from i = share K / 2 on, and those numbers carry
no position. GPT-NeoX (Black et al. 2022, arXiv 2204.06745) spreads frequencies b^(-2i / (share K)) over what
turns, which is base b^(1 / share) here; modded-nanogpt turns half, from base 1024^2.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from sabrage.config import Part

# Turns within the trained length below which a frequency is stretched wholly, and above which not at all.
SLOW_TURNS, FAST_TURNS = 1, 32


@dataclass(frozen=True, kw_only=True)
class Rotary(Part):
    """Rotates queries and keys; `max_length` is the number of positions that the tables hold.

    `factor` is YaRN's, for a model trained on `original_length` tokens; 1 changes nothing. `share` of a
    head's pairs turn, the fastest, rounded and at least one; 1 is all.
    """

    base: float = 10000.0
    max_length: int = 16384
    factor: float = 1.0
    original_length: int = 1024
    share: float = 1.0

    def problems(self) -> list[str]:
        found = []
        if self.base <= 0 or self.max_length < 1:
            found.append(
                f"rotary base={self.base}, max_length={self.max_length}; allowed: above 0, 1 or more"
            )
        if self.factor < 1 or self.original_length < 1:
            found.append(
                f"rotary factor={self.factor}, original_length={self.original_length}; allowed: 1 or more, "
                "the length evaluated over the length trained on, and the latter in tokens"
            )
        if not 0 < self.share <= 1:
            found.append(
                f"rotary share={self.share}; allowed: above 0 and at most 1, all; rotary=null turns nothing"
            )
        return found

    def turning(self, width: int) -> int:
        """Pairs of a head of this width that turn; its numbers i and i + width / 2 are pair i."""
        return max(round(self.share * (width // 2)), 1)

    def build(self, width: int) -> "RotaryTables":
        """Tables for heads of this width (even)."""
        return RotaryTables(self, width)


class RotaryTables(nn.Module):
    """Cosines and sines by position, (max_length, K / 2), fp32, not saved with the weights."""

    cosine_TK: Tensor
    sine_TK: Tensor

    def __init__(self, part: Rotary, width: int) -> None:
        super().__init__()
        cosine_TK, sine_TK = tables(part, width)
        self.register_buffer("cosine_TK", torch.from_numpy(cosine_TK.copy()), persistent=False)
        self.register_buffer("sine_TK", torch.from_numpy(sine_TK.copy()), persistent=False)

    def forward(self, x_BTHK: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """The rotated heads, in the input's dtype; positions default to 0 .. T-1."""
        if positions_BT is None:
            cosine, sine = (table_TK[:, None, :] for table_TK in self.upto(x_BTHK.shape[1]))
        else:
            cosine = self.cosine_TK[positions_BT][:, :, None, :]
            sine = self.sine_TK[positions_BT][:, :, None, :]
        first, second = x_BTHK.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cosine + second * sine, second * cosine - first * sine), dim=-1)
        return rotated.to(x_BTHK.dtype)

    def upto(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to length - 1. Raises ValueError beyond the tables."""
        limit = self.cosine_TK.shape[0]
        if length > limit:
            raise ValueError(
                f"a sequence of {length} tokens, rotary tables of {limit}; raise rotary.max_length"
            )
        return self.cosine_TK[:length], self.sine_TK[:length]


@cache
def tables(part: Rotary, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, (length, width / 2) fp32, computed once for all layers."""
    frequency_K = part.base ** (-np.arange(0, width, 2) / width)
    magnitude = 1.0
    if part.factor != 1:
        frequency_K = stretched(frequency_K, part)
        magnitude = 0.1 * np.log(part.factor) + 1
    frequency_K[part.turning(width) :] = 0
    angle_TK = np.arange(part.max_length)[:, None] * frequency_K
    cosine_TK, sine_TK = np.cos(angle_TK), np.sin(angle_TK)
    return (magnitude * cosine_TK).astype(np.float32), (magnitude * sine_TK).astype(np.float32)


def stretched(frequency_K: np.ndarray, part: Rotary) -> np.ndarray:
    """YaRN's frequencies: those that turn often within the trained length stay, slow ones are divided."""
    turns_K = part.original_length * frequency_K / (2 * np.pi)
    kept_K = np.clip((turns_K - SLOW_TURNS) / (FAST_TURNS - SLOW_TURNS), 0, 1)
    return frequency_K * (kept_K + (1 - kept_K) / part.factor)
