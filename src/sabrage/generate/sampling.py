"""From logits to a token: greedy, or drawn from the likeliest.

Of tokens seen before, logits above 0 are divided by the repetition penalty and others multiplied by it
(Keskar et al. 2019, arXiv 1909.05858). p = softmax(logits / temperature) is cut to the k likeliest tokens,
then to the smallest set whose probability reaches top_p (Holtzman et al. 2019, arXiv 1904.09751), and to
those with at least min_p times the probability of the likeliest (Nguyen et al. 2024, arXiv 2407.01082), and
renormalised. A number u in [0, 1) then takes the first token whose cumulated probability exceeds u.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

from sabrage.generate.cache import upload


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw. Raises ValueError.

    Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and a repetition penalty of 1 change nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            "temperature >= 0": self.temperature >= 0,
            "top_k >= 0": self.top_k >= 0,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "0 <= min_p <= 1": 0 <= self.min_p <= 1,
            "repetition_penalty > 0": self.repetition_penalty > 0,
        }
        broken = [rule for rule, kept in rules.items() if not kept]
        if broken:
            raise ValueError(f"got {self}; allowed: {', '.join(broken)}")

    @property
    def cuts(self) -> bool:
        """Whether tokens are left out, for which all of them have to be sorted."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is drawn from, (B, V) fp32; temperature must be above 0, no token was seen."""
    settings_B5 = torch.tensor([astuple(sampling)], device=logits_BV.device).expand(len(logits_BV), -1)
    return distribution(logits_BV.float(), settings_B5, cut=sampling.cuts)


def distribution(logits_BV: Tensor, settings_B5: Tensor, *, cut: bool) -> Tensor:
    """Probabilities with settings of its own for each row, the fields of `Sampling` in order.

    Without `cut` nothing is sorted, for rows that leave no token out; for these it changes no bit.
    """
    temperature, top_k, top_p, min_p, _ = settings_B5[:, :, None].unbind(1)
    scaled_BV = logits_BV / temperature.masked_fill(temperature == 0, 1.0)
    if cut:
        ordered, order = scaled_BV.sort(descending=True, stable=True)
        ranks = torch.arange(ordered.shape[-1], device=ordered.device)
        kept = (ranks < top_k) | (top_k == 0)
        chances = ordered.masked_fill(~kept, float("-inf")).softmax(-1)
        before = chances.cumsum(-1) - chances
        kept &= ((before < top_p) | (top_p >= 1)) & (chances >= min_p * chances[:, :1])
        kept = torch.zeros_like(kept).scatter(-1, order, kept)
        scaled_BV = scaled_BV.masked_fill(~kept, float("-inf"))
    return scaled_BV.softmax(-1)


def pick(chances_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token that each number in [0, 1) falls on, (B,) int64; never one without probability."""
    # Apple's GPUs have no fp64.
    wide = torch.float32 if chances_BV.device.type == "mps" else torch.float64
    sums_BV = chances_BV.cumsum(-1, dtype=wide)
    aims_B1 = uniform_B.to(wide)[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, aims_B1, right=True)[:, 0].clamp(max=chances_BV.shape[-1] - 1)


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token a row, (B,) int64."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    uniform_B = torch.rand(logits_BV.shape[0], generator=generator, device=logits_BV.device)
    return pick(probabilities(logits_BV, sampling), uniform_B)


class Sampler:
    """Draws for the rows of a batch, each with settings, seen tokens and random numbers of its own.

    The n-th number of a row is a function of its seed and n alone (Philox), so that what else is in the
    batch changes no draw. What a step reads lies in tensors that stay where they are.
    """

    def __init__(self, *, rows: int, vocab_size: int, device: torch.device) -> None:
        self.settings_B5 = torch.ones(rows, 5, device=device)
        self.seen_BV = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self.uniform_B = torch.zeros(rows, device=device)
        self.host_B = torch.zeros(rows)
        self.samplings: list[Sampling | None] = [None] * rows
        self.numbers = [np.random.Generator(np.random.Philox(0)) for _ in range(rows)]

    def place(self, row: int, sampling: Sampling, seed: int) -> None:
        """Gives a row to another sequence, none of whose tokens was seen."""
        self.samplings[row] = sampling
        self.numbers[row] = np.random.Generator(np.random.Philox(key=seed % 2**64))
        self.settings_B5[row] = torch.tensor(astuple(sampling))
        self.seen_BV[row] = False

    def clear(self, row: int) -> None:
        """Takes the sequence away from a row."""
        self.samplings[row] = None

    @property
    def cut(self) -> bool:
        """Whether a row leaves tokens out."""
        return any(sampling is not None and sampling.cuts for sampling in self.samplings)

    def advance(self, rows: Iterable[int]) -> None:
        """Takes the next random number of each of the rows."""
        for row in rows:
            self.host_B[row] = float(self.numbers[row].random(dtype=np.float32))
        upload(self.host_B, self.uniform_B)

    def see(self, tokens_BT: Tensor, rows: slice = slice(None)) -> None:
        """Notes the tokens that the rows hold."""
        self.seen_BV[rows].scatter_(1, tokens_BT, True)

    def __call__(self, logits_BV: Tensor, *, cut: bool, rows: slice = slice(None)) -> Tensor:
        """One token a row, (B,) int64; `cut` as in `distribution`."""
        logits_BV, settings_B5 = logits_BV.float(), self.settings_B5[rows]
        penalty_B1 = settings_B5[:, 4:]
        punished_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
        logits_BV = torch.where(self.seen_BV[rows], punished_BV, logits_BV)
        drawn_B = pick(distribution(logits_BV, settings_B5, cut=cut), self.uniform_B[rows])
        return torch.where(settings_B5[:, 0] > 0, drawn_B, logits_BV.argmax(-1))
