"""The multi-token recipes: what they cost, who optimises them, what is refused, and whole short runs."""

from dataclasses import replace

import pytest
import torch
from contracts import shrink
from objectives import OBJECTIVES, weighted

from sabrage.cli import main
from sabrage.config import ConfigError, override
from sabrage.model.counts import flops_per_token, memory_estimate, num_parameters, objective_parameters
from sabrage.optim.groups import Optimizers
from sabrage.optim.muon import Muon
from sabrage.plan import Anneal
from sabrage.recipes import find
from sabrage.recipes.multi_token import multi_token
from sabrage.study.plan import buildable, fitted
from sabrage.train.loop import build_learner
from sabrage.train.world import World

NAMES = [recipe.name for recipe in multi_token]


def test_an_annealed_weight_stays_falls_and_stays():
    weight = Anneal(first=0.5, last=0.1, begin=4, end=8)
    found = [weight.at(step, 100) for step in (0, 4, 5, 6, 8, 50)]
    assert found == pytest.approx([0.5, 0.5, 0.4, 0.3, 0.1, 0.1], rel=1e-12)
    assert weight.at(8, 100) == 0.1
    assert Anneal(first=0.5, begin=3, end=3).at(3, 100) == 0
    assert weight.scaled(0.5) == Anneal(first=0.5, last=0.1, begin=2, end=4)
    assert Anneal(first=1, begin=5, end=4).problems()


@pytest.mark.parametrize("name", ["mtp-shared", "mtp-heads", "mtp-prefix"])
def test_further_targets_are_gone_before_two_thirds_of_a_run_of_any_length(name):
    recipe = find(name)
    for plan in (recipe.plan, fitted(recipe, steps=36).plan):
        first, last = plan.at(0).loss_weights, plan.at(-(-2 * plan.steps // 3)).loss_weights
        assert all(weight > 0 for weight in first)
        assert last == (1.0, *(0.0 for _ in first[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_muon_takes_the_matrices_of_the_objectives_blocks(name):
    recipe = shrink(find(name))
    learner = build_learner(recipe, World(torch.device("cpu")))
    optimizers = Optimizers(recipe.optim, learner.named_parameters(), "cpu")
    taken = {name: member.part for member in optimizers.members for name, _ in member.parameters}
    own = [name for name in taken if name.startswith("objective.")]
    assert len(own) == {"mtp-heads": 2, "mtp-sequential": 5}.get(name, 0)
    assert all(isinstance(taken[each], Muon) for each in own)
    buildable(recipe)


def test_the_objectives_work_is_counted():
    dim, length, vocab_size = 768, 1024, 50257
    costs = {}
    for name in ("base", *NAMES):
        recipe = find(name)
        more = flops_per_token(recipe.model, length, recipe.objective) - flops_per_token(recipe.model, length)
        costs[name] = objective_parameters(recipe.objective, recipe.model), more
    head, perceptron = dim * vocab_size, 8 * dim**2
    attention = 4 * dim**2, dim * (length + 1)
    assert costs["base"] == costs["mtp-shared"] == costs["mtp-prefix"] == (0, 0)
    assert costs["mtp-heads"] == (perceptron, 3 * 2 * (perceptron + head))
    matrices = 2 * dim**2 + attention[0] + perceptron
    assert costs["mtp-sequential"] == (matrices, 3 * 2 * (matrices + attention[1] + head))


def test_memory_counts_the_objectives_blocks_and_logits():
    recipe, base = find("mtp-sequential"), find("base")
    assert memory_estimate(base.model, 1024, objective=base.objective) == memory_estimate(base.model, 1024)
    estimate = memory_estimate(recipe.model, 1024, objective=recipe.objective)
    more = estimate - memory_estimate(recipe.model, 1024)
    parameters = objective_parameters(recipe.objective, recipe.model)
    assert more == 18 * parameters + 1024 * (768 * 30 + 50257 * 4)
    assert num_parameters(recipe.model) == num_parameters(base.model)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("objective.tokens=2", "plan.loss_weights has 3 and SharedAhead takes 2; give one schedule for each"),
        ("objective=NextToken", "plan.loss_weights has 3 and NextToken takes 0"),
        ("objective.tokens=0", "objective.tokens=0 must be at least 1"),
        ("plan.loss_weights.1.begin=-1", "begin must be at least 0"),
    ],
)
def test_an_objective_that_the_plan_does_not_fit_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        override(find("mtp-shared"), change).validate()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("objective.mixer.heads=7", "objective: mixer.heads=7 does not cut dim=768"),
        ("objective.mixer.rotary.max_length=512", "is more than objective.mixer.rotary.max_length=512"),
        ("objective.depth=0", "objective.depth=0 must be at least 1"),
    ],
)
def test_an_objective_that_the_model_does_not_fit_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        override(find("mtp-sequential"), change).validate()


@pytest.mark.parametrize("name", ["heads", "sequential"])
def test_a_run_with_extra_heads_resumes_evaluates_and_exports(tiny, run_recipe, tmp_path, capsys, name):
    recipe = weighted(tiny, OBJECTIVES[name])
    _, whole = run_recipe(recipe, name="whole")
    stopping = replace(recipe, budget=replace(recipe.budget, target=100.0))
    run_recipe(stopping, name="resumed")
    _, resumed = run_recipe(recipe, name="resumed", resume=True)
    (loss,) = {run.events("validation")[-1]["loss"] for run in (whole, resumed)}
    assert main(["eval", str(tmp_path / "whole"), "--device", "cpu"]) == 0
    assert f"validation loss {loss:.5f}" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "out")]) == 0


# The tiny shards name no tokenizer, which the prefixes need.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mtp-prefix"])
def test_a_short_run_of_a_multi_token_recipe_learns(tiny, run_recipe, name):
    small = shrink(find(name))
    plan = replace(find(name).plan.scaled(12), tokens_per_step=128, sequence_length=32)
    recipe = replace(small, data=tiny.data, plan=plan, budget=tiny.budget)
    _, run = run_recipe(recipe.validate())
    first, *_, last = [record["loss"] for record in run.events("validation")]
    assert last < first
