"""FP8 products for named layers (Micikevicius et al. 2022, arXiv 2209.05433), all else as in bf16 autocast.

e4m3 (4 significant bits, up to 448) holds inputs and weights, e5m2 (3 bits, up to 57,344) the gradient that
flows back, each with one scale s = amax / largest value for the whole tensor:

    y = s_x s_W q(x / s_x) q(W / s_W)^T,    dx = s_g s_W q(g / s_g) q(W / s_W),    dW = g^T x in bf16.

The gradient of the weight stays in bf16: FP8 would need transposed copies of g and x, whose traffic costs
about what the product saves at width 768, and it is the sum over the most terms.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.config import ConfigError
from sabrage.kernels.fp8 import traced_product
from sabrage.linear import Linear, check_patterns, replace_products
from sabrage.parts import Precision
from sabrage.precision.autocast import lacking, set_switches
from sabrage.run.device import DeviceFacts

# FP8 matrix units want both widths of a weight to be multiples of this.
MULTIPLE = 16
# Micro-batches over which delayed scaling looks back.
HISTORY = 16


@dataclass(frozen=True, kw_only=True)
class Fp8(Precision):
    """bf16 autocast with FP8 products in the layers whose names one of the patterns is found in.

    With "dynamic" scaling every tensor is read for its largest value before it is rounded. With "delayed" the
    largest of the last 16 micro-batches sets the scale of inputs and gradients, and what is larger is cut
    off: one pass less over them. Evaluation uses no FP8.
    """

    products: tuple[str, ...] = (r"\bhead$",)
    scaling: Literal["dynamic", "delayed"] = "dynamic"

    def problems(self) -> list[str]:
        if not self.products:
            return [r"products is empty; name at least one layer, such as '\bhead$', or use Bf16"]
        return check_patterns("products", self.products)

    def refusal(self, facts: DeviceFacts) -> str | None:
        return lacking("FP8", (8, 9), facts)

    def prepare(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Raises ConfigError for a pattern that matches no layer and for a width that FP8 cannot take."""
        set_switches()
        histories = nn.Module()

        def make(name: str, layer: Linear) -> Callable[[Tensor, Tensor], Tensor]:
            if layer.in_features % MULTIPLE:
                raise ConfigError(
                    f"precision: FP8 products need an input width that {MULTIPLE} divides, and {name!r} has "
                    f"{layer.in_features}; change the width or leave this layer out of precision.products"
                )
            product = Fp8Product()
            if self.scaling == "delayed":
                product.inputs, product.gradients = (torch.zeros(HISTORY, device=device) for _ in range(2))
                # A buffer's name holds no dot.
                path = name.replace(".", "/")
                histories.register_buffer(f"{path}/inputs", product.inputs)
                histories.register_buffer(f"{path}/gradients", product.gradients)
            return product

        replace_products(model, self.products, make)
        if self.scaling == "delayed":
            model.add_module("fp8_histories", histories)
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def peak(self) -> str:
        # Attention and the weights' gradients are bf16, and runs with and without FP8 must compare.
        return "bf16"


class Fp8Product:
    """product(x_XI, weight_OI) -> y_XO in bf16; histories of largest values, or None to scale dynamically."""

    inputs: Tensor | None = None
    gradients: Tensor | None = None

    def __call__(self, x_XI: Tensor, weight_OI: Tensor) -> Tensor:
        outputs = weight_OI.shape[0]
        extra = -outputs % MULTIPLE
        padded_OI = F.pad(weight_OI, (0, 0, 0, extra)) if extra else weight_OI
        x_NI = x_XI.to(torch.bfloat16).flatten(0, -2)
        y_NO = Fp8Function.apply(x_NI, padded_OI, self.inputs, self.gradients)
        return y_NO[:, :outputs].unflatten(0, x_XI.shape[:-1])


class Fp8Function(torch.autograd.Function):
    """The formulas at the head of this file, in operations that a compiler fuses with their neighbours."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, inputs: Tensor | None, gradients: Tensor | None
    ) -> Tensor:
        narrow_NI, x_scale = quantise(x_NI, torch.float8_e4m3fn, inputs)
        narrow_OI, weight_scale = quantise(weight_OI, torch.float8_e4m3fn)
        ctx.save_for_backward(x_NI, narrow_OI, weight_scale)
        ctx.gradients, ctx.weight_dtype = gradients, weight_OI.dtype
        return traced_product(narrow_NI, narrow_OI.t(), x_scale, weight_scale, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_NI, narrow_OI, weight_scale = ctx.saved_tensors
        narrow_NO, grad_scale = quantise(grad_NO, torch.float8_e5m2, ctx.gradients)
        # The units read the right-hand factor by columns.
        columns_OI = narrow_OI.t().contiguous().t()
        grad_NI = traced_product(narrow_NO, columns_OI, grad_scale, weight_scale, torch.bfloat16, fast=False)
        grad_OI = (grad_NO.t() @ x_NI).to(ctx.weight_dtype)
        return grad_NI, grad_OI, None, None


def quantise(values_X: Tensor, dtype: torch.dtype, history: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values / scale in `dtype`, the 0-D scale); with a history its largest entry sets the scale.

    The history moves on by one, in place; one that holds nothing yet gives way to the values' own largest.
    """
    largest = torch.finfo(dtype).max
    amax = values_X.abs().amax().float()
    if history is not None:
        past = history.amax()
        history.copy_(torch.cat((amax[None], history[:-1])))
        amax = torch.where(past > 0, past, amax)
    # The floor keeps a tensor of zeros at zero instead of 0 / 0.
    scale = amax.clamp(min=1e-30) / largest
    return (values_X.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale
