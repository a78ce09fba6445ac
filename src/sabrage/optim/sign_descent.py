"""Sign descent: w <- w - lr sign(g), for the few numbers whose gradient says only which way to go.

It moves the selection bias of routers without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664), whose
gradient is the load of an expert less the mean load. As a gradient it adds up over micro-batches and
processes like every other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sabrage.parts import Knobs, Optimizer


@dataclass(frozen=True, kw_only=True)
class SignDescent(Optimizer):
    """Moves every number by `lr`, the same all the time, against its gradient; without state."""

    lr: float = 0.001

    def problems(self) -> list[str]:
        return [] if self.lr >= 0 else [f"SignDescent.lr={self.lr}, allowed: at least 0"]

    def build(self, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return SignDescentOptimizer([parameter for _, parameter in parameters], lr=self.lr)

    def hyperparameters(self, knobs: Knobs) -> dict[str, float]:
        return {"lr": self.lr}


class SignDescentOptimizer(torch.optim.Optimizer):
    """The optimizer of the part `SignDescent`, with one parameter group: lr."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, unless `found_inf` holds 1; parameters without a gradient stay. No device sync."""
        (group,) = self.param_groups
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not moving:
            return
        signs = list(torch._foreach_sign([parameter.grad for parameter in moving]))
        if self.found_inf is not None:
            # A gradient that is no number has no sign to multiply with zero.
            signs = [torch.where(self.found_inf > 0, 0.0, sign) for sign in signs]
        torch._foreach_add_(moving, signs, alpha=-group["lr"])
