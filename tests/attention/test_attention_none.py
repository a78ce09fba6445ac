"""Layers without attention: nothing is mixed, cached or counted, and the rest is what it was."""

from dataclasses import replace

import pytest
import torch

from sabrage.attention.none import NoMixer
from sabrage.context import Context
from sabrage.model.counts import flops_per_token
from sabrage.model.lm import build_model
from sabrage.recipes import find


def without(spec, *layers):
    """The model with no attention in these layers."""
    mixers = tuple(NoMixer() if layer in layers else spec.mixer(layer) for layer in range(spec.layers))
    return replace(spec, mixers=mixers)


def test_it_adds_nothing_and_caches_nothing():
    part = NoMixer()
    x_BTD = torch.randn(2, 3, 8)
    assert torch.equal(part.build(dim=8, layer=0)(x_BTD, Context()), torch.zeros(2, 3, 8))
    assert (part.streams(8), part.flops(8, 5)) == ({}, 0)
    assert not list(part.build(dim=8, layer=0).parameters())


def test_it_is_attention_whose_output_is_zero(tiny):
    spec = replace(tiny.model, layers=3)
    with_it, plain = (build_model(each, seed=0) for each in (without(spec, 1), spec))
    with_it.load_state_dict(
        {name: weight for name, weight in plain.state_dict().items() if not name.startswith("blocks.1.mixer")}
    )
    with torch.no_grad():
        for name, weight in plain.blocks[1].mixer.named_parameters():
            if "out" in name:
                weight.zero_()
    tokens_BT = torch.randint(spec.vocab_size, (2, 7))
    assert torch.equal(with_it(tokens_BT), plain(tokens_BT))


def test_a_model_without_any_attention_knows_one_token(tiny):
    spec = without(replace(tiny.model, layers=2), 0, 1)
    model = build_model(spec, seed=0)
    tokens_BT = torch.randint(spec.vocab_size, (1, 6))
    other_BT = tokens_BT.clone()
    other_BT[0, 2] = (other_BT[0, 2] + 1) % spec.vocab_size
    same_T = (model(tokens_BT) == model(other_BT)).all(-1)[0]
    assert same_T.tolist() == [True, True, False, True, True, True]


def test_what_is_left_out_is_not_counted():
    recipe, base = find("fewer-mixers"), find("base")
    layers = recipe.model.layers
    attention = base.model.mixer(0).flops(base.model.dim, 1024)
    saved = flops_per_token(base.model, 1024) - flops_per_token(recipe.model, 1024)
    assert saved == pytest.approx(3 * (layers // 4) * attention)
