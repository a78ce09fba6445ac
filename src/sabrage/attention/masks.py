"""Who sees whom: the causal mask with documents and a window, in full and by blocks.

Query t sees key s where s <= t, where both are of one document, and where s > t - window: a window counts
tokens, the query's own included. Masks are made once a forward pass and shared by its layers.
"""

import torch
from torch import Tensor

from sabrage.context import Context


def visible(context: Context, num_keys: int, device: torch.device, *, window: int | None = None) -> Tensor:
    """(B or 1, 1, T, S) mask, true where query t may see key s.

    From a cache key s is position s; without one queries and keys are the same tokens, in order.
    """
    return context.once(("visible", num_keys, window), lambda: _visible(context, num_keys, device, window))


def _visible(context: Context, num_keys: int, device: torch.device, window: int | None) -> Tensor:
    distance_BTS = distances(context, num_keys, device)
    mask_BTS = distance_BTS >= 0
    if window is not None:
        mask_BTS = mask_BTS & (distance_BTS < window)
    if context.documents_BT is not None:
        mask_BTS = mask_BTS & (context.documents_BT[:, :, None] == context.documents_BT[:, None, :])
    return mask_BTS[:, None]


def distances(context: Context, num_keys: int, device: torch.device) -> Tensor:
    """(B or 1, T, S) tokens from key s to query t; negative where the key is later."""
    queries_BT = keys_BS = torch.arange(num_keys, device=device)[None]
    if context.cache is not None:
        assert context.positions_BT is not None, "decoding needs the positions of its queries"
        assert context.documents_BT is None, "a cache knows no documents"
        queries_BT = context.positions_BT
    return queries_BT[:, :, None] - keys_BS[:, None, :]
