import pytest
import torch

from sabrage.config import ConfigError, override
from sabrage.model.lm import build_model
from sabrage.precision.fp8 import HISTORY, Fp8, Fp8Product, quantise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def rounded(values, dtype):
    """Quantised and restored, in fp32: what an FP8 product may at best know of them."""
    scale = values.float().abs().max() / torch.finfo(dtype).max
    return (values.float() / scale).to(dtype).float() * scale


def products(x, weight, pulled, *, narrow):
    """(y, dx, dW) in fp32 of rounded or exact inputs; dW knows no rounding."""
    x, weight, pulled = (tensor.float() for tensor in (x, weight, pulled))
    if not narrow:
        return x @ weight.t(), pulled @ weight, pulled.t() @ x
    weight = rounded(weight, E4M3)
    return rounded(x, E4M3) @ weight.t(), rounded(pulled, E5M2) @ weight, pulled.t() @ x


def error(found, exact):
    return (found.float() - exact).norm().item()


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(63, 32, 48), (217, 64, 257), (16, 16, 16)])
def test_errors_are_at_most_twice_those_of_rounding_the_inputs(tokens, inputs, outputs):
    x, weight, pulled = draw(tokens, inputs), draw(outputs, inputs, seed=1), draw(tokens, outputs, seed=2)
    x.requires_grad_()
    weight = weight.float().requires_grad_()
    y = Fp8Product()(x, weight)
    y.backward(pulled)
    exact = products(x, weight, pulled, narrow=False)
    emulated = products(x, weight, pulled, narrow=True)
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    for own, best, true in zip((y, x.grad, weight.grad), emulated, exact, strict=True):
        assert error(own, true) <= 2 * error(best, true) + 2**-8 * true.norm()
        # And it is the emulated product itself, up to the rounding of the result.
        assert error(own, best) <= 2**-8 * true.norm()


def test_leading_dimensions_pass_through():
    x, weight = draw(2, 3, 16), draw(32, 16, seed=1)
    assert torch.equal(Fp8Product()(x, weight), Fp8Product()(x.flatten(0, 1), weight).view(2, 3, 32))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_quantising_uses_the_whole_range_and_restores_the_values(dtype, size):
    values = draw(64, 16).float() * size
    narrow, scale = quantise(values, dtype)
    assert scale.shape == ()
    assert narrow.float().abs().max() == torch.finfo(dtype).max
    assert error(narrow.float() * scale, values) < torch.finfo(dtype).eps / 2 * values.norm()


def test_zeros_stay_zeros():
    narrow, _ = quantise(torch.zeros(4, 16), E4M3)
    assert torch.equal(narrow.float(), torch.zeros(4, 16))


def test_a_value_that_is_no_number_stays_visible():
    values = draw(4, 16).float()
    values[0, 0] = float("nan")
    narrow, scale = quantise(values, E4M3)
    assert (narrow.float() * scale).isnan().any()


def test_delayed_scaling_takes_its_scale_from_the_past_and_cuts_off_what_is_larger():
    history = torch.zeros(HISTORY)
    _, first = quantise(torch.full((1, 16), 448.0), E4M3, history)
    assert first == 1
    narrow, second = quantise(torch.full((1, 16), 4480.0), E4M3, history)
    assert second == 1
    assert narrow.float().max() == 448
    _, third = quantise(torch.ones(1, 16), E4M3, history)
    assert third == 10
    assert history[:3].tolist() == [1, 4480, 448]
    for _ in range(HISTORY):
        _, last = quantise(torch.full((1, 16), 44.8), E4M3, history)
    assert last == pytest.approx(0.1)


def test_delayed_scaling_keeps_two_histories_a_layer_beside_the_model(make_step, batch, knobs):
    step = make_step(Fp8(products=("head", "up"), scaling="delayed"))
    step(batch(), knobs())
    found = {name: buffer for name, buffer in step.learner.named_buffers() if name.startswith("fp8")}
    names = ("model/head", "model/blocks/0/feedforward/up", "model/blocks/1/feedforward/up")
    assert set(found) == {
        f"fp8_histories.{name}/{kind}" for name in names for kind in ("inputs", "gradients")
    }
    # Two micro-batches a step.
    assert all((history > 0).sum() == 2 for history in found.values())


def test_a_width_that_fp8_cannot_take_is_refused_with_its_layer(tiny):
    model = build_model(override(tiny.model, "dim=36"), seed=0)
    with pytest.raises(ConfigError, match=r"'blocks\.0\.feedforward\.up' has 36"):
        Fp8(products=("up",)).prepare(model, torch.device("cpu"))
