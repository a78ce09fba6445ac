import pytest
import torch

from sabrage.kernels import linear_activation as room
from sabrage.kernels.language import KernelError
from sabrage.kernels.linear_activation import Activation, perceptron, perceptron_reference

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted"
)


def leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 32), (80, 32), (32, 80))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@interpreted
@pytest.mark.parametrize(("activation", "kept"), [("relu_squared", 1), ("gelu", 1)])
def test_one_tensor_of_the_hidden_width_is_kept_for_the_backward_pass(
    activation: Activation, kept: int
) -> None:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        perceptron(*leaves(), activation=activation)
    assert sum(tensor.shape == (20, 80) for tensor in saved) == kept


@interpreted
@pytest.mark.parametrize("activation", ["relu_squared", "gelu"])
def test_without_gradients_the_result_is_the_same(activation: Activation) -> None:
    with torch.no_grad():
        alone = perceptron(*leaves(), activation=activation)
    assert torch.equal(alone, perceptron(*leaves(), activation=activation))


@interpreted
def test_a_unit_that_is_off_passes_no_gradient_back() -> None:
    x, up, down = leaves()
    with torch.no_grad():
        up[:] = -up.abs()
        x[:] = x.abs()
    y = perceptron(x, up, down)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()


@interpreted
def test_batches_of_sequences_are_taken_as_they_are() -> None:
    x, up, down = leaves()
    shaped = perceptron(x.view(4, 5, 32), up, down)
    assert torch.equal(shaped.view(20, 32), perceptron(x, up, down))


@interpreted
def test_autocast_decides_the_products_and_gradients_keep_their_dtype() -> None:
    tensors = leaves()
    with torch.autocast("cpu", dtype=torch.float16):
        y = perceptron(*tensors)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in tensors} == {torch.float32}


@interpreted
@pytest.mark.parametrize("sizes", [(256, 128, 512), (200, 72, 600), (1, 8, 8)], ids=str)
def test_the_kernel_for_the_copy_engine_computes_the_same(
    sizes: tuple[int, int, int], poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, dim, wide = sizes
    shapes = ((tokens, dim), (wide, dim), (dim, wide))
    tensors = [torch.randn(shape, generator=generator).half() / 4 for shape in shapes]
    found = []
    for capability in ((8, 6), (9, 0)):
        monkeypatch.setattr(room, "capability_of", lambda _, told=capability: told)
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        y = perceptron(*given)
        y.square().sum().backward()
        found.append((y.detach(), *(tensor.grad for tensor in given)))
    for mapped, other in zip(*reversed(found), strict=True):
        assert (mapped.float() - other.float()).abs().max() <= 4e-3 * other.float().abs().max()


def test_the_copy_engine_is_for_hopper_and_aligned_rows_of_sixteen_bits() -> None:
    a, b, out = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((9, 16), (24, 16), (9, 24)))
    assert room.maps((9, 0), "relu_squared", a, b, out)
    assert room.maps((9, 0), "relu_squared_back", a, b, out)
    assert not room.maps((9, 0), "gelu", a, b, out)
    assert not any(room.maps(other, "relu_squared", a, b, out) for other in ((8, 0), (8, 9), (10, 0)))
    assert not room.maps((9, 0), "relu_squared", a.float(), b.float(), out.float())
    assert not room.maps((9, 0), "relu_squared", a[:, :12], b[:, :12], out)


@interpreted
def test_the_polynomial_gelu_is_the_exact_one_to_a_ten_millionth() -> None:
    z = torch.linspace(-8, 8, 512)[:, None]
    wide, one = z.repeat(1, 16) / 16, torch.eye(16)[:1]
    found = perceptron(wide, torch.ones(1, 16), one.t().contiguous(), activation="gelu")
    wanted = perceptron_reference(wide, torch.ones(1, 16), one.t().contiguous(), activation="gelu")
    assert (found - wanted).abs().max() < 1.5e-6


@interpreted
@pytest.mark.parametrize("activation", ["relu_squared", "gelu"])
def test_the_registration_of_the_operation_is_sound(activation: Activation) -> None:
    torch.library.opcheck(room._forward, (*leaves(), activation, True, False))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_every_capability_has_a_tile(capability: tuple[int, int]) -> None:
    for epilogue in ("relu_squared", "gelu_back", "norm"):
        assert room.tile_for(capability, torch.bfloat16, epilogue).m >= 64


def test_mixed_dtypes_and_unknown_activations_are_refused() -> None:
    x, up, down = leaves()
    with pytest.raises(KernelError, match="one dtype; cast"):
        perceptron(x.half(), up, down)
    with pytest.raises(KernelError, match="allowed: 'relu_squared', 'gelu'"):
        perceptron(x, up, down, activation="silu")
