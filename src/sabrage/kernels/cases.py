"""What tests and benchmarks share: an operation, its cases, and the error gate that both must pass.

The gate (after FlashAttention's tests): with e(x) = max |x - exact|, where exact is the reference in fp32
(fp64 when fp32 itself is judged) on the same rounded inputs, every output and gradient must satisfy
e(kernel) <= 2 e(same-precision torch) + 4 eps max |exact|, eps being fp32's spacing (fp64's beyond it).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FLOOR = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Sizes by name, options by name; `measured` cases are timed, the others are small enough for a CPU."""

    name: str
    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    strided: bool = False
    measured: bool = False

    def shrunk(self) -> "Case":
        """The case with a thirty-second of its first size: what a measured case is gated on."""
        first = next(iter(self.sizes))
        return replace(self, sizes=self.sizes | {first: max(1, self.sizes[first] // 32)})


@dataclass(frozen=True)
class Operation:
    """A fused operation beside its specification.

    `inputs(case, generator, dtype)` makes the named arguments on the generator's device; `fused(**arguments,
    **case.options)` and `plain(...)` return tuples of tensors. `gradients` names the arguments that learn,
    where they are not None. `rival` is what is timed in place of `plain` where that would be unfair.
    `memory_bytes` and `flops` are the least that forward and backward must move and multiply.
    """

    name: str
    fused: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[[Case, torch.Generator, torch.dtype], dict[str, Any]]
    outputs: tuple[str, ...]
    gradients: tuple[str, ...]
    cases: tuple[Case, ...]
    memory_bytes: Callable[[Case, int], int]
    flops: Callable[[Case], int]
    # How many times same-precision torch's error the gate allows: more only for a lower precision.
    slack: float = 2.0
    rival: Callable[..., tuple[Tensor, ...]] | None = None

    def learning(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments that learn, as fresh leaves in the same memory: a copy would lose their strides."""
        named = ((name, arguments[name]) for name in self.gradients)
        return {name: value.detach().requires_grad_() for name, value in named if value is not None}


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0, strided: bool = False
) -> Tensor:
    """Normal values; `strided` ones are every second row and column of something larger."""
    wanted = [*shape[:-2], *(2 * size for size in shape[-2:])] if strided else list(shape)
    values = torch.randn(wanted, generator=generator, device=generator.device) * scale
    return values.to(dtype)[..., ::2, ::2] if strided else values.to(dtype)


def run(
    operation: Operation,
    case: Case,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Named outputs and named gradients of one forward and backward; what is pulled back is the same
    values, representable in `dtype`, whatever precision the function works in."""
    learning = operation.learning(arguments)
    outputs = function(**{**arguments, **learning}, **case.options)
    found = dict(zip(operation.outputs, outputs, strict=True))
    if learning:
        driven = [output for output in outputs if output.requires_grad]
        generator = torch.Generator(driven[0].device).manual_seed(1)
        pulls = [normal(generator, *output.shape, dtype=dtype).to(output.dtype) for output in driven]
        grads = torch.autograd.grad(driven, list(learning.values()), pulls)
        found |= {f"gradient of {name}": grad for name, grad in zip(learning, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def failures(operation: Operation, case: Case, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Sentences about the outputs and gradients that fail the gate in shape, dtype or error."""
    arguments = operation.inputs(case, torch.Generator(device).manual_seed(0), dtype)
    exact_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    widened = {
        name: value.to(exact_dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    fused = run(operation, case, operation.fused, arguments, dtype)
    plain = run(operation, case, operation.plain, arguments, dtype)
    exact = run(operation, case, operation.plain, widened, dtype)
    found = []
    for name, truth in exact.items():
        if fused[name].shape != truth.shape or fused[name].dtype != plain[name].dtype:
            found.append(
                f"{name}: got {fused[name].dtype} {tuple(fused[name].shape)}, "
                f"expected {plain[name].dtype} {tuple(truth.shape)}"
            )
        elif truth.numel():
            kernel_error = (fused[name].to(exact_dtype) - truth).abs().max().item()
            torch_error = (plain[name].to(exact_dtype) - truth).abs().max().item()
            allowed = operation.slack * torch_error + FLOOR * truth.abs().max().item()
            if not kernel_error <= allowed:
                found.append(f"{name}: error {kernel_error:.3g}, allowed {allowed:.3g}")
    return found
