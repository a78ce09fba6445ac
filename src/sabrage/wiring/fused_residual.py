"""`Residual` with residual, dropout and norm in one pass over memory; see `sabrage.kernels.residual_norm`.

The dropout mask is computed from a seed, the same forward and backward, and never stored; the linear layer
that follows reads the norm that the pass has written.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.kernels.backend import KernelBackend, choose_kernel, kernel_refusal
from sabrage.kernels.residual_norm import residual_norm, residual_norm_reference
from sabrage.norms import rms_norm
from sabrage.parts import Wiring
from sabrage.run.device import DeviceFacts
from sabrage.wiring.residual import Residual


@dataclass(frozen=True, kw_only=True)
class FusedResidual(Wiring):
    """The fields of `Residual`; without dropout the same values up to rounding."""

    mixer_scale: Literal["one", "depth"] = "one"
    eps: float = 1e-6
    dropout: float = 0.0
    backend: KernelBackend = "auto"

    def problems(self) -> list[str]:
        return self.plain().problems()

    def plain(self) -> Residual:
        """The part whose work this one does."""
        return Residual(mixer_scale=self.mixer_scale, eps=self.eps, dropout=self.dropout)

    def refusal(self, facts: DeviceFacts) -> str | None:
        return kernel_refusal(self.backend, facts)

    def resolve(self, facts: DeviceFacts) -> Self:
        return replace(self, backend=choose_kernel(self.backend, facts))

    def build(self, *, dim: int, num_layers: int, vocab_size: int) -> nn.Module:
        return FusedResidualStream(self, num_layers=num_layers)


class FusedResidualStream(nn.Module):
    """The module of `FusedResidual`: forward(x_BTD, blocks, context) -> normalised h_BTD."""

    def __init__(self, part: FusedResidual, *, num_layers: int) -> None:
        super().__init__()
        self.eps, self.dropout = part.eps, part.dropout
        self.mixer_scale = part.plain().scale(num_layers)
        self.compute = residual_norm if part.backend == "triton" else residual_norm_reference

    def forward(self, x_BTD: Tensor, blocks: Iterable[Any], context: Context) -> Tensor:
        normed_BTD = rms_norm(x_BTD, eps=self.eps)
        for block in blocks:
            x_BTD, normed_BTD = self.add(x_BTD, block.mixer(normed_BTD, context), self.mixer_scale)
            x_BTD, normed_BTD = self.add(x_BTD, block.feedforward(normed_BTD, context), 1.0)
        return normed_BTD

    def add(self, x_BTD: Tensor, branch_BTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The stream with the branch added, and its norm."""
        p = self.dropout if self.training else 0.0
        seed = torch.randint(2**62, (), device=x_BTD.device) if p else None
        return self.compute(x_BTD, branch_BTD, eps=self.eps, p=p, scale=scale, seed=seed)
