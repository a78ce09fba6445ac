"""Value embeddings: tables that give a layer's values the token itself, gated.

    v_t <- v_t + 2 sigmoid(G x_t[:12]) * table_l[token t],    x the mixer's input, one gate a slice of v

From modded-nanogpt, after value residuals (Zhou et al. 2024, arXiv 2410.17897). The first layers and the last
share the tables: with three of them the layers read 0 1 2 ... 0 1 2. Tables start at zero, so that nothing
changes at first, and gates of G = 0 are open as they are, 1.

The two layers of the first table may get the pair of tokens as well, from a hashed table with signs, as
`sabrage.model.previous` has it at the model's input. N-grams inside a model: Cheng et al. 2026, "Engram"
(arXiv 2601.07372), with other gates.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.hashing import salts, signed_row
from sabrage.linear import GATE_WIDTH
from sabrage.parts import Wiring
from sabrage.wiring.residual import Residual


@dataclass(frozen=True, kw_only=True)
class ValueEmbeddings(Wiring):
    """`inner` with `tables` value tables, for mixers that add `Context.values_BTD`, as wide as the model.

    `gates` is how many slices of a value have a gate of their own: that of the heads, for one a head.
    `pairs` is the rows of the table of pairs (0: none), for embeddings that hash them.
    """

    inner: Wiring = field(default_factory=Residual)
    tables: int = 3
    gates: int = 12
    pairs: int = 0

    def problems(self) -> list[str]:
        return [
            f"{name}={getattr(self, name)} must be at least {least}"
            for name, least in (("tables", 1), ("gates", 1), ("pairs", 0))
            if getattr(self, name) < least
        ]

    def layers(self, num_layers: int) -> dict[int, int]:
        """The table of each layer that has one."""
        first = {layer: layer for layer in range(self.tables)}
        return first | {num_layers - self.tables + table: table for table in range(self.tables)}

    def value_layers(self, num_layers: int) -> Collection[int]:
        return self.layers(num_layers)

    def takes_pairs(self) -> bool:
        return self.pairs > 0 or self.inner.takes_pairs()

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

    salts_D: Tensor

    def __init__(self, part: ValueEmbeddings, *, dim: int, num_layers: int, vocab_size: int) -> None:
        super().__init__()
        self.inner = part.inner.build(dim=dim, num_layers=num_layers, vocab_size=vocab_size)
        self.layers = part.layers(num_layers)
        self.tables = nn.ParameterList(torch.zeros(vocab_size, dim) for _ in range(part.tables))
        self.gates = gates(part, sorted(self.layers), dim=dim)
        self.register_parameter("pairs_RD", None)
        if part.pairs:
            first = sorted(layer for layer, table in self.layers.items() if table == 0)
            self.pairs_RD = nn.Parameter(torch.zeros(part.pairs, dim))
            self.pair_gates = gates(part, first, dim=dim)
            self.register_buffer("salts_D", salts(dim), persistent=False)

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        valued = [
            ValuedBlock(block, self, layer) if layer in self.layers else block
            for layer, block in enumerate(blocks)
        ]
        return self.inner(x_BTD, valued, context)

    def values(self, x_BTD: Tensor, layer: int, context: Context) -> Tensor:
        """What a layer whose mixer gets x adds to its values."""
        tokens_BT, table = context.tokens_BT, self.layers[layer]
        assert tokens_BT is not None, "value embeddings need the tokens"
        # Once for both layers of a table: its gradient, as large as the table, is then made once as well.
        row_BTD = context.once(f"values of table {table}", lambda: F.embedding(tokens_BT, self.tables[table]))
        value_BTD = gated(row_BTD, x_BTD, self.gates[str(layer)])
        hash_BT, table_RD = context.pairs_BT, self.pairs_RD
        if table_RD is None or table:
            return value_BTD
        assert hash_BT is not None, "values of pairs need an embedding that hashes them"
        pair_BTD = context.once("values of pairs", lambda: signed_row(hash_BT, table_RD, self.salts_D))
        return value_BTD + gated(pair_BTD, x_BTD, self.pair_gates[str(layer)])


def gates(part: ValueEmbeddings, layers: list[int], *, dim: int) -> nn.ParameterDict:
    """Gates of 1, by layer."""
    width = min(GATE_WIDTH, dim)
    return nn.ParameterDict({str(layer): torch.zeros(part.gates, width) for layer in layers})


def gated(value_BTD: Tensor, x_BTD: Tensor, gates_HX: Tensor) -> Tensor:
    """Each of the H slices of the value times the gate that x opens for it."""
    opened_BTH = 2 * torch.sigmoid(F.linear(x_BTD[..., : gates_HX.shape[1]], gates_HX))
    return (value_BTD.unflatten(2, (len(gates_HX), -1)) * opened_BTH[..., None]).flatten(2)


@dataclass(frozen=True)
class ValuedBlock:
    """A block whose mixer is told what to add to its values."""

    block: Any
    stream: ValuedStream
    layer: int

    def mixer(self, x_BTD: Tensor, context: Context) -> Tensor:
        context.values_BTD = self.stream.values(x_BTD, self.layer, context)
        mixed_BTD = self.block.mixer(x_BTD, context)
        context.values_BTD = None
        return mixed_BTD

    def feedforward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.block.feedforward(x_BTD, context)
