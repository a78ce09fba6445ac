"""A learner in any precision, and the process's switches put back after every test."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture(autouse=True)
def switches():
    """What a precision sets for the whole process is put back."""
    precision = torch.get_float32_matmul_precision()
    accumulation = torch.backends.cuda.matmul.allow_fp16_accumulation
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_fp16_accumulation = accumulation


@pytest.fixture
def make_step(tiny, one_thread):
    """make_step(precision, device="cpu", optim=None) -> the TrainStep of the tiny recipe."""
    from sabrage.optim.groups import Optimizers
    from sabrage.train.loop import build_learner
    from sabrage.train.step import TrainStep
    from sabrage.train.world import World

    def make(precision, *, device="cpu", optim=None, compile=False):
        recipe = replace(tiny, precision=precision, optim=optim or tiny.optim)
        world = World(torch.device(device))
        learner = build_learner(recipe, world)
        masters = precision.masters()
        optimizers = Optimizers(recipe.optim, learner.named_parameters(), device, masters=masters)
        return TrainStep(learner, optimizers, world, micro_tokens=64, compile=compile)

    return make


@pytest.fixture
def batch():
    """batch(seed=0, device="cpu") -> 4 rows of 32 tokens that count upwards, which can be learned."""
    from sabrage.parts import Batch

    def make(seed=0, device="cpu"):
        start_B1 = torch.randint(200, (4, 1), generator=torch.Generator().manual_seed(seed))
        tokens_BT = (start_B1 + torch.arange(33)).to(device)
        return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])

    return make


@pytest.fixture
def knobs():
    """knobs(step) of a constant plan."""
    from sabrage.parts import Knobs

    return lambda step=0: Knobs(step=step, lr=1.0, sequence_length=32, tokens_per_step=128)
