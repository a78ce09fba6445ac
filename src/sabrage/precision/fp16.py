"""fp16 products with dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740).

fp16 ends at 65,504 and has nothing below 6e-8, where many gradients lie. The loss is multiplied by a scale S
before the backward pass and the gradients are divided by it after. A step in which one of them is not finite
moves nothing and halves S; after `growth_interval` good steps in a row S doubles. The device alone decides.

Named products may also accumulate in fp16, which runs at twice the rate on GeForce cards. Only the forward
product does: a sum over a layer's inputs keeps most of its 11 bits, a sum over a batch of tokens does not.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sabrage.linear import check_patterns, replace_products
from sabrage.parts import LossScaler, Precision
from sabrage.precision.autocast import lacking, set_switches
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Fp16(Precision):
    """fp32 weights and optimizer state, matrix products in fp16 by torch's autocast, dynamic loss scaling.

    `fp16_accumulation` holds patterns (searched in names of layers, such as r"feedforward\\.up") of the
    products whose forward pass accumulates in fp16.
    """

    initial_scale: float = 65536.0
    growth_interval: int = 2000
    fp16_accumulation: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        found = check_patterns("fp16_accumulation", self.fp16_accumulation)
        if self.initial_scale <= 0:
            found.append(f"initial_scale={self.initial_scale}, allowed: above 0, such as 65536")
        if self.growth_interval < 1:
            found.append(f"growth_interval={self.growth_interval}, allowed: at least 1")
        return found

    def refusal(self, facts: DeviceFacts) -> str | None:
        return None if facts.capability is None else lacking("fp16", (7, 0), facts)

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        set_switches()
        replace_products(model, self.fp16_accumulation, lambda name, layer: fp16_accumulated)
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.float16)

    def scaler(self) -> LossScaler:
        return DynamicScaler(initial=self.initial_scale, growth_interval=self.growth_interval)

    def peak(self) -> str:
        return "fp16"


class DynamicScaler(nn.Module):
    """The `LossScaler` of `Fp16`; `overflows` counts the steps that moved nothing."""

    scale: Tensor
    good_steps: Tensor
    overflows: Tensor

    def __init__(self, *, initial: float, growth_interval: int) -> None:
        super().__init__()
        self.growth_interval = growth_interval
        self.register_buffer("scale", torch.tensor(initial))
        self.register_buffer("good_steps", torch.zeros((), dtype=torch.int32))
        self.register_buffer("overflows", torch.zeros(()))

    @torch.no_grad()
    def unscale(self, gradients: list[Tensor]) -> Tensor:
        found_inf = torch.zeros_like(self.overflows)
        # In fp64, since a reciprocal rounded in fp32 need not undo a scale that is no power of two.
        inverse = self.scale.double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
        torch._amp_update_scale_(self.scale, self.good_steps, found_inf, 2.0, 0.5, self.growth_interval)
        self.overflows += found_inf
        return found_inf

    def readings(self) -> dict[str, float]:
        scale, overflows = torch.stack((self.scale, self.overflows)).tolist()
        return {"loss_scale": scale, "overflows": overflows}


def fp16_accumulated(x_XI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T in fp16, accumulated in fp16 where the device can; both gradients accumulate in fp32."""
    x_NI = x_XI.to(torch.float16).flatten(0, -2)
    return _product(x_NI, weight_OI.to(torch.float16)).unflatten(0, x_XI.shape[:-1])


@torch.library.custom_op("sabrage::fp16_accumulated_product", mutates_args=())
def _product(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    # An operation of its own: the switch belongs to the process, and compiled code would not turn it.
    switches = torch.backends.cuda.matmul
    switches.allow_fp16_accumulation = True
    try:
        return x_NI @ weight_OI.t()
    finally:
        switches.allow_fp16_accumulation = False


@_product.register_fake
def _(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor]:
    x_NI, weight_OI = ctx.saved_tensors
    return grad_NO @ weight_OI, grad_NO.t() @ x_NI


_product.register_autograd(_gradients, setup_context=_remember)
