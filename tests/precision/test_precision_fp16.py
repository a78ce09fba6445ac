import pytest
import torch

from sabrage.config import ConfigError
from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.precision.autocast import Fp32
from sabrage.precision.fp16 import DynamicScaler, Fp16, fp16_accumulated

MUON = (
    OptimizerGroup(pattern=r"blocks", optimizer=Muon(normuon=True, weight_decay=0.1)),
    OptimizerGroup(pattern=".", optimizer=AdamW()),
)
# So large that the scaled gradients of any model overflow, and yet finite.
HUGE = 2.0**100


def snapshot(step):
    tensors = dict(step.learner.named_parameters()) | step.optimizers.state_tensors()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("optim", [None, MUON], ids=["adamw", "muon"])
def test_a_step_that_overflows_moves_nothing_is_counted_and_halves_the_scale(optim, make_step, batch, knobs):
    step = make_step(Fp16(), optim=optim)
    step(batch(), knobs(0))
    step.learner.scaler.scale.fill_(HUGE)
    before = snapshot(step)
    loss = step(batch(1), knobs(1))
    after = snapshot(step)
    assert loss.isfinite()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert step.readings() == {"loss_scale": HUGE / 2, "overflows": 1.0}
    assert all(parameter.grad is None for parameter in step.learner.parameters())


@pytest.mark.parametrize("optim", [None, MUON], ids=["adamw", "muon"])
def test_the_step_after_an_overflow_is_the_one_that_would_have_been_made_without(
    optim, make_step, batch, knobs
):
    calm, shaken = make_step(Fp16(), optim=optim), make_step(Fp16(), optim=optim)
    for step in (calm, shaken):
        step(batch(), knobs(0))
    shaken.learner.scaler.scale.fill_(HUGE)
    shaken(batch(5), knobs(1))
    shaken.learner.scaler.scale.fill_(65536.0)
    for step in (calm, shaken):
        step(batch(1), knobs(1))
    left, right = snapshot(calm), snapshot(shaken)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_scale_doubles_after_the_interval_and_an_overflow_starts_it_anew():
    scaler = DynamicScaler(initial=8.0, growth_interval=3)
    scales = []
    for value in (1.0, 1.0, float("inf"), 1.0, 1.0, 1.0, float("nan")):
        scaler.unscale([torch.full((2,), value)])
        scales.append(scaler.scale.item())
    assert scales == [8, 8, 4, 4, 4, 8, 4]
    assert scaler.overflows.item() == 2


def test_unscaling_undoes_any_scale():
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.ones(())]
    scaler = DynamicScaler(initial=3.0, growth_interval=9)
    scaled = [gradient * scaler.scale for gradient in gradients]
    assert scaler.unscale(scaled).item() == 0
    torch.testing.assert_close(scaled, gradients)


def test_the_scale_brings_back_gradients_that_fp16_would_lose(make_step, batch):
    def gradient(scale):
        learner = make_step(Fp16(initial_scale=scale)).learner
        data = batch()
        total, _ = learner(data.tokens_BT, data.targets_BT, None, None)
        (total * 1e-5 * scale).backward()
        return learner.model.blocks[0].mixer.qkv.weight.grad / scale

    lost, kept = gradient(1.0), gradient(65536.0)
    assert (lost == 0).float().mean() > (kept == 0).float().mean() + 0.05


def test_the_log_shows_the_scale_and_the_overflows(tiny, run_recipe):
    from dataclasses import replace

    precision = Fp16(initial_scale=2.0**30, growth_interval=2000)
    records = list(run_recipe(replace(tiny, precision=precision))[1].events("speed"))
    overflows = [record["overflows"] for record in records]
    assert overflows == sorted(overflows)
    assert overflows[-1] >= 1
    assert [record["loss_scale"] for record in records] == [2.0 ** (30 - count) for count in overflows]


def test_other_precisions_log_no_scale(make_step):
    assert make_step(Fp32()).readings() == {}


def test_an_optimizer_that_lets_gradients_wait_is_refused(make_step, batch, knobs):
    optim = (OptimizerGroup(pattern="blocks", optimizer=Muon(every=2)), MUON[1])
    with pytest.raises(ConfigError, match="Muon does not move at every step"):
        make_step(Fp16(), optim=optim)(batch(), knobs(0))


def test_fp16_accumulation_gives_the_product_and_gradients_of_fp16_and_resets_the_switch():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((3, 5, 63), (17, 63)))
    found, exact = [
        [tensor.clone().to(dtype).requires_grad_() for tensor in (x, weight)]
        for dtype in (torch.float16, torch.float64)
    ]
    y = fp16_accumulated(*found)
    expected = exact[0] @ exact[1].t()
    pulled = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    y.backward(pulled.half())
    expected.backward(pulled)
    assert y.dtype == torch.float16
    for own, true in ((y, expected), *((a.grad, b.grad) for a, b in zip(found, exact, strict=True))):
        assert (own.double() - true).norm() / true.norm() < 2**-10
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation
