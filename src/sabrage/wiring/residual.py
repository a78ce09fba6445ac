"""The plain pre-norm residual stream.

x <- x + s * drop(mixer(norm(x))); x <- x + drop(feedforward(norm(x))); after the last layer, norm(x) goes to
the head. Dropout (Srivastava et al. 2014) is off by default, and in evaluation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.norms import rms_norm
from sabrage.parts import Wiring


@dataclass(frozen=True, kw_only=True)
class Residual(Wiring):
    """Pre-norm residuals; `mixer_scale` "depth" multiplies the mixer's output by 1 / sqrt(2 L).

    `dropout` is the share of each branch's output that is dropped.
    """

    mixer_scale: Literal["one", "depth"] = "one"
    eps: float = 1e-6
    dropout: float = 0.0

    def problems(self) -> list[str]:
        return [] if 0 <= self.dropout < 1 else [f"dropout={self.dropout} must lie in [0, 1)"]

    def scale(self, num_layers: int) -> float:
        """What the mixers' outputs are multiplied by."""
        return (2 * num_layers) ** -0.5 if self.mixer_scale == "depth" else 1.0

    def build(self, *, dim: int, num_layers: int, vocab_size: int) -> nn.Module:
        return ResidualStream(self, num_layers=num_layers)


class ResidualStream(nn.Module):
    """The module of `Residual`: forward(x_BTD, blocks, context) -> normalised h_BTD."""

    def __init__(self, part: Residual, *, num_layers: int) -> None:
        super().__init__()
        self.eps, self.dropout = part.eps, part.dropout
        self.mixer_scale = part.scale(num_layers)

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        for block in blocks:
            x_BTD = self.layer(x_BTD, block, context)
        return rms_norm(x_BTD, eps=self.eps)

    def layer(self, x_BTD: Tensor, block: Any, context: Context) -> Tensor:
        """The stream after one block."""
        mixed_BTD = self.drop(block.mixer(rms_norm(x_BTD, eps=self.eps), context))
        x_BTD = x_BTD + (mixed_BTD if self.mixer_scale == 1.0 else self.mixer_scale * mixed_BTD)
        return x_BTD + self.drop(block.feedforward(rms_norm(x_BTD, eps=self.eps), context))

    def drop(self, y_BTD: Tensor) -> Tensor:
        """The branch after dropout."""
        return F.dropout(y_BTD, self.dropout, self.training) if self.dropout else y_BTD
