"""Linear + ReLU^2 with FP8 in its backward pass: near the 16-bit gradients, and only there."""

from functools import partial

import pytest
import torch
from perceptrons import compiled_and_not, interpreted, on_hopper, relative, tensors
from torch._subclasses import FakeTensorMode

from sabrage.kernels import linear_activation as room
from sabrage.kernels import narrow_gradients as kernel
from sabrage.kernels.fp8 import quantised
from sabrage.kernels.language import KernelError
from sabrage.kernels.linear_activation import perceptron
from sabrage.kernels.narrow_gradients import narrow_gradients, narrow_gradients_reference


def check_near(dtype: torch.dtype, device: str, allowed: float) -> None:
    x, up, down, grad = tensors(dtype, device)
    post = torch.relu(x @ up.t()).square()
    found = narrow_gradients(grad, x, up, down, post)
    exact = narrow_gradients_reference(*(y.double() for y in (grad, x, up, down, post)))
    for ours, theirs, wide in zip(found, exact, (allowed, 0.08, 2e-3), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        assert relative(ours, theirs) < wide
    # The first is rounded twice, the second once, the third not.
    assert relative(found[0], exact[0]) > relative(found[1], exact[1]) > 0.02


@interpreted
def test_gradients_are_near_those_in_sixteen_bits(poisoned: None) -> None:
    # The interpreter rounds to e5m2 towards zero.
    check_near(torch.float16, "cpu", 0.16)


@interpreted
def test_the_forward_pass_and_the_down_projection_are_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "capability_of", lambda _: (9, 0))
    *inputs, grad = tensors(torch.float16)
    found = []
    for narrow in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = perceptron(*leaves, fp8_gradients=narrow)
        found.append((y, *torch.autograd.grad(y, leaves, grad)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][3], found[1][3])
    assert 0.02 < relative(found[1][1], found[0][1]) < 0.16


@interpreted
@pytest.mark.parametrize("factor", [2**5, 2**10], ids=str)
def test_the_size_of_the_gradient_does_not_matter(factor: int) -> None:
    x, up, down, grad = tensors(torch.float16)
    post = torch.relu(x @ up.t()).square()
    base, scaled = (narrow_gradients(grad * size, x, up, down, post) for size in (1, factor))
    for small, large in zip(base, scaled, strict=True):
        # Up to what fp16 itself loses of the smallest numbers.
        assert relative(large.double() / factor, small.double()) < 1e-3


def test_what_it_is_not_for_is_refused() -> None:
    x, up, down, _ = tensors(torch.float16)
    with pytest.raises(KernelError, match="FP8 products are for relu_squared in 16 bits"):
        perceptron(x, up, down, fp8_gradients=True)


@interpreted
@pytest.mark.parametrize("change", ["gelu", "wide", "uneven"])
def test_gelu_wide_formats_and_uneven_widths_are_refused(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(room, "capability_of", lambda _: (9, 0))
    x, up, down, _ = tensors(torch.float32 if change == "wide" else torch.float16)
    if change == "uneven":
        up, down = up[:312].contiguous(), down[:, :312].contiguous()
    with pytest.raises(KernelError, match="use fp8_forward=False and fp8_gradients=False"):
        perceptron(x, up, down, activation="gelu" if change == "gelu" else "relu_squared", fp8_gradients=True)


@interpreted
def test_the_compiler_is_told_the_shapes_and_formats_that_there_are() -> None:
    x, up, down, grad = tensors(torch.float16)
    narrow, scale = quantised(grad, torch.float8_e5m2)
    weight, _ = quantised(down.t().contiguous())
    told = (narrow, weight, torch.relu(x @ up.t()).square(), torch.stack((scale, scale)))
    real = kernel._hidden_gradient(*told)
    with FakeTensorMode() as mode:
        fake = kernel._hidden_gradient(*(mode.from_tensor(part) for part in told))
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_on_the_device_are_near_the_exact_ones(dtype: torch.dtype, poisoned: None) -> None:
    check_near(dtype, "cuda", 0.1)


@pytest.mark.gpu
@on_hopper
def test_a_compiled_backward_pass_is_the_eager_one() -> None:
    function = partial(perceptron, fp8_gradients=True)
    inputs = tensors(torch.bfloat16, "cuda", tokens=512)
    assert max(compiled_and_not(function, inputs, backend="inductor")) < 1e-2
