"""Two-layer perceptron: y = activation(x W_up) W_down, without biases.

Activations: exact (erf) GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), or the squared rectifier
relu(x)^2 (So et al. 2021, arXiv 2109.08668).
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.linear import Linear
from sabrage.parts import FeedForward


@dataclass(frozen=True, kw_only=True)
class Mlp(FeedForward):
    """A perceptron `expansion` times as wide inside; `zero_init` starts W_down at zero."""

    expansion: int = 4
    activation: Literal["gelu", "relu_squared"] = "gelu"
    zero_init: bool = False

    def problems(self) -> list[str]:
        return [] if self.expansion >= 1 else [f"expansion={self.expansion} must be at least 1; GPT-2 has 4"]

    def build(self, *, dim: int, layer: int) -> nn.Module:
        return Perceptron(self, dim=dim)

    def flops(self, dim: int) -> int:
        return 2 * 2 * dim * self.expansion * dim


class Perceptron(nn.Module):
    """The module of `Mlp`: forward(x_BTD, context) -> y_BTD."""

    def __init__(self, part: Mlp, *, dim: int) -> None:
        super().__init__()
        self.activation = part.activation
        self.up = Linear(dim, part.expansion * dim)
        self.down = Linear(part.expansion * dim, dim)
        if part.zero_init:
            nn.init.zeros_(self.down.weight)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        hidden_BTF = self.up(x_BTD)
        if self.activation == "gelu":
            return self.down(F.gelu(hidden_BTF))
        return self.down(F.relu(hidden_BTF).square())
