"""From logits to a token: greedy, or sampled with temperature, top-k and top-p (nucleus).

p = softmax(logits / temperature), cut to the k likeliest tokens, then to the smallest set whose probability
reaches top_p (Holtzman et al. 2019, arXiv 1904.09751), and renormalised.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw; temperature 0 is greedy, top_k 0 and top_p 1 cut nothing. Raises ValueError."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}; allowed: "
                "temperature >= 0, top_k >= 0, 0 < top_p <= 1"
            )


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from, (B, V) fp32; temperature must be above 0."""
    scaled = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    chances_BV = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = chances_BV.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
        chances_BV = torch.zeros_like(chances_BV).scatter(-1, order, kept)
        chances_BV = chances_BV / chances_BV.sum(-1, keepdim=True)
    return chances_BV


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, (B,) int64."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    return torch.multinomial(probabilities(logits_BV, sampling), 1, generator=generator)[:, 0]
