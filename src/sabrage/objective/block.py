"""A pre-norm block of an objective's own.

x <- x + mixer(norm(x)); x <- x + feedforward(norm(x)); what comes out is norm(x).
"""

from torch import Tensor, nn

from sabrage.context import Context
from sabrage.norms import rms_norm
from sabrage.parts import FeedForward, Mixer


class ExtraBlock(nn.Module):
    """forward(x_BTD, context) -> normalised h_BTD, ready for the head; the mixer may be left out."""

    def __init__(self, mixer: Mixer | None, feedforward: FeedForward, *, dim: int, layer: int) -> None:
        super().__init__()
        self.mixer = mixer.build(dim=dim, layer=layer) if mixer else None
        self.feedforward = feedforward.build(dim=dim, layer=layer)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        if self.mixer is not None:
            x_BTD = x_BTD + self.mixer(rms_norm(x_BTD), context)
        return rms_norm(x_BTD + self.feedforward(rms_norm(x_BTD), context))
