"""Dense skips: a reader gets a weighted sum of all states so far, one of which is the newest.

    static (DenseFormer, Pagliardini et al. 2024, arXiv 2402.02622)    sum_j a_lj s_j
    dynamic (MUDDFormer, Xiao et al. 2025, arXiv 2502.12170)           sum_j (a_lj + c_j(x)) s_j,
                                                                       c(x) = 0.1 gelu(norm(x) W) U

The dynamic weights differ from token to token and see that token alone; the tenth is modded-nanogpt's.
MUDDFormer's several ways, sums of their own for queries, keys and values, need mixers that take several
inputs; here is one way, the stream.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.norms import rms_norm
from sabrage.wiring.skips import Skip

DYNAMIC_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class DenseSkips(Skip):
    """Weights that start as the newest state alone (a = 1 and 0, U = 0), which changes nothing.

    Every `period`-th reader gets a sum, of every `dilation`-th state counted back from the newest: each sum
    reads all its states from memory once more.
    """

    dynamic: bool = False
    period: int = 1
    dilation: int = 1

    def problems(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("period", "dilation")
            if getattr(self, name) < 1
        ]

    def sources(self, num_layers: int) -> dict[int, list[int]]:
        """The states that each reader sums, newest last. Raises ValueError where no reader has two."""
        readers = range(self.period, num_layers + 1, self.period)
        found = {reader: list(range(reader, -1, -self.dilation))[::-1] for reader in readers}
        found = {reader: states for reader, states in found.items() if len(states) > 1}
        if not found:
            raise ValueError(
                f"with period={self.period} and dilation={self.dilation} no reader of {num_layers} layers "
                "sums two states; use smaller ones"
            )
        return found

    def build(self, *, dim: int, num_layers: int) -> nn.Module:
        return WeightedStates(self, dim=dim, num_layers=num_layers)


class WeightedStates(nn.Module):
    """The module of `DenseSkips`: forward(x_BTD, states, context) -> x_BTD."""

    def __init__(self, part: DenseSkips, *, dim: int, num_layers: int) -> None:
        super().__init__()
        self.sources = part.sources(num_layers)
        counts = {str(reader): len(states) for reader, states in self.sources.items()}
        self.static = nn.ParameterDict({reader: torch.eye(count)[-1] for reader, count in counts.items()})
        self.dynamic = part.dynamic
        if part.dynamic:
            # Drawn as torch's Linear draws.
            down = {reader: nn.Linear(dim, count, bias=False).weight for reader, count in counts.items()}
            up = {reader: torch.zeros(count, count) for reader, count in counts.items()}
            self.down, self.up = nn.ParameterDict(down), nn.ParameterDict(up)

    def forward(self, x_BTD: Tensor, states: list[Tensor], context: Context) -> Tensor:
        reader = len(states) - 1
        if reader not in self.sources:
            return x_BTD
        weights = self.static[str(reader)]
        if self.dynamic:
            inner = F.gelu(F.linear(rms_norm(x_BTD), self.down[str(reader)]))
            weights = weights + DYNAMIC_SCALE * F.linear(inner, self.up[str(reader)])
        summed = [states[source] for source in self.sources[reader][:-1]] + [x_BTD]
        parts = [weight[..., None] * state for weight, state in zip(weights.unbind(-1), summed, strict=True)]
        return sum(parts[1:], parts[0])
