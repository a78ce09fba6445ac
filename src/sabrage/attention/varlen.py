"""Variable-length attention: rows and documents as sequences of one flat batch, by FlashAttention-2's kernel.

The kernel is told where sequences begin. How many documents a batch holds is known on the device alone, so
room is made for a fixed number of them, one for every 64 tokens beside one a row. A batch of more, that is
of shorter documents on average, gives an output of NaN rather than a wrong one.
"""

from typing import Any

import torch
from torch import Tensor

from sabrage.attention.dense import of_one_width
from sabrage.context import Context

DOCUMENT_TOKENS = 64


def varlen(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHX: Tensor, context: Context, *, window: int | None) -> Tensor:
    """Whole sequences, (B, T, H, X), causal, with window and documents."""
    # Imported here, since it takes more than a second.
    from torch.nn.attention.varlen import varlen_attn

    batch, length, width = *q_BTHK.shape[:2], v_BTHX.shape[-1]
    starts_N, fits = context.once(
        ("starts", batch, length), lambda: starts(context.documents_BT, batch, length, q_BTHK.device)
    )
    q, k, v = (x.flatten(0, 1) for x in of_one_width(q_BTHK, k_BTHK, v_BTHX))
    out: Any = varlen_attn(
        q,
        k,
        v,
        starts_N,
        starts_N,
        length,
        length,
        scale=q_BTHK.shape[-1] ** -0.5,
        window_size=(-1 if window is None else window - 1, 0),
    )
    out = out.unflatten(0, (batch, length))[..., :width]
    return out if fits is None else torch.where(fits, out, float("nan"))


def starts(
    documents_BT: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Where sequences begin, int32, padded with the number of tokens; and whether all of them had room."""
    tokens = batch * length
    if documents_BT is None:
        return torch.arange(0, tokens + 1, length, device=device, dtype=torch.int32), None
    index_N = torch.arange(tokens, device=device)
    flat_N = documents_BT.flatten()
    new_N = (index_N % length == 0) | (flat_N != flat_N.roll(1))
    room = min(batch + tokens // DOCUMENT_TOKENS, tokens)
    first_N = torch.where(new_N, index_N, tokens).sort().values[:room]
    ends_N = torch.full((1,), tokens, device=device)
    return torch.cat((first_N, ends_N)).to(torch.int32), new_N.sum() <= room
