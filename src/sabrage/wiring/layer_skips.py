"""Skips from earlier layers to later ones, gated: U-net skips and single ones.

    the reader of layer b gets x + s 2 sigmoid(w . s_0[:12]) y_a,   y_a what layer a left behind, a < b

After U-Net (Ronneberger et al. 2015, arXiv 1505.04597), in language models modded-nanogpt: the layers of the
second half read their mirror image in the first. A gate of w = 0 is open as it is, 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.linear import GATE_WIDTH, opened
from sabrage.wiring.skips import Skip


@dataclass(frozen=True, kw_only=True)
class LayerSkips(Skip):
    """`pairs` of (from, to), in shares of the depth so that it may change; "to" 1 is the head.

    None are the mirrored layers of a U-net. Every scalar s starts at `start`; at 0 nothing changes.
    """

    pairs: tuple[tuple[float, float], ...] | None = None
    start: float = 0.0

    def problems(self) -> list[str]:
        return [
            f"pairs holds ({first}, {last}), allowed: 0 <= from < to <= 1"
            for first, last in self.pairs or ()
            if not 0 <= first < last <= 1
        ]

    def layers(self, num_layers: int) -> dict[int, int]:
        """The layer that each reader's skip is from. Raises ValueError for pairs that this depth merges."""
        if self.pairs is None:
            return {layer: num_layers - 1 - layer for layer in range((num_layers + 1) // 2, num_layers)}
        made = [(int(first * num_layers), int(last * num_layers)) for first, last in self.pairs]
        found = {last: first for first, last in made}
        if len(found) < len(made) or any(first >= last for first, last in made):
            raise ValueError(
                f"at {num_layers} layers the skips {self.pairs} are {made}: each must go to a later layer, "
                "and no two to the same; use more layers or other shares"
            )
        return found

    def build(self, *, dim: int, num_layers: int) -> nn.Module:
        return GatedSkips(self, dim=dim, num_layers=num_layers)


class GatedSkips(nn.Module):
    """The module of `LayerSkips`: forward(x_BTD, states, context) -> x_BTD."""

    def __init__(self, part: LayerSkips, *, dim: int, num_layers: int) -> None:
        super().__init__()
        self.sources = part.layers(num_layers)
        self.rows = {reader: row for row, reader in enumerate(self.sources)}
        self.scales_P = nn.Parameter(torch.full((len(self.sources),), part.start))
        self.gates_PD = nn.Parameter(torch.zeros(len(self.sources), min(GATE_WIDTH, dim)))

    def forward(self, x_BTD: Tensor, states: list[Tensor], context: Context) -> Tensor:
        reader = len(states) - 1
        if reader not in self.sources:
            return x_BTD
        row, source_BTD = self.rows[reader], states[self.sources[reader] + 1]
        opened_BT1 = opened(states[0], self.gates_PD[row])
        return x_BTD + (self.scales_P[row] * opened_BT1).to(x_BTD.dtype) * source_BTD
