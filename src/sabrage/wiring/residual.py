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

    `dropout` is the share of each branch's output that is dropped. With `sizes` the log shows the root mean
    square of the stream before each layer and of what its two branches add: what adds less than 1/256 of the
    stream is rounded away where the stream is bf16.
    """

    mixer_scale: Literal["one", "depth"] = "one"
    eps: float = 1e-6
    dropout: float = 0.0
    sizes: bool = False

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
        self.eps, self.dropout, self.sizes = part.eps, part.dropout, part.sizes
        self.mixer_scale = part.scale(num_layers)

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        for block in blocks:
            x_BTD = self.layer(x_BTD, block, context)
        return rms_norm(x_BTD, eps=self.eps)

    def layer(self, x_BTD: Tensor, block: Any, context: Context) -> Tensor:
        """The stream after one block."""
        before_BTD = x_BTD
        mixed_BTD = self.drop(block.mixer(rms_norm(x_BTD, eps=self.eps), context))
        mixed_BTD = mixed_BTD if self.mixer_scale == 1.0 else self.mixer_scale * mixed_BTD
        x_BTD = x_BTD + mixed_BTD
        fed_BTD = self.drop(block.feedforward(rms_norm(x_BTD, eps=self.eps), context))
        if self.sizes:
            note_sizes(context, stream=before_BTD, mixer=mixed_BTD, feedforward=fed_BTD)
        return x_BTD + fed_BTD

    def drop(self, y_BTD: Tensor) -> Tensor:
        """The branch after dropout."""
        return F.dropout(y_BTD, self.dropout, self.training) if self.dropout else y_BTD


def note_sizes(context: Context, **tensors: Tensor) -> None:
    """Notes the root mean squares of one layer, as "stream 00", "mixer 00" and so on from layer to layer."""
    place = sum(name.startswith("stream ") for name in context.readings)
    for name, tensor in tensors.items():
        context.note(f"{name} {place:02d}", tensor.detach().float().square().mean().sqrt())
