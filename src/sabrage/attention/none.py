"""No attention: what a layer is whose feed-forward works alone.

    y_t = 0

A layer's mixer takes more time than its feed-forward where widths are small, and not every layer has to look
back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.parts import Mixer


@dataclass(frozen=True, kw_only=True)
class NoMixer(Mixer):
    """Adds nothing, caches nothing and costs nothing."""

    def build(self, *, dim: int, layer: int) -> nn.Module:
        return Nothing()

    def streams(self, dim: int) -> dict[str, int]:
        return {}

    def flops(self, dim: int, sequence_length: int) -> int:
        return 0


class Nothing(nn.Module):
    """The module of `NoMixer`."""

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(x_BTD)
