"""The options of multi-head attention on the device: held against fp32 on the CPU, and each one graph."""

from dataclasses import replace

import pytest
import torch
from attention_cases import DOCUMENTS, Case
from attention_options import HALF, OPTIONS

from sabrage.attention.backends import KNOWS, refusal
from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context
from sabrage.run.device import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTH, DIM = 217, 256
FUSED = [name for name in KNOWS if name not in ("plain", "sdpa")]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """The compiler takes few shapes of one function and refuses the next."""
    torch.compiler.reset()


def made(changes, **more):
    """A layer with noise on its gate, the same for all devices."""
    torch.manual_seed(0)
    layer = MultiHead(**{"heads": 4, "qk_norm": True, **changes, **more}).build(dim=DIM, layer=0)
    if layer.gate_HX is not None:
        torch.nn.init.normal_(layer.gate_HX, std=0.3)
    return layer


def inputs(device):
    """x, the gradient of the output and documents."""
    generator = torch.Generator().manual_seed(1)
    x_BTD, pull_BTD = (torch.randn(2, LENGTH, DIM, generator=generator).to(device) for _ in range(2))
    return x_BTD, pull_BTD, Case("", documents=DOCUMENTS).context(device).documents_BT


def results(layer, device, *, documents, bf16, compiled=False):
    """The output and the gradients of x and of all parameters, by name, in fp32 on the CPU."""
    layer = layer.to(device)
    x_BTD, pull_BTD, documents_BT = inputs(device)
    x_BTD.requires_grad_()

    def forward(x_BTD, documents_BT):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return layer(x_BTD, Context(documents_BT=documents_BT if documents else None))

    run = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward
    y_BTD = run(x_BTD, documents_BT)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y_BTD.float(), [x_BTD, *parameters], pull_BTD)
    found = dict(zip(["out", "dx", *names], [y_BTD, *gradients], strict=True))
    return {name: value.detach().float().cpu() for name, value in found.items()}


def errors(found, exact):
    """Relative errors, by name."""
    return {name: ((found[name] - x).norm() / x.norm()).item() for name, x in exact.items()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_in_bf16_an_option_is_what_it_is_in_fp32_on_the_cpu(name, compiled):
    """Compiled it is one graph. The bound is three times the error of plain attention in bf16 on a CPU."""
    exact = results(made(OPTIONS[name], backend="plain"), "cpu", documents=True, bf16=False)
    layer = made(OPTIONS[name], backend="sdpa")
    found = results(layer, "cuda", documents=True, bf16=True, compiled=compiled)
    assert max(errors(found, exact).values()) <= 0.02, errors(found, exact)


@pytest.mark.parametrize("backend", FUSED)
def test_every_backend_attends_in_pairs_in_one_graph(backend):
    """Under the masks that it knows: windows and documents count tokens and not entries."""
    reason = refusal(backend, replace(probe("cuda"), products="bf16"), width=DIM // 4)
    if reason:
        pytest.skip(reason)
    changes = OPTIONS["all"] | {"window": 40 if "window" in KNOWS[backend] else None}
    documents = "documents" in KNOWS[backend]
    exact = results(made(changes, backend="plain"), "cpu", documents=documents, bf16=False)
    for compiled in (False, True):
        layer = made(changes, backend=backend)
        found = results(layer, "cuda", documents=documents, bf16=True, compiled=compiled)
        assert max(errors(found, exact).values()) <= 0.02, errors(found, exact)


@pytest.mark.parametrize("key_offset", [False, True])
def test_the_kernel_of_norm_and_rotation_turns_a_share(key_offset):
    changes = {"rotary": HALF, "key_offset": key_offset}
    exact = results(made(changes, backend="plain"), "cpu", documents=True, bf16=False)
    for compiled in (False, True):
        layer = made(changes, backend="sdpa", rotary_backend="triton")
        found = results(layer, "cuda", documents=True, bf16=True, compiled=compiled)
        assert max(errors(found, exact).values()) <= 0.02, errors(found, exact)
