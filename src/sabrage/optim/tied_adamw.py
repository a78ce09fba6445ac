"""AdamW for two tables that are one until a given step and then go their own ways (modded-nanogpt).

While they are tied both get the sum of their gradients, so that equal weights and equal moments stay equal,
bit for bit; from then on each keeps what it has and follows its own gradient. Nothing else in a run knows of
it: shapes, graph and checkpoints are those of two tables all along.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sabrage.config import ConfigError
from sabrage.optim.adamw import AdamW
from sabrage.parts import Knobs, Optimizer


@dataclass(frozen=True, kw_only=True)
class TiedAdamW(Optimizer):
    """`adamw` for an embedding's table and the head's, which are one until step `until`.

    The head must start as a copy: `tied=false`, `copied=true`.
    """

    until: int
    adamw: AdamW = field(default_factory=AdamW)

    def problems(self) -> list[str]:
        return [] if self.until >= 0 else [f"TiedAdamW.until={self.until}, allowed: at least 0"]

    def build(self, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises ConfigError unless there are two parameters, equal to each other."""
        tables = [parameter for _, parameter in parameters]
        if len(tables) != 2 or not torch.equal(*tables):
            raise ConfigError(
                f"TiedAdamW takes two equal tables and got {', '.join(name for name, _ in parameters)}; set "
                "model.head.tied=false and model.head.copied=true, and give the rest to another group"
            )
        optimizer = self.adamw.build(parameters)
        optimizer.register_step_pre_hook(share_gradients)
        optimizer.param_groups[0]["tied"] = True
        return optimizer

    def due(self, step: int) -> bool:
        return self.adamw.due(step)

    def hyperparameters(self, knobs: Knobs) -> dict[str, float]:
        return self.adamw.hyperparameters(knobs) | {"tied": knobs.step < self.until}


def share_gradients(optimizer: torch.optim.Optimizer, arguments: Any, named: Any) -> None:
    """Gives both tables the sum of their gradients while they are tied."""
    (group,) = optimizer.param_groups
    if group["tied"]:
        first, second = (table.grad for table in group["params"])
        first.add_(second)
        second.copy_(first)
