import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from sabrage.config import resolve
from sabrage.optim.muon import Muon
from sabrage.parts import Batch, Knobs, OptimizerGroup
from sabrage.plan import Stages
from sabrage.precision.autocast import Bf16
from sabrage.run.device import probe
from sabrage.train.loop import make_loader
from sabrage.train.step import micro_rows
from sabrage.train.warmup import warm_up

KNOBS = Knobs(step=0, lr=1.0, sequence_length=32, tokens_per_step=128)


def batch(*, rows=4, length=32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(257, (rows, length + 1), generator=generator).to(device)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:])


class Keep:
    """Optimizers that keep the gradients and move nothing."""

    def __init__(self, learner):
        self.learner = learner

    def step(self, knobs, **options):
        self.gradients = {name: p.grad.clone() for name, p in self.learner.named_parameters()}

    def zero_grad(self):
        self.learner.zero_grad()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(tiny, assemble, rows):
    found = []
    for size in (rows, 6):
        session, step, _ = assemble(tiny, micro_rows=size)
        step.optimizers = Keep(session.learner)
        found.append((step(batch(rows=6), KNOBS), step.optimizers.gradients))
    (loss, gradients), (whole_loss, whole_gradients) = found
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item()
        )


def test_micro_batches_are_equal_parts_that_fit():
    assert [micro_rows(torch.Size((6, 32)), tokens) for tokens in (32, 64, 127, 160, 6 * 32, 10_000)] == [
        1, 2, 3, 3, 6, 6,
    ]  # fmt: skip
    assert micro_rows(torch.Size((6, 32)), 31) == 1


def test_a_step_leaves_no_gradients(tiny, assemble):
    session, step, _ = assemble(tiny)
    step(batch(), KNOBS)
    assert all(parameter.grad is None for parameter in session.learner.parameters())


def test_the_forward_pass_is_one_graph_whatever_the_knobs(tiny, assemble, counting):
    session, step, _ = assemble(tiny, micro_rows=2)
    expected = [step(batch(seed=seed), replace(KNOBS, step=seed, lr=1 / (1 + seed))) for seed in range(4)]
    session, step, _ = assemble(tiny, micro_rows=2)
    step.forward = counting.compile(session.learner)
    # fullgraph makes a graph break an error.
    found = [step(batch(seed=seed), replace(KNOBS, step=seed, lr=1 / (1 + seed))) for seed in range(4)]
    assert counting.graphs == 1
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=0)


def test_nothing_compiles_after_the_warm_up(tiny, assemble, counting):
    plan = replace(tiny.plan, steps=6, sequence_length=Stages(values=(16, 32, 64), starts=(0, 2, 4)))
    recipe = replace(tiny, plan=plan)
    session, step, evaluator = assemble(recipe)
    step.forward = counting.compile(session.learner)
    evaluator.forward = counting.compile(evaluator._forward)
    warm_up(session, step, plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    assert counting.graphs == 4
    with make_loader(recipe, recipe.data.open(), step.world, step=0, block=0) as loader:
        for number in range(plan.steps):
            step(Batch(*next(loader)), plan.at(number))
            evaluator()
    assert counting.graphs == 4


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
def test_a_compiled_run_gives_the_losses_of_an_eager_one(tiny, run_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tiny = replace(tiny, model=replace(tiny.model, layers=1))
    _, eager = run_recipe(tiny, name="eager")
    _, compiled = run_recipe(replace(tiny, runtime=replace(tiny.runtime, compile="on")), name="compiled")
    for event in ("train", "validation"):
        pairs = zip(eager.events(event), compiled.events(event), strict=True)
        assert all(left["loss"] == pytest.approx(right["loss"], rel=1e-5) for left, right in pairs)
    assert compiled.result["warmup_seconds"] > 0


@pytest.fixture
def on_gpu(tiny):
    """The tiny recipe in bf16, with Muon for the matrices, as it would run on this GPU."""
    matrices = OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02))
    recipe = replace(tiny, precision=Bf16(), optim=(matrices, *tiny.optim))
    return resolve(recipe, probe("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_the_hot_loop_never_waits_for_the_device(on_gpu, assemble, compile):
    session, step, evaluator = assemble(on_gpu, micro_rows=2, device="cuda", compile=compile)
    warm_up(session, step, on_gpu.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    with make_loader(on_gpu, on_gpu.data.open(), step.world, step=0, block=0) as loader:
        batches = [Batch(*next(loader)) for _ in range(2)]
        knobs = replace(KNOBS, loss_weights=(0.5, 0.25))
        step(batches[0], knobs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches.append(Batch(*next(loader)))
            for number, made in enumerate(batches):
                step(made, replace(knobs, step=number, lr=1 / (1 + number)))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_the_gpu_learns_and_neither_recompiles_nor_grows(on_gpu, assemble):
    session, step, evaluator = assemble(on_gpu, micro_rows=2, device="cuda", compile=True)
    warm_up(session, step, on_gpu.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    graphs, losses, peaks = counters["stats"]["unique_graphs"], [evaluator()], []
    with make_loader(on_gpu, on_gpu.data.open(), step.world, step=0, block=0) as loader:
        for number in range(40):
            torch.cuda.reset_peak_memory_stats()
            step(Batch(*next(loader)), replace(KNOBS, step=number, lr=1 - number / 40))
            peaks.append(torch.cuda.max_memory_allocated())
    losses.append(evaluator())
    assert losses[1] < losses[0] - 0.5
    assert counters["stats"]["unique_graphs"] == graphs
    assert max(peaks[20:]) <= max(peaks[:20])
