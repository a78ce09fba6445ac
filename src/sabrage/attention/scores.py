"""Changes to attention scores before the softmax, each a small part: ALiBi, a learned bias, a soft cap.

A part builds a module whose `function(num_keys)` is score' = function(score, head, distance): elementwise,
of tensors that broadcast, in fp32. `head` counts query heads from 0, `distance` is tokens from key to query;
where it is negative or a mask hides the key the result counts for nothing. The reference calls the function
on whole tensors and FlexAttention inside its kernel, so that both do the same maths.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.config import Part

# function(score, head, distance) -> score
ScoreFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class ScoreModule(nn.Module, ABC):
    """What a score part builds; `gathers` says whether its function looks a number up for every pair."""

    gathers = False

    @abstractmethod
    def function(self, num_keys: int) -> ScoreFunction:
        """The function for distances below `num_keys`; what it needs is computed here, once."""


@dataclass(frozen=True, kw_only=True)
class ScorePart(Part, ABC):
    """Changes scores; several are applied in the order given."""

    @abstractmethod
    def build(self, *, heads: int) -> ScoreModule: ...


@dataclass(frozen=True, kw_only=True)
class Alibi(ScorePart):
    """Attention with linear biases (Press et al. 2021, arXiv 2108.12409): score - slope_h * distance.

    Of a power of two of heads, head h (from 1) has the slope 2^(-8 h / H). Of another number the first ones
    are those of the next lower power of two and the rest every other one of twice that power.
    """

    def build(self, *, heads: int) -> ScoreModule:
        return AlibiSlopes(heads)


class AlibiSlopes(ScoreModule):
    """The slopes of `Alibi`, (H,) fp32, not saved with the weights."""

    slopes_H: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes_H", torch.tensor(alibi_slopes(heads)), persistent=False)

    def function(self, num_keys: int) -> ScoreFunction:
        slopes_H = self.slopes_H
        return lambda score, head, distance: score - slopes_H[head] * distance


def alibi_slopes(heads: int) -> list[float]:
    """One slope for each head."""
    lower = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * (index + 1) / lower) for index in range(lower)]
    between = [2 ** (-4 * (index + 1) / lower) for index in range(0, 2 * lower, 2)]
    return first + between[: heads - lower]


@dataclass(frozen=True, kw_only=True)
class RelativeBias(ScorePart):
    """A learned bias by head and bucket of distances (T5, Raffel et al. 2020, arXiv 1910.10683).

    Half of the buckets hold one distance each, the others ranges that widen by a constant factor up to
    `max_distance`, beyond which all is one bucket. It starts at zero. Each layer has its own.
    """

    buckets: int = 32
    max_distance: int = 128

    def problems(self) -> list[str]:
        if self.buckets < 2 or self.max_distance <= self.buckets // 2:
            return [
                f"buckets={self.buckets}, max_distance={self.max_distance}; allowed: 2 buckets or more, and "
                "a distance beyond half their number; use buckets=32, max_distance=128"
            ]
        return []

    def build(self, *, heads: int) -> ScoreModule:
        return RelativeBiasTable(self, heads)


class RelativeBiasTable(ScoreModule):
    """The table of `RelativeBias`, `bias_HN` (H, buckets)."""

    gathers = True
    bucket_S: Tensor

    def __init__(self, part: RelativeBias, heads: int) -> None:
        super().__init__()
        # Not called a weight: it is no matrix that maps vectors, and optimizers of matrices leave it alone.
        self.bias_HN = nn.Parameter(torch.zeros(heads, part.buckets))
        buckets = [bucket(distance, part) for distance in range(part.max_distance + 1)]
        self.register_buffer("bucket_S", torch.tensor(buckets), persistent=False)

    def function(self, num_keys: int) -> ScoreFunction:
        # A number for each distance: in the backward pass of a kernel few threads then add to the same one.
        far = self.bucket_S.shape[0] - 1
        distance_S = torch.arange(num_keys, device=self.bucket_S.device).clamp(max=far)
        bias_HS = self.bias_HN[:, self.bucket_S[distance_S]]
        return lambda score, head, distance: score + bias_HS[head, distance.clamp(min=0)]


def bucket(distance: int, part: RelativeBias) -> int:
    """The bucket of a distance of 0 or more."""
    exact = part.buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(part.max_distance / exact)
    return min(exact + int(share * (part.buckets - exact)), part.buckets - 1)


@dataclass(frozen=True, kw_only=True)
class SoftCap(ScorePart):
    """cap * tanh(score / cap), so that no score exceeds the cap (Gemma 2, arXiv 2408.00118)."""

    cap: float = 50.0

    def problems(self) -> list[str]:
        return [] if self.cap > 0 else [f"cap={self.cap} must be above 0; Gemma 2 uses 50"]

    def build(self, *, heads: int) -> ScoreModule:
        return SoftCapped(self.cap)


class SoftCapped(ScoreModule):
    """The module of `SoftCap`; it holds nothing."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def function(self, num_keys: int) -> ScoreFunction:
        cap = self.cap
        return lambda score, head, distance: cap * torch.tanh(score / cap)
