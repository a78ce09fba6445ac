"""Targets further ahead than the next token, and the loss over several sets of targets.

With nll_w the negative log-likelihood of a token's target in set w, 0 where it has none there, and a mean
over the tokens that have a next token,

    total = sum_w weight_w * mean(nll_w)

One denominator for all sets keeps micro-batches, which differ in how many targets are missing, equal parts of
the whole. W sets, the first being the next tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sabrage.losses import Loss
from sabrage.parts import Batch


def ahead(batch: Batch, distance: int) -> Tensor:
    """(B, T): the token `distance` after each one, -1 where it lies beyond the row or its document.

    A document reaches to the target of its last token.
    """
    length = batch.targets_BT.shape[1]
    shift = min(distance - 1, length)
    if shift == 0:
        return batch.targets_BT
    targets_BT = batch.targets_BT[:, shift:]
    if batch.documents_BT is not None:
        same_BT = batch.documents_BT[:, shift:] == batch.documents_BT[:, : length - shift]
        targets_BT = targets_BT.masked_fill(~same_BT, -1)
    return F.pad(targets_BT, (0, shift), value=-1)


def shares(targets_BTW: Tensor) -> Tensor:
    """(W,): targets of each set for every target of the first."""
    counts_W = (targets_BTW >= 0).sum((0, 1))
    return counts_W / counts_W[0].clamp(min=1)


def score_together(h_BTD: Tensor, targets: dict[str, Tensor], model: Any, weights_W: Tensor | None) -> Loss:
    """The loss of one hidden state against named sets of targets, (B, T) each: one pass of the head."""
    assert weights_W is not None, "the plan gives no loss weights"
    targets_BTW = torch.stack(list(targets.values()), dim=-1)
    total, losses_W = model.head.losses(h_BTD, targets_BTW, weights_W * shares(targets_BTW))
    return Loss(total, dict(zip(targets, losses_W.unbind(), strict=True)))


def score_apart(
    hidden: Sequence[Tensor], targets: dict[str, Tensor], model: Any, weights_W: Tensor | None
) -> Loss:
    """The loss of a hidden state (B, T, D) for each named set of targets (B, T): a pass of the head each."""
    assert weights_W is not None, "the plan gives no loss weights"
    targets_BTW = torch.stack(list(targets.values()), dim=-1)
    weights_W = weights_W * shares(targets_BTW)
    totals, means = [], []
    for index, h_BTD in enumerate(hidden):
        one = slice(index, index + 1)
        total, (mean,) = model.head.losses(h_BTD, targets_BTW[..., one], weights_W[one])
        totals.append(total)
        means.append(mean)
    return Loss(sum(totals[1:], totals[0]), dict(zip(targets, means, strict=True)))
