"""Token tables and heads: how they start, what they bound, and that their plain settings change nothing."""

from dataclasses import replace

import pytest
import torch
from contracts import CONTRACT, build, draw_tokens, shrink

from sabrage.config import ConfigError, override
from sabrage.model.ends import LinearHead, Rescale, TokenTable
from sabrage.model.fused_head import FusedHead
from sabrage.model.lm import build_model
from sabrage.norms import rms_norm
from sabrage.recipes import find

HEADS = [LinearHead, FusedHead]


def spec(**changes):
    return replace(shrink(find("nocap")).model, **changes)


def test_a_normalised_token_has_unit_root_mean_square_and_a_tied_head_keeps_the_table_as_it_is():
    model = build_model(spec(embedding=TokenTable(normalise=True)), seed=0)
    tokens_BT = draw_tokens(model)
    x_BTD = model.embedding(tokens_BT, None)
    assert torch.equal(x_BTD, rms_norm(model.embedding.weight[tokens_BT]))
    assert model.head.weight is model.embedding.weight


def test_the_scale_of_the_table_is_a_factor():
    plain, scaled = (
        build_model(spec(embedding=TokenTable(init_scale=scale)), seed=0).embedding.weight
        for scale in (1.0, 4.0)
    )
    assert torch.equal(4 * plain, scaled)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_starts_at_zero_guesses_uniformly_and_learns(kind):
    model = build_model(spec(head=kind(tied=False, zero_init=True)), seed=0)
    tokens_BT = draw_tokens(model)
    loss = model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(257.0).log())
    assert model.head.weight.grad.any()


@pytest.mark.parametrize("kind", HEADS)
def test_a_copied_head_starts_as_the_tied_one_and_is_not_it(kind):
    tied, copied = (build_model(spec(head=head), seed=0) for head in (kind(), kind(tied=False, copied=True)))
    tokens_BT = draw_tokens(tied)
    assert torch.equal(tied.logits(tokens_BT), copied.logits(tokens_BT))
    assert copied.head.weight is not copied.embedding.weight


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bound", [{"softcap": 2.0}, {"rescale": Rescale(height=4.0, shift=1.0, width=0.5)}])
def test_a_bound_is_its_formula_and_keeps_the_loss_that_of_a_distribution(kind, bound):
    model, plain = (build(spec(head=head)) for head in (kind(**bound), kind()))
    x_BTV, z_BTV = (m.logits(draw_tokens(m)) for m in (plain, model))
    expected = 2 * (x_BTV / 2).tanh() if "softcap" in bound else 4 / (1 + (-(x_BTV + 1) / 0.5).exp())
    torch.testing.assert_close(z_BTV, expected)
    assert (z_BTV - z_BTV.mean()).abs().max() > 0.5
    CONTRACT["normalised"](model)


def test_the_rescale_twice_as_steep_is_the_soft_cap_but_for_a_constant():
    capped = build(spec(head=LinearHead(softcap=3.0)))
    rescaled = build(spec(head=LinearHead(rescale=Rescale(height=6.0, shift=0.0, width=1.5))))
    tokens_BT = draw_tokens(capped)
    torch.testing.assert_close(rescaled.logits(tokens_BT), capped.logits(tokens_BT) + 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_the_kernels_rescale_is_that_of_the_plain_path():
    losses, gradients = [], []
    for backend in ("plain", "triton"):
        model = build_model(spec(head=FusedHead(rescale=Rescale(), backend=backend)), seed=0)
        tokens_BT = draw_tokens(model, rows=1)
        loss = model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.head.weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["model.head.zero_init=true"], "set at most one of them"),
        (["model.head.tied=false", "model.head.copied=true", "model.head.zero_init=true"], "at most one"),
        (["model.head.softcap=0"], "softcap=0.0 must be above 0"),
        (["model.head.softcap=15", "model.head.rescale=Rescale"], "set one of them to null"),
        (["model.head.rescale=Rescale", "model.head.rescale.width=0"], "width=0.0 must be above 0"),
        (["model.head=FusedHead", "model.head.columns=-1"], "columns=-1 must be 0"),
        (["model.embedding.init_scale=0"], "init_scale=0.0 must be above 0"),
    ],
)
def test_ends_that_contradict_themselves_are_refused(assignments, said):
    recipe = find("base")
    for assignment in assignments:
        recipe = override(recipe, assignment)
    with pytest.raises(ConfigError, match=said):
        recipe.validate()
