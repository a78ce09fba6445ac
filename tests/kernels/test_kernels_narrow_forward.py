"""Linear + ReLU^2 whose forward pass is in FP8: near the 16-bit products, and with their gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from perceptrons import compiled_and_not, interpreted, on_hopper, relative, tensors
from torch._subclasses import FakeTensorMode

from sabrage.kernels import linear_activation as room
from sabrage.kernels.language import KernelError
from sabrage.kernels.linear_activation import perceptron, perceptron_reference
from sabrage.kernels.narrow_forward import LARGEST, narrow_factors, narrow_forward


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "capability_of", lambda _: (9, 0))


def uneven(dtype: torch.dtype, device: str = "cpu", *, tokens: int = 200) -> list[torch.Tensor]:
    """`tensors`, some of the tokens four times as long as others."""
    x, *others = tensors(dtype, device, tokens=tokens)
    x[::3] *= 0.5
    x[1::3] *= 2
    return [x, *others]


def exact(*inputs: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x, U and D, in fp64."""
    *leaves, grad = [x.double().requires_grad_() for x in inputs]
    y = perceptron_reference(*leaves)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def check_near(dtype: torch.dtype, device: str, allowed: float) -> None:
    inputs = uneven(dtype, device)
    factors = narrow_factors(*inputs[:3])
    y, post = narrow_forward(*factors, dtype)
    truth = perceptron_reference(*(x.double() for x in inputs[:3]))
    true_post = torch.relu(inputs[0].double() @ inputs[1].double().t()).square()
    for found, wanted in ((y, truth), (post, true_post)):
        assert (found.shape, found.dtype) == (wanted.shape, dtype)
        # Long tokens and short ones.
        for part in range(3):
            assert 0.01 < relative(found[part::3], wanted[part::3]) < allowed
    # Nothing of post is cut off.
    assert post.double().max().item() < factors[5].item() * LARGEST


@interpreted
def test_the_products_are_near_those_in_sixteen_bits(poisoned: None) -> None:
    # The interpreter rounds to e4m3 towards zero.
    check_near(torch.float16, "cpu", 0.12)


@interpreted
@pytest.mark.parametrize("fp8_gradients", [False, True])
def test_gradients_are_near_the_exact_ones(hopper: None, fp8_gradients: bool) -> None:
    *inputs, grad = uneven(torch.float16)
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = perceptron(*leaves, fp8_forward=True, fp8_gradients=fp8_gradients)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    for ours, theirs in zip(found, exact(*inputs, grad), strict=True):
        assert ours.shape == theirs.shape
        assert 0.01 < relative(ours, theirs) < (0.2 if fp8_gradients else 0.12)


@interpreted
def test_no_token_depends_on_another(hopper: None) -> None:
    x, up, down, _ = uneven(torch.float16)
    whole = perceptron(x, up, down, fp8_forward=True)
    other = torch.cat((x[:100], 10 * x[100:]))
    assert torch.equal(perceptron(other, up, down, fp8_forward=True)[:100], whole[:100])


@interpreted
def test_what_is_beyond_the_bound_is_cut_off_and_stays_a_number(hopper: None) -> None:
    x, up, down, _ = uneven(torch.float16)
    *narrow, scale_N, up_scale, post_scale, down_scale = narrow_factors(x, up, down)
    near, far = (
        narrow_forward(*narrow, times * scale_N, up_scale, post_scale, down_scale, torch.float16)[0]
        for times in (1, 10)
    )
    assert far.isfinite().all()
    # Uncut, a hundred times as much.
    assert far.norm() < 50 * near.norm()


@interpreted
def test_rows_of_a_batch_are_tokens_and_none_is_none(hopper: None) -> None:
    x, up, down, _ = uneven(torch.float16)
    flat = perceptron(x, up, down, fp8_forward=True)
    assert torch.equal(perceptron(x.view(4, 50, 80), up, down, fp8_forward=True), flat.view(4, 50, 80))
    assert perceptron(x[:0], up, down, fp8_forward=True).shape == (0, 80)


@interpreted
def test_a_token_of_zeros_is_nothing_and_spoils_nothing(hopper: None) -> None:
    x, up, down, _ = uneven(torch.float16)
    x[5] = 0
    y = perceptron(x, up, down, fp8_forward=True)
    assert (y[5] == 0).all()
    assert y.isfinite().all()
    assert (perceptron(torch.zeros_like(x), up, down, fp8_forward=True) == 0).all()


def test_what_it_is_not_for_is_refused() -> None:
    x, up, down, _ = uneven(torch.float32)
    with pytest.raises(KernelError, match=r"FP8 products are for relu_squared in 16 bits.*fp8_forward=False"):
        perceptron(x, up, down, fp8_forward=True)


@interpreted
def test_the_compiler_is_told_the_shapes_and_formats_that_there_are() -> None:
    x, up, down, _ = uneven(torch.float16)
    told = (x, up, down, *narrow_factors(x, up, down))
    real = room._forward_fp8(*told, False)
    with FakeTensorMode() as mode:
        fake = room._forward_fp8(*(mode.from_tensor(part) for part in told), False)
    assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_on_the_device_are_near_the_exact_ones(dtype: torch.dtype, poisoned: None) -> None:
    check_near(dtype, "cuda", 0.08)


def narrow(*, fp8_gradients: bool) -> Callable:
    return partial(perceptron, fp8_forward=True, fp8_gradients=fp8_gradients)


@interpreted
@pytest.mark.parametrize("fp8_gradients", [False, True])
def test_one_graph_holds_all_of_it(hopper: None, fp8_gradients: bool) -> None:
    inputs = uneven(torch.float16)
    function = narrow(fp8_gradients=fp8_gradients)
    assert compiled_and_not(function, inputs, backend="aot_eager") == [0, 0, 0, 0]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("fp8_gradients", [False, True])
def test_compiled_it_is_what_it_is_eagerly(fp8_gradients: bool) -> None:
    inputs = uneven(torch.bfloat16, "cuda", tokens=512)
    function = narrow(fp8_gradients=fp8_gradients)
    assert max(compiled_and_not(function, inputs, backend="inductor")) < 1e-2
