"""The fixed metric: mean next-token cross-entropy, in nats, over the first targets of the validation split.

Rows are cut one after another; the last one may be short. Every target is scored exactly once, and the
result does not depend on the batch size beyond rounding. Where documents are kept apart, their borders are
the ends of text among the inputs so far: what comes later decides nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sabrage.context import Context
from sabrage.model.lm import LM
from sabrage.parts import Precision
from sabrage.train.step import compiled
from sabrage.train.world import World

SHORTEST_STRETCH = 64


class Evaluator:
    """evaluator(window, layers) -> loss; rows of `length` tokens, `batch_tokens` tokens at a time.

    `shapes` are the windows and active layers that it will be asked for, which the warm-up compiles. With
    `end_of_text` the documents of a row, each of which begins with it, do not see each other.
    """

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
        shapes: Sequence[tuple[int | None, int | None]] = ((None, None),),
        end_of_text: int | None = None,
    ) -> None:
        if len(validation) < num_targets + 1:
            raise ValueError(
                f"the validation split has {len(validation):,} tokens and budget.evaluation_tokens="
                f"{num_targets:,} needs one more than that; lower budget.evaluation_tokens"
            )
        self.model, self.precision, self.world = model, precision, world
        self.tokens = validation[: num_targets + 1].astype(np.int64)
        self.num_targets, self.length = num_targets, length
        self.shapes, self.end_of_text = shapes, end_of_text
        self.batch_rows = max(min(batch_tokens, num_targets) // length, 1)
        self.forward: Callable = compiled(self._forward, compile)

    def score(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        window: int | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """The mean loss of a batch over its targets that are not -1, a 0-D tensor."""
        loss, _ = self.scored(tokens_BT, targets_BT, window, layers)
        return loss

    def scored(
        self, tokens_BT: Tensor, targets_BT: Tensor, window: int | None, layers: int | None
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the states h_BTD that the head was given."""
        found: tuple[Tensor, Tensor] = self.forward(
            tokens_BT, targets_BT, self.documents(tokens_BT), window, layers
        )
        return found

    def documents(self, tokens_BT: Tensor) -> Tensor | None:
        """How many documents have begun in the row so far, (B, T) int32, where they are kept apart.

        Outside of the graph, which then takes documents as that of training does: as an input.
        """
        if self.end_of_text is None:
            return None
        return (tokens_BT == self.end_of_text).cumsum(1, dtype=torch.int32)

    def _forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        documents_BT: Tensor | None,
        window: int | None,
        layers: int | None,
    ) -> tuple[Tensor, Tensor]:
        with self.precision.autocast(self.world.device):
            context = Context(documents_BT=documents_BT, window=window, layers=layers)
            h_BTD = self.model(tokens_BT, context)
            return self.model.head.loss(h_BTD, targets_BT), h_BTD

    def batches(self, text: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Equally shaped (tokens_BT, targets_BT); what fills up the last one has targets of -1.

        They are those of the metric, or of another `text`, (N,), of which N - 1 tokens are targets.
        """
        text = self.tokens if text is None else text
        count = len(text) - 1
        rows = -(-count // self.length)
        rows = -(-rows // self.batch_rows) * self.batch_rows
        tokens, targets = np.zeros(rows * self.length, np.int64), np.full(rows * self.length, -1)
        tokens[:count], targets[:count] = text[:-1], text[1:]
        shape = (-1, self.batch_rows, self.length)
        for pair in zip(tokens.reshape(shape), targets.reshape(shape), strict=True):
            inputs, outputs = (torch.from_numpy(array).to(self.world.device) for array in pair)
            yield inputs, outputs

    def __call__(self, window: int | None = None, layers: int | None = None) -> float:
        return self.total(window, layers) / self.num_targets

    def by_position(
        self, window: int | None = None, layers: int | None = None
    ) -> list[tuple[int, int, float]]:
        """(first, end, loss) of the targets at positions from `first` to before `end` of their rows.

        The stretches grow by powers of two, so that it shows what each doubling of the context brings.
        """
        longest = min(self.length, self.num_targets)
        ends = [0, *(SHORTEST_STRETCH << n for n in range(32) if SHORTEST_STRETCH << n < longest), longest]
        whole, rest = divmod(self.num_targets, self.length)
        found = []
        for first, end in pairwise(ends):
            count = whole * (end - first) + max(min(rest, end) - first, 0)
            found.append((first, end, self.total(window, layers, slice(first, end)) / count))
        return found

    @torch.no_grad()
    def total(self, window: int | None, layers: int | None, positions: slice | None = None) -> float:
        """The summed loss of all targets, or of those at some positions of their rows."""
        was_training = self.model.training
        self.model.eval()
        sums = [torch.zeros((), device=self.world.device)]
        for index, (tokens_BT, targets_BT) in enumerate(self.batches()):
            if index % self.world.size != self.world.rank:
                continue
            if positions is not None:
                chosen_BT = targets_BT[:, positions]
                targets_BT = torch.full_like(targets_BT, -1)
                targets_BT[:, positions] = chosen_BT
            count = (targets_BT >= 0).sum()
            loss = self.score(tokens_BT, targets_BT, window, layers).float() * count
            # The mean over no target is no number.
            sums.append(loss if positions is None else torch.where(count > 0, loss, 0.0))
        self.model.train(was_training)
        return self.world.total(torch.stack(sums).cpu().double().sum().item())
