"""Fewer active layers: which they are, and that switching the others on changes nothing, in every wiring."""

from dataclasses import dataclass, replace

import pytest
import torch
from contracts import CONTRACT, build, draw_tokens, shrink

from sabrage.context import Context
from sabrage.generate.cache import DenseCache
from sabrage.model.counts import flops_per_token
from sabrage.model.depth import active_layers
from sabrage.model.legality import quick
from sabrage.recipes import find
from sabrage.wiring.dense_skips import DenseSkips
from sabrage.wiring.fused_residual import FusedResidual
from sabrage.wiring.layer_skips import LayerSkips
from sabrage.wiring.residual import Residual, ResidualStream
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skipping
from sabrage.wiring.value_embeddings import ValueEmbeddings

LAYERS = 5
DEPTH = Residual(mixer_scale="depth")
FUSED = FusedResidual(mixer_scale="depth", backend="plain")
SKIPS = (LayerSkips(), SkipScales(), DenseSkips(dynamic=True, dilation=2))
WIRINGS = {
    "residual": DEPTH,
    "dropout": replace(DEPTH, dropout=0.2),
    "fused": FUSED,
    "fused-dropout": replace(FUSED, dropout=0.2),
    "scales": Skipping(residual=DEPTH, skips=SKIPS[1:2]),
    "skips": Skipping(residual=DEPTH, skips=SKIPS),
    "values": ValueEmbeddings(inner=DEPTH, tables=2, gates=2),
    "values-fused": ValueEmbeddings(inner=FUSED, tables=2, gates=2),
    "values-skips": ValueEmbeddings(inner=Skipping(residual=DEPTH, skips=SKIPS), tables=2, gates=2),
}


def spec_of(wiring, *, layers=LAYERS):
    return replace(shrink(find("base")).model, layers=layers, wiring=wiring)


def with_idle_from_zero(wiring, *, active):
    """A model with noise on all weights but the output projections of idle layers, which are zero."""
    model = build(spec_of(wiring))
    working = active_layers(LAYERS, active)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            if layer not in working:
                block.mixer.out.weight.zero_()
                block.feedforward.down.weight.zero_()
    return model


def logits(model, *, layers, training=False, dtype=None):
    context = Context(layers=layers)
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        torch.manual_seed(0)
        return model.train(training).logits(draw_tokens(model), context)


def test_active_layers_are_spread_hold_both_ends_and_are_some_of_any_larger_choice():
    for layers in range(1, 25):
        for active in range(1, layers + 1):
            chosen = active_layers(layers, active)
            assert len(chosen) == active
            assert chosen == sorted(set(chosen))
            assert chosen[0] == 0
            assert active == 1 or chosen[-1] == layers - 1
            assert set(chosen) <= set(active_layers(layers, min(active + 1, layers)))
    assert active_layers(12, 6) == [0, 2, 4, 6, 8, 11]
    assert active_layers(12, 4) == [0, 4, 8, 11]
    assert active_layers(12, 12) == list(range(12))


@pytest.mark.parametrize("active", range(1, LAYERS + 1))
@pytest.mark.parametrize("name", WIRINGS)
def test_switching_on_layers_that_start_at_zero_changes_nothing_bit_for_bit(name, active):
    model = with_idle_from_zero(WIRINGS[name], active=active)
    for training in (False, True):
        for dtype in (None, torch.bfloat16):
            few, all_layers = (
                logits(model, layers=layers, training=training, dtype=dtype) for layers in (active, None)
            )
            assert few.dtype == all_layers.dtype
            assert torch.equal(few, all_layers)


@pytest.mark.parametrize("name", WIRINGS)
def test_layers_that_add_something_are_left_out_while_they_are_idle(name):
    model = build(spec_of(WIRINGS[name]))
    assert not torch.equal(logits(model, layers=3), logits(model, layers=None))
    assert torch.equal(logits(model, layers=LAYERS), logits(model, layers=None))


@pytest.mark.parametrize("name", ["residual", "fused"])
def test_the_active_layers_are_the_model_that_has_no_others(name):
    model, small = build(spec_of(WIRINGS[name])), build(spec_of(WIRINGS[name], layers=3))
    # The depth that scales the mixers is that of the whole model.
    small.wiring.mixer_scale = model.wiring.mixer_scale
    weights = model.state_dict()
    for place, layer in enumerate(active_layers(LAYERS, 3)):
        for key in small.blocks[place].state_dict():
            weights[f"blocks.{place}.{key}"] = model.state_dict()[f"blocks.{layer}.{key}"]
    small.load_state_dict({key: weights[key] for key in small.state_dict()})
    assert torch.equal(logits(model, layers=3), logits(small, layers=None))


@pytest.mark.parametrize("name", WIRINGS)
def test_idle_blocks_get_no_gradient_and_all_others_do(name):
    model = build(spec_of(WIRINGS[name])).train()
    tokens_BT = draw_tokens(model)
    model.head.loss(model(tokens_BT, Context(layers=3)), tokens_BT.roll(-1, 1)).backward()
    idle = {layer for layer, block in enumerate(model.blocks) if block.mixer.out.weight.grad is None}
    assert idle == {1, 2, 3} - set(active_layers(LAYERS, 3))
    for layer, block in enumerate(model.blocks):
        assert [weight.grad is None for weight in block.parameters()] == [layer in idle] * 4


def test_with_a_cache_all_layers_must_be_active():
    model = build(spec_of(DEPTH))
    tokens_BT = draw_tokens(model)
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    cache = DenseCache(model.spec, batch=len(tokens_BT), capacity=tokens_BT.shape[1])
    with pytest.raises(AssertionError, match="entries of every layer"):
        model(tokens_BT, Context(positions_BT=positions_BT, cache=cache, layers=3))


@pytest.mark.parametrize(
    "check", [name for name in CONTRACT if "decoding" not in name and "cache" not in name]
)
def test_a_model_with_idle_layers_keeps_the_contract_of_whole_passes(check):
    model = build(spec_of(WIRINGS["values-skips"]))

    def tell(module, given):
        tokens_BT, *rest = given
        context = next(filter(None, rest), Context())
        context.layers = 3
        return tokens_BT, context

    model.register_forward_pre_hook(tell)
    CONTRACT[check](model)


@dataclass(frozen=True, kw_only=True)
class Hasty(Residual):
    """Reads the next token, and only where layers are idle."""

    def build(self, *, dim, num_layers, vocab_size):
        return HastyStream(self, num_layers=num_layers)


class HastyStream(ResidualStream):
    def forward(self, x_BTD, blocks, context):
        return super().forward(x_BTD if context.layers is None else x_BTD.roll(-1, 1), blocks, context)


def test_a_model_is_examined_with_idle_layers_where_it_is_asked_for():
    spec = find("grown").model
    assert quick(spec, max_length=64, layers=6).passed
    hasty = replace(spec, wiring=Hasty())
    assert quick(hasty, max_length=64).passed
    assert not quick(hasty, max_length=64, layers=6).passed


def test_flops_are_those_of_the_active_layers():
    spec, small = spec_of(DEPTH, layers=6), spec_of(DEPTH, layers=4)
    assert flops_per_token(spec, 64, active=4) == flops_per_token(small, 64) < flops_per_token(spec, 64)
    assert flops_per_token(spec, 64, active=6) == flops_per_token(spec, 64)
