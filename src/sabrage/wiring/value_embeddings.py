"""Value embeddings: tables that give a layer's values the token itself, gated.

    v_t <- v_t + 2 sigmoid(G x_t[:12]) * table_l[token t],    x the mixer's input, one gate a slice of v

From modded-nanogpt, after value residuals (Zhou et al. 2024, arXiv 2410.17897). The first layers and the last
share the tables: with three of them the layers read 0 1 2 ... 0 1 2. Tables start at zero, so that nothing
changes at first, and gates of G = 0 are open as they are, 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.linear import GATE_WIDTH
from sabrage.parts import Wiring
from sabrage.wiring.residual import Residual


@dataclass(frozen=True, kw_only=True)
class ValueEmbeddings(Wiring):
    """`inner` with `tables` value tables, for mixers that add `Context.values_BTD`, as wide as the model.

    `gates` is how many slices of a value have a gate of their own: that of the heads, for one a head.
    """

    inner: Wiring = field(default_factory=Residual)
    tables: int = 3
    gates: int = 12

    def problems(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in ("tables", "gates")
            if getattr(self, name) < 1
        ]

    def layers(self, num_layers: int) -> dict[int, int]:
        """The table of each layer that has one."""
        first = {layer: layer for layer in range(self.tables)}
        return first | {num_layers - self.tables + table: table for table in range(self.tables)}

    def gives_values(self) -> bool:
        return True

    def build(self, *, dim: int, num_layers: int, vocab_size: int) -> nn.Module:
        if 2 * self.tables > num_layers:
            raise ValueError(
                f"tables={self.tables} are for the first and the last {self.tables} of {num_layers} layers; "
                f"use {num_layers // 2} or fewer"
            )
        if dim % self.gates:
            raise ValueError(f"gates={self.gates} does not divide dim={dim}; use 1, or the number of heads")
        return ValuedStream(self, dim=dim, num_layers=num_layers, vocab_size=vocab_size)


class ValuedStream(nn.Module):
    """The module of `ValueEmbeddings`: forward(x_BTD, blocks, context) -> normalised h_BTD."""

    def __init__(self, part: ValueEmbeddings, *, dim: int, num_layers: int, vocab_size: int) -> None:
        super().__init__()
        self.inner = part.inner.build(dim=dim, num_layers=num_layers, vocab_size=vocab_size)
        self.layers = part.layers(num_layers)
        self.tables = nn.ParameterList(torch.zeros(vocab_size, dim) for _ in range(part.tables))
        width = min(GATE_WIDTH, dim)
        self.gates = nn.ParameterDict(
            {str(layer): torch.zeros(part.gates, width) for layer in sorted(self.layers)}
        )

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        valued = [
            ValuedBlock(block, self.tables[self.layers[layer]], self.gates[str(layer)])
            if layer in self.layers
            else block
            for layer, block in enumerate(blocks)
        ]
        return self.inner(x_BTD, valued, context)


@dataclass(frozen=True)
class ValuedBlock:
    """A block whose mixer is told what to add to its values."""

    block: Any
    table_VD: Tensor
    gates_HX: Tensor

    def mixer(self, x_BTD: Tensor, context: Context) -> Tensor:
        assert context.tokens_BT is not None, "value embeddings need the tokens"
        value_BTD = F.embedding(context.tokens_BT, self.table_VD)
        opened_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., : self.gates_HX.shape[1]], self.gates_HX))
        value_BTHK = value_BTD.unflatten(2, (len(self.gates_HX), -1)) * opened_BTH[..., None]
        context.values_BTD = value_BTHK.flatten(2)
        mixed_BTD = self.block.mixer(x_BTD, context)
        context.values_BTD = None
        return mixed_BTD

    def feedforward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.block.feedforward(x_BTD, context)
