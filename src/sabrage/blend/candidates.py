"""Candidates for the next token, and what is known of each: what `rescoring` changes the network by.

A mixture gives each model one weight for all tokens, so it cannot say that a token is likely because the
network *and* the counts have it. That takes a look at single tokens, and a look at every token of the
vocabulary would be dear. Few are worth one, as in rescoring a list of hypotheses: those that followed the
context in the counted text, found at evenly spaced places of its occurrences, those that followed states of
the document like the present one, and those that the network itself thinks likeliest. Which they are, and
all that is known of them, depends on the context alone.

Shapes: N places, M of them at once, C candidates of a place, X features of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sabrage.blend.columns import Columns
from sabrage.blend.document import Occurrences
from sabrage.blend.grams import Grams
from sabrage.blend.neural import Rows, cache_shares, flat
from sabrage.config import Part

# Places whose candidates are looked up at once: 8 MB of numbers of 64 bits, some thirty times over.
PLACES_AT_ONCE = 16_384
# What is less likely than e^-40 is as good as that to a linear layer.
LEAST = -40.0
# Contexts of 0 and 1 tokens in the document. Those of 2 and 3 bring nothing (see LOG.md).
DOCUMENT_ORDERS = 2
# How much a shorter context weighs beside one that occurs once, and how that grows with occurrences.
STRENGTH, STRENGTH_POWER = 8.0, 0.75
# What a cache gives to a token that it has not seen; sums in fp32 err by less.
LEAST_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Candidates(Part):
    """`followers` tokens for each order of context in the counted text, the network's `likeliest`, and, where
    the blend has a cache, what followed the `nearest` states of the document; at `most` so many of all these.

    `layers` of `hidden` units look at each of them. On a GPU one of the gate's held-out tokens takes 3 KB, of
    which the features of its 48 candidates are the most. They are also looked up after contexts with
    `gaps`: (4, 2, 1) is the last two tokens and the fourth before the next one. Below zero it is not the
    token that counts but which of the `classes` it is in: (-3, -2, 1) is the last token and the kinds of the
    two before. Each costs 8 bytes a counted token, thrice that and more for a moment, and 0.2 KB a held-out
    one.
    """

    followers: int = 6
    likeliest: int = 22
    nearest: int = 8
    most: int = 48
    gaps: tuple[tuple[int, ...], ...] = ()
    classes: int = 256
    hidden: int = 64
    layers: int = 1

    def has_classes(self) -> bool:
        """Whether any context asks for the class of a token."""
        return any(distance < 0 for back in self.gaps for distance in back)

    def problems(self) -> list[str]:
        found = [
            f"candidates.{name}={getattr(self, name)} must be above 0"
            for name in ("likeliest", "most", "classes", "hidden", "layers")
            if getattr(self, name) <= 0
        ]
        for back in self.gaps:
            sizes = [abs(distance) for distance in back]
            if not sizes or 0 in sizes or sizes != sorted(set(sizes), reverse=True):
                found.append(f"candidates.gaps has {list(back)}: name distances, none 0, the farthest first")
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
            run = flat(rows.context(order))
            tokens_NM, known_N = grams.followers(run, part.followers)
            known_N = known_N & (rows.depth_BT >= order).flatten()
            found.append(torch.where(known_N[:, None], tokens_NM, -1))
    return torch.cat(found, 1)


def offered(
    rows: Rows,
    grams: Grams | None,
    counts: Sequence[Tensor],
    befores: Sequence[Tensor],
    candidates: tuple[Tensor, Tensor],
    vocab_size: int,
    cache: Sequence[float] = (),
    apart: Sequence[Tensor] = (),
) -> Offered:
    """What is known of `candidates`, their tokens and log-probabilities (N, C).

    `counts` are the occurrences (N,) of the contexts of 1, 2, ... tokens in the text of `grams`, 0 where
    they are unknown, `apart` those of its contexts with gaps, and `befores` the document's contexts of 0, 1,
    ... tokens, by number. The features: the network's log-probability; what `followed` says; how often the
    candidate stands earlier in the document, after each of those contexts, and how far back; its share of a
    `cache` of each sharpness; what is counted `after` each context with gaps.
    """
    tokens_NC, log_NC = candidates
    target_N = rows.targets_BT.flatten()
    stood = [Occurrences(before_N * vocab_size + target_N) for before_N in befores]
    shares = cache_shares(rows, cache, tokens_NC) if cache else []
    place_N = torch.arange(len(target_N), device=target_N.device)
    runs = [flat(rows.context(order)) for order in range(1, len(counts) + 1)]
    gapped = list(grams.gapped) if grams is not None else []
    apart_runs = [flat(rows.back(table.back)) for table in gapped]
    pieces = []
    for at in range(0, len(place_N), PLACES_AT_ONCE):
        piece = slice(at, at + PLACES_AT_ONCE)
        tokens_MC = tokens_NC[piece].clamp(min=0)
        seen = [log_NC[piece].clamp(min=LEAST) / 4 + 1]
        if counts:
            assert grams is not None
            run_MC = [[x_N[piece] for x_N in run] for run in runs]
            seen += followed(grams, run_MC, [count_N[piece] for count_N in counts], tokens_MC)
        for order, (before_N, occurrences) in enumerate(zip(befores, stood, strict=True)):
            asked_MC = before_N[piece, None] * vocab_size + tokens_MC
            count_MC, back_MC = occurrences.before(asked_MC, place_N[piece])
            seen.append(count_MC.float().log1p() / 2)
            if not order:
                seen.append(torch.where(back_MC > 0, 1 - back_MC.float().log() / 8, 0.0))
        seen += [(share_NC[piece].clamp(min=0) + LEAST_SHARE).log() / 4 + 1 for share_NC in shares]
        for table, run, count_N in zip(gapped, apart_runs, apart, strict=True):
            seen += after(table.count, [x_N[piece] for x_N in run], count_N[piece], tokens_MC)[2]
        features_MCX = torch.stack(seen, 2)
        pieces.append(features_MCX.half() if features_MCX.is_cuda else features_MCX)
    same_NC = tokens_NC == target_N[:, None]
    number_N = torch.where(same_NC.any(1), same_NC.int().argmax(1), -1)
    return Offered(log_NC, torch.cat(pieces), number_N)


def followed(
    grams: Grams, runs: Sequence[Sequence[Tensor]], counts: Sequence[Tensor], tokens_MC: Tensor
) -> list[Tensor]:
    """What the text says of tokens after contexts of 1, 2, ... tokens that occur `counts` times, (M, C) each.

    Of every context what `after` says, and of all together their probability backed off,
    p_k = (hits_k + s_k p_k-1) / (count_k + s_k), from their own frequency on. That is a hierarchy of
    Dirichlet distributions (MacKay and Peto 1995, Natural Language Engineering 1(3)); by held-out text its
    strength is s = 8 count^0.75, much the same for all lengths. All are of about unit size.
    """
    own_MC, _ = grams.count([tokens_MC])
    backed_MC = (own_MC + 0.5) / (grams.size + 0.5 * grams.vocab_size)
    found, smoothed = [], [backed_MC.log() / 8 + 1]
    for run, count_M in zip(runs, counts, strict=True):
        known, hits_KC, features = after(lambda asked: grams.count(asked)[0], run, count_M, tokens_MC)
        found += features
        count_K1 = count_M[known, None]
        strength_K1 = STRENGTH * count_K1.float() ** STRENGTH_POWER
        backed_KC = (hits_KC + strength_K1 * backed_MC[known]) / (count_K1 + strength_K1)
        backed_MC = backed_MC.index_copy(0, known, backed_KC)
        smoothed.append(backed_MC.log() / 4 + 1)
    return found + smoothed


def after(
    counting: Callable[[Sequence[Tensor]], Tensor], run: Sequence[Tensor], count_M: Tensor, tokens_MC: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `counting` says of tokens after a context of one length, a `run`, that occurs `count_M` times.

    (places that know their context, (K,); how often the tokens followed there, (K, C); that number and in
    what share, as features, 0 where the context is unknown, (M, C) each).
    """
    known = count_M.nonzero()[:, 0]
    hits_KC = counting([*(token_M[known, None] for token_M in run), tokens_MC[known]])
    share_KC = (hits_KC + 0.05) / (count_M[known, None] + 1)
    features = []
    for feature_KC in (hits_KC.float().log1p() / 4, share_KC.log() / 4 + 1):
        feature_MC = torch.zeros(tokens_MC.shape, device=tokens_MC.device)
        features.append(feature_MC.index_copy_(0, known, feature_KC))
    return known, hits_KC, features
