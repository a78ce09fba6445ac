"""The vector of the token and the one before it, from a hashed table, in every layer and not the first alone.

    layer l reads x + s_l 2 sigmoid(w_l . s_0[:12]) pair,    l = 1, 2, ...

The embedding adds the same vector to what layer 0 reads. After modded-nanogpt, whose gates are a small
network's. The table starts at zero, so that nothing changes at first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.linear import GATE_WIDTH, opened
from sabrage.wiring.skips import Skip


@dataclass(frozen=True, kw_only=True)
class PairSkips(Skip):
    """For embeddings that hash pairs. Every scale s_l starts at `start`; at 0 nothing changes."""

    start: float = 1.0

    def takes_pairs(self) -> bool:
        return True

    def build(self, *, dim: int, num_layers: int) -> nn.Module:
        return PairAdder(self, dim=dim, num_layers=num_layers)


class PairAdder(nn.Module):
    """The module of `PairSkips`: forward(x_BTD, states, context) -> x_BTD."""

    def __init__(self, part: PairSkips, *, dim: int, num_layers: int) -> None:
        super().__init__()
        self.scales_L = nn.Parameter(torch.full((num_layers,), part.start))
        self.gates_LD = nn.Parameter(torch.zeros(num_layers, min(GATE_WIDTH, dim)))

    def forward(self, x_BTD: Tensor, states: list[Tensor], context: Context) -> Tensor:
        layer = len(states) - 1
        if not 0 < layer < len(self.scales_L):
            return x_BTD
        assert context.pair_BTD is not None, "needs an embedding that hashes pairs"
        opened_BT1 = opened(states[0], self.gates_LD[layer])
        return x_BTD + (self.scales_L[layer] * opened_BT1).to(x_BTD.dtype) * context.pair_BTD
