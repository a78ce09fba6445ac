from dataclasses import replace

import pytest
import torch

from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.precision.autocast import Bf16, Bf16Weights, Fp32, Tf32
from sabrage.precision.fp8 import Fp8, Fp8Product
from sabrage.precision.fp16 import Fp16, fp16_accumulated
from sabrage.run.device import probe
from sabrage.run.folder import RunFolder, read_run
from sabrage.train.loop import train
from sabrage.train.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ALL = (r"qkv", r"out", r"up", r"down", r"head")
KINDS = {
    "fp32": Fp32(),
    "tf32": Tf32(),
    "bf16": Bf16(),
    "bf16-weights": Bf16Weights(),
    "fp16": Fp16(),
    "fp16-fast": Fp16(fp16_accumulation=ALL),
    "fp8": Fp8(products=ALL),
    "fp8-delayed": Fp8(products=ALL, scaling="delayed"),
}
MUON = (
    OptimizerGroup(pattern=r"blocks", optimizer=Muon(normuon=True)),
    OptimizerGroup(pattern=".", optimizer=AdamW(lr=0.01)),
)


@pytest.fixture(params=KINDS)
def precision(request):
    """Each precision that this device has."""
    refusal = KINDS[request.param].refusal(probe("cuda"))
    if refusal:
        pytest.skip(refusal)
    return KINDS[request.param]


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_tf32_and_fp32_products_are_what_they_are_called():
    a, b = draw(512, 768), draw(768, 512, seed=1)
    exact = a.double() @ b.double()
    errors = {}
    for part in (Tf32(), Fp32()):
        if part.refusal(probe("cuda")):
            pytest.skip(part.refusal(probe("cuda")))
        part.prepare(torch.nn.Module(), torch.device("cuda"))
        errors[type(part)] = error(a @ b, exact)
    assert errors[Fp32] < 2e-6
    assert 2**-13 < errors[Tf32] < 2**-10


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1000, 768, 3072), (512, 3072, 768), (300, 768, 50304)]
)
def test_fp8_errors_are_at_most_twice_those_of_rounding_the_inputs(tokens, inputs, outputs):
    refusal = Fp8().refusal(probe("cuda"))
    if refusal:
        pytest.skip(refusal)

    def rounded(values, dtype):
        scale = values.float().abs().max() / torch.finfo(dtype).max
        return ((values.float() / scale).to(dtype).float() * scale).double()

    x, weight = draw(tokens, inputs, dtype=torch.bfloat16).requires_grad_(), draw(outputs, inputs, seed=1)
    pulled = draw(tokens, outputs, seed=2, dtype=torch.bfloat16)
    weight.requires_grad_()
    y = Fp8Product()(x, weight)
    y.backward(pulled)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    exact = (
        x.double() @ weight.double().t(),
        pulled.double() @ weight.double(),
        pulled.double().t() @ x.double(),
    )
    emulated = (
        rounded(x, e4m3) @ rounded(weight, e4m3).t(),
        rounded(pulled, e5m2) @ rounded(weight, e4m3),
        exact[2],
    )
    for own, best, true in zip((y, x.grad, weight.grad), emulated, exact, strict=True):
        assert error(own, true) <= 2 * error(best, true) + 2**-8


# The backward pass has a thread of its own, and its first product there makes the context.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
def test_fp16_accumulation_happens_forward_and_nowhere_else():
    x, weight = draw(256, 8192, dtype=torch.float16).abs(), draw(128, 8192, seed=1, dtype=torch.float16).abs()
    pulled = draw(256, 128, seed=2, dtype=torch.float16)
    outputs, gradients = [], []
    for product in (fp16_accumulated, torch.nn.functional.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x / 64, weight / 64)]
        y = product(*leaves)
        y.backward(pulled)
        outputs.append(y.detach())
        gradients.append([leaf.grad for leaf in leaves])
    exact = x.double() / 64 @ (weight.double() / 64).t()
    assert not torch.equal(*outputs)
    assert error(outputs[0], exact) < 0.02
    for fast, plain in zip(*gradients, strict=True):
        assert error(fast, plain.double()) < 2**-10
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


@pytest.mark.parametrize("optim", [None, MUON], ids=["adamw", "muon"])
def test_a_step_never_waits_for_the_device(precision, optim, make_step, batch, knobs):
    step = make_step(precision, device="cuda", optim=optim)
    first, second = batch(0, "cuda"), batch(1, "cuda")
    step(first, knobs(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(second, knobs(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optim", [None, MUON], ids=["adamw", "muon"])
def test_an_overflow_moves_nothing_on_the_device(optim, make_step, batch, knobs):
    step = make_step(Fp16(), device="cuda", optim=optim)
    step(batch(0, "cuda"), knobs(0))
    step.learner.scaler.scale.fill_(2.0**100)

    def snapshot():
        tensors = dict(step.learner.named_parameters()) | step.optimizers.state_tensors()
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    before = snapshot()
    step(batch(1, "cuda"), knobs(1))
    after = snapshot()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert step.readings() == {"loss_scale": 2.0**99, "overflows": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_short_training_follows_fp32(precision, compile, tiny, tmp_path):
    """Through the whole loop, warm-up and compilation included; 12 steps, losses in nats."""

    def losses(each, name):
        recipe = replace(tiny, precision=each, optim=MUON, runtime=replace(tiny.runtime, compile=compile))
        folder, world = RunFolder(tmp_path / name).create(), World(torch.device("cuda"))
        train(recipe, folder=folder, corpus=recipe.data.open(), world=world)
        torch._dynamo.reset()
        return torch.tensor([record["loss"] for record in read_run(folder.path).events("train")])

    plain, own = losses(Fp32(), "plain"), losses(precision, "own")
    assert plain[-1] < plain[0] - 0.5
    assert (own - plain).abs().max() < (0.15 if isinstance(precision, Fp8) else 0.05)
