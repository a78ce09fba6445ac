"""Learned residual and embedding-skip scales: layer l reads a_l x + b_l s_0 (modded-nanogpt, nanochat)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.wiring.skips import Skip


@dataclass(frozen=True, kw_only=True)
class SkipScales(Skip):
    """Two scalars a layer, which start at `residual` and `embedding`: at 1 and 0 they change nothing.

    The head reads x as it is, and so do layers between those that are multiples of `period`: to read s_0
    again, and to add up its gradient, takes time in every layer.
    """

    residual: float = 1.0
    embedding: float = 0.0
    period: int = 1

    def problems(self) -> list[str]:
        return [] if self.period >= 1 else [f"period={self.period} must be at least 1"]

    def build(self, *, dim: int, num_layers: int) -> nn.Module:
        return Scales(self, num_layers=num_layers)


class Scales(nn.Module):
    """The module of `SkipScales`: forward(x_BTD, states, context) -> x_BTD."""

    def __init__(self, part: SkipScales, *, num_layers: int) -> None:
        super().__init__()
        self.num_layers, self.period = num_layers, part.period
        scaled = -(-num_layers // part.period)
        self.residual_L = nn.Parameter(torch.full((scaled,), part.residual))
        self.embedding_L = nn.Parameter(torch.full((scaled,), part.embedding))

    def forward(self, x_BTD: Tensor, states: list[Tensor], context: Context) -> Tensor:
        layer = len(states) - 1
        if layer == self.num_layers or layer % self.period:
            return x_BTD
        index = layer // self.period
        return self.residual_L[index] * x_BTD + self.embedding_L[index] * states[0]
