"""Runs that share a workshop in one process are the runs that they would be each in a process of its own."""

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from sabrage.config import ConfigError, override
from sabrage.objective.shared import SharedAhead
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.plan import Constant, Stages
from sabrage.precision.autocast import Bf16, Bf16Weights
from sabrage.precision.fp16 import Fp16
from sabrage.run.clocks import Clocks
from sabrage.run.folder import RunFolder, read_run
from sabrage.train.loop import TrainingStopped, build_learner, train
from sabrage.train.workshop import Shelf, Workshop, blueprint
from sabrage.train.world import World

CPU = World(torch.device("cpu"))
USED = "using the model and the compiled graphs"
MUON = (OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02, normuon=True)),)


def changed(recipe, *assignments):
    for assignment in assignments:
        recipe = override(recipe, assignment)
    return recipe


def told(run):
    """All that a run computed: losses, learning rates and what else was read, but for the time it took."""
    clocks = ("seconds", "tokens_per_second", "mfu", "memory")
    return [
        {name: value for name, value in record.items() if not name.endswith(clocks)} for record in run.records
    ]


SAME = {
    "another seed": lambda recipe: changed(recipe, "budget.seed=3"),
    "another rate": lambda recipe: changed(recipe, "optim.0.optimizer.lr=0.003"),
    "another schedule": lambda recipe: replace(recipe, plan=replace(recipe.plan, steps=7, lr=Constant())),
    "other optimizers": lambda recipe: replace(recipe, optim=(*MUON, *recipe.optim)),
    "other cadences": lambda recipe: changed(recipe, "budget.evaluate_every=3", "budget.log_every=1"),
    "a target": lambda recipe: changed(recipe, "budget.target=4.6"),
    "the very same": lambda recipe: recipe,
}
OTHER = {
    "layers": lambda recipe: changed(recipe, "model.layers=1"),
    "precision": lambda recipe: changed(recipe, "precision=Tf32"),
    "order": lambda recipe: changed(recipe, "data.order=masked"),
    "objective": lambda recipe: replace(recipe, objective=SharedAhead()),
    "tokens": lambda recipe: changed(recipe, "plan.tokens_per_step=256"),
    "length": lambda recipe: changed(recipe, "plan.sequence_length=16"),
    "window": lambda recipe: changed(recipe, "plan.window=8"),
    "layers at work": lambda recipe: changed(recipe, 'plan.layers={"part": "Stages", "values": [2]}'),
    "scored": lambda recipe: changed(recipe, "budget.evaluation_tokens=400"),
    "rows scored": lambda recipe: changed(recipe, "budget.evaluation_length=16"),
    "documents scored": lambda recipe: changed(recipe, "budget.evaluation_documents=true"),
    "compile": lambda recipe: changed(recipe, "runtime.compile=on"),
    "micro-batch": lambda recipe: changed(recipe, "runtime.micro_batch=2"),
}


@pytest.mark.parametrize("what", SAME)
def test_a_run_with_the_model_of_another_is_that_of_a_process_of_its_own(tiny, run_recipe, capsys, what):
    recipe = SAME[what](tiny)
    _, alone = run_recipe(recipe, name="alone")
    shelf = Shelf()
    run_recipe(replace(tiny, optim=(*MUON, *tiny.optim)), name="before", shelf=shelf)
    assert USED not in capsys.readouterr().out
    torch.manual_seed(77)
    _, after = run_recipe(recipe, name="after", shelf=shelf)
    assert USED in capsys.readouterr().out
    assert told(after) == told(alone)
    assert after.manifest["legality"] == alone.manifest["legality"]


@pytest.mark.parametrize("what", OTHER)
def test_what_is_built_into_the_graphs_asks_for_a_workshop_of_its_own(tiny, what):
    assert blueprint(OTHER[what](tiny), CPU) != blueprint(tiny, CPU)


def test_stages_that_begin_elsewhere_share_a_workshop_and_other_stages_do_not(tiny):
    def staged(*starts, values=(16, 32)):
        stages = Stages(values=values, starts=starts)
        return blueprint(replace(tiny, plan=replace(tiny.plan, sequence_length=stages)), CPU)

    assert staged(0, 4) == staged(0, 8)
    assert staged(0, 4) != staged(0, 4, values=(8, 32))
    assert staged(0, 4) != staged(0, 40)


@pytest.mark.parametrize("precision", [Fp16(initial_scale=2.0**20), Bf16Weights()], ids=["fp16", "bf16"])
def test_loss_scale_and_narrow_weights_start_anew(tiny, run_recipe, precision):
    recipe = replace(tiny, precision=precision)
    _, alone = run_recipe(recipe, name="alone")
    shelf = Shelf()
    run_recipe(changed(recipe, "budget.seed=1"), name="before", shelf=shelf)
    _, after = run_recipe(recipe, name="after", shelf=shelf)
    assert told(after) == told(alone)


