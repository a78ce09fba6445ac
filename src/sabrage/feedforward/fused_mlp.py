"""`Mlp` with the activation in the epilogue of its products; see `sabrage.kernels.linear_activation`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
    """The fields of `Mlp`; the same values up to rounding.

    On Hopper alone, `fp8_gradients` has the two products of the backward pass that make the gradient of the
    input in FP8, and `fp8_forward` the two of the forward pass, in validation as well; the gradients of the
    weights stay in 16 bits.
    """

    expansion: int = 4
    activation: Literal["gelu", "relu_squared"] = "relu_squared"
    zero_init: bool = False
    backend: KernelBackend = "auto"
    fp8_gradients: bool = False
    fp8_forward: bool = False

    def problems(self) -> list[str]:
        return self.plain().problems() + [
            f"{name}=true is for activation='relu_squared' and this is {self.activation!r}; "
            "use that, or false"
            for name in self.fp8_fields()
            if self.activation != "relu_squared"
        ]

    def fp8_fields(self) -> list[str]:
        """The fields that ask for FP8."""
        return [name for name in ("fp8_gradients", "fp8_forward") if getattr(self, name)]

    def plain(self) -> Mlp:
        """The part whose work this one does."""
        return Mlp(expansion=self.expansion, activation=self.activation, zero_init=self.zero_init)

    def refusal(self, facts: DeviceFacts) -> str | None:
        asked = self.fp8_fields()
        if asked and (facts.capability != (9, 0) or choose_kernel(self.backend, facts) != "triton"):
            remedy = " and ".join(f"model.feedforwards.0.{name}=false" for name in asked)
            return (
                "FP8 products of a perceptron need compute capability 9.0 and its Triton kernel, and this "
                f"is {facts.name} with backend {self.backend!r}; set {remedy}"
            )
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
        self.compute: Callable[..., Tensor] = perceptron_reference
        if part.backend == "triton":
            self.compute = partial(perceptron, fp8_forward=part.fp8_forward, fp8_gradients=part.fp8_gradients)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.compute(x_BTD, self.up.weight, self.down.weight, activation=self.activation)
