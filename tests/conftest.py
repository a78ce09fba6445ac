"""Where Triton kernels run without a CUDA device, and a recipe that trains in a moment.

Triton must be told that it interprets before any kernel is defined, so the fixtures import what they need.
"""

import json
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_logreport(report):
    """Names a failure and its reason at once: a run that is cut off never gets to the list at its end."""
    # Only the process that prints; xdist's workers report to it.
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = f": {crash.message[:300]}" if crash else ""
        print(f"\nFAILED {report.nodeid} ({report.when}){reason}", file=sys.__stderr__, flush=True)


@pytest.fixture
def one_thread():
    """Sums in one order, whatever the machine; tiny products are faster so, too."""
    from sabrage.run import device

    with device.one_thread():
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of shards: bytes of printable text with a pattern that can be learned."""
    import numpy as np

    from sabrage.data.shards import write_shard

    folder = tmp_path_factory.mktemp("tiny-data")
    for split, count, start in (("train", 20_000, 0), ("val", 2_000, 50_000)):
        index = np.arange(start, start + count)
        write_shard(folder / f"{split}.bin", 48 + (index + index // 7 * 5 + index**2 // 31) % 64)
    return folder


@pytest.fixture
def tiny(tiny_data):
    """A byte-level recipe: 12 steps of 4 rows of 32 bytes, 2 layers of width 32. It borrows `demo`'s name."""
    from sabrage.attention.multi_head import MultiHead
    from sabrage.data.folder import ShardFolder
    from sabrage.feedforward.mlp import Mlp
    from sabrage.model.ends import LinearHead, TokenTable
    from sabrage.model.lm import ModelSpec
    from sabrage.objective.next_token import NextToken
    from sabrage.optim.adamw import AdamW
    from sabrage.parts import OptimizerGroup
    from sabrage.plan import Plan, Trapezoid
    from sabrage.precision.autocast import Fp32
    from sabrage.recipe import Budget, Recipe
    from sabrage.wiring.residual import Residual

    return Recipe(
        name="demo",
        summary="tiny",
        data=ShardFolder(path=str(tiny_data), vocab_size=257, block_tokens=128),
        model=ModelSpec(
            layers=2,
            dim=32,
            vocab_size=257,
            embedding=TokenTable(),
            mixers=(MultiHead(heads=2),),
            feedforwards=(Mlp(),),
            wiring=Residual(mixer_scale="depth"),
            head=LinearHead(),
        ),
        objective=NextToken(),
        optim=(OptimizerGroup(pattern=".*", optimizer=AdamW(lr=0.01)),),
        plan=Plan(steps=12, lr=Trapezoid(warmup=2, warmdown=4), tokens_per_step=128, sequence_length=32),
        precision=Fp32(),
        budget=Budget(evaluate_every=4, evaluation_tokens=500, evaluation_length=32, log_every=2),
    )


@pytest.fixture
def tiny_options(tiny):
    """The options that make `sabrage train demo` train the tiny recipe on the CPU."""
    from sabrage.config import to_json

    fields = {key: value for key, value in to_json(tiny).items() if key not in ("part", "name", "summary")}
    changes = [("--set", f"{field}={json.dumps(value)}") for field, value in fields.items()]
    return [*(part for change in changes for part in change), "--device", "cpu"]


@pytest.fixture
def run_recipe(tmp_path, one_thread):
    """run_recipe(recipe, name="run", resume=False, shelf=None) -> (outcome, what the run folder says)."""
    from sabrage.run.folder import RunFolder, read_run
    from sabrage.train.loop import train
    from sabrage.train.world import World

    def run(recipe, *, name="run", resume=False, shelf=None):
        folder = RunFolder(tmp_path / name).create(resume=resume)
        world = World(torch.device("cpu"))
        corpus = recipe.data.open()
        outcome = train(recipe, folder=folder, corpus=corpus, world=world, resume=resume, shelf=shelf)
        return outcome, read_run(folder.path)

    return run


@pytest.fixture
def assemble(one_thread):
    """assemble(recipe, micro_rows=4, device="cpu") -> (session, step, evaluator), nothing compiled."""
    from sabrage.optim.groups import Optimizers
    from sabrage.train.evaluate import Evaluator
    from sabrage.train.loop import build_learner
    from sabrage.train.session import Session
    from sabrage.train.step import TrainStep
    from sabrage.train.world import World

    def build(recipe, *, micro_rows=4, device="cpu", compile=False):
        world, budget = World(torch.device(device)), recipe.budget
        learner = build_learner(recipe, world)
        optimizers = Optimizers(recipe.optim, learner.named_parameters(), world.device)
        micro_tokens = micro_rows * recipe.plan.at(0).sequence_length
        step = TrainStep(learner, optimizers, world, micro_tokens=micro_tokens, compile=compile)
        evaluator = Evaluator(
            learner.model, recipe.precision, world, recipe.data.open().validation,
            num_targets=budget.evaluation_tokens, length=budget.evaluation_length,
            batch_tokens=micro_tokens, compile=compile, shapes=recipe.evaluation_shapes(),
        )  # fmt: skip
        return Session(learner, optimizers), step, evaluator

    return build


class CountGraphs:
    """A torch.compile backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward

    def compile(self, function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self)


@pytest.fixture
def counting():
    torch._dynamo.reset()
    yield CountGraphs()
    torch._dynamo.reset()
