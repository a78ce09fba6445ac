"""What the tests of perceptrons in FP8 share: where they run, what they run on, and how near is near."""

from collections.abc import Callable

import pytest
import torch

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
)


def tensors(dtype: torch.dtype, device: str = "cpu", *, tokens: int = 200) -> list[torch.Tensor]:
    """x, U, D and a gradient as small as a mean over many tokens makes it."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((tokens, 80, 1.0), (320, 80, 80**-0.5), (80, 320, 320**-0.5), (tokens, 80, 1e-3))
    drawn = [
        scale * torch.randn(rows, columns, generator=generator, device=device)
        for rows, columns, scale in shapes
    ]
    return [x.to(dtype) for x in drawn]


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def compiled_and_not(function: Callable, inputs: list[torch.Tensor], *, backend: str) -> list[float]:
    """How far y and the gradients of compiled code are from those of code that is not; the last input is the
    gradient of y."""
    *inputs, grad = inputs
    compiled: Callable = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    found = []
    for work in (function, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = work(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    torch._dynamo.reset()
    return [relative(ours, theirs) for ours, theirs in zip(*found, strict=True)]
