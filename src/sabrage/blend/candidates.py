"""Candidates for the next token, and what is known of each: what `rescoring` changes the network by.

A mixture gives each model one weight for all tokens, so it cannot say that a token is likely because the
network *and* the counts have it. That takes a look at single tokens, and a look at every token of the
vocabulary would be dear. Few are worth one, as in rescoring a list of hypotheses: those that followed the
context in the counted text, found at evenly spaced places of its occurrences, those that followed states of
the document like the present one, and those that the network itself thinks likeliest. Which they are, and
all that is known of them, depends on the context alone.

Shapes: N places, M of them at once, C candidates of a place, X features of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.blend.columns import Columns
from sabrage.blend.grams import Grams
from sabrage.blend.neural import Rows, cache_shares
from sabrage.config import Part

# Places whose candidates are looked up at once: 8 MB of numbers of 64 bits, some thirty times over.
PLACES_AT_ONCE = 16_384
# What is less likely than e^-40 is as good as that to a linear layer.
LEAST = -40.0
# What a cache gives to a token that it has not seen; sums in fp32 err by less.
LEAST_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Candidates(Part):
    """`followers` tokens for each order of context in the counted text, the network's `likeliest`, and, where
    the blend has a cache, what followed the `nearest` states of the document.

    `hidden` units look at each of them. On a GPU one of the gate's held-out tokens takes 3.2 KB, of which the
    features of its 72 candidates are the most.
    """

    followers: int = 6
    likeliest: int = 22
    nearest: int = 8
    hidden: int = 64

    def problems(self) -> list[str]:
        found = [
            f"candidates.{name}={getattr(self, name)} must be above 0"
            for name in ("likeliest", "hidden")
            if getattr(self, name) <= 0
        ]
        return found + [
            f"candidates.{name}={getattr(self, name)}, allowed: 0 or more"
            for name in ("followers", "nearest")
            if getattr(self, name) < 0
        ]


@dataclass(frozen=True)
class Offered(Columns):
    """The candidates of N places: log-probabilities by the network (N, C), in nats, and features (N, C, X).

    A log-probability of -inf stands for no candidate. `target_N` is the number of the one that is the
    target, or -1; nothing else depends on the target. Features are in fp16 on a GPU: they are most of what
    a gate is fitted to.
    """

    log_NC: Tensor
    features_NCX: Tensor
    target_N: Tensor


def listed(part: Candidates, grams: Grams | None, orders: int, rows: Rows) -> Tensor:
    """(N, L) tokens that followed the contexts of 1 to `orders` tokens in the text, -1 where none did.

    A context that begins before its document has no followers.
    """
    found = [rows.tokens_BT.new_empty(rows.tokens_BT.numel(), 0)]
    if grams is not None and part.followers:
        for order in range(1, orders + 1):
            run = [token_BT.flatten() for token_BT in rows.context(order)]
            tokens_NM, known_N = grams.followers(run, part.followers)
            known_N = known_N & (rows.depth_BT >= order).flatten()
            found.append(torch.where(known_N[:, None], tokens_NM, -1))
    return torch.cat(found, 1)


def offered(
    rows: Rows,
    grams: Grams | None,
    counts: Sequence[Tensor],
    candidates: tuple[Tensor, Tensor],
    vocab_size: int,
    cache: Sequence[float] = (),
) -> Offered:
    """What is known of `candidates`, their tokens and log-probabilities (N, C).

    `counts` are the occurrences (N,) of the contexts of 1, 2, ... tokens in the text of `grams`, 0 where
    they are unknown. The features: the network's log-probability; for each of the contexts how often the
    candidate followed, and in what share; how often it stands earlier in the document, in all and after
    the present token; its share of a `cache` of each sharpness.
    """
    tokens_NC, log_NC = candidates
    group_N, token_N, target_N = (x_BT.flatten() for x_BT in (rows.group_BT, rows.tokens_BT, rows.targets_BT))
    # What stood before a token: its document, or its document and the token before it.
    befores = group_N, group_N * vocab_size + token_N
    stood = [Occurrences(before_N * vocab_size + target_N) for before_N in befores]
    shares = cache_shares(rows, cache, tokens_NC) if cache else []
    place_N = torch.arange(len(group_N), device=group_N.device)
    contexts = [[x_BT.flatten() for x_BT in rows.context(order)] for order in range(1, len(counts) + 1)]
    pieces = []
    for at in range(0, len(place_N), PLACES_AT_ONCE):
        piece = slice(at, at + PLACES_AT_ONCE)
        tokens_MC = tokens_NC[piece].clamp(min=0)
        seen = [log_NC[piece].clamp(min=LEAST) / 4 + 1]
        for context, count_N in zip(contexts, counts, strict=True):
            assert grams is not None
            seen += followed(grams, [x_N[piece] for x_N in context], count_N[piece], tokens_MC)
        for before_N, occurrences in zip(befores, stood, strict=True):
            asked_MC = before_N[piece, None] * vocab_size + tokens_MC
            seen.append(occurrences.before(asked_MC, place_N[piece]).float().log1p() / 2)
        seen += [(share_NC[piece].clamp(min=0) + LEAST_SHARE).log() / 4 + 1 for share_NC in shares]
        features_MCX = torch.stack(seen, 2)
        pieces.append(features_MCX.half() if features_MCX.is_cuda else features_MCX)
    same_NC = tokens_NC == target_N[:, None]
    number_N = torch.where(same_NC.any(1), same_NC.int().argmax(1), -1)
    return Offered(log_NC, torch.cat(pieces), number_N)


def followed(grams: Grams, run: Sequence[Tensor], count_M: Tensor, tokens_MC: Tensor) -> list[Tensor]:
    """How often tokens followed contexts that occur `count_M` times, and in what share, (M, C) both.

    Both are scaled to about unit size, and 0 where the context is unknown.
    """
    known = count_M.nonzero()[:, 0]
    hits_KC, _ = grams.count([*(token_M[known, None] for token_M in run), tokens_MC[known]])
    share_KC = (hits_KC + 0.05) / (count_M[known, None] + 1)
    found = []
    for feature_KC in (hits_KC.float().log1p() / 4, share_KC.log() / 4 + 1):
        feature_MC = torch.zeros(tokens_MC.shape, device=tokens_MC.device)
        found.append(feature_MC.index_copy_(0, known, feature_KC))
    return found


class Occurrences:
    """Where each key stands in a list of them, (N,)."""

    def __init__(self, key_N: Tensor) -> None:
        self.keys, number_N = torch.unique(key_N, return_inverse=True)
        self.size = len(key_N)
        # Sorted by key and then by place, as one number.
        self.places_N = (number_N * self.size + torch.arange(self.size, device=key_N.device)).sort().values

    def before(self, asked_MC: Tensor, place_M: Tensor) -> Tensor:
        """How often the keys that are asked for stand before these places, (M, C)."""
        number_MC = torch.searchsorted(self.keys, asked_MC).clamp(max=len(self.keys) - 1)
        begin_MC = number_MC * self.size
        low_MC, high_MC = (
            torch.searchsorted(self.places_N, at_MC) for at_MC in (begin_MC, begin_MC + place_M[:, None])
        )
        return torch.where(self.keys[number_MC] == asked_MC, high_MC - low_MC, 0)
