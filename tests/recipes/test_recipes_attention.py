"""The recipes of attention's options: one change to the base each, and where what is new goes."""

from dataclasses import replace

import pytest
import torch
from contracts import draw_tokens, shrink

from sabrage.model.lm import LM
from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import assign
from sabrage.optim.muon import Muon
from sabrage.recipes import find

NAMES = [
    "attention-gate",
    "attention-scale",
    "exclusive-self",
    "paired-heads",
    "partial-rotary",
    "key-offset",
]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_mixers_of_the_base_are_exchanged(name):
    recipe, base = find(name), find("base")
    plain = replace(recipe, name="base", summary=base.summary, model=base.model, optim=base.optim)
    assert plain == base
    assert replace(recipe.model, mixers=base.model.mixers) == base.model
    assert recipe.optim[-len(base.optim) :] == base.optim


@pytest.mark.parametrize("name", NAMES)
def test_gates_go_to_adamw_without_decay_and_matrices_to_muon(name):
    recipe = find(name)
    with torch.device("meta"):
        parameters = [(f"model.{key}", weight) for key, weight in LM(recipe.model).named_parameters()]
    taken = {
        key: group.optimizer for group, members in assign(recipe.optim, parameters) for key, _ in members
    }
    gates = {key for key in taken if "gate" in key}
    assert len(gates) == (12 if name == "attention-gate" else 0)
    for key, optimizer in taken.items():
        if key in gates:
            assert optimizer == AdamW(lr=0.005, weight_decay=0.0)
        else:
            assert isinstance(optimizer, Muon) == key.startswith("model.blocks.")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_as_soon_as_outputs_have_left_zero(name):
    recipe = shrink(find(name))
    torch.manual_seed(0)
    model = LM(recipe.model)
    tokens_BT = draw_tokens(model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("out.weight", "down.weight")):
                weight += 0.1 * torch.randn(weight.shape)
    model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1)).backward()
    assert [key for key, weight in model.named_parameters() if not weight.grad.any()] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_learns(tiny, run_recipe, name):
    plan = replace(find(name).plan.scaled(12), tokens_per_step=128, sequence_length=32)
    recipe = replace(shrink(find(name)), data=tiny.data, plan=plan, budget=tiny.budget)
    _, run = run_recipe(recipe.validate())
    first, *_, last = [record["loss"] for record in run.events("validation")]
    assert last < first
