"""What stands in a place's document before it: counts of its contexts, and where single tokens were last.

Shapes: N places, M of them at once, C tokens that are asked for at each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sabrage.blend.neural import Rows


def contexts(orders: int, rows: Rows, vocab_size: int) -> list[Tensor]:
    """Of contexts of 0 to `orders` - 1 tokens, (N,) each: equal keys are equal contexts of one document.

    One that would reach beyond its document is like no other, so that it was never there before.
    """
    keys = [rows.group_BT.flatten()]
    for order in range(1, orders):
        deep_BT = rows.depth_BT >= order
        last_BT = torch.where(deep_BT, rows.tokens_BT.roll(order - 1, 1), vocab_size)
        keys.append(numbered(keys[-1] * (vocab_size + 1) + last_BT.flatten()))
    return keys[:orders]


def in_document(keys: Sequence[Tensor], rows: Rows, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """(count, hits) of `contexts` in the document so far, (N,) each."""
    targets_N = rows.targets_BT.flatten()
    return [(earlier(key_N), earlier(key_N * vocab_size + targets_N)) for key_N in keys]


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


class Occurrences:
    """Where each key stands in a list of them, (N,)."""

    def __init__(self, key_N: Tensor) -> None:
        self.keys, number_N = torch.unique(key_N, return_inverse=True)
        self.size = len(key_N)
        # Sorted by key and then by place, as one number.
        self.places_N = (number_N * self.size + torch.arange(self.size, device=key_N.device)).sort().values

    def before(self, asked_MC: Tensor, place_M: Tensor) -> tuple[Tensor, Tensor]:
        """(how often the keys that are asked for stand before these places, how far back last), (M, C) both.

        A distance of 0 stands for never.
        """
        number_MC = torch.searchsorted(self.keys, asked_MC).clamp(max=len(self.keys) - 1)
        begin_MC = number_MC * self.size
        low_MC, high_MC = (
            torch.searchsorted(self.places_N, at_MC) for at_MC in (begin_MC, begin_MC + place_M[:, None])
        )
        count_MC = torch.where(self.keys[number_MC] == asked_MC, high_MC - low_MC, 0)
        last_MC = self.places_N[(high_MC - 1).clamp(min=0)] - begin_MC
        return count_MC, torch.where(count_MC > 0, place_M[:, None] - last_MC, 0)
