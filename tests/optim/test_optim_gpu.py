import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import Optimizers
from sabrage.optim.muon import Muon
from sabrage.optim.orthogonalise import newton_schulz, polar_express
from sabrage.parts import Knobs, OptimizerGroup
from sabrage.run.device import probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FULL = Muon(normuon=True, cautious=True, weight_decay=0.1, orthogonalise="polar_express")
HALVES = replace(FULL, backend="triton")
LONGER = replace(FULL, evens="longer", variance_decay=0.9)


def gpt2_parameters(*, dim=256, layers=2, vocab=512, seed=0, dtype=torch.float32):
    """The parameters of a GPT-2 without biases, on the GPU, each with a gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = {"embedding.weight": (vocab, dim)}
    for layer in range(layers):
        shapes |= {
            f"blocks.{layer}.qkv.weight": (3 * dim, dim),
            f"blocks.{layer}.out.weight": (dim, dim),
            f"blocks.{layer}.up.weight": (4 * dim, dim),
            f"blocks.{layer}.down.weight": (dim, 4 * dim),
        }
    named = [
        (name, nn.Parameter(torch.randn(shape, generator=generator, device="cuda").to(dtype)))
        for name, shape in shapes.items()
    ]
    give_gradients(named, seed=seed + 1)
    return named


def give_gradients(named, *, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for _, parameter in named:
        gradient = torch.randn(parameter.shape, generator=generator, device="cuda")
        parameter.grad = gradient.to(parameter.dtype)


def optimizers_of(part, named):
    groups = [
        OptimizerGroup(pattern="blocks", optimizer=part),
        OptimizerGroup(pattern="embedding", optimizer=AdamW()),
    ]
    return Optimizers(groups, named, "cuda")


def knobs(step):
    return Knobs(
        step=step,
        lr=1 / (step + 1),
        sequence_length=8,
        tokens_per_step=64,
        momentum=0.85 + step / 100,
        weight_decay=1 + step,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [Muon(weight_decay=0.1), FULL, HALVES, LONGER])
def test_the_compiled_update_equals_the_eager_one(part, dtype):
    start = [parameter.detach().float() for _, parameter in gpt2_parameters(dtype=dtype)]
    ends = []
    for compiles in (True, False):
        named = gpt2_parameters(dtype=dtype)
        chosen = replace(part, compile=compiles, lr=0.5)
        optimizers = optimizers_of(chosen, named)
        for step in range(2):
            give_gradients(named, seed=step)
            optimizers.step(knobs(step))
        ends.append([parameter.detach().float() for _, parameter in named])
    for before, compiled, eager in zip(start, *ends, strict=True):
        error = (compiled - eager).norm() / (eager - before).norm()
        # Both orthogonalise in bfloat16; fusion rounds intermediate values elsewhere.
        assert error < 0.02


@pytest.mark.parametrize("part", [FULL, HALVES], ids=["plain", "halves"])
def test_changing_knobs_recompile_nothing(part):
    named = gpt2_parameters()
    optimizers = optimizers_of(part, named)
    optimizers.step(knobs(0))
    before = [parameter.detach().clone() for _, parameter in named]
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            give_gradients(named, seed=step)
            optimizers.step(knobs(step))
            optimizers.zero_grad()
    assert not any(torch.equal(old, new) for old, (_, new) in zip(before, named, strict=True))


@pytest.mark.parametrize("part", [FULL, HALVES], ids=["plain", "halves"])
def test_a_step_never_waits_for_the_device(part):
    named = gpt2_parameters()
    optimizers = optimizers_of(part, named)
    optimizers.step(knobs(0))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizers.step(knobs(1))
        optimizers.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_resumed_steps_are_the_same_bit_for_bit():
    named = gpt2_parameters()
    optimizers = optimizers_of(FULL, named)
    optimizers.step(knobs(0))
    state = {key: value.clone() for key, value in optimizers.state_tensors().items()}
    weights = [parameter.detach().clone() for _, parameter in named]
    ends = []
    for _ in range(2):
        optimizers.load_state_tensors(state)
        for (_, parameter), weight in zip(named, weights, strict=True):
            parameter.data.copy_(weight)
        for step in (1, 2):
            give_gradients(named, seed=step)
            optimizers.step(knobs(step))
        ends.append([parameter.detach().clone() for _, parameter in named])
    assert all(torch.equal(first, second) for first, second in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("method", "low", "high"), [(newton_schulz, 0.68, 1.21), (polar_express, 0.87, 1.13)]
)
@pytest.mark.parametrize(("rows", "columns"), [(768, 3072), (3072, 768)])
def test_bfloat16_products_bring_random_matrices_into_the_band(method, low, high, rows, columns):
    generator = torch.Generator("cuda").manual_seed(0)
    g = torch.randn(4, rows, columns, generator=generator, device="cuda")
    found = method(g)
    assert found.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found.float())
    assert low - 0.03 <= values.min()
    assert values.max() <= high + 0.03


@pytest.mark.skipif(
    not torch.cuda.is_available() or probe("cuda").peaks.get("bf16", 0) < 700e12,
    reason="the bar is set for H100-class devices",
)
@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="other tests use the device; run it without -n"
)
def test_a_whole_gpt2_step_takes_at_most_eight_milliseconds():
    named = gpt2_parameters(dim=768, layers=12, vocab=50_304)
    optimizers = optimizers_of(FULL, named)
    for step in range(3):
        optimizers.step(knobs(step))
    times = []
    for step in range(3, 13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizers.step(knobs(step))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    # The best of them: what else runs on the host only ever adds.
    print(f"optimizer step, 124M GPT-2: {min(times):.2f} ms (the best of {len(times)})")
    assert min(times) <= 8.0
