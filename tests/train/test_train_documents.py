"""Documents and windows in training: they reach the parts, compile before the clock, and resume exactly."""

import shutil
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn

from sabrage.attention.multi_head import MultiHead
from sabrage.config import override
from sabrage.data.shards import write_shard
from sabrage.parts import Batch, Mixer
from sabrage.plan import Stages
from sabrage.train.compiling import allow_graphs
from sabrage.train.loop import make_loader, micro_batch_tokens
from sabrage.train.warmup import warm_up

END = 256


class WindowedMean(nn.Module):
    """The mean over the window's tokens, and a note of what it was told."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def forward(self, x_BTD, context):
        if not torch.compiler.is_compiling():
            self.told.append((context.window, context.documents_BT))
        sums_BTD = x_BTD.cumsum(1)
        window = context.window
        if window is None or window >= x_BTD.shape[1]:
            return sums_BTD
        return sums_BTD - nn.functional.pad(sums_BTD, (0, 0, window, 0))[:, : x_BTD.shape[1]]


TOLD = []


@dataclass(frozen=True, kw_only=True)
class Means(Mixer):
    """A mixer that is built without attention."""

    def build(self, *, dim, layer):
        return WindowedMean(TOLD)

    def streams(self, dim):
        return {}

    def flops(self, dim, sequence_length):
        return 0


@pytest.fixture
def told():
    TOLD.clear()
    return TOLD


@pytest.fixture(scope="session")
def document_data(tmp_path_factory):
    """Shards of bytes in documents of 5 to 40 tokens."""
    folder = tmp_path_factory.mktemp("document-data")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6000), ("val", 1500)):
        tokens = 48 + np.arange(count) % 7 + generator.integers(20, size=count)
        tokens[np.cumsum(generator.integers(5, 40, size=count // 45))] = END
        write_shard(folder / f"{split}.bin", tokens)
    return folder


@pytest.fixture
def windowed(tiny):
    """The tiny recipe with means for attention and windows that grow."""
    plan = replace(tiny.plan, window=Stages(values=(4, 8, 16), starts=(0, 4, 8)))
    return replace(tiny, plan=plan, model=replace(tiny.model, mixers=(Means(),)))


def documented(recipe, folder, order):
    return override(override(recipe, f"data.path={folder}"), f"data.order={order}")


def test_the_plans_window_reaches_every_layer_in_training_and_in_validation(windowed, run_recipe, told):
    recipe = override(override(windowed, "budget.evaluate_every=6"), "budget.evaluation_window=12")
    _, run = run_recipe(recipe)
    layers, batches = 2, 2
    step = [[window] * layers for window in (4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16)]
    validation = [[window] * layers * batches for window in (12, 16)]
    expected = [*chain(*step[:6], validation[0], *step[6:], validation[1])]
    assert len(run.events("validation")) == 2
    # The legality check comes first.
    assert [window for window, _ in told][-len(expected) :] == expected


def test_nothing_compiles_after_the_warm_up_however_many_windows(windowed, assemble, counting):
    # More than the eight graphs that torch would allow by itself.
    windows = Stages(values=tuple(range(3, 11)), starts=tuple(range(8)))
    plan = replace(windowed.plan, window=windows, sequence_length=Stages(values=(16, 32), starts=(0, 10)))
    recipe = override(replace(windowed, plan=plan), "budget.evaluate_every=6")
    recipe = override(recipe, "model.layers=1")
    session, step, evaluator = assemble(recipe)
    allow_graphs(recipe)
    step.forward = counting.compile(session.learner)
    evaluator.forward = counting.compile(evaluator._forward)
    warm_up(session, step, plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    assert len(plan.stages()) == 9
    assert evaluator.shapes == [(8, None), (10, None)]
    assert counting.graphs == 11
    with make_loader(recipe, recipe.data.open(), step.world, step=0, block=0) as loader:
        for number in range(plan.steps):
            step(Batch(*next(loader)), plan.at(number))
            if number in (5, 11):
                evaluator(recipe.evaluation_window(number + 1))
    assert counting.graphs == 11


@pytest.mark.parametrize("order", ["masked", "documents"])
def test_the_warm_up_compiles_for_documents_where_the_data_has_them(
    tiny, assemble, counting, document_data, order
):
    recipe = documented(tiny, document_data, order)
    session, step, _ = assemble(recipe)
    step.forward = counting.compile(session.learner)
    warm_up(session, step, recipe.plan.stages(), None, vocab_size=257, say=pytest.fail, documents=True)
    assert counting.graphs == 1
    with make_loader(recipe, recipe.data.open(), step.world, step=0, block=0) as loader:
        step(Batch(*next(loader)), recipe.plan.at(0))
    assert counting.graphs == 1


@pytest.mark.parametrize("order", ["masked", "documents"])
def test_a_run_over_documents_resumes_bit_for_bit(tiny, run_recipe, document_data, order):
    plan = replace(tiny.plan, sequence_length=Stages(values=(16, 64), starts=(0, 6)))
    recipe = documented(replace(tiny, plan=plan), document_data, order)
    recipe = override(override(recipe, "budget.checkpoint_every=5"), "budget.keep_checkpoints=3")
    _, whole = run_recipe(recipe)
    for step in (10, 5):
        for path in sorted((whole.path / "checkpoints").iterdir()):
            if path.name > f"step-{step:08d}":
                shutil.rmtree(path)
        _, run = run_recipe(recipe, resume=True)
        assert run.events("resume")[-1]["step"] == step
        losses = [
            {record["step"]: record["loss"] for record in found.events("train")} for found in (run, whole)
        ]
        assert losses[0] == losses[1]


def test_documents_in_training_do_not_see_each_other(tiny, assemble, document_data):
    """The loss of a packed batch is the mean over its pieces, each alone in a row of its own."""
    recipe = documented(tiny, document_data, "documents")
    # Where a piece lies in its row must not matter.
    recipe = replace(recipe, model=replace(recipe.model, mixers=(MultiHead(heads=2, rotary=None),)))
    session, step, _ = assemble(recipe)
    with make_loader(recipe, recipe.data.open(), step.world, step=0, block=0) as loader:
        batch = Batch(*next(loader))
    loss, _ = session.learner(batch.tokens_BT, batch.targets_BT, batch.documents_BT, None)
    total = 0.0
    for row in range(len(batch.tokens_BT)):
        for number in batch.documents_BT[row].unique():
            piece = batch.documents_BT[row] == number
            alone = (batch.tokens_BT[row, piece][None], batch.targets_BT[row, piece][None])
            total += session.learner(*alone, None, None)[0].item() * int(piece.sum())
    assert len(batch.documents_BT.unique()) > 1
    assert loss.item() == pytest.approx(total / batch.tokens_BT.numel(), rel=1e-6)


def test_validation_by_documents_starts_each_one_afresh(tiny, assemble, document_data):
    recipe = documented(tiny, document_data, "stream")
    recipe = replace(recipe, model=replace(recipe.model, mixers=(MultiHead(heads=2, rotary=None),)))
    session, _, evaluator = assemble(recipe)
    plain = evaluator()
    evaluator.end_of_text = END
    tokens = torch.from_numpy(evaluator.tokens)
    inputs, targets, total = tokens[:-1], tokens[1:], 0.0
    places = torch.arange(500)
    cut = (inputs == END) | (places % 32 == 0)
    for number in cut.cumsum(0).unique():
        piece = cut.cumsum(0) == number
        with torch.no_grad():
            h_BTD = session.learner.model.eval()(inputs[piece][None])
            loss = session.learner.model.head.loss(h_BTD, targets[piece][None])
        total += loss.item() * int(piece.sum())
    assert evaluator() == pytest.approx(total / 500, rel=1e-6)
    assert evaluator() != pytest.approx(plain, rel=1e-4)


def test_validation_may_be_longer_than_training(tiny, run_recipe):
    _, run = run_recipe(override(tiny, "budget.evaluation_length=96"))
    assert run.result["validation_loss"] < 5.5


def test_a_growing_batch_is_cut_for_the_largest_one(tiny):
    from sabrage.run.device import DeviceFacts

    stages = Stages(values=(128, 1280), starts=(0, 6))
    recipe = replace(tiny, plan=replace(tiny.plan, tokens_per_step=stages))
    card = DeviceFacts(kind="cuda", name="a card", memory=80 << 30, capability=(9, 0))
    assert micro_batch_tokens(recipe, card, size=1) == 1280


def test_the_last_validation_is_told_by_position_when_asked(tiny, run_recipe):
    recipe = override(override(tiny, "budget.by_position=true"), "budget.evaluation_length=100")
    _, run = run_recipe(recipe)
    assert [(first, end) for first, end, _ in run.result["by_position"]] == [(0, 64), (64, 100)]
    shares = [5 * 64, 5 * 36]
    losses = [loss for *_, loss in run.result["by_position"]]
    mean = sum(loss * share for loss, share in zip(losses, shares, strict=True)) / 500
    assert mean == pytest.approx(run.result["validation_loss"], rel=1e-6)
