"""One optimization step: micro-batches forward and backward, gradients averaged, parameters updated."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.model.lm import LM
from sabrage.optim.groups import Optimizers
from sabrage.parts import Batch, Knobs, Precision
from sabrage.train.world import World


class Learner(nn.Module):
    """Everything that learns: the model and whatever the objective adds.

    forward(tokens_BT, targets_BT, documents_BT, loss_weights_W, window, layers) -> (total loss, named parts),
    both in nats. The parts hold what was noted for the log as well.
    """

    def __init__(self, model: LM, objective: nn.Module, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.precision, self.device = precision, device
        # A submodule: the scale lives on the device and in the checkpoints.
        self.scaler = precision.scaler()

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        documents_BT: Tensor | None,
        loss_weights_W: Tensor | None,
        window: int | None = None,
        layers: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with self.precision.autocast(self.device):
            context = Context(documents_BT=documents_BT, window=window, layers=layers)
            h_BTD = self.model(tokens_BT, context)
            batch = Batch(tokens_BT, targets_BT, documents_BT)
            loss = self.objective(h_BTD, batch, self.model, loss_weights_W)
        noted = {name: torch.stack(values).mean() for name, values in context.readings.items()}
        return sum(context.losses.values(), loss.total), loss.parts | context.losses | noted


def compiled(function: Callable, wanted: bool) -> Callable:
    """`function` as one graph without breaks, or as it is."""
    return torch.compile(function, fullgraph=True, dynamic=False) if wanted else function


class TrainStep:
    """step(batch, knobs) -> mean loss of the step, a 0-D tensor on the device; never waits for the device."""

    def __init__(
        self, learner: Learner, optimizers: Optimizers, world: World, *, micro_tokens: int, compile: bool
    ) -> None:
        self.learner, self.optimizers, self.world = learner, optimizers, world
        self.micro_tokens = micro_tokens
        self.forward = compiled(learner, compile)
        # What the newest micro-batch showed beside its loss, on the device.
        self.parts: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, knobs: Knobs) -> Tensor:
        rows = micro_rows(batch.tokens_BT.shape, self.micro_tokens)
        weights, device = knobs.loss_weights, self.world.device
        weights_W = None
        if weights:
            # From pinned memory, since a copy from any other waits for the device.
            host_W = torch.tensor(weights, pin_memory=device.type == "cuda")
            weights_W = host_W.to(device, non_blocking=True)
        documents = batch.documents_BT
        pieces = zip(
            batch.tokens_BT.split(rows),
            batch.targets_BT.split(rows),
            documents.split(rows) if documents is not None else [None] * len(batch.tokens_BT),
            strict=False,
        )
        count = batch.tokens_BT.shape[0] // rows
        scaler, found_inf = self.learner.scaler, None
        mean = torch.zeros((), device=device)
        for tokens_BT, targets_BT, documents_BT in pieces:
            shape = knobs.window, knobs.layers
            total, parts = self.forward(tokens_BT, targets_BT, documents_BT, weights_W, *shape)
            (total / count if scaler is None else total / count * scaler.scale).backward()
            mean += total.detach() / count
        self.parts = {name: part.detach() for name, part in parts.items()}
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        self.world.average(gradients)
        if scaler is not None:
            found_inf = scaler.unscale(gradients)
        self.optimizers.step(knobs, found_inf=found_inf)
        self.optimizers.zero_grad()
        self.world.average([mean])
        return mean

    def readings(self) -> dict[str, float]:
        """What the log shows of the newest micro-batch and of the precision's state; waits for the device."""
        values = torch.stack(list(self.parts.values())).tolist() if self.parts else []
        state = {} if self.learner.scaler is None else self.learner.scaler.readings()
        return dict(zip(self.parts, values, strict=True)) | state


@cache
def micro_rows(shape: torch.Size, micro_tokens: int) -> int:
    """Rows of a micro-batch: the largest divisor of the batch's rows that stays within `micro_tokens`."""
    rows, length = shape
    fits = [count for count in range(1, rows + 1) if rows % count == 0 and count * length <= micro_tokens]
    return max(fits, default=1)
