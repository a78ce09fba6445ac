"""A transform for each token further ahead, one unembedding (Gloeckle et al. 2024, arXiv 2404.19737).

    loss = sum_k weight_k * CE(softmax(head(f_k(h_t))), token t + k),    f_1(h) = h, f_k a block

The transforms serve training alone; the model decodes and is validated without them.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sabrage.context import Context
from sabrage.losses import Loss, Objective
from sabrage.objective.block import ExtraBlock
from sabrage.objective.targets import ahead, score_apart
from sabrage.parts import Batch, FeedForward, Mixer


@dataclass(frozen=True, kw_only=True)
class HeadsAhead(Objective):
    """Scores the next `tokens` tokens, each but the first through a block: `feedforward`, and `mixer` if any.

    Takes as many loss weights, the first being the next token's.
    """

    tokens: int = 2
    feedforward: FeedForward
    mixer: Mixer | None = None

    def problems(self) -> list[str]:
        return [] if self.tokens >= 1 else [f"objective.tokens={self.tokens} must be at least 1"]

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return HeadsAheadLoss(self, dim=dim)

    def num_weights(self) -> int:
        return self.tokens

    def extra_heads(self) -> int:
        return self.tokens - 1

    def flops(self, dim: int, sequence_length: int, head: int) -> int:
        mixed = self.mixer.flops(dim, sequence_length) if self.mixer else 0
        return self.extra_heads() * (mixed + self.feedforward.flops(dim) + head)


class HeadsAheadLoss(nn.Module):
    """The module of `HeadsAhead`."""

    def __init__(self, part: HeadsAhead, *, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ExtraBlock(part.mixer, part.feedforward, dim=dim, layer=index)
            for index in range(part.extra_heads())
        )

    def forward(self, h_BTD: Tensor, batch: Batch, model: Any, loss_weights_W: Tensor | None) -> Loss:
        context = Context(documents_BT=batch.documents_BT)
        hidden = [h_BTD, *(block(h_BTD, context) for block in self.blocks)]
        targets = {f"loss_ahead_{1 + index}": ahead(batch, 1 + index) for index in range(len(hidden))}
        return score_apart(hidden, targets, model, loss_weights_W).plus(context.losses)
