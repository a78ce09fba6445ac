"""Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): many perceptrons, of which a token uses few.

y = sum over the A chosen experts e of w_e D_e relu(U_e x)^2, and the shared expert's output where there is
one (Dai et al. 2024, arXiv 2401.06066). Who is chosen is the business of `sabrage.feedforward.routing`; the
layers that have experts are a pattern, `model.feedforwards`. No token is dropped.

`dense` is the specification: every expert computes every token, weighed with zero where it was not chosen.
The others sort the tokens by expert, once, and multiply each group by its own matrix: `grouped_mm` is
torch's, for bf16 on compute capability 9 and 10, where it does not wait for the host; `triton` is
`sabrage.kernels.grouped_product`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sabrage.context import Context
from sabrage.feedforward.mlp import Mlp
from sabrage.feedforward.routing import MOST_EXPERTS, Gate, Router
from sabrage.kernels.backend import kernel_refusal, runs_triton
from sabrage.kernels.grouped_product import grouped_product
from sabrage.parts import FeedForward
from sabrage.run.device import DeviceFacts

# Rows of bf16 numbers must begin at multiples of 16 bytes.
MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(FeedForward):
    """`experts` perceptrons with ReLU^2, `expansion` times as wide inside, `active` of them for each token.

    `shared` is the expansion of one more that takes every token, 0 for none. `zero_init` starts all W_down
    at zero.
    """

    experts: int = 8
    active: int = 1
    expansion: float = 4.0
    shared: int = 0
    gate: Gate = field(default_factory=Gate)
    zero_init: bool = False
    backend: Literal["auto", "dense", "grouped_mm", "triton"] = "auto"

    def problems(self) -> list[str]:
        found = []
        if not 2 <= self.experts <= MOST_EXPERTS:
            found.append(f"experts={self.experts}, allowed: 2 to {MOST_EXPERTS}; for one use Mlp")
        if not 1 <= self.active <= self.experts:
            found.append(f"active={self.active}, allowed: 1 to experts={self.experts}")
        if self.expansion <= 0:
            found.append(f"expansion={self.expansion} must be above 0; a dense layer has 4")
        if self.shared < 0:
            found.append(f"shared={self.shared} must be 0 (no shared expert) or more")
        return found

    def refusal(self, facts: DeviceFacts) -> str | None:
        if self.backend == "grouped_mm" and not has_grouped_mm(facts):
            return (
                f"backend 'grouped_mm' needs bf16 products on compute capability 9 or 10 (elsewhere it waits "
                f"for the host); this is {facts.name} with {facts.products or 'unknown'} products; use "
                "backend 'auto'"
            )
        return kernel_refusal("triton", facts) if self.backend == "triton" else None

    def resolve(self, facts: DeviceFacts) -> Self:
        if self.backend != "auto":
            return self
        if has_grouped_mm(facts):
            return replace(self, backend="grouped_mm")
        return replace(self, backend="triton" if runs_triton(facts) else "dense")

    def width(self, dim: int) -> int:
        """The inner width of an expert. Raises ValueError where it is not a multiple of 8."""
        width = self.expansion * dim
        if width % MULTIPLE or dim % MULTIPLE:
            raise ValueError(
                f"expansion={self.expansion} makes experts {width:g} wide at dim={dim}; both widths must be "
                f"multiples of {MULTIPLE}: change one of the two"
            )
        return int(width)

    def build(self, *, dim: int, layer: int) -> nn.Module:
        return Experts(self, dim=dim, layer=layer)

    def streams(self, dim: int) -> dict[str, int]:
        return {"gate": self.experts} if self.gate.block else {}

    def flops(self, dim: int) -> int:
        return 2 * dim * (self.experts + 2 * (self.active * self.width(dim) + self.shared * dim))

    def idle(self, dim: int) -> int:
        return 2 * dim * self.width(dim) * (self.experts - self.active)


def has_grouped_mm(facts: DeviceFacts) -> bool:
    """Whether torch's grouped product is one kernel on this device, for the run's format of products."""
    return facts.products == "bf16" and facts.capability is not None and facts.capability[0] in (9, 10)


class Experts(nn.Module):
    """The module of `MixtureOfExperts`: forward(x_BTD, context) -> y_BTD, in the dtype of x.

    `up_weight` (E, F, D) and `down_weight` (E, D, F) start as torch's Linears of one expert do.
    """

    def __init__(self, part: MixtureOfExperts, *, dim: int, layer: int) -> None:
        super().__init__()
        width = part.width(dim)
        self.backend = part.backend
        self.router = Router(part.gate, dim=dim, experts=part.experts, active=part.active, layer=layer)
        self.up_weight = nn.Parameter(torch.empty(part.experts, width, dim))
        self.down_weight = nn.Parameter(torch.empty(part.experts, dim, width))
        nn.init.uniform_(self.up_weight, -(dim**-0.5), dim**-0.5)
        if part.zero_init:
            nn.init.zeros_(self.down_weight)
        else:
            nn.init.uniform_(self.down_weight, -(width**-0.5), width**-0.5)
        shared = Mlp(expansion=part.shared or 1, activation="relu_squared", zero_init=part.zero_init)
        self.shared = shared.build(dim=dim, layer=layer) if part.shared else None

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        experts_NA, weights_NA, load_E = self.router(x_BTD, context)
        x_ND, up_EFD, down_EDF = cast(x_BTD.flatten(0, 1), self.up_weight, self.down_weight)
        if self.backend in ("grouped_mm", "triton"):
            product = torch_product if self.backend == "grouped_mm" else grouped_product
            y_ND = sorted_experts(product, x_ND, up_EFD, down_EDF, experts_NA, weights_NA, load_E)
        else:
            y_ND = every_expert(x_ND, up_EFD, down_EDF, experts_NA, weights_NA)
        y_BTD = y_ND.view(x_BTD.shape)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, context)
        return y_BTD.to(x_BTD.dtype)


def cast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in autocast's dtype where it is on: it does not know grouped products."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def every_expert(
    x_ND: Tensor, up_EFD: Tensor, down_EDF: Tensor, experts_NA: Tensor, weights_NA: Tensor
) -> Tensor:
    """The specification: E products for every token. No row depends on where the others went, by no bit."""
    weights_NE = torch.zeros(len(x_ND), len(up_EFD), device=x_ND.device, dtype=weights_NA.dtype)
    weights_NE = weights_NE.scatter(1, experts_NA, weights_NA)
    y_ND = torch.zeros_like(x_ND, dtype=weights_NA.dtype)
    for up_FD, down_DF, weights_N in zip(up_EFD, down_EDF, weights_NE.unbind(1), strict=True):
        y_ND = y_ND + weights_N[:, None] * F.linear(F.relu(F.linear(x_ND, up_FD)).square(), down_DF)
    return y_ND


def torch_product(x_MD: Tensor, weight_EOD: Tensor, ends_E: Tensor) -> Tensor:
    """The product of each group of rows with its own matrix, by torch."""
    return F.grouped_mm(x_MD, weight_EOD.mT, offs=ends_E)


def sorted_experts(
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_ND: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    experts_NA: Tensor,
    weights_NA: Tensor,
    load_E: Tensor,
) -> Tensor:
    """The same with the M = N A pairs of token and expert sorted by expert, stably; nothing waits."""
    active = experts_NA.shape[1]
    # A byte sorts faster than eight.
    order_M = experts_NA.flatten().to(torch.uint8).argsort(stable=True)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=x_ND.device))
    ends_E = load_E.cumsum(0).to(torch.int32)
    pairs_MD = x_ND[:, None].expand(-1, active, -1).flatten(0, 1)
    grouped_MD = Permutation.apply(pairs_MD, order_M, place_M)
    positive_MF = F.relu(product(grouped_MD, up_EFD, ends_E))
    # Not a power: autocast computes those in fp32, and the next product takes one format.
    hidden_MF = positive_MF * positive_MF
    y_MD = Permutation.apply(product(hidden_MF, down_EDF, ends_E), place_M, order_M)
    return (y_MD.unflatten(0, (-1, active)) * weights_NA[..., None]).sum(1)


class Permutation(torch.autograd.Function):
    """x[order], whose gradient is g[place] by the inverse permutation: gathers both ways, no atomic sums."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, place_M: Tensor) -> Tensor:
        ctx.save_for_backward(place_M)
        return x_MD[order_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (place_M,) = ctx.saved_tensors
        return grad_MD[place_M], None, None
