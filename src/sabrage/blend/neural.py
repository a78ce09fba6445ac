"""What the network says itself, of the target and of candidates, and two experts made from it.

- `seen`: the network's own distribution, restricted to tokens that the document has shown so far,
  p(token) = p_network(token) / (its sum over the tokens seen): repeating oneself is more likely than a small
  network believes.
- `cache`: the tokens that followed earlier states of the document, weighted by how much those states are like
  the present one (Grave, Joulin and Usunier 2017, "Improving neural language models with a continuous
  cache", arXiv 1612.04426), p(token) = sum over s < t with target_s = token of softmax_s(b cos(h_t, h_s)).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of this many tokens are held at once: 0.4 GB of 50,257 in fp32, three times over.
TOKENS_AT_ONCE = 2048
# Cosines that differ by less are equally near.
ALIKE = 1e-4


@dataclass(frozen=True)
class Rows:
    """Tokens, targets (none of them negative), and each place's document and depth in it, (B, T) each.

    `h_BTD` are the network's states there.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    group_BT: Tensor
    depth_BT: Tensor
    h_BTD: Tensor

    def context(self, length: int) -> list[Tensor]:
        """The last `length` tokens at each place, the oldest first, (B, T) each.

        Where fewer stand in the row, those before it come from its end: ask `depth_BT` first.
        """
        return self.back(range(length, 0, -1))

    def back(self, distances: Iterable[int]) -> list[Tensor]:
        """The tokens so far before the next one, (B, T) each; 1 is the present one. As in `context`.

        Of a distance below zero its size counts.
        """
        return [self.tokens_BT.roll(abs(distance) - 1, 1) for distance in distances]

    def pieces(self) -> list[tuple[int, int, int]]:
        """(row, first, end) of stretches that are worked on at once, all of them in order."""
        rows, length = self.tokens_BT.shape
        starts = range(0, length, TOKENS_AT_ONCE)
        return [(row, at, min(at + TOKENS_AT_ONCE, length)) for row in range(rows) for at in starts]

    def before(self, row: int, first: int, end: int, *, itself: bool) -> Tensor:
        """(end - first, end): which places of the document stand before each, or also its own."""
        time_T = torch.arange(end, device=self.tokens_BT.device)
        group_T = self.group_BT[row, :end]
        behind = time_T[first:, None] - time_T
        return (behind >= (0 if itself else 1)) & (group_T[first:, None] == group_T)


def flat(run: Iterable[Tensor]) -> list[Tensor]:
    """(N,) for each (B, T)."""
    return [token_BT.flatten() for token_BT in run]


@dataclass(frozen=True)
class Says:
    """Log-probabilities of the targets, of the network and of it restricted, and features for the gate.

    `candidates` are tokens and their log-probabilities, (N, C) both, as `union` has them.
    """

    log_N: Tensor
    restricted_N: Tensor
    features_NX: Tensor
    candidates: tuple[Tensor, Tensor] | None


def network_says(
    head: Callable[[Tensor], Tensor],
    rows: Rows,
    first_BT: Tensor | None,
    listed_NL: Tensor | None = None,
    likeliest: int = 0,
    most: int = 0,
) -> Says:
    """`first_BT` tells where a token stands for the first time in its document; None: nothing restricted.

    `listed_NL` are tokens, or -1, that are candidates beside the network's `likeliest`, `most` of all of them
    at a place; None: no candidates.
    """
    logs, restricted, features, candidates = [], [], [], []
    length = rows.tokens_BT.shape[1]
    for row, first, end in rows.pieces():
        log_MV = head(rows.h_BTD[row, first:end]).float().log_softmax(1)
        targets_M1 = rows.targets_BT[row, first:end, None]
        log_M = log_MV.gather(1, targets_M1)[:, 0]
        seen = [-(log_MV.exp() * log_MV).sum(1) / 4 - 1, log_MV.amax(1)]
        if first_BT is not None:
            tokens_S = rows.tokens_BT[row, :end]
            mask_MS = rows.before(row, first, end, itself=True) & first_BT[row, :end]
            share_M = torch.where(mask_MS, log_MV.index_select(1, tokens_S).exp(), 0.0).sum(1)
            share_M = share_M.clamp(min=1e-30).log()
            member_M = (mask_MS & (tokens_S == targets_M1)).any(1)
            restricted.append(torch.where(member_M, log_M - share_M, -torch.inf))
            seen.append(share_M)
        if listed_NL is not None:
            listed_ML = listed_NL[row * length + first : row * length + end]
            candidates.append(union(log_MV, listed_ML, likeliest, most))
        logs.append(log_M)
        features.append(torch.stack(seen, 1))
    log_N = torch.cat(logs)
    tokens, log_each = ([pair[which] for pair in candidates] for which in (0, 1))
    return Says(
        log_N,
        torch.cat(restricted) if restricted else log_N,
        torch.cat(features),
        (torch.cat(tokens), torch.cat(log_each)) if candidates else None,
    )


def union(log_MV: Tensor, listed_ML: Tensor, likeliest: int, most: int) -> tuple[Tensor, Tensor]:
    """Each token that is listed or among the `likeliest` once, and its log-probability, (M, C) both.

    Of more than `most` those that the network thinks likeliest are kept. A token of -1 and a log-probability
    of -inf stand for none.
    """
    likely_MK = log_MV.topk(min(likeliest, log_MV.shape[1]), 1, sorted=False).indices
    sorted_MC = torch.cat((listed_ML, likely_MK), 1).sort(1).values
    again_MC = F.pad(sorted_MC[:, 1:] == sorted_MC[:, :-1], (1, 0))
    tokens_MC = sorted_MC.masked_fill(again_MC, -1)
    log_MC = log_MV.gather(1, tokens_MC.clamp(min=0)).masked_fill(tokens_MC < 0, -torch.inf)
    if log_MC.shape[1] > most:
        log_MC, kept_MC = log_MC.topk(most, 1)
        tokens_MC = tokens_MC.gather(1, kept_MC)
    return tokens_MC, log_MC


def alike(rows: Rows, row: int, first: int, end: int) -> Tensor:
    """(end - first, end): cosines of the states there and those before them in the document, else -inf."""
    h_SD = F.normalize(rows.h_BTD[row, :end].float(), dim=1)
    return (h_SD[first:] @ h_SD.T).masked_fill(~rows.before(row, first, end, itself=False), -torch.inf)


def cached(rows: Rows, sharpness: Sequence[float], nearest: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities of the targets (N, C) by each sharpness b, features (N, 1 + C), tokens (N, K)).

    The tokens followed the K = `nearest` earlier states of the document most like each, -1 where none did.
    Where a document has only begun, the other numbers mean nothing.
    """
    logs, features, tokens = [], [], []
    for row, first, end in rows.pieces():
        alike_MS = alike(rows, row, first, end)
        targets_S = rows.targets_BT[row, :end]
        tokens.append(nearest_followers(alike_MS, targets_S, nearest))
        same_MS = targets_S[first:, None] == targets_S
        nearest_M = alike_MS.amax(1).clamp(min=-1)
        alike_MS = alike_MS - nearest_M[:, None]
        found, seen = [], [nearest_M]
        for b in sharpness:
            weight_MS = (b * alike_MS).exp()
            total_M = weight_MS.sum(1).clamp(min=1e-30)
            found.append((torch.where(same_MS, weight_MS, 0.0).sum(1) / total_M).log())
            # How many earlier states share the weight.
            seen.append(total_M.clamp(min=1).log() / 4 - 1)
        logs.append(torch.stack(found, 1))
        features.append(torch.stack(seen, 1))
    return torch.cat(logs), torch.cat(features), torch.cat(tokens)


def nearest_followers(alike_MS: Tensor, targets_S: Tensor, most: int) -> Tensor:
    """(M, most) tokens that followed the states most like each, -1 where none did.

    Of states that are equally alike, but for rounding, the newest come first.
    """
    end = len(targets_S)
    if not most:
        return targets_S.new_empty(len(alike_MS), 0)
    # One number to sort by: the cosine, a step further up than any place, and then the place.
    rank_MS = ((alike_MS.clamp(min=-1) + 1) / ALIKE).round().long() * end
    rank_MS = (rank_MS + torch.arange(end, device=targets_S.device)).masked_fill(alike_MS == -torch.inf, -1)
    near_MK, place_MK = rank_MS.topk(min(most, end), 1)
    tokens_MK = targets_S[place_MK].masked_fill(near_MK < 0, -1)
    return F.pad(tokens_MK, (0, most - tokens_MK.shape[1]), value=-1)


def cache_shares(rows: Rows, sharpness: Sequence[float], tokens_NC: Tensor) -> list[Tensor]:
    """What the cache of each sharpness, at least one, gives to tokens, (N, C) each.

    It is 0 where a document has only begun.
    """
    length, found = rows.tokens_BT.shape[1], []
    for row, first, end in rows.pieces():
        alike_MS = alike(rows, row, first, end)
        followers_S, order_S = rows.targets_BT[row, :end].sort()
        tokens_MC = tokens_NC[row * length + first : row * length + end]
        low_MC, high_MC = (torch.searchsorted(followers_S, tokens_MC, right=right) for right in (False, True))
        shares = []
        for b in sharpness:
            # A row of nothing but -inf is NaN everywhere. Sorted by token, a token's share is an interval.
            weight_MS = (b * alike_MS).softmax(1).nan_to_num(0.0)[:, order_S]
            before_MS = F.pad(weight_MS.cumsum(1), (1, 0))
            shares.append(before_MS.gather(1, high_MC) - before_MS.gather(1, low_MC))
        found.append(torch.stack(shares))
    return list(torch.cat(found, 1))
