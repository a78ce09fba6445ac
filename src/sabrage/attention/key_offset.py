"""Partial key offset: what does not turn of a key is that of the token before.

    k_t <- [turning part of k_t ; standing part of k_(t-1)]

From modded-nanogpt (pull request 169). A query that asks in its standing part for a token like its own then
finds the token AFTER that one, and copies it: induction in one layer, where two are needed otherwise (Olsson
et al. 2022, arXiv 2209.11895). Parts are those of a partial rotary embedding (`Rotary.share`), normalised
with the key that they are from.

The first token of a sequence and of a document has none before it and keeps its own part. A cache holds
keys before the offset, which is made when they are read, so that it needs no stream of its own.
"""

import torch
from torch import Tensor

from sabrage.context import Context


def offset_keys(k_BSGK: Tensor, context: Context, *, turning: int) -> Tensor:
    """Keys of whole sequences, or all of a cache's, with their offset; the first `turning` pairs stay."""
    before_BSGK = torch.cat((k_BSGK[:, :1], k_BSGK[:, :-1]), dim=1)
    if context.documents_BT is not None:
        first_BS = context.documents_BT != context.documents_BT.roll(1, 1)
        before_BSGK = torch.where(first_BS[..., None, None], k_BSGK, before_BSGK)
    # Pair i is the numbers i and i + K / 2.
    own, other = (x.unflatten(-1, (2, -1)) for x in (k_BSGK, before_BSGK))
    return torch.cat((own[..., :turning], other[..., turning:]), dim=-1).flatten(-2)
