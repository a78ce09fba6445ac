"""What counts say about a token: how often its context has been seen, and how often it went on like this.

An expert is a kind of context: the last k tokens, looked up in the training text (k from 1) or in the same
document so far (k from 0, which asks for no context at all). Its probability of a token is

    hits / count,    count = occurrences of the context, hits = those that went on with the token

and it has none where the context was never seen. A context ends at the beginning of its row and document, so
that experts see what the network sees. Everything depends on tokens up to the context's last one, and the
hits over all tokens of the vocabulary sum to the count.

Shapes: N tokens, E experts, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from sabrage.blend.grams import Grams


@dataclass(frozen=True)
class Evidence:
    """Of N scored tokens: `count_NE`, `hits_NE`, what the gate may look at, the network's log-probability.

    Nothing in `features_NF` depends on the scored token or on what comes after it.
    """

    count_NE: Tensor
    hits_NE: Tensor
    features_NF: Tensor
    network_N: Tensor

    def __len__(self) -> int:
        return len(self.network_N)

    def __getitem__(self, chosen: Tensor | slice) -> Self:
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @classmethod
    def joined(cls, pieces: Sequence[Self]) -> Self:
        """One after another."""
        return cls(*(torch.cat([getattr(piece, field.name) for piece in pieces]) for field in fields(cls)))


def rows_evidence(
    grams: Grams | None,
    text_orders: int,
    document_orders: int,
    vocab_size: int,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    documents_BT: Tensor | None,
    network: tuple[Tensor, Tensor],
) -> Evidence:
    """The evidence on the targets of whole rows, B T tokens; `targets_BT` are the tokens one further on.

    `network` is its log-probabilities of the targets, (B T,), and what the gate may see of it, (B T, .).
    A target of -1 is none; what is said of it means nothing.
    """
    targets_N = targets_BT.flatten().clamp(min=0)
    depth_N, group_N = depths(tokens_BT, documents_BT)
    log_network_N, seen_NX = network
    counts, hits, features = [], [], [seen_NX]
    if grams is not None:
        for order in range(1, text_orders + 1):
            context = context_of(tokens_BT, order)
            count_N, ways_N = grams.count(context)
            hits_N, _ = grams.count([*context, targets_N])
            known_N = depth_N >= order
            count_N, ways_N, hits_N = (torch.where(known_N, x, 0) for x in (count_N, ways_N, hits_N))
            counts.append(count_N)
            hits.append(hits_N)
            evenness_N = ways_N.clamp(min=1).log() - count_N.clamp(min=1).log()
            features.append(torch.stack((tamed(count_N), tamed(ways_N), evenness_N), 1))
    for order in range(document_orders):
        known_N = depth_N >= order
        if order:
            # What would reach beyond the document is a context like no other, not that of another place.
            last_N = torch.where(known_N, tokens_BT.roll(order - 1, 1).flatten(), vocab_size)
            group_N = numbered(group_N * (vocab_size + 1) + last_N)
        count_N = torch.where(known_N, earlier(group_N), 0)
        hits_N = torch.where(known_N, earlier(group_N * vocab_size + targets_N), 0)
        counts.append(count_N)
        hits.append(hits_N)
        features.append(tamed(count_N)[:, None])
    return Evidence(
        torch.stack(counts, 1).int(), torch.stack(hits, 1).int(), torch.cat(features, 1), log_network_N
    )


def tamed(count_N: Tensor) -> Tensor:
    """A count as a feature of about unit size."""
    return count_N.float().log1p() / 4 - 1


def context_of(tokens_BT: Tensor, order: int) -> list[Tensor]:
    """The last `order` tokens at each place, oldest first, (B T,) each; what precedes a row means nothing."""
    return [tokens_BT.roll(back, 1).flatten() for back in range(order - 1, -1, -1)]


def depths(tokens_BT: Tensor, documents_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tokens of the document in the row so far, a number for each document of each row), (B T,) both."""
    rows, length = tokens_BT.shape
    time_T = torch.arange(length, device=tokens_BT.device)
    row_B1 = torch.arange(rows, device=tokens_BT.device)[:, None]
    if documents_BT is None:
        return (time_T + 1).expand(rows, -1).flatten(), row_B1.expand(-1, length).flatten()
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    first_BT[:, 1:] = documents_BT.diff(dim=1) != 0
    start_BT = torch.where(first_BT, time_T, 0).cummax(1).values
    return (time_T - start_BT + 1).flatten(), (row_B1 * length + start_BT).flatten()


def numbered(key_N: Tensor) -> Tensor:
    """Equal keys as equal small numbers."""
    return torch.unique(key_N, return_inverse=True)[1]


def earlier(key_N: Tensor) -> Tensor:
    """At each place, how often its key stands before it."""
    sorted_N, order_N = torch.sort(key_N, stable=True)
    place_N = torch.arange(len(key_N), device=key_N.device)
    new_N = torch.ones_like(key_N, dtype=torch.bool)
    new_N[1:] = sorted_N[1:] != sorted_N[:-1]
    first_N = torch.where(new_N, place_N, 0).cummax(0).values
    return torch.empty_like(key_N).scatter_(0, order_N, place_N - first_N)
