"""The recipes of latents and pools: one graph to train, and what they cost beside the base."""

from dataclasses import replace

import pytest
import torch
from contracts import build, draw_tokens, shrink

from sabrage.context import Context
from sabrage.model.counts import flops_per_token, num_parameters
from sabrage.recipes import find

NAMES = ["mla", "mla-small", "pool-mean", "pool-max", "pool-reservoir", "pool-latent"]


@pytest.mark.parametrize(
    ("name", "documents", "backend"),
    [
        ("mla", False, "eager"),
        ("pool-max", False, "eager"),
        ("pool-reservoir", True, "eager"),
        ("pool-latent", True, "aot_eager"),
    ],
)
def test_training_is_one_graph_with_the_same_gradients(name, documents, backend):
    model = build(replace(shrink(find(name)).model, layers=1)).train()
    tokens_BT = draw_tokens(model, rows=2)[:, :50]
    documents_BT = (torch.arange(50) > 20).long().expand(2, -1) if documents else None

    def loss():
        h_BTD = model(tokens_BT, Context(documents_BT=documents_BT))
        return model.head.loss(h_BTD, tokens_BT)

    # The limit on recompiling is one for all models that the function above has seen.
    torch._dynamo.reset()
    plain = torch.autograd.grad(loss(), list(model.parameters()))
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
    for expected, got in zip(plain, torch.autograd.grad(compiled(), list(model.parameters())), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_mixers_of_the_base_are_exchanged(name):
    recipe, base = find(name), find("base")
    assert replace(recipe, name="base", summary=base.summary, model=base.model) == base
    assert replace(recipe.model, mixers=base.model.mixers) == base.model


def test_a_latent_costs_fewer_parameters_and_pools_fewer_flops_than_the_base():
    base = find("base").model
    sizes = [num_parameters(find(name).model) for name in ("mla-small", "mla", "base")]
    assert sizes == sorted(set(sizes))
    for name in NAMES:
        for length in (1024, 16384):
            assert flops_per_token(find(name).model, length) < flops_per_token(base, length)
