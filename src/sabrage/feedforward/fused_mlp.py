"""`Mlp` with the activation in the epilogue of its products; see `sabrage.kernels.linear_activation`."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, nn

from sabrage.context import Context
from sabrage.feedforward.mlp import Mlp, Perceptron
from sabrage.kernels.backend import KernelBackend, choose_kernel, kernel_refusal
from sabrage.kernels.linear_activation import perceptron, perceptron_reference
from sabrage.parts import FeedForward
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class FusedMlp(FeedForward):
    """The fields of `Mlp`; the same values up to rounding."""

    expansion: int = 4
    activation: Literal["gelu", "relu_squared"] = "relu_squared"
    zero_init: bool = False
    backend: KernelBackend = "auto"

    def problems(self) -> list[str]:
        return self.plain().problems()

    def plain(self) -> Mlp:
        """The part whose work this one does."""
        return Mlp(expansion=self.expansion, activation=self.activation, zero_init=self.zero_init)

    def refusal(self, facts: DeviceFacts) -> str | None:
        return kernel_refusal(self.backend, facts)

    def resolve(self, facts: DeviceFacts) -> Self:
        return replace(self, backend=choose_kernel(self.backend, facts))

    def build(self, *, dim: int, layer: int) -> nn.Module:
        return FusedPerceptron(self, dim=dim)

    def flops(self, dim: int) -> int:
        return self.plain().flops(dim)


class FusedPerceptron(Perceptron):
    """The module of `FusedMlp`: forward(x_BTD, context) -> y_BTD."""

    def __init__(self, part: FusedMlp, *, dim: int) -> None:
        super().__init__(part.plain(), dim=dim)
        self.up.replaceable = self.down.replaceable = False
        self.compute = perceptron if part.backend == "triton" else perceptron_reference

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.compute(x_BTD, self.up.weight, self.down.weight, activation=self.activation)
