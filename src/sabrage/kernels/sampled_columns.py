"""The columns of a sampled softmax: every target of some tokens, and a share of the other tokens.

Of V tokens n are certain: the targets. K columns hold these and K - n of the others, drawn by priority
(Duffield, Lund and Thorup 2007, "Priority sampling for estimation of arbitrary subset sums", J. ACM 54(6)):
token i of size s_i has the priority s_i / u_i, u_i uniform in (0, 1], those with the largest are drawn, and
with t the largest priority of those that are not, token i counts max(1, t / s_i) times,

    sum_certain exp(z_i) + sum_drawn max(1, t / s_i) exp(z_i)    in place of    sum_V exp(z_i).

The expectation of the left sum is the right one; that of its logarithm, and with it that of the loss, lies
below by about half its relative variance. This is importance sampling of the softmax (Bengio and Senecal
2008, "Adaptive importance sampling to accelerate training of a neural probabilistic language model", IEEE
Trans. Neural Networks 19(4)) with exact targets. The draw is a hash of the targets: it takes no random state,
and a run that resumes draws the same.

The least variance is that of sizes in proportion to sqrt(E p_i^2). It is not the frequent tokens that matter,
which are targets of almost any stretch of text, but the rare ones that are likely where they may stand; a
target that nobody else has in a stretch of text, weighed with the probability that it had, stands for what
might have been there. By that measure sizes that are roots of frequencies vary by half as much as equal ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.hashing import scramble

# A draw is a number of this many bits.
DRAW_BITS = 52
# Above every priority.
CERTAIN = 2.0**80
# The frequency that every token is taken to have beside its own.
FLOOR = 2.0**-22


@dataclass(frozen=True)
class Sample:
    """Tokens that share their columns: `part` of all, M, with `targets_MW` as columns, and the columns' ids.

    `bits_K` is what is added to the columns' logits, in bits. Without a sample it and `ids_K` are None and
    the targets are those given.
    """

    part: slice
    targets_MW: Tensor
    ids_K: Tensor | None = None
    bits_K: Tensor | None = None


def samples(
    targets_NW: Tensor,
    *,
    num_real: int,
    num_columns: int,
    tokens: int = 0,
    sizes_V: Tensor | None = None,
) -> list[Sample]:
    """The tokens in stretches of `tokens` (0: all of them) with columns drawn for each by `choose_columns`.

    Fewer tokens have fewer targets, which leaves more columns to the sample, and several samples even out
    what each of them misses. Without columns, or with as many as there are tokens to predict, it is one, of
    all of them.
    """
    count = len(targets_NW)
    if not 0 < num_columns < num_real:
        return [Sample(slice(0, count), targets_NW)]
    stretch = tokens or max(count, 1)
    whole = count // stretch * stretch
    # The stretches of full length at once: what takes the time here is the number of small kernels.
    parts = [targets_NW[:whole].unflatten(0, (-1, stretch))] if whole else []
    if whole < count or not count:
        parts.append(targets_NW[None, whole:])
    drawn: list[Sample] = []
    for targets_SMW in parts:
        for chosen in zip(
            *draws(targets_SMW, num_real=num_real, num_columns=num_columns, sizes_V=sizes_V), strict=True
        ):
            ids_K, columns_MW, bits_K = chosen
            start = drawn[-1].part.stop if drawn else 0
            drawn.append(Sample(slice(start, start + len(columns_MW)), columns_MW, ids_K, bits_K))
    return drawn


def choose_columns(
    targets_NW: Tensor, *, num_real: int, num_columns: int, sizes_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_K, columns_NW, bits_K): the tokens that are columns, the targets as columns, and log2 of how often
    each column counts.

    `num_columns`, K, is below `num_real`, V. The first n columns are the targets. -1 stays -1, and a target
    at or beyond `num_real` becomes K, which is no column. Of more than K targets a uniform sample of K are
    columns and the others become -1. `sizes_V` (fp64, above 0) are equal where they are None. `bits_K` is
    fp16: what rounds is the count of a sampled column, by a thousandth. Nothing here waits for the device.
    """
    found = draws(targets_NW[None], num_real=num_real, num_columns=num_columns, sizes_V=sizes_V)
    ids_1K, columns_1NW, bits_1K = found
    return ids_1K[0], columns_1NW[0], bits_1K[0]


def draws(
    targets_SNW: Tensor, *, num_real: int, num_columns: int, sizes_V: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids_SK, columns_SNW, bits_SK): what `choose_columns` says of each of S stretches of tokens."""
    device, stretches = targets_SNW.device, len(targets_SNW)
    # One slot more than there are tokens: for whatever is none.
    slots_SNW = torch.where((targets_SNW >= 0) & (targets_SNW < num_real), targets_SNW, num_real)
    slots_SM = slots_SNW.flatten(1)
    is_slot_SV = torch.zeros((stretches, num_real + 1), dtype=torch.bool, device=device)
    is_target_SV = is_slot_SV.scatter(1, slots_SM, torch.ones_like(slots_SM, dtype=torch.bool))[:, :num_real]
    draw_SV = scramble(torch.arange(num_real, device=device) + _keys(targets_SNW)[:, None])
    uniform_SV = ((draw_SV & (2**DRAW_BITS - 1)) + 1).double() / 2**DRAW_BITS
    sizes = torch.ones((), dtype=torch.float64, device=device) if sizes_V is None else sizes_V[:num_real]
    priority_SV = torch.where(is_target_SV, CERTAIN * (1 + uniform_SV), sizes / uniform_SV)
    largest = priority_SV.topk(num_columns + 1)
    ids_SK, passed_S1 = largest.indices[:, :num_columns], largest.values[:, num_columns:]
    column_SV = torch.full((stretches, num_real + 1), -1, device=device)
    column_SV = column_SV.scatter(1, ids_SK, torch.arange(num_columns, device=device).expand_as(ids_SK))
    own_SNW = column_SV.gather(1, slots_SM).view_as(slots_SNW)
    columns_SNW = torch.where(targets_SNW >= num_real, num_columns, own_SNW)
    # Of too many targets the next one has been passed over as well; those that are left count once.
    sampled_SK = largest.values[:, :num_columns] < CERTAIN
    counts_SK = torch.where(sampled_SK, passed_S1 / sizes.expand(num_real)[ids_SK], 1.0).clamp(min=1)
    return ids_SK, columns_SNW, counts_SK.log2().to(torch.float16)


def sizes_of(counts_V: Tensor) -> Tensor:
    """The root of how often each token has been a target, fp64.

    As though each had been one once, and in a few millionths of the time.
    """
    counts_V = counts_V.double()
    return (counts_V + 1 + FLOOR * counts_V.sum()).sqrt()


def _keys(targets_SNW: Tensor) -> Tensor:
    """(S,) numbers of 64 bits that every target and its place have a part in; integers add in any order."""
    targets_SM = targets_SNW.flatten(1)
    places_M = torch.arange(1, 1 + targets_SM.shape[1], device=targets_SM.device)
    # From 1 on: the hash of 0 is 0, and its place would play no part.
    return scramble((scramble(targets_SM + 2) * places_M).sum(1))
