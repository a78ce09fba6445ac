"""Attention to near tokens one by one and to far ones through pools of their blocks.

Time is cut into blocks of S tokens. Query t sees, in one softmax,

- token by token: what is not later than t and lies in t's own block or among the last `window` tokens;
- pooled: every block that has wholly passed, which is every block before t's own.

So near tokens are seen twice and far ones through their pool, and none is seen before its time: a block's
pool holds its last token, and is first seen by the token after that. With documents a token is seen by its
own document alone, and a pool by those queries to whose document the WHOLE block belongs; far tokens in a
block that two documents share are not seen.

A pooled key stands for a token in the middle of its block (or where the drawn token was): it is pooled first,
then normalised and turned like any other. Decoding makes the pools anew from the cached tokens, so the cache
holds keys before norm and rotation and values: 2 D floats per token and layer, as for `MultiHead`. What is
saved is what a query meets: with a window of a block or more, `window` keys and on average E T / (2 S) pools
where `MultiHead` meets T / 2 keys.

Shapes beside those of the legend: N blocks, E entries of a pool, P = N E, W near keys of a block of queries.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sabrage.attention.near_and_pooled import Sight, attend_by_blocks, attend_everywhere
from sabrage.attention.pools import Mean, Pool
from sabrage.attention.rotary import Rotary
from sabrage.context import Context
from sabrage.linear import Linear
from sabrage.norms import rms_norm
from sabrage.parts import Mixer


@dataclass(frozen=True, kw_only=True)
class Pooled(Mixer):
    """`MultiHead` that sees blocks of `block` tokens through a `pool`, and the last `window` exactly."""

    heads: int
    pool: Pool = field(default_factory=Mean)
    block: int = 64
    window: int = 128
    rotary: Rotary | None = field(default_factory=Rotary)
    qk_norm: bool = False
    zero_init: bool = False

    def problems(self) -> list[str]:
        found = [
            f"mixer.{name}={getattr(self, name)} must be at least 1"
            for name in ("heads", "block", "window")
            if getattr(self, name) < 1
        ]
        if self.pool.num_entries > self.block:
            found.append(
                f"mixer.pool.entries={self.pool.num_entries} of blocks of {self.block}; use fewer entries"
            )
        return found

    def build(self, *, dim: int, layer: int) -> nn.Module:
        if self.heads < 1 or dim % (2 * self.heads):
            raise ValueError(
                f"mixer.heads={self.heads} does not cut dim={dim} into heads of even width; use a divisor of "
                f"{dim // 2}"
            )
        return PooledAttention(self, dim=dim, layer=layer)

    def streams(self, dim: int) -> dict[str, int]:
        return {"key": dim, "value": dim}

    def flops(self, dim: int, sequence_length: int) -> int:
        first_seen = (
            max(0, min(t // self.block * self.block, t + 1 - self.window)) for t in range(sequence_length)
        )
        exact = sum(t + 1 - first for t, first in enumerate(first_seen))
        pools = sum(t // self.block for t in range(sequence_length)) * self.pool.num_entries
        seen = 2 * 2 * dim * (exact + pools) // sequence_length
        return 2 * 4 * dim * dim + self.pool.flops(dim) + seen


class PooledAttention(nn.Module):
    """The module of `Pooled`: forward(x_BTD, context) -> y_BTD."""

    def __init__(self, part: Pooled, *, dim: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer, self.qk_norm = part.heads, layer, part.qk_norm
        self.sight = Sight(block=part.block, window=part.window, entries=part.pool.num_entries)
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        if part.zero_init:
            nn.init.zeros_(self.out.weight)
        self.pool = part.pool.build(heads=part.heads, width=dim // part.heads, layer=layer)
        self.rotary = part.rotary.build(dim // part.heads) if part.rotary else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, positions_BS = self.place(q, context.positions_BT), context.positions_BT
        if context.cache is not None:
            cached = context.cache.extend(self.layer, key=k.flatten(2), value=v.flatten(2))
            k, v = (cached[name].unflatten(2, (self.heads, -1)) for name in ("key", "value"))
            # Entry s of a cache is position s.
            positions_BS = None
        pooled_k, pooled_v = self.pools(k, v, positions_BS)
        k = self.place(k, positions_BS)
        attend = attend_by_blocks if context.cache is None else attend_everywhere
        return self.out(attend(q, (k, v), (pooled_k, pooled_v), context, self.sight).flatten(2))

    def place(self, x_BTHK: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Queries or keys normalised and turned, as far as the part says so."""
        x_BTHK = rms_norm(x_BTHK) if self.qk_norm else x_BTHK
        return x_BTHK if self.rotary is None else self.rotary(x_BTHK, positions_BT)

    def pools(self, k_BSHK: Tensor, v_BSHK: Tensor, positions_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of all whole blocks, (B, P, H, K), the keys in their places."""
        block, batch = self.sight.block, k_BSHK.shape[0]
        whole = k_BSHK.shape[1] // block * block
        blocks = (x[:, :whole].unflatten(1, (-1, block)) for x in (k_BSHK, v_BSHK))
        k_BNEHK, v_BNEHK, offset_NE = self.pool(*blocks)
        starts_N1 = torch.arange(0, whole, block, device=k_BSHK.device)[:, None]
        index_P = (starts_N1 + offset_NE).flatten()
        places_BP = index_P.expand(batch, -1) if positions_BS is None else positions_BS[:, index_P]
        return self.place(k_BNEHK.flatten(1, 2), places_BP), v_BNEHK.flatten(1, 2)
