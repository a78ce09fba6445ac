"""The columns of a sampled softmax: every target of a micro-batch, and a share of the other tokens.

Of V tokens n are certain: the targets, and those that are always wanted. K columns hold these and K - n of
the others, a uniform sample without replacement, each of which counts w times:

    w = (V - n) / (K - n),    sum_certain exp(z) + w sum_sampled exp(z)    in place of    sum_V exp(z)

The expectation of the left sum is the right one; that of its logarithm, and with it that of the loss, lies
slightly below. This is importance sampling of the softmax (Bengio and Senecal 2008, "Adaptive importance
sampling to accelerate training of a neural probabilistic language model", IEEE Trans. Neural Networks 19(4))
with a uniform proposal and exact targets. The draw is a hash of the targets: it takes no random state, and a
run that resumes draws the same.

What the sum varies by grows with w and with the squares of the probabilities that are sampled, which is why
frequent tokens should be certain. Of GPT-2's tokens 16,384 in a row hold some 4,000, a quarter of all text is
made of others, and the 8,000 most frequent make nine tenths of that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.hashing import scramble

# Draws are numbers of this many bits; the next ones put targets first, and then what is always wanted.
DRAW_BITS = 61


@dataclass(frozen=True)
class Sample:
    """Tokens that share their columns: `part` of all, M, with `targets_MW` as columns, and the columns' ids.

    Without a sample `ids_K` and `weighing_2` are None and the targets are those given.
    """

    part: slice
    targets_MW: Tensor
    ids_K: Tensor | None = None
    weighing_2: Tensor | None = None


def samples(
    targets_NW: Tensor,
    *,
    num_real: int,
    num_columns: int,
    tokens: int = 0,
    wanted_V: Tensor | None = None,
) -> list[Sample]:
    """The tokens in stretches of `tokens` (0: all of them) with columns drawn for each by `choose_columns`.

    Fewer tokens have fewer targets, which leaves more columns to the sample, and several samples even out
    what each of them misses. Without columns, or with as many as there are tokens to predict, it is one, of
    all of them.
    """
    count = len(targets_NW)
    if not 0 < num_columns < num_real:
        return [Sample(slice(0, count), targets_NW)]
    stretch = min(tokens or count, max(count, 1))
    whole = count // stretch * stretch if count else 0
    # The stretches of full length at once: what takes the time here is the number of small kernels.
    parts = [targets_NW[:whole].unflatten(0, (-1, stretch))] if whole else []
    if whole < count or not count:
        parts.append(targets_NW[None, whole:])
    drawn: list[Sample] = []
    for targets_SMW in parts:
        for chosen in zip(
            *draws(targets_SMW, num_real=num_real, num_columns=num_columns, wanted_V=wanted_V), strict=True
        ):
            ids_K, columns_MW, weighing_2 = chosen
            start = drawn[-1].part.stop if drawn else 0
            drawn.append(Sample(slice(start, start + len(columns_MW)), columns_MW, ids_K, weighing_2))
    return drawn


def choose_columns(
    targets_NW: Tensor, *, num_real: int, num_columns: int, wanted_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_K, columns_NW, weighing_2): the tokens that are columns, the targets as columns, and (n, log2(w)).

    `num_columns`, K, is below `num_real`, V. The first n columns are certain: the targets, and those of
    `wanted_V` (bool) where there is room for all of these and a sample. -1 stays -1, and a target at or
    beyond `num_real` becomes K, which is no column. Of more than K targets a uniform sample of K are columns,
    the others become -1 and w is 1. `weighing_2` is fp32; nothing here waits for the device.
    """
    found = draws(targets_NW[None], num_real=num_real, num_columns=num_columns, wanted_V=wanted_V)
    ids_1K, columns_1NW, weighing_12 = found
    return ids_1K[0], columns_1NW[0], weighing_12[0]


def draws(
    targets_SNW: Tensor, *, num_real: int, num_columns: int, wanted_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_SK, columns_SNW, weighing_S2): what `choose_columns` says of each of S stretches of tokens."""
    device, stretches = targets_SNW.device, len(targets_SNW)
    # One slot more than there are tokens: for whatever is none.
    slots_SNW = torch.where((targets_SNW >= 0) & (targets_SNW < num_real), targets_SNW, num_real)
    slots_SM = slots_SNW.flatten(1)
    is_slot_SV = torch.zeros((stretches, num_real + 1), dtype=torch.bool, device=device)
    is_target_SV = is_slot_SV.scatter(1, slots_SM, torch.ones_like(slots_SM, dtype=torch.bool))[:, :num_real]
    is_certain_SV = is_target_SV
    if wanted_V is not None:
        both_SV = is_target_SV | wanted_V[:num_real]
        is_certain_SV = torch.where(both_SV.sum(1, keepdim=True) < num_columns, both_SV, is_target_SV)
    key_S1 = _keys(targets_SNW)[:, None]
    draw_SV = scramble(torch.arange(num_real, device=device) + key_S1) & (2**DRAW_BITS - 1)
    score_SV = draw_SV + is_certain_SV * 2**DRAW_BITS + is_target_SV * 2**DRAW_BITS
    ids_SK = score_SV.topk(num_columns).indices
    column_SV = torch.full((stretches, num_real + 1), -1, device=device)
    column_SV = column_SV.scatter(1, ids_SK, torch.arange(num_columns, device=device).expand_as(ids_SK))
    own_SNW = column_SV.gather(1, slots_SM).view_as(slots_SNW)
    columns_SNW = torch.where(targets_SNW >= num_real, num_columns, own_SNW)
    num_certain_S = is_certain_SV.sum(1)
    num_sampled_S = num_columns - num_certain_S
    weight_S = torch.where(num_sampled_S > 0, (num_real - num_certain_S) / num_sampled_S.clamp(min=1), 1.0)
    return ids_SK, columns_SNW, torch.stack((num_certain_S.float(), weight_S.log2()), dim=1)


def most_frequent(counts_V: Tensor, number: int) -> Tensor:
    """(V,) bool: the `number` tokens with the largest counts (int64); of equal ones the lowest ids."""
    num_real = len(counts_V)
    # One number a token, no two the same, so that every device chooses alike.
    rank_V = counts_V * num_real + torch.arange(num_real - 1, -1, -1, device=counts_V.device)
    chosen_M = rank_V.topk(min(number, num_real)).indices
    return torch.zeros(num_real, dtype=torch.bool, device=counts_V.device).index_fill(0, chosen_M, True)


def _keys(targets_SNW: Tensor) -> Tensor:
    """(S,) numbers of 64 bits that every target and its place have a part in; integers add in any order."""
    targets_SM = targets_SNW.flatten(1)
    places_M = torch.arange(1, 1 + targets_SM.shape[1], device=targets_SM.device)
    # From 1 on: the hash of 0 is 0, and its place would play no part.
    return scramble((scramble(targets_SM + 2) * places_M).sum(1))


def log_weights(weighing_2: Tensor, num_columns: int) -> Tensor:
    """What is added to the logits of each column, in bits: 0 for what is certain, log2(w) for the others."""
    column_K = torch.arange(num_columns, device=weighing_2.device)
    return torch.where(column_K < weighing_2[0], 0.0, weighing_2[1])
