"""Attention by whole matrices of scores or under a given mask: the reference, and torch's choice."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.attention.masks import distances, visible
from sabrage.attention.scores import ScoreModule
from sabrage.context import Context


def plain(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSX: Tensor,
    context: Context,
    *,
    window: int | None,
    scores: Sequence[ScoreModule],
    mask_BTS: Tensor | None,
) -> Tensor:
    """The specification, (B, H, T, X): every product and the softmax in fp32, also under autocast."""
    heads, num_keys, device = q_BHTK.shape[1], k_BGSK.shape[2], q_BHTK.device
    with torch.autocast(device.type, enabled=False):
        k, v = (repeated(x.float(), heads) for x in (k_BGSK, v_BGSX))
        score_BHTS = (q_BHTK.float() @ k.transpose(-1, -2)) * q_BHTK.shape[-1] ** -0.5
        if scores:
            head_H11 = torch.arange(heads, device=device)[:, None, None]
            distance_B1TS = distances(context, num_keys, device)[:, None]
            for score in scores:
                score_BHTS = score.function(num_keys)(score_BHTS, head_H11, distance_B1TS)
        mask = seen(context, num_keys, device, window, mask_BTS)
        weights = score_BHTS.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ v).to(v_BGSX.dtype)


def masked(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSX: Tensor,
    context: Context,
    *,
    window: int | None,
    mask_BTS: Tensor | None,
) -> Tensor:
    """Torch's attention under the mask in full, (B, H, T, X)."""
    k, v = (repeated(x, q_BHTK.shape[1]) for x in (k_BGSK, v_BGSX))
    mask = seen(context, k.shape[2], q_BHTK.device, window, mask_BTS)
    return F.scaled_dot_product_attention(q_BHTK, k, v, attn_mask=mask)


def seen(
    context: Context, num_keys: int, device: torch.device, window: int | None, mask_BTS: Tensor | None
) -> Tensor:
    """The mask of every query and key, (B or 1, 1, T, S)."""
    if mask_BTS is not None:
        return mask_BTS[:, None]
    return visible(context, num_keys, device, window=window)


def repeated(x_BGSX: Tensor, heads: int) -> Tensor:
    """Each key/value head once for every query head that reads it, (B, H, S, X)."""
    groups = x_BGSX.shape[1]
    return x_BGSX if groups == heads else x_BGSX.repeat_interleave(heads // groups, dim=1)


def of_one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with zeros up to the wider of the two widths, for kernels that know but one.

    Products stay what they are; the scale and the output's width are the caller's to keep.
    """
    width = max(q.shape[-1], v.shape[-1])
    if q.shape[-1] == v.shape[-1]:
        return q, k, v
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v
