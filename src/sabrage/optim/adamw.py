"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): Adam with the weight decay kept out of the moments.

m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,
w <- w - lr (weight_decay w + m' / (sqrt(v') + eps)),  m' and v' being m / (1 - b1^t) and v / (1 - b2^t).

It is torch's own, fused: one kernel reads gradient, moments and weight once and writes the last three. The
fused CPU kernel gives the same bits for any number of threads.
"""

from dataclasses import dataclass

import torch
from torch import nn

from sabrage.parts import Knobs, Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Fused AdamW; the defaults are those of the NoCap baseline. `lr` and `weight_decay` are peak values.

    With `every` = n the weights move at each n-th step, by the gradients summed since the last.
    """

    lr: float = 0.0018
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    every: int = 1

    def problems(self) -> list[str]:
        found = [
            f"AdamW.{name}={getattr(self, name)}, allowed: at least 0"
            for name in ("lr", "eps", "weight_decay")
            if getattr(self, name) < 0
        ]
        if self.every < 1:
            found.append(f"AdamW.every={self.every}, allowed: at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"AdamW.betas={self.betas}, allowed: two numbers from 0 to below 1")
        return found

    def build(self, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The optimizer with its state already there, so that a fresh one can be saved or loaded into."""
        optimizer = torch.optim.AdamW(
            [parameter for _, parameter in parameters],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
        for _, parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def hyperparameters(self, knobs: Knobs) -> dict[str, float]:
        return {"lr": self.lr * knobs.lr, "weight_decay": self.weight_decay * knobs.weight_decay}
