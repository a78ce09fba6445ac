"""Embeddings that also look back: `Smear` by the vector before, `BigramHash` and `TrigramHash` by the tokens.

Each wraps another embedding and starts as that one, bit for bit. The first token of a sequence and of a
document has none before it. What a token has to know of the one before is a stream of the cache of layer 0.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.hashing import DIGIT, GOLDEN, digits, number, salts, scramble, signed_row
from sabrage.linear import GATE_WIDTH
from sabrage.model.ends import TokenTable
from sabrage.parts import Embedding


def one_back(x_BTX: Tensor, context: Context, *, stream: str) -> Tensor:
    """Each token's predecessor in x, zeros where it has none; in decoding by way of the cache's stream."""
    if context.cache is None:
        before_BTX = F.pad(x_BTX[:, :-1], (0, 0, 1, 0))
        if context.documents_BT is None:
            return before_BTX
        first_BT = context.documents_BT != context.documents_BT.roll(1, 1)
        return before_BTX.masked_fill(first_BT[..., None], 0)
    assert context.positions_BT is not None, "decoding needs the positions of its tokens"
    assert context.documents_BT is None, "a cache knows no documents"
    entries_BSX = context.cache.extend(0, **{stream: x_BTX})[stream]
    places_BT = context.positions_BT.expand(x_BTX.shape[:2]) - 1
    before_BTX = entries_BSX.gather(1, places_BT.clamp(min=0)[..., None].expand_as(x_BTX))
    return before_BTX.masked_fill(places_BT[..., None] < 0, 0).to(x_BTX.dtype)


class Wrapped(nn.Module):
    """An embedding around another, whose table is its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> nn.Parameter:
        """The token table, (V, D)."""
        table = self.inner.weight
        assert isinstance(table, nn.Parameter)
        return table


@dataclass(frozen=True, kw_only=True)
class Smear(Embedding):
    """x_t <- x_t + s sigmoid(w . x_t[:12]) x_(t-1), the scalar s starting at `start` and w at zero.

    From modded-nanogpt. It caches D numbers a token.
    """

    inner: Embedding = field(default_factory=TokenTable)
    start: float = 0.0

    def streams(self, dim: int) -> dict[str, int]:
        return self.inner.streams(dim) | {"smeared": dim}

    def gives_pairs(self) -> bool:
        return self.inner.gives_pairs()

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return SmearedEmbedding(self, dim=dim, vocab_size=vocab_size)


class SmearedEmbedding(Wrapped):
    """The module of `Smear`."""

    def __init__(self, part: Smear, *, dim: int, vocab_size: int) -> None:
        super().__init__(part.inner.build(dim=dim, vocab_size=vocab_size))
        self.scale = nn.Parameter(torch.full((1,), part.start))
        self.gate_D = nn.Parameter(torch.zeros(min(GATE_WIDTH, dim)))

    def forward(self, tokens_BT: Tensor, context: Context) -> Tensor:
        x_BTD = self.inner(tokens_BT, context)
        opened_BT1 = torch.sigmoid((x_BTD[..., : len(self.gate_D)] * self.gate_D).sum(-1, keepdim=True))
        return x_BTD + self.scale * opened_BT1 * one_back(x_BTD, context, stream="smeared")


@dataclass(frozen=True, kw_only=True)
class BigramHash(Embedding):
    """x_t <- x_t + sign(h) * table[h mod rows], h = hash(token t-1, token t), the table starting at zero.

    The signs, one a number and drawn by the hash, make pairs that share a row push it in directions of their
    own, so that they average out ("the hashing trick", Chen et al. 2015, arXiv 1504.04788). `width` numbers
    are added to the first of x; 0 means all of them. The hashed table is modded-nanogpt's, with five rows a
    token of the vocabulary. It caches two numbers a token.
    """

    inner: Embedding = field(default_factory=TokenTable)
    rows: int = 262_144
    width: int = 0

    def problems(self) -> list[str]:
        found = [] if self.rows >= 1 else [f"rows={self.rows} must be at least 1"]
        return found if self.width >= 0 else [*found, f"width={self.width} must be at least 0 (0: all)"]

    def streams(self, dim: int) -> dict[str, int]:
        return self.inner.streams(dim) | {"token": 2}

    def gives_pairs(self) -> bool:
        return True

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        if self.width > dim:
            raise ValueError(f"width={self.width} is more than dim={dim}; use {dim} or less, or 0 for all")
        if vocab_size >= DIGIT**2:
            raise ValueError(
                f"a vocabulary of {vocab_size} tokens; {type(self).__name__} takes up to {DIGIT**2 - 1}"
            )
        return self.module(dim=dim, vocab_size=vocab_size)

    def module(self, *, dim: int, vocab_size: int) -> nn.Module:
        return BigramEmbedding(self, dim=dim, vocab_size=vocab_size)


class HashedEmbedding(Wrapped):
    """The rows that `hashed` names of a table, added with their signs; `table` is the parameter's name."""

    table: str
    salts_D: Tensor

    def __init__(self, part: BigramHash, *, dim: int, vocab_size: int) -> None:
        super().__init__(part.inner.build(dim=dim, vocab_size=vocab_size))
        width = part.width or dim
        self.register_parameter(self.table, nn.Parameter(torch.zeros(part.rows, width)))
        self.register_buffer("salts_D", salts(width), persistent=False)

    def forward(self, tokens_BT: Tensor, context: Context) -> Tensor:
        x_BTD = self.inner(tokens_BT, context)
        row_BTX = signed_row(self.hashed(tokens_BT, context), getattr(self, self.table), self.salts_D)
        row_BTD = F.pad(row_BTX, (0, x_BTD.shape[-1] - row_BTX.shape[-1]))
        self.told(row_BTD, context)
        return x_BTD + row_BTD

    def told(self, row_BTD: Tensor, context: Context) -> None:
        """What others than the first layer may know of the rows."""

    def hashed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        """(B, T) int64."""
        raise NotImplementedError


class BigramEmbedding(HashedEmbedding):
    """The module of `BigramHash`."""

    table = "pairs_RD"

    def told(self, row_BTD: Tensor, context: Context) -> None:
        context.pair_BTD = row_BTD

    def hashed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        before_BT2 = one_back(digits(tokens_BT), context, stream="token")
        context.pairs_BT = scramble(number(before_BT2) * DIGIT**2 + tokens_BT)
        return context.pairs_BT


@dataclass(frozen=True, kw_only=True)
class TrigramHash(BigramHash):
    """`BigramHash` of three tokens: h = hash(token t-2, token t-1, token t).

    Hashed tables of n-grams at a model's input: Huang et al. 2025, "Over-tokenized transformer" (arXiv
    2501.16975); inside it: Cheng et al. 2026, "Engram" (arXiv 2601.07372). It caches four numbers a token.
    """

    def streams(self, dim: int) -> dict[str, int]:
        return self.inner.streams(dim) | {"second": 2, "third": 2}

    def gives_pairs(self) -> bool:
        return self.inner.gives_pairs()

    def module(self, *, dim: int, vocab_size: int) -> nn.Module:
        return TrigramEmbedding(self, dim=dim, vocab_size=vocab_size)


class TrigramEmbedding(HashedEmbedding):
    """The module of `TrigramHash`."""

    table = "triples_RD"

    def hashed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        second_BT2 = one_back(digits(tokens_BT), context, stream="second")
        third_BT2 = one_back(second_BT2, context, stream="third")
        pair_BT = number(second_BT2) * DIGIT**2 + tokens_BT
        return scramble(pair_BT + GOLDEN * number(third_BT2))
