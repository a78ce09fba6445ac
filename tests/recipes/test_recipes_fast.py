"""The fast recipes: who moves what, what they take, and that they learn."""

from dataclasses import replace

import pytest
import torch
from contracts import LENGTH, shrink

from sabrage.feedforward.fused_mlp import FusedMlp
from sabrage.model.counts import memory_estimate
from sabrage.model.lm import LM
from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import assign
from sabrage.optim.muon import Muon
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts

NAMES = ["fast", "fast-24gb", "fast-min"]
# Training tokens of the stand-in corpus, which a race passes over at most once.
ONE_PASS = 143_500_000


def groups(recipe):
    with torch.device("meta"):
        parameters = [(f"model.{key}", weight) for key, weight in LM(recipe.model).named_parameters()]
    return [(group.optimizer, [key for key, _ in taken]) for group, taken in assign(recipe.optim, parameters)]


@pytest.mark.parametrize("name", NAMES)
def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else(name):
    for optimizer, keys in groups(find(name)):
        assert isinstance(optimizer, Muon if keys[0].startswith("model.blocks.") else AdamW)
        assert all(key.startswith("model.blocks.") is isinstance(optimizer, Muon) for key in keys), keys


@pytest.mark.parametrize("name", ["fast", "fast-24gb"])
def test_tables_that_learn_at_rare_tokens_have_a_rate_of_their_own_and_no_decay(name):
    tables = [
        (optimizer, keys)
        for optimizer, keys in groups(find(name))
        if any("tables" in key or "pairs" in key for key in keys)
    ]
    assert [keys for _, keys in tables] == [
        [f"model.wiring.tables.{n}" for n in range(3)],
        ["model.embedding.pairs_RD"],
    ]
    assert all(optimizer.weight_decay == 0 for optimizer, _ in tables)


@pytest.mark.parametrize("name", NAMES)
def test_a_race_is_one_pass_at_most_and_leaves_tokens_for_the_blend(name):
    recipe = find(name)
    held_out = recipe.blend.held_out if recipe.blend else 0
    assert recipe.plan.tokens() + held_out <= ONE_PASS


@pytest.mark.parametrize("name", NAMES)
def test_training_has_one_graph_and_validation_one(name):
    recipe = find(name)
    shapes = {(knobs.sequence_length, knobs.window, knobs.layers) for knobs in recipe.plan.stages()}
    assert len(shapes) == len(recipe.evaluation_shapes()) == 1


def test_what_a_24_gb_card_trains_fits_it_and_needs_no_fp8():
    recipe = find("fast-24gb")
    tokens = recipe.runtime.micro_batch * recipe.plan.at(0).sequence_length
    assert memory_estimate(recipe.model, tokens, objective=recipe.objective) < 22e9
    rtx_3090 = DeviceFacts(
        kind="cuda",
        name="RTX 3090",
        capability=(8, 6),
        memory=24 * 10**9,
        shared_memory_per_block=101_376,
        triton="3.6.0",
    )
    assert recipe.refusals(rtx_3090) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_small_copy_learns_from_packed_documents(name, run_recipe):
    recipe = shrink(find(name))
    # No CPU has FP8 products.
    head = replace(recipe.model.head, fp8=False)
    plain = [
        replace(part, fp8_gradients=False) if isinstance(part, FusedMlp) else part
        for part in recipe.model.feedforwards
    ]
    recipe = replace(recipe, model=replace(recipe.model, head=head, feedforwards=tuple(plain)))
    data = replace(recipe.data, order="documents", block_tokens=4 * LENGTH)
    plan = replace(recipe.plan, steps=30, lr=replace(recipe.plan.lr, warmup=2, warmdown=15))
    _, run = run_recipe(replace(recipe, data=data, plan=plan))
    losses = [record["loss"] for record in run.events("train")]
    assert losses[-1] < losses[0] - 1.0
