"""Paired heads: head h and head h + H / 2 see each other's keys and values, in one softmax.

After modded-nanogpt (pull request 191). The two are one head over a sequence twice as long, in which entry 2t
is head h at token t and entry 2t + 1 is head h + H / 2 at token t:

    y_th = sum_(s, g) softmax_(s, g)(q_th . k_sg / sqrt(K)) v_sg,    g of the pair, entry (s, g) <= (t, h)

The order of entries is the causal one, so at its own token the second head sees the first and the first does
not see the second. That is plain causal attention of T x 2 tokens and H / 2 heads, which every backend knows.
Keys and queries are turned by the position of their token, whichever entry they are.

A window of W tokens is 2 W - 1 entries, the most that never reaches beyond the window: of the farthest token
in it the first head sees both and the second itself alone. A cache holds keys and values of all heads as
ever, and its entries are doubled when they are read.

Which heads make a pair is a name and no more. Those half the heads apart lie so that doubling moves nothing
in memory, and that heads that share keys and values keep those that they have unpaired.
"""

import torch
from torch import Tensor

from sabrage.attention.backends import Backend, attend
from sabrage.context import Context


def attend_paired(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    context: Context,
    *,
    backend: Backend,
    window: int | None,
) -> Tensor:
    """(B, T, H, K); H and G are even and `window` is tokens, the query's own included. Raises as `attend`."""
    q, k, v = (doubled(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    entries = context.once("paired", lambda: doubled_context(context))
    y = attend(q, k, v, entries, backend=backend, window=None if window is None else entries_of(window))
    return y.reshape(q_BTHK.shape)


def doubled(x_BTHK: Tensor) -> Tensor:
    """(B, 2 T, H / 2, K), the heads of the first half at even entries."""
    batch, length, heads, width = x_BTHK.shape
    return x_BTHK.reshape(batch, 2 * length, heads // 2, width)


def doubled_context(context: Context) -> Context:
    """Positions and documents of the entries; masks are shared by all layers that are paired."""
    positions_BT, documents_BT = context.positions_BT, context.documents_BT
    if positions_BT is not None:
        second_2 = torch.arange(2, device=positions_BT.device)
        positions_BT = (2 * positions_BT[..., None] + second_2).flatten(1)
    if documents_BT is not None:
        documents_BT = documents_BT[..., None].expand(-1, -1, 2).flatten(1)
    return Context(positions_BT=positions_BT, documents_BT=documents_BT, cache=context.cache)


def entries_of(window: int) -> int:
    """Entries that a query sees through a window of so many tokens."""
    return 2 * window - 1
