"""Growing depth in training: idle layers rest, switching on loses nothing, all compiles before the clock."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from sabrage.config import resolve
from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon, compiled_update
from sabrage.parts import Batch, OptimizerGroup
from sabrage.plan import Stages
from sabrage.precision.autocast import Bf16
from sabrage.run.clocks import Clocks
from sabrage.run.device import DeviceFacts, probe
from sabrage.run.folder import RunFolder
from sabrage.train.compiling import allow_graphs
from sabrage.train.loop import make_loader
from sabrage.train.recorder import Recorder
from sabrage.train.warmup import warm_up
from sabrage.train.world import World

SWITCH = 6
MUON = Muon(lr=0.02, normuon=True, weight_decay=0.1)
# The training losses of steps 4 to 8 of the recipe below; the switch is before step 6.
LOSSES = [5.191132068634033, 4.99627685546875, 4.645094871520996, 4.530205726623535, 4.453336238861084]


@pytest.fixture
def grown(tiny):
    """The tiny recipe with four layers that start at zero, of which two work at first: 0 and 3."""
    mixer, feedforward = tiny.model.mixers[0], tiny.model.feedforwards[0]
    return replace(
        tiny,
        model=replace(
            tiny.model,
            layers=4,
            mixers=(replace(mixer, zero_init=True),),
            feedforwards=(replace(feedforward, zero_init=True),),
        ),
        optim=(
            OptimizerGroup(pattern=r"blocks\..*(qkv|up|down)", optimizer=MUON),
            OptimizerGroup(pattern=".*", optimizer=AdamW(lr=0.01)),
        ),
        plan=replace(tiny.plan, layers=Stages(values=(2, 4), starts=(0, SWITCH))),
    )


def steps(recipe, step, *, first=0, end=None):
    """Makes the steps from `first` to before `end`; returns their losses."""
    end = recipe.plan.steps if end is None else end
    with make_loader(recipe, recipe.data.open(), step.world, step=first, block=first) as loader:
        return [step(Batch(*next(loader)), recipe.plan.at(number)).item() for number in range(first, end)]


def snapshot(session):
    return {name: tensor.clone() for name, tensor in session.tensors().items() if "random" not in name}


def test_idle_layers_and_their_state_rest_until_they_are_switched_on(grown, assemble):
    session, step, _ = assemble(grown)
    before = snapshot(session)
    steps(grown, step, end=SWITCH)
    at_switch = snapshot(session)
    idle = {name for name in before if "blocks.1." in name or "blocks.2." in name}
    # Weights and what each of the optimizers keeps: step, exp_avg, exp_avg_sq; momentum and variance.
    assert len(idle) == 2 * (4 + 3 * 2 + 1 * 3)
    assert {name for name in before if torch.equal(before[name], at_switch[name])} == idle
    steps(grown, step, first=SWITCH)
    after = snapshot(session)
    assert not any(torch.equal(at_switch[name], after[name]) for name in after)


def test_the_loss_goes_on_bit_for_bit_where_the_switch_finds_it(grown, assemble):
    _, step, evaluator = assemble(grown)
    steps(grown, step, end=SWITCH)
    assert evaluator(None, 2) == evaluator(None, 4) == evaluator()
    steps(grown, step, first=SWITCH)
    assert evaluator(None, 2) != evaluator(None, 4) == evaluator()


def test_a_plan_whose_layers_are_all_active_is_one_without_layers_bit_for_bit(grown, run_recipe):
    losses = []
    for layers in (None, Stages(values=(4,))):
        recipe = replace(grown, plan=replace(grown.plan, layers=layers))
        _, run = run_recipe(recipe, name=str(bool(layers)))
        losses.append([record["loss"] for record in run.records if "loss" in record])
    assert losses[0] == losses[1]


def test_a_run_validates_with_the_layers_that_it_trains(grown, run_recipe, assemble):
    _, run = run_recipe(grown)
    _, step, evaluator = assemble(grown)
    assert [record["loss"] for record in run.events("train")] == steps(grown, step)
    # The legality of few layers is examined as well, and of all in the end.
    assert run.manifest["legality"]["passed"]
    _, step, evaluator = assemble(grown)
    steps(grown, step, end=4)
    expected = evaluator(None, 2)
    assert run.events("validation")[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert run.result["validation_loss"] < expected


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="the losses were written down with torch 2.13"
)
def test_a_fixed_seed_gives_fixed_losses_across_the_switch(grown, assemble):
    _, step, _ = assemble(grown)
    found = steps(grown, step, end=9)[4:]
    assert found == pytest.approx(LOSSES, rel=1e-6)


def test_the_warm_up_runs_every_depth_and_leaves_everything_as_it_was(grown, assemble):
    session, step, evaluator = assemble(grown)
    before, told, forward, score = snapshot(session), [], step.forward, evaluator.score

    def note(*given):
        told.append(given[5])
        return forward(*given)

    def note_score(*given):
        told.append(given[3])
        return score(*given)

    step.forward, evaluator.score = note, note_score
    warm_up(session, step, grown.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    # Training at both depths, and validation with all layers, which idle ones do not change.
    assert list(dict.fromkeys(told)) == [2, 4, None]
    assert told.count(None) == 1
    after = snapshot(session)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in session.learner.parameters())


def test_one_graph_a_depth_and_nothing_compiles_after_the_warm_up(grown, assemble, counting):
    session, step, evaluator = assemble(grown)
    allow_graphs(grown)
    step.forward = counting.compile(session.learner)
    evaluator.forward = counting.compile(evaluator._forward)
    (muon,) = (member.optimizer for member in step.optimizers.members if member.part == MUON)
    for batch in muon.batches:
        batch.update = compiled_update("muon_test", backend=counting)
    warm_up(session, step, grown.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    # Two of training and of each matrix shape, 32 x 32, 128 x 32 and 32 x 128; one of validation.
    assert counting.graphs == 2 + 1 + 2 * 3
    steps(grown, step, end=SWITCH)
    evaluator(*grown.evaluation_shape(SWITCH))
    steps(grown, step, first=SWITCH)
    evaluator(*grown.evaluation_shape(12))
    assert counting.graphs == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_the_switch_compiles_nothing_waits_for_nothing_and_keeps_the_loss(grown, assemble):
    recipe = resolve(replace(grown, precision=Bf16()), probe("cuda"))
    session, step, evaluator = assemble(recipe, device="cuda", compile=True)
    allow_graphs(recipe)
    evaluator.shapes = [(None, 2), (None, 4)]
    warm_up(session, step, recipe.plan.stages(), evaluator, vocab_size=257, say=pytest.fail)
    graphs = counters["stats"]["unique_graphs"]
    with make_loader(recipe, recipe.data.open(), step.world, step=0, block=0) as loader:
        batches = [Batch(*next(loader)) for _ in range(12)]
    torch.cuda.synchronize()
    for number, batch in enumerate(batches):
        if number == SWITCH:
            assert evaluator(None, 2) == pytest.approx(evaluator(None, 4), rel=1e-3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batch, recipe.plan.at(number))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == graphs
    assert evaluator(None, 4) != evaluator(None, 2)


def test_utilisation_counts_the_layers_that_worked(grown, tmp_path):
    facts = DeviceFacts(kind="cpu", name="a processor", memory=0, peaks={"fp32": 1e9})
    world, corpus, folder = World(torch.device("cpu")), grown.data.open(), RunFolder(tmp_path)
    recorder = Recorder(
        grown, grown, folder, corpus, world, facts, Clocks(), None, tracker="none", resume=False
    )
    # Per token and layer: 12 D^2 of matrices and attention over half the row; the head once; three passes.
    layer = 2 * 12 * 32**2 + 2 * 2 * 32 * 32 // 2
    few, all_layers = (3 * (count * layer + 2 * 257 * 32) * 128 / 1e9 for count in (2, 4))
    assert recorder.utilisation(range(6), 2.0) == pytest.approx(6 * few / 2, rel=0.02)
    assert recorder.utilisation(range(12), 2.0) == pytest.approx((6 * few + 6 * all_layers) / 2, rel=0.02)
    assert recorder.utilisation(range(12), 0.0) is None
