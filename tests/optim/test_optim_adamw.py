import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sabrage.config import from_json, to_json
from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import Optimizers
from sabrage.parts import Knobs, Optimizer, OptimizerGroup


class Launches(TorchDispatchMode):
    """Counts what is computed; views compute nothing."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


def parameters(*, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding.weight": (11, 4), "head.bias": (11,), "gain": ()}
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        for name, shape in shapes.items()
    ]


def knobs(step, **changes):
    return Knobs(step=step, lr=(step + 1) / 4, sequence_length=8, tokens_per_step=64, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_torchs_own(dtype):
    part = AdamW()
    ours, theirs = parameters(seed=0, dtype=dtype), parameters(seed=0, dtype=dtype)
    optimizers = Optimizers([OptimizerGroup(pattern=".", optimizer=part)], ours, "cpu")
    oracle = torch.optim.AdamW(
        [parameter for _, parameter in theirs], betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for (_, mine), (_, other) in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator).to(dtype)
            other.grad = mine.grad.clone()
        optimizers.step(knobs(step, weight_decay=0.5))
        oracle.param_groups[0].update(lr=0.0018 * (step + 1) / 4, weight_decay=0.05)
        oracle.step()
    for (name, mine), (_, other) in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other), name
        for key, value in oracle.state[other].items():
            assert torch.equal(optimizers.state_tensors()[f"{name}/{key}"], value), (name, key)


def test_fused_adamw_on_the_cpu_agrees_with_the_formula():
    part = AdamW(lr=0.1, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.2)
    (name, weight) = ("w", nn.Parameter(torch.tensor([1.0, -2.0])))
    optimizer = part.build([(name, weight)])
    weight.grad = torch.tensor([0.5, 4.0])
    optimizer.step()
    # After one step both corrected moments are the gradient and its square.
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.2) - 0.1 * torch.tensor([0.5 / 0.501, 4.0 / 4.001])
    torch.testing.assert_close(weight.detach(), expected)


def test_all_groups_of_one_adamw_are_one_fused_launch():
    groups = [OptimizerGroup(pattern=pattern, optimizer=AdamW()) for pattern in ("embedding", "head", "gain")]
    named = parameters(seed=0)
    optimizers = Optimizers(groups, named, "cpu")
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    with Launches() as launches:
        optimizers.step(knobs(0))
    assert launches.names == ["aten::_foreach_add_", "aten::_fused_adamw_"]


def test_adamw_hyperparameters_follow_the_knobs():
    part = AdamW(lr=0.01, weight_decay=0.2)
    values = part.hyperparameters(knobs(1, weight_decay=0.25, momentum=0.7))
    assert values == {"lr": 0.005, "weight_decay": 0.05}


def test_adamw_survives_json_and_names_bad_values():
    part = AdamW(betas=(0.8, 0.9))
    assert from_json(to_json(part), Optimizer) == part
    assert AdamW().problems() == []
    (sentence,) = AdamW(betas=(0.9, 1.0)).problems()
    assert "AdamW.betas=(0.9, 1.0)" in sentence


def test_every_second_step_moves_by_the_gradients_of_both():
    def one():
        return [("w", torch.nn.Parameter(torch.arange(6.0).view(2, 3)))]

    (pair, sum_of_both), groups = (one(), one()), []
    for part in (AdamW(every=2), AdamW()):
        groups.append([OptimizerGroup(pattern=".*", optimizer=part)])
    halting = Optimizers(groups[0], pair, "cpu")
    steady = Optimizers(groups[1], sum_of_both, "cpu")
    first, second = torch.full((2, 3), 0.5), torch.linspace(-1, 1, 6).view(2, 3)
    weight = pair[0][1]
    weight.grad = first.clone()
    halting.step(knobs(0))
    halting.zero_grad()
    assert torch.equal(weight.detach(), torch.arange(6.0).view(2, 3))
    assert torch.equal(weight.grad, first)
    weight.grad += second
    halting.step(knobs(1))
    halting.zero_grad()
    assert weight.grad is None
    sum_of_both[0][1].grad = first + second
    steady.step(knobs(1))
    assert torch.equal(weight, sum_of_both[0][1])
    assert "AdamW.every=0" in AdamW(every=0).problems()[0]
