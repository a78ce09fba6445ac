"""Steps that the device skips, and fp32 masters of narrower weights."""

import dataclasses

import pytest
import torch
from torch import nn

from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import Optimizers
from sabrage.optim.muon import Muon, compiled_update
from sabrage.parts import Knobs, OptimizerGroup

FULL = Muon(normuon=True, cautious=True, weight_decay=0.1)
LONGER = dataclasses.replace(FULL, evens="longer")
SHAPES = {"0.qkv": (24, 8), "1.qkv": (24, 8), "0.up": (32, 8), "0.down": (8, 32)}


def named_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        for name, shape in SHAPES.items()
    ]


def give_gradients(named, *, seed, largest=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * largest


def optimizers_of(part, named, *, compiled=False, masters=False):
    optimizers = Optimizers([OptimizerGroup(pattern=".", optimizer=part)], named, "cpu", masters=masters)
    if compiled:
        for batch in optimizers.members[0].optimizer.batches:
            batch.update = compiled_update("muon_test", backend="aot_eager")
    return optimizers


def knobs(step):
    return Knobs(step=step, lr=1.0, sequence_length=8, tokens_per_step=64)


def snapshot(optimizers, named):
    tensors = dict(named) | optimizers.state_tensors()
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("part", "compiled"), [(AdamW(), False), (FULL, False), (FULL, True), (LONGER, True), (Muon(), False)]
)
def test_a_step_with_found_inf_changes_neither_weights_nor_state(part, compiled):
    named = named_parameters()
    optimizers = optimizers_of(part, named, compiled=compiled)
    give_gradients(named, seed=0)
    optimizers.step(knobs(0), found_inf=torch.zeros(()))
    before = snapshot(optimizers, named)
    for bad in (float("inf"), float("nan"), 1.0):
        give_gradients(named, seed=1, largest=bad)
        optimizers.step(knobs(1), found_inf=torch.ones(()))
        assert same(snapshot(optimizers, named), before)


@pytest.mark.parametrize("part", [AdamW(), FULL])
def test_found_inf_of_zero_is_a_step_without_it_bit_for_bit(part):
    ends = []
    for found_inf in (None, torch.zeros(())):
        named = named_parameters()
        optimizers = optimizers_of(part, named)
        for step in range(3):
            give_gradients(named, seed=step)
            optimizers.step(knobs(step), found_inf=found_inf)
        ends.append(snapshot(optimizers, named))
    assert same(*ends)


@pytest.mark.parametrize("part", [AdamW(), FULL])
def test_masters_move_as_fp32_parameters_do_and_the_weights_follow_rounded(part):
    narrow = named_parameters(torch.bfloat16)
    wide = [(name, nn.Parameter(parameter.detach().float())) for name, parameter in narrow]
    small = dataclasses.replace(part, lr=1e-5)
    optimizers, reference = optimizers_of(small, narrow, masters=True), optimizers_of(small, wide)
    for step in range(3):
        give_gradients(narrow, seed=step)
        for (_, parameter), (_, source) in zip(wide, narrow, strict=True):
            parameter.grad = source.grad.float()
        optimizers.step(knobs(step))
        reference.step(knobs(step))
        optimizers.zero_grad()
    state = optimizers.state_tensors()
    for (name, parameter), (_, weight) in zip(wide, narrow, strict=True):
        assert torch.equal(state[f"{name}/master"], parameter)
        assert torch.equal(weight, parameter.bfloat16())
        assert weight.grad is None
    # Steps this small would be lost without masters.
    assert not same(dict(wide), dict(named_parameters(torch.bfloat16)))


def test_masters_come_back_bit_for_bit_and_go_on_as_before():
    named = named_parameters(torch.bfloat16)
    optimizers = optimizers_of(FULL, named, masters=True)
    give_gradients(named, seed=0)
    optimizers.step(knobs(0))
    saved = snapshot(optimizers, named)
    ends = []
    for _ in range(2):
        optimizers.load_state_tensors({name: saved[name] for name in optimizers.state_tensors()})
        for name, parameter in named:
            parameter.data.copy_(saved[name])
        give_gradients(named, seed=1)
        optimizers.step(knobs(1))
        ends.append(snapshot(optimizers, named))
    assert same(*ends)
    assert not same(ends[0], saved)


def test_fp32_parameters_get_no_masters():
    named = named_parameters()
    assert not any("master" in name for name in optimizers_of(FULL, named, masters=True).state_tensors())
