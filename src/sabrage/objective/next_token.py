"""Next-token prediction: the mean cross-entropy of token t+1 given tokens 0..t, in nats."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sabrage.losses import Loss, Objective
from sabrage.parts import Batch


@dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """The plain language-model loss."""

    def build(self, *, dim: int, vocab_size: int) -> nn.Module:
        return NextTokenLoss()


class NextTokenLoss(nn.Module):
    """The module of `NextToken`."""

    def forward(self, h_BTD: Tensor, batch: Batch, model: Any, loss_weights_W: Tensor | None = None) -> Loss:
        return Loss(model.head.loss(h_BTD, batch.targets_BT), {})
