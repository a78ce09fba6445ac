"""Residuals whose layers read more than the stream: a frame for what crosses layers.

With the states s_0 (the embedding) to s_L (after the last layer), layer l reads skip(s_l; s_0, ..., s_l)
where the plain model reads s_l, and so does the head with l = L. Several skips follow one another.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sabrage.config import Part
from sabrage.context import Context
from sabrage.norms import rms_norm
from sabrage.parts import Wiring
from sabrage.wiring.residual import Residual


@dataclass(frozen=True, kw_only=True)
class Skip(Part, ABC):
    """What a reader gets beside the newest state.

    The module's `forward(x_BTD, states, context) -> x_BTD`: `states` are those so far, as many as the
    reader's index and one more, x the newest of them or what the skip before has made of it.
    """

    @abstractmethod
    def build(self, *, dim: int, num_layers: int) -> nn.Module: ...

    def takes_pairs(self) -> bool:
        """Whether it reads what the context has of pairs of tokens."""
        return False


@dataclass(frozen=True, kw_only=True)
class Skipping(Wiring):
    """`residual` with `skips` between its layers; without any it is `residual`, bit for bit."""

    residual: Residual = field(default_factory=Residual)
    skips: tuple[Skip, ...] = ()

    def takes_pairs(self) -> bool:
        return any(skip.takes_pairs() for skip in self.skips)

    def build(self, *, dim: int, num_layers: int, vocab_size: int) -> nn.Module:
        return SkippingStream(self, dim=dim, num_layers=num_layers, vocab_size=vocab_size)


class SkippingStream(nn.Module):
    """The module of `Skipping`: forward(x_BTD, blocks, context) -> normalised h_BTD."""

    def __init__(self, part: Skipping, *, dim: int, num_layers: int, vocab_size: int) -> None:
        super().__init__()
        self.residual: Any = part.residual.build(dim=dim, num_layers=num_layers, vocab_size=vocab_size)
        self.skips = nn.ModuleList(skip.build(dim=dim, num_layers=num_layers) for skip in part.skips)

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        states = [x_BTD]
        for block in blocks:
            states.append(self.residual.layer(self.read(states, context), block, context))
        return rms_norm(self.read(states, context), eps=self.residual.eps)

    def read(self, states: list[Tensor], context: Context) -> Tensor:
        """What the next reader gets."""
        x_BTD = states[-1]
        for skip in self.skips:
            x_BTD = skip(x_BTD, states, context)
        return x_BTD
