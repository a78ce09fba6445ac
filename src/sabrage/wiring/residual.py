"""The plain pre-norm residual stream.

x <- x + s * mixer(norm(x)); x <- x + feedforward(norm(x)); after the last layer, norm(x) goes to the head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from sabrage.norms import rms_norm
from sabrage.parts import Context, Wiring


@dataclass(frozen=True, kw_only=True)
class Residual(Wiring):
    """Pre-norm residuals; `mixer_scale` "depth" multiplies the mixer's output by 1 / sqrt(2 L)."""

    mixer_scale: Literal["one", "depth"] = "one"
    eps: float = 1e-6

    def build(self, *, dim: int, num_layers: int, vocab_size: int) -> nn.Module:
        scale = (2 * num_layers) ** -0.5 if self.mixer_scale == "depth" else 1.0
        return ResidualStream(mixer_scale=scale, eps=self.eps)


class ResidualStream(nn.Module):
    """The module of `Residual`: forward(x_BTD, blocks, context) -> normalised h_BTD."""

    def __init__(self, *, mixer_scale: float, eps: float) -> None:
        super().__init__()
        self.mixer_scale, self.eps = mixer_scale, eps

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        for block in blocks:
            mixed_BTD = block.mixer(rms_norm(x_BTD, eps=self.eps), context)
            x_BTD = x_BTD + (mixed_BTD if self.mixer_scale == 1.0 else self.mixer_scale * mixed_BTD)
            x_BTD = x_BTD + block.feedforward(rms_norm(x_BTD, eps=self.eps))
        return rms_norm(x_BTD, eps=self.eps)
