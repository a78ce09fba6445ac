"""Muon: momentum, then orthogonalisation, for the matrices inside a network.

    m <- mu m + (1 - mu) g,    u = orthogonalise(g + mu (m - g)),    w <- w - lr (weight_decay w + scale u)

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); the scale that lets AdamW's
learning rates be kept: Liu et al. 2025 (arXiv 2502.16982). NorMuon (Li et al. 2025, arXiv 2510.05491) evens
out the rows of u, a row being one neuron: v <- b2 v + (1 - b2) mean of u^2 over the row, u <- u / sqrt(v),
then u gets its old norm back. In KellerJordan/modded-nanogpt (`train_gpt.py`, b2 = 0.9) a wide u (M < N) has
one v per column: one per hidden neuron in both projections of an MLP. Cautious decay (Chen et al. 2025,
arXiv 2510.12402) decays a weight only where the update pulls it towards zero as well: sign(u) = sign(w).

All matrices of one shape, whatever parameters they come from, go through one batched product.

The floor for the 124M GPT-2 (48 matrices of 768 x 768 and 24 of 768 x 3072, five rounds): 0.65 + 0.98 = 1.63
TFLOP of products, 2.7 ms at 600 TFLOP/s, and 2.0 GB of element-wise traffic (gradient, momentum and weight in
fp32, the first and the last iterate in bf16), 0.7 ms at 3 TB/s: 3.4 ms. Stacking gradients and weights adds
about 1.4 GB, 0.5 ms. Computing the symmetric X X^T and A^2 by halves saves at most 0.8 ms (measured alone on
an H100: 1.87 to 1.44 ms for the square matrices, 2.24 to 1.95 ms for the wide ones).

Shapes: S matrices in a batch, M rows, N columns; I, J are M, 1 (a moment per row) or 1, N (one per column).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sabrage.config import ConfigError
from sabrage.kernels.backend import KernelBackend, choose_kernel, kernel_refusal
from sabrage.optim.groups import matches
from sabrage.optim.orthogonalise import evened, newton_schulz, polar_express
from sabrage.parts import Knobs, Optimizer
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon for matrices (2-D) and stacks of matrices (3-D). `lr` and `weight_decay` are peak values.

    `stacks` holds (pattern, number): a 2-D parameter whose name matches is that many matrices, one below
    the other, such as a fused projection. `lr_scale` multiplies the update of an (M, N) matrix: "spectral"
    by sqrt(max(1, M / N)), "longer" by sqrt(max(M / N, N / M)), "match_rms_adamw" by 0.2 sqrt(max(M, N)).
    With `every` = n the weights move at each n-th step, by the gradients summed since the last. A plan's
    momentum overrides `momentum`. NorMuon `evens` out the rows, or the columns of wide matrices and the rows
    of all others ("longer"), by second moments with `variance_decay`. `compile` fuses the update on CUDA;
    elsewhere it changes nothing. `backend` "triton" multiplies half of each symmetric product.
    """

    lr: float = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    cautious: bool = False
    orthogonalise: Literal["newton_schulz", "polar_express"] = "newton_schulz"
    steps: int = 5
    normuon: bool = False
    evens: Literal["rows", "longer"] = "rows"
    variance_decay: float = 0.95
    lr_scale: Literal["spectral", "longer", "match_rms_adamw", "none"] = "spectral"
    stacks: tuple[tuple[str, int], ...] = ((r"qkv", 3),)
    every: int = 1
    compile: bool = True
    backend: KernelBackend = "auto"

    def problems(self) -> list[str]:
        found = [
            f"Muon.{name}={getattr(self, name)}, allowed: at least {least}"
            for name, least in (("lr", 0), ("weight_decay", 0), ("steps", 1), ("every", 1))
            if getattr(self, name) < least
        ]
        for name in ("momentum", "variance_decay"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"Muon.{name}={getattr(self, name)}, allowed: from 0 to below 1")
        return found

    def refusal(self, facts: DeviceFacts) -> str | None:
        return kernel_refusal(self.backend, facts)

    def resolve(self, facts: DeviceFacts) -> Self:
        return replace(self, backend=choose_kernel(self.backend, facts))

    def build(self, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Raises ConfigError for a parameter that is neither a matrix nor a stack of matrices."""
        return MuonOptimizer(self, parameters)

    def hyperparameters(self, knobs: Knobs) -> dict[str, float]:
        return {
            "lr": self.lr * knobs.lr,
            "weight_decay": self.weight_decay * knobs.weight_decay,
            "momentum": self.momentum if knobs.momentum is None else knobs.momentum,
            "partial": knobs.layers is not None,
        }

    def scale(self, rows: int, columns: int) -> float:
        """What the update of a matrix is multiplied by, beside the learning rate."""
        ratio = rows / columns
        if self.lr_scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        scales = {"spectral": max(1.0, ratio), "longer": max(ratio, 1 / ratio), "none": 1.0}
        return math.sqrt(scales[self.lr_scale])

    def moments(self, rows: int, columns: int) -> tuple[int, int]:
        """(I, J) of NorMuon's second moments of a matrix."""
        return (1, columns) if self.evens == "longer" and rows < columns else (rows, 1)


def matrix_shape(part: Muon, name: str, parameter: nn.Parameter) -> tuple[int, int, int]:
    """(S, M, N): the matrices that a parameter is made of. Raises ConfigError when it is made of none."""
    if parameter.ndim == 3:
        return parameter.shape[0], parameter.shape[1], parameter.shape[2]
    if parameter.ndim != 2:
        raise ConfigError(
            f"Muon takes matrices (2-D) and stacks of them (3-D); {name!r} is {tuple(parameter.shape)}: "
            "give it to another optimizer"
        )
    rows, columns = parameter.shape
    number = next((number for pattern, number in part.stacks if matches(pattern, name)), 1)
    if number < 1 or rows % number:
        raise ConfigError(f"Muon.stacks cuts {name!r} into {number} matrices, but it has {rows} rows")
    return number, rows // number, columns


def update(
    part: Muon,
    weights: list[Tensor],
    gradients: list[Tensor],
    momentum_SMN: Tensor,
    variance_SIJ: Tensor | None = None,
    *,
    lr: Tensor,
    weight_decay: Tensor,
    momentum: Tensor,
    found_inf: Tensor | None = None,
) -> None:
    """One step of all matrices of one shape; weights, momentum and variance change in place.

    Weights and gradients hold S matrices together, each a whole number of them; the last four are 0-D
    float32 tensors on their device. Where `found_inf` holds 1 all stays as it was. Arithmetic is float32 but
    for the orthogonalisation.
    """
    rows, columns = momentum_SMN.shape[-2:]
    changing = [momentum_SMN, *weights] + ([] if variance_SIJ is None else [variance_SIJ])
    before = [] if found_inf is None else [tensor.clone() for tensor in changing]
    g_SMN = torch.cat([gradient.reshape(-1, rows, columns) for gradient in gradients]).float()
    momentum_SMN.lerp_(g_SMN, 1 - momentum)
    mixed_SMN = g_SMN.lerp(momentum_SMN, momentum) if part.nesterov else momentum_SMN
    orthogonalise = newton_schulz if part.orthogonalise == "newton_schulz" else polar_express
    u_SMN = orthogonalise(mixed_SMN, steps=part.steps, halves=part.backend == "triton").float()
    if variance_SIJ is not None:
        u_SMN = evened(u_SMN, variance_SIJ, decay=part.variance_decay)
    w_SMN = torch.cat([weight.reshape(-1, rows, columns) for weight in weights]).float()
    decayed_SMN = w_SMN * (1 - lr * weight_decay)
    if part.cautious:
        decayed_SMN = torch.where(u_SMN.sign() == w_SMN.sign(), decayed_SMN, w_SMN)
    new_SMN = decayed_SMN - lr * part.scale(rows, columns) * u_SMN
    pieces = new_SMN.split([weight.numel() // (rows * columns) for weight in weights])
    torch._foreach_copy_(weights, [piece.reshape(w.shape) for piece, w in zip(pieces, weights, strict=True)])
    if found_inf is not None:
        for tensor, old in zip(changing, before, strict=True):
            tensor.copy_(torch.where(found_inf > 0, old, tensor))


def compiled_update(name: str, *, backend: str | Callable[..., Any] = "inductor") -> Callable[..., None]:
    """`update`, compiled on its first call.

    Compiled code and the limit on recompiling belong to a code object: each caller gets a copy, so that many
    shapes, and many runs in one process, do not use up one limit.
    """
    copy = FunctionType(update.__code__.replace(co_name=name), update.__globals__, name, update.__defaults__)
    return torch.compile(copy, fullgraph=True, dynamic=False, backend=backend)


@dataclass
class ShapeBatch:
    """All parameters made of (M, N) matrices of one number format, and their state, stacked.

    `counts` is how many matrices each parameter has.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    counts: list[int]
    momentum_SMN: Tensor
    variance_SIJ: Tensor | None
    update: Callable[..., None]

    def moving(self, *, partial: bool) -> list[int]:
        """The indices of the parameters that have a gradient.

        Raises ValueError where only some have one, unless `partial`: then the plan leaves layers idle.
        """
        found = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if found and len(found) < len(self.parameters) and not partial:
            missing = next(index for index in range(len(self.parameters)) if index not in found)
            raise ValueError(
                f"{self.names[missing]!r} has no gradient while others of its shape have one; let the loss "
                "reach it, freeze it (requires_grad=False) or give it to an optimizer with other settings"
            )
        return found

    def step(
        self, part: Muon, moving: list[int], values: dict[str, Tensor], found_inf: Tensor | None
    ) -> None:
        """Moves the parameters of these indices; the others and their state stay as they are."""
        moved = [self.parameters[index] for index in moving]
        weights = [parameter.detach() for parameter in moved]
        gradients = [parameter.grad for parameter in moved]
        stacks = [stack for stack in (self.momentum_SMN, self.variance_SIJ) if stack is not None]
        if len(moving) == len(self.parameters):
            self.update(part, weights, gradients, *stacks, **values, found_inf=found_inf)
            return
        # Those that move get a stack of their own: one product for all, and none for the others.
        pieces = [[stack.split(self.counts)[index] for index in moving] for stack in stacks]
        gathered = [torch.cat(own) for own in pieces]
        self.update(part, weights, gradients, *gathered, **values, found_inf=found_inf)
        for own, stack in zip(pieces, gathered, strict=True):
            torch._foreach_copy_(own, list(stack.split([len(piece) for piece in own])))


class MuonOptimizer(torch.optim.Optimizer):
    """The optimizer of the part `Muon`, with one parameter group: lr, weight_decay, momentum and partial.

    Momentum (and NorMuon's second moment) are float32 and stacked by shape; `state` shows each parameter its
    own part of the stack, so writing into a state tensor is how state is restored. The second moments of a
    2-D parameter are 1-D: those of its matrices one after the other.
    """

    def __init__(self, part: Muon, parameters: list[tuple[str, nn.Parameter]]) -> None:
        defaults = {"lr": part.lr, "weight_decay": part.weight_decay, "momentum": part.momentum}
        super().__init__([parameter for _, parameter in parameters], defaults | {"partial": False})
        self.part = part
        self.found_inf: Tensor | None = None
        by_shape: dict[tuple[int, int, torch.dtype], list[tuple[str, nn.Parameter, int]]] = {}
        for name, parameter in parameters:
            number, rows, columns = matrix_shape(part, name, parameter)
            by_shape.setdefault((rows, columns, parameter.dtype), []).append((name, parameter, number))
        self.batches = [self._batch(rows, columns, rest) for (rows, columns, _), rest in by_shape.items()]
        device = parameters[0][1].device
        self.values = {key: torch.zeros((), dtype=torch.float32, device=device) for key in defaults}

    def _batch(self, rows: int, columns: int, members: list[tuple[str, nn.Parameter, int]]) -> ShapeBatch:
        device = members[0][1].device
        total = sum(number for _, _, number in members)
        momentum_SMN = torch.zeros(total, rows, columns, dtype=torch.float32, device=device)
        moments = self.part.moments(rows, columns)
        variance_SIJ = torch.zeros(total, *moments, device=device) if self.part.normuon else None
        start = 0
        for _, parameter, number in members:
            state = {"momentum": momentum_SMN[start : start + number].view(parameter.shape)}
            if variance_SIJ is not None:
                state["variance"] = variance_SIJ[start : start + number].view(*parameter.shape[:-2], -1)
            self.state[parameter] = state
            start += number
        compiles = self.part.compile and device.type == "cuda"
        return ShapeBatch(
            names=[name for name, _, _ in members],
            parameters=[parameter for _, parameter, _ in members],
            counts=[number for _, _, number in members],
            momentum_SMN=momentum_SMN,
            variance_SIJ=variance_SIJ,
            update=compiled_update(f"muon_{rows}x{columns}") if compiles else update,
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, unless `found_inf` holds 1; shapes without a gradient are left alone. No device sync.

        With the group's `partial` so are single parameters, and how many there are is a shape of the update.
        """
        (group,) = self.param_groups
        # A fill is a launch, not a copy from the host: nothing waits, and changed values recompile nothing.
        for key, value in self.values.items():
            value.fill_(group[key])
        for batch in self.batches:
            moving = batch.moving(partial=group["partial"])
            if moving:
                batch.step(self.part, moving, self.values, self.found_inf)

    def load_state_dict(self, state_dict: object) -> None:
        raise NotImplementedError("Muon's state is stacked: restore it with Optimizers.load_state_tensors")