@pytest.mark.parametrize("precision", [Fp16(), Bf16Weights()], ids=["fp16", "bf16"])
def test_renewing_leaves_nothing_of_what_was_learned_and_moves_no_memory(tiny, precision):
    tiny = replace(tiny, precision=precision)
    used, fresh = build_learner(tiny, CPU), build_learner(changed(tiny, "budget.seed=1"), CPU)
    tensors = [*used.parameters(), *used.buffers()]
    pointers = [tensor.data_ptr() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(1)
    for parameter in used.parameters():
        parameter.grad = torch.ones_like(parameter)
    used.eval()
    Workshop(used, step=None, evaluator=None).renew(fresh)
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    assert all(map(torch.equal, tensors, [*fresh.parameters(), *fresh.buffers()]))
    assert all(parameter.grad is None for parameter in used.parameters())
    assert all(module.training for module in used.modules())


def test_a_run_after_one_whose_loss_was_no_number_is_that_of_a_process_of_its_own(tiny, run_recipe, capsys):
    _, alone = run_recipe(tiny, name="alone")
    shelf = Shelf()
    with pytest.raises(TrainingStopped):
        run_recipe(changed(tiny, "optim.0.optimizer.lr=1e30"), name="before", shelf=shelf)
    _, after = run_recipe(tiny, name="after", shelf=shelf)
    assert USED in capsys.readouterr().out
    assert told(after) == told(alone)


def test_a_resumed_run_goes_on_with_the_model_of_another(tiny, run_recipe, capsys):
    _, alone = run_recipe(tiny, name="alone")
    shelf = Shelf()
    run_recipe(changed(tiny, "budget.checkpoint_every=4"), name="half", shelf=shelf)
    # As if it had been killed after step 8.
    shutil.rmtree(alone.path.parent / "half" / "checkpoints" / "step-00000012")
    _, after = run_recipe(changed(tiny, "budget.checkpoint_every=4"), name="half", resume=True, shelf=shelf)
    assert USED in capsys.readouterr().out
    losses = [[record["loss"] for record in run.events("train")] for run in (after, alone)]
    assert losses[0] == losses[1]


def test_the_graphs_of_one_run_serve_the_next(tiny, run_recipe, counting, monkeypatch):
    for room in ("step", "evaluate"):
        monkeypatch.setattr(
            f"sabrage.train.{room}.compiled", lambda function, wanted: counting.compile(function)
        )
    tiny = changed(tiny, "runtime.compile=on", "plan.window=16")
    second = changed(tiny, "budget.seed=1", "optim.0.optimizer.lr=0.003", "plan.lr.warmup=5")
    _, alone = run_recipe(second, name="alone")
    torch._dynamo.reset()
    shelf = Shelf()
    run_recipe(tiny, name="before", shelf=shelf)
    graphs = counting.graphs
    _, after = run_recipe(second, name="after", shelf=shelf)
    assert counting.graphs == graphs > 0
    assert told(after) == told(alone)


def test_another_model_frees_the_last_one_and_its_graphs(tiny, run_recipe, counting, monkeypatch, capsys):
    monkeypatch.setattr("sabrage.train.step.compiled", lambda function, wanted: counting.compile(function))
    shelf = Shelf()
    built = []
    build = Workshop.begin
    monkeypatch.setattr(
        Workshop, "begin", lambda self, recipe: built.append(weakref.ref(self.learner)) or build(self, recipe)
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        # More models than graphs that torch keeps of one function.
        for heads in (1, 2, 4):
            recipe = changed(tiny, "plan.steps=1", f"model.mixers.0.heads={heads}")
            run_recipe(recipe, name=f"{heads}-heads", shelf=shelf)
    gc.collect()
    assert [each() is None for each in built] == [True, True, False]
    assert USED not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_next_run_compiles_no_graph_of_the_model_and_takes_no_more_memory(tiny, tmp_path):
    def run(recipe, name, shelf):
        folder, corpus = RunFolder(tmp_path / name).create(), recipe.data.open()
        world = World(torch.device("cuda"))
        train(recipe, folder=folder, corpus=corpus, world=world, shelf=shelf, clocks=Clocks(inline=True))
        return read_run(folder.path)

    tiny = replace(tiny, precision=Bf16())
    second = changed(tiny, "budget.seed=1", "optim.0.optimizer.lr=0.003", "plan.lr.warmup=5")
    alone, shelf = run(second, "alone", Shelf()), Shelf()
    shelf.clear()
    run(tiny, "before", shelf)
    graphs = counters["stats"]["unique_graphs"]
    after = run(second, "after", shelf)
    assert counters["stats"]["unique_graphs"] == graphs
    assert after.result["peak_memory"] <= 1.1 * alone.result["peak_memory"]
    pairs = zip(alone.events("train"), after.events("train"), strict=True)
    assert all(left["loss"] == pytest.approx(right["loss"], rel=1e-3) for left, right in pairs)


def test_the_verdict_on_a_model_is_asked_for_once_and_again_for_another(tiny, run_recipe, monkeypatch):
    from sabrage.train import loop

    asked, examine = [], loop.examined
    monkeypatch.setattr(loop, "examined", lambda recipe: asked.append(recipe.model.layers) or examine(recipe))
    shelf = Shelf()
    for index, layers in enumerate((2, 2, 1, 2)):
        _, run = run_recipe(changed(tiny, "plan.steps=1", f"model.layers={layers}", f"budget.seed={index}"),
                            name=f"run-{index}", shelf=shelf)  # fmt: skip
        assert run.manifest["legality"]["passed"]
    assert asked == [2, 1]


def test_data_is_opened_once_and_again_for_other_data(tiny):
    shelf = Shelf()
    assert shelf.open(tiny.data) is shelf.open(replace(tiny.data))
    assert shelf.open(tiny.data) is not shelf.open(replace(tiny.data, block_tokens=64))


def test_optimizers_that_do_not_fit_are_refused_with_a_used_model_as_well(tiny, run_recipe):
    shelf = Shelf()
    run_recipe(tiny, name="before", shelf=shelf)
    with pytest.raises(ConfigError, match="no optimizer group matches"):
        run_recipe(changed(tiny, "optim.0.pattern=blocks"), name="after", shelf=shelf)
