"""Tokens further ahead from the same hidden state and the same head, in one pass of it.

    loss = sum_k weight_k * CE(softmax(head(h_t)), token t + k),    k = 1 .. tokens

No head and no parameter is added. One distribution cannot fit several tokens, so the plan lets all weights
but the first fall to zero within the run: what lies further ahead is signal while little is known.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sabrage.losses import Loss, Objective
from sabrage.objective.targets import ahead, score_together
from sabrage.parts import Batch


@dataclass(frozen=True, kw_only=True)
class SharedAhead(Objective):
    """Scores the next `tokens` tokens at once; as many loss weights, the first being the next token's."""

    tokens: int = 3

    def problems(self) -> list[str]:
        return [] if self.tokens >= 1 else [f"objective.tokens={self.tokens} must be at least 1"]

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return SharedAheadLoss(self.tokens)

    def num_weights(self) -> int:
        return self.tokens


class SharedAheadLoss(nn.Module):
    """The module of `SharedAhead`."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.distances = range(1, tokens + 1)

    def forward(self, h_BTD: Tensor, batch: Batch, model: Any, loss_weights_W: Tensor | None) -> Loss:
        targets = {f"loss_ahead_{distance}": ahead(batch, distance) for distance in self.distances}
        return score_together(h_BTD, targets, model, loss_weights_W)
