"""The columns of a sampled softmax: every target of a micro-batch, and a share of the other tokens.

Of V tokens n are targets. K columns hold these and K - n of the others, a uniform sample without replacement,
each of which counts w times:

    w = (V - n) / (K - n),    sum_targets exp(z) + w sum_sampled exp(z)    in place of    sum_V exp(z)

The expectation of the left sum is the right one; that of its logarithm, and with it that of the loss, lies
slightly below. This is importance sampling of the softmax (Bengio and Senecal 2008, "Adaptive importance
sampling to accelerate training of a neural probabilistic language model", IEEE Trans. Neural Networks 19(4))
with a uniform proposal and exact targets. The draw is a hash of the targets: it takes no random state, and a
run that resumes draws the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.hashing import scramble

# Draws are numbers of this many bits; the next bit puts targets above all others.
DRAW_BITS = 62


@dataclass(frozen=True)
class Sample:
    """Tokens that share their columns: `part` of all, M, with `targets_MW` as columns, and the columns' ids.

    Without a sample `ids_K` and `weighing_2` are None and the targets are those given.
    """

    part: slice
    targets_MW: Tensor
    ids_K: Tensor | None = None
    weighing_2: Tensor | None = None


def samples(targets_NW: Tensor, *, num_real: int, num_columns: int, tokens: int = 0) -> list[Sample]:
    """The tokens in stretches of `tokens` (0: all of them) with columns drawn for each by `choose_columns`.

    Fewer tokens have fewer targets, which leaves more columns to the sample, and several samples even out
    what each of them misses. Without columns, or with as many as there are tokens to predict, it is one, of
    all of them.
    """
    count = len(targets_NW)
    if not 0 < num_columns < num_real:
        return [Sample(slice(0, count), targets_NW)]
    drawn = []
    for start in range(0, max(count, 1), tokens or max(count, 1)):
        part = slice(start, start + (tokens or count))
        chosen = choose_columns(targets_NW[part], num_real=num_real, num_columns=num_columns)
        ids_K, columns_MW, weighing_2 = chosen
        drawn.append(Sample(part, columns_MW, ids_K, weighing_2))
    return drawn


def choose_columns(targets_NW: Tensor, *, num_real: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_K, columns_NW, weighing_2): the tokens that are columns, the targets as columns, and (n, log2(w)).

    `num_columns`, K, is below `num_real`, V. The targets are the first n columns. -1 stays -1, and a target
    at or beyond `num_real` becomes K, which is no column. Of more than K targets a uniform sample of K are
    columns, the others become -1 and w is 1. `weighing_2` is fp32; nothing here waits for the device.
    """
    device = targets_NW.device
    # One slot more than there are tokens: for whatever is none.
    slots_NW = torch.where((targets_NW >= 0) & (targets_NW < num_real), targets_NW, num_real)
    is_slot_V = torch.zeros(num_real + 1, dtype=torch.bool, device=device)
    is_target_V = is_slot_V.index_fill(0, slots_NW.flatten(), True)[:num_real]
    draw_V = scramble(torch.arange(num_real, device=device) + _key(targets_NW)) & (2**DRAW_BITS - 1)
    score_V = torch.where(is_target_V, draw_V + 2**DRAW_BITS, draw_V)
    ids_K = score_V.topk(num_columns).indices
    column_V = torch.full((num_real + 1,), -1, device=device)
    column_V = column_V.index_copy(0, ids_K, torch.arange(num_columns, device=device))
    columns_NW = torch.where(targets_NW >= num_real, num_columns, column_V[slots_NW])
    num_targets = is_target_V.sum()
    num_sampled = num_columns - num_targets
    weight = torch.where(num_sampled > 0, (num_real - num_targets) / num_sampled.clamp(min=1), 1.0)
    return ids_K, columns_NW, torch.stack((num_targets.float(), weight.log2()))


def _key(targets_NW: Tensor) -> Tensor:
    """A number of 64 bits that every target and its place have a part in; integers add up in any order."""
    targets_M = targets_NW.flatten()
    places_M = torch.arange(1, 1 + len(targets_M), device=targets_M.device)
    # From 1 on: the hash of 0 is 0, and its place would play no part.
    return scramble((scramble(targets_M + 2) * places_M).sum())


def log_weights(weighing_2: Tensor, num_columns: int) -> Tensor:
    """What is added to the logits of each column, in bits: 0 for a target, log2(w) for the others."""
    column_K = torch.arange(num_columns, device=weighing_2.device)
    return torch.where(column_K < weighing_2[0], 0.0, weighing_2[1])
