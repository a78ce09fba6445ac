"""One softmax over near tokens and the pools of passed blocks, in full and by blocks of queries.

The full form is the specification and decodes; for whole sequences the other one gives each block of queries
the keys that it can see: copies of near blocks and the pools of all. Masks are made once a forward pass and
shared by its layers. Shapes as in `sabrage.attention.pooled`, and Q any number of queries.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sabrage.attention.backends import attend
from sabrage.context import Context

# Keys and values, (B, S, H, K) both.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Who sees what, by the index of a token in its sequence; a pool has `entries` for each block."""

    block: int
    window: int
    entries: int

    def near_blocks(self, num_blocks: int) -> int:
        """The blocks before its own, of `num_blocks` in all, in which a query may see single tokens."""
        return min(-(-(self.window - 1) // self.block), num_blocks - 1)

    def exact(self, query: Tensor, key: Tensor) -> Tensor:
        """True where the query may see the key itself; the two are broadcast."""
        near = (query // self.block == key // self.block) | (query - key < self.window)
        return (key >= 0) & (key <= query) & near

    def pooled(self, query: Tensor, entry: Tensor) -> Tensor:
        """True where the whole block of the pools' entry has passed; the two are broadcast."""
        return entry // self.entries < query // self.block

    def mask(self, query_Q: Tensor, key_S: Tensor, num_entries: int, documents_BT: Tensor | None) -> Tensor:
        """(..., Q, P + S), true where a query may see a pool's entry or a key.

        Indices may have dimensions in front, the same ones; with documents B comes before them.
        """
        query_Q1, key_1S = query_Q[..., :, None], key_S[..., None, :]
        exact_QS = self.exact(query_Q1, key_1S)
        pooled_QP = self.pooled(query_Q1, torch.arange(num_entries, device=query_Q.device))
        if documents_BT is not None:
            last = documents_BT.shape[1] - 1
            own_BQ1 = documents_BT[:, query_Q1.clamp(max=last)]
            exact_QS = exact_QS & (own_BQ1 == documents_BT[:, key_1S.clamp(0, last)])
            whole = num_entries // self.entries * self.block
            blocks_BNS = documents_BT[:, :whole].unflatten(1, (-1, self.block))
            for edge_BN in (blocks_BNS.amin(2), blocks_BNS.amax(2)):
                edge_BP = edge_BN.repeat_interleave(self.entries, dim=1)
                edge_B1P = edge_BP.view(len(edge_BP), *(1,) * query_Q.dim(), -1)
                pooled_QP = pooled_QP & (own_BQ1 == edge_B1P)
        return torch.cat((pooled_QP, exact_QS), dim=-1)


def attend_everywhere(q_BTHK: Tensor, tokens: Pair, pools: Pair, context: Context, sight: Sight) -> Tensor:
    """Attention to all pools and all tokens under the mask, (B, T, H, K); from a cache as well."""
    num_entries, num_keys, device = pools[0].shape[1], tokens[0].shape[1], q_BTHK.device

    def make() -> Tensor:
        query_BT = torch.arange(q_BTHK.shape[1], device=device)
        if context.cache is not None:
            assert context.positions_BT is not None, "decoding needs the positions of its queries"
            assert context.documents_BT is None, "a cache knows no documents"
            query_BT = context.positions_BT
        mask = sight.mask(query_BT, torch.arange(num_keys, device=device), num_entries, context.documents_BT)
        return mask if mask.dim() == 3 else mask[None]

    mask_BTS = context.once(("everywhere", sight, num_entries, num_keys), make)
    k, v = (torch.cat((pool, token), dim=1) for pool, token in zip(pools, tokens, strict=True))
    return attend(q_BTHK, k, v, context, backend="sdpa", mask_BTS=mask_BTS)


def attend_by_blocks(q_BTHK: Tensor, tokens: Pair, pools: Pair, context: Context, sight: Sight) -> Tensor:
    """The same for whole sequences, (B, T, H, K): a query is multiplied by near blocks and pools alone."""
    batch, length, block = *q_BTHK.shape[:2], sight.block
    num_blocks = -(-length // block)
    near = sight.near_blocks(num_blocks)

    def make() -> Tensor:
        query_NQ = torch.arange(num_blocks * block, device=q_BTHK.device).view(num_blocks, block)
        key_NW = torch.arange(-near * block, block, device=q_BTHK.device) + query_NQ[:, :1]
        mask_BNQW = sight.mask(query_NQ, key_NW, pools[0].shape[1], context.documents_BT)
        return mask_BNQW.expand(batch, -1, -1, -1).flatten(0, 1)

    mask = context.once(("by blocks", sight, batch, length), make)
    # Copies are made again for the backward pass: kept, they would be the largest thing that a layer saves.
    k, v = (
        checkpoint(by_blocks, token, pool, near, block, use_reentrant=False, preserve_rng_state=False)
        for token, pool in zip(tokens, pools, strict=True)
    )
    q = F.pad(q_BTHK, (0, 0, 0, 0, 0, num_blocks * block - length)).unflatten(1, (-1, block)).flatten(0, 1)
    out = attend(q, k, v, context, backend="sdpa", mask_BTS=mask)
    return out.unflatten(0, (batch, num_blocks)).flatten(1, 2)[:, :length]


def by_blocks(x_BTHK: Tensor, pool_BPHK: Tensor, near: int, block: int) -> Tensor:
    """For each block: all pools, the `near` blocks before it and itself, (B N, P + W, H, K)."""
    num_blocks = -(-x_BTHK.shape[1] // block)
    ends = (near * block, num_blocks * block - x_BTHK.shape[1])
    x_BNSHK = F.pad(x_BTHK, (0, 0, 0, 0, *ends)).unflatten(1, (-1, block))
    shifted = [x_BNSHK[:, start : start + num_blocks] for start in range(near + 1)]
    pools = pool_BPHK.unsqueeze(1).expand(-1, num_blocks, -1, -1, -1)
    return torch.cat((pools, *shifted), dim=2).flatten(0, 1)
