"""Exact counts of every run of up to eight tokens of a text, in two sorted tables, and of runs with gaps.

The text is a ring, so that every token has seven after it. A run of four tokens is one number, its digits to
the base of the vocabulary. The distinct numbers, sorted, are the first table; a shorter run is all numbers
that begin with it, an interval. A run of eight is the pair of two places in that table, again one number, and
the distinct pairs are the second table. So a count is the difference of two running totals, found by
bisection, as in a suffix array (Liu et al. 2024, "Infini-gram", arXiv 2401.17377) cut off at eight tokens.

Contexts whose tokens do not all touch (skip-grams; Guthrie et al. 2006, "A closer look at skip-gram
modelling", LREC), or count by their class, have a sorted table each, of the numbers that they make with the
token after them.

N tokens take two sorts of N numbers of 64 bits and at most 24 N bytes, and a sort and 8 N for each gap.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FOUR, LONGEST = 4, 8


def largest_vocabulary() -> int:
    """Four of its tokens must make one signed number of 64 bits."""
    return int((2**63 - 1) ** (1 / FOUR))


class Grams:
    """The counts of `text_N`, token ids below `vocab_size`, on its device.

    Each of `gaps` says how far before the token that is counted those of a context stand, the farthest first;
    below zero it is the token's class, by `classes_V`, that must be the same. Raises ValueError for a
    vocabulary that is too large and for a text without tokens.
    """

    def __init__(
        self,
        text_N: Tensor,
        vocab_size: int,
        gaps: Sequence[Sequence[int]] = (),
        classes_V: Tensor | None = None,
    ) -> None:
        if vocab_size > largest_vocabulary():
            raise ValueError(f"vocab_size={vocab_size}, allowed: up to {largest_vocabulary()}")
        if not len(text_N):
            raise ValueError("a text without tokens has no counts")
        self.vocab_size, self.size = vocab_size, len(text_N)
        number_N = text_N.long()
        for offset in range(1, FOUR):
            number_N = number_N * vocab_size + text_N.long().roll(-offset)
        self.fours, place_N, counts = torch.unique(number_N, return_inverse=True, return_counts=True)
        del number_N
        self.fours_before = running(counts)
        pair_N = place_N * len(self.fours) + place_N.roll(-FOUR)
        del place_N
        self.eights, counts = torch.unique(pair_N, return_counts=True)
        self.eights_before = running(counts)
        del pair_N, counts
        self.gapped = [Gapped(text_N, vocab_size, back, classes_V) for back in gaps]

    def count(self, run: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(occurrences, distinct ways to go on) of runs of 1 to 8 tokens, as many tensors.

        Their shapes are broadcast: one context, (N, 1), and many tokens after it, (N, C), are looked up so.
        Ways to go on are counted up to the end of the four or of the eight tokens that the run begins.
        """
        assert 1 <= len(run) <= LONGEST, len(run)
        if len(run) <= FOUR:
            low, high = self.interval(run)
            return self.fours_before[high] - self.fours_before[low], high - low
        low, high = self.pairs(run)
        return self.eights_before[high] - self.eights_before[low], high - low

    def followers(self, run: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
        """(tokens that followed runs of 1 to 7 tokens, (N, most); whether a run occurs at all, (N,)).

        `run` is as many tensors (N,). The occurrences of a run, sorted by what followed, are asked at the
        middles of `most` equal parts: a token that followed in a share of 1 / most of them or more is found,
        and one with a larger share several times. Of a run that never occurs the tokens mean nothing.
        """
        assert 1 <= len(run) < LONGEST, len(run)
        short = len(run) < FOUR
        low_N, high_N = self.interval(run) if short else self.pairs(run)
        before = self.fours_before if short else self.eights_before
        start_N, total_N = before[low_N].long(), (before[high_N] - before[low_N]).long()
        odd = torch.arange(1, 2 * most, 2, device=start_N.device)
        at_NM = start_N[:, None] + odd * total_N[:, None] // (2 * most)
        place_NM = torch.searchsorted(before, at_NM.int(), right=True) - 1
        # Of a run behind all others the place is one too many.
        place_NM = place_NM.clamp(max=len(before) - 2)
        if not short:
            place_NM = self.eights[place_NM] % len(self.fours)
        digit = self.vocab_size ** (FOUR - 1 - len(run) % FOUR)
        return self.fours[place_NM] // digit % self.vocab_size, total_N > 0

    def interval(self, run: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The places in the table of fours, from the first to before the second, that begin with `run`."""
        number = run[0].long()
        for token in run[1:]:
            number = number * self.vocab_size + token.long()
        width = self.vocab_size ** (FOUR - len(run))
        low, high = (torch.searchsorted(self.fours, end * width) for end in (number, number + 1))
        return low, high

    def pairs(self, run: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `interval`, of 4 to 8 tokens in the table of eights."""
        first, end = self.interval(run[:FOUR])
        places = len(self.fours)
        rest = self.interval(run[FOUR:]) if len(run) > FOUR else (0, places)
        low, high = (torch.searchsorted(self.eights, first * places + place) for place in rest)
        return low, torch.where(end > first, high, low)


def fits(back: Sequence[int], vocab_size: int, num_classes: int) -> bool:
    """Whether such a context and the token after it make one signed number of 64 bits."""
    number = vocab_size
    for distance in back:
        number *= vocab_size if distance > 0 else num_classes
    return number < 2**63


class Gapped:
    """How often tokens of `text_N`, a ring, followed contexts whose tokens stand `back` before them.

    Of a distance below zero the class of the token counts, by `classes_V`.
    """

    def __init__(
        self, text_N: Tensor, vocab_size: int, back: Sequence[int], classes_V: Tensor | None = None
    ) -> None:
        self.vocab_size, self.back, self.classes_V = vocab_size, tuple(back), classes_V
        self.num_classes = int(classes_V.max()) + 1 if classes_V is not None else 0
        assert classes_V is not None or min(back) > 0, back
        assert fits(back, vocab_size, self.num_classes), back
        run = [text_N.roll(abs(distance)) for distance in back]
        self.numbers = (self.number(run) * vocab_size + text_N).sort().values

    def number(self, run: Sequence[Tensor]) -> Tensor:
        """The context as one number."""
        number = torch.zeros_like(run[0], dtype=torch.int64)
        for distance, token in zip(self.back, run, strict=True):
            if distance > 0:
                number = number * self.vocab_size + token.long()
            else:
                assert self.classes_V is not None
                number = number * self.num_classes + self.classes_V[token.long()]
        return number

    def count(self, run: Sequence[Tensor]) -> Tensor:
        """Occurrences of contexts, as many tensors as `back`, or with the token after them, one more.

        Their shapes are broadcast.
        """
        *context, last = run
        if len(run) == len(self.back):
            low = self.number(run) * self.vocab_size
            high = low + self.vocab_size
        else:
            low = self.number(context) * self.vocab_size + last.long()
            high = low + 1
        low, high = (torch.searchsorted(self.numbers, end) for end in (low, high))
        return high - low


def running(counts: Tensor) -> Tensor:
    """How much stands before each place, and in all: one longer than `counts`."""
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
