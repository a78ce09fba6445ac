"""The fixed metric: mean next-token cross-entropy, in nats, over the first targets of the validation split.

Rows are cut one after another; the last one may be short. Every target is scored exactly once, and the
result does not depend on the batch size beyond rounding.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sabrage.context import Context
from sabrage.model.lm import LM
from sabrage.parts import Precision
from sabrage.train.step import compiled
from sabrage.train.world import World


class Evaluator:
    """evaluator() -> loss; rows of `length` tokens, `batch_tokens` tokens at a time."""

    def __init__(
        self,
        model: LM,
        precision: Precision,
        world: World,
        validation: np.ndarray,
        *,
        num_targets: int,
        length: int,
        batch_tokens: int,
        compile: bool,
    ) -> None:
        if len(validation) < num_targets + 1:
            raise ValueError(
                f"the validation split has {len(validation):,} tokens and budget.evaluation_tokens="
                f"{num_targets:,} needs one more than that; lower budget.evaluation_tokens"
            )
        self.model, self.precision, self.world = model, precision, world
        self.tokens = validation[: num_targets + 1].astype(np.int64)
        self.num_targets, self.length = num_targets, length
        self.batch_rows = max(min(batch_tokens, num_targets) // length, 1)
        self.score: Callable = compiled(self._score, compile)

    def _score(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with self.precision.autocast(self.world.device):
            return self.model.head.loss(self.model(tokens_BT, Context()), targets_BT)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Equally shaped (tokens_BT, targets_BT); what fills up the last one has targets of -1."""
        rows = -(-self.num_targets // self.length)
        rows = -(-rows // self.batch_rows) * self.batch_rows
        tokens, targets = np.zeros(rows * self.length, np.int64), np.full(rows * self.length, -1)
        tokens[: self.num_targets], targets[: self.num_targets] = self.tokens[:-1], self.tokens[1:]
        shape = (-1, self.batch_rows, self.length)
        for pair in zip(tokens.reshape(shape), targets.reshape(shape), strict=True):
            inputs, outputs = (torch.from_numpy(array).to(self.world.device) for array in pair)
            yield inputs, outputs

    @torch.no_grad()
    def __call__(self) -> float:
        was_training = self.model.training
        self.model.eval()
        sums = [torch.zeros((), device=self.world.device)]
        for index, (tokens_BT, targets_BT) in enumerate(self.batches()):
            if index % self.world.size == self.world.rank:
                count = (targets_BT >= 0).sum()
                sums.append(self.score(tokens_BT, targets_BT).float() * count)
        self.model.train(was_training)
        total = torch.stack(sums).cpu().double().sum().item()
        return self.world.total(total) / self.num_targets
