"""The architecture recipes: where their scalars, gates and tables go, and that all of it is one graph."""

from dataclasses import replace

import pytest
import torch
from contracts import LENGTH, build, draw_tokens, shrink

from sabrage.attention.copying import Copying
from sabrage.context import Context
from sabrage.model.ends import LinearHead, Rescale, TokenTable
from sabrage.model.lm import LM
from sabrage.model.previous import BigramHash, Smear
from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import assign
from sabrage.optim.muon import Muon
from sabrage.optim.tied_adamw import TiedAdamW
from sabrage.recipes import find
from sabrage.recipes.architecture import architecture
from sabrage.wiring.dense_skips import DenseSkips
from sabrage.wiring.layer_skips import LayerSkips
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skipping
from sabrage.wiring.value_embeddings import ValueEmbeddings

TABLES = {"model.head.weight", *("model.embedding." + "inner." * depth + "weight" for depth in range(3))}
NAMES = [recipe.name for recipe in architecture]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_go_to_muon_tables_to_adamw_and_what_is_new_to_adamw_without_decay(name):
    recipe = find(name)
    with torch.device("meta"):
        parameters = [(f"model.{key}", weight) for key, weight in LM(recipe.model).named_parameters()]
    for group, taken in assign(recipe.optim, parameters):
        for key, _ in taken:
            if key.startswith("model.blocks."):
                assert isinstance(group.optimizer, Muon)
            elif key in TABLES:
                assert isinstance(group.optimizer, AdamW | TiedAdamW)
            else:
                assert isinstance(group.optimizer, AdamW)
                assert group.optimizer.weight_decay == 0, key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_recipe_learns_in_its_first_step_or_opens_what_does(name):
    """Gradients reach all but the gates and inner weights behind a factor that starts at zero."""
    recipe = shrink(find(name))
    model = LM(recipe.model)
    tokens_BT = draw_tokens(model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            # A table at zero opens what its rows are multiplied by.
            if key.startswith("blocks") or "pairs" in key:
                weight += 0.1 * torch.randn(weight.shape)
    # A head at zero sends nothing back until its first step is done.
    if recipe.model.head.zero_init:
        torch.nn.init.normal_(model.head.weight, std=0.1)
    model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1)).backward()
    idle = {key for key, weight in model.named_parameters() if not weight.grad.any()}
    assert all("gate" in key or ".down." in key for key in idle), idle


@pytest.fixture
def everything():
    """A model with every part, its tokens and their documents."""
    spec = replace(
        shrink(find("base")).model,
        embedding=Smear(inner=BigramHash(inner=TokenTable(normalise=True), rows=100)),
        wiring=ValueEmbeddings(
            inner=Skipping(skips=(LayerSkips(), SkipScales(), DenseSkips(dynamic=True))), tables=1, gates=2
        ),
        head=LinearHead(tied=False, rescale=Rescale()),
        last=Copying(head_width=32),
    )
    model = build(spec).train()
    tokens_BT = draw_tokens(model, rows=1)
    return model, tokens_BT, (torch.arange(LENGTH) >= 20).long().expand_as(tokens_BT)


def compiled_and_plain(model, tokens_BT, documents_BT, **options):
    """The loss of one graph without breaks, and the loss."""

    def loss(tokens_BT, documents_BT):
        context = Context(documents_BT=documents_BT)
        return model.head.loss(model(tokens_BT, context), tokens_BT.roll(-1, 1))

    traced = torch.compile(loss, fullgraph=True, dynamic=False, **options)
    return traced(tokens_BT, documents_BT), loss(tokens_BT, documents_BT)


def test_all_parts_together_are_one_graph_in_training_with_documents(everything):
    torch.testing.assert_close(*compiled_and_plain(*everything, backend="eager"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("documents", [False, True])
def test_all_parts_together_compile_and_learn_in_bf16(everything, documents):
    model, tokens_BT, documents_BT = (each.cuda() for each in everything)
    found = []
    with torch.autocast("cuda", torch.bfloat16):
        losses = compiled_and_plain(model, tokens_BT, documents_BT if documents else None)
    for loss in losses:
        model.zero_grad()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.isfinite().all(), name
        # That of a single scale sums products of both signs over all tokens; bf16 keeps it less well.
        allowed = 0.1 if gradient.numel() > 1 else 0.5
        assert (gradient - found[1][name]).norm() <= allowed * found[1][name].norm() + 1e-6, name
