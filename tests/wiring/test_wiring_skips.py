"""Skips: their formulas, that they start as the plain residual stream, and which states they read."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contracts import CONTRACT, build, draw_tokens, shrink

from sabrage.context import Context
from sabrage.model.lm import build_model
from sabrage.model.previous import BigramHash
from sabrage.norms import rms_norm
from sabrage.recipes import find
from sabrage.wiring.dense_skips import DenseSkips
from sabrage.wiring.layer_skips import LayerSkips
from sabrage.wiring.pair_skips import PairSkips
from sabrage.wiring.residual import Residual
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skipping

SKIPS = {
    "none": (),
    "scales": (SkipScales(),),
    "scales of every other layer": (SkipScales(period=2),),
    "unet": (LayerSkips(),),
    "single": (LayerSkips(pairs=((0.2, 1.0),)),),
    "dense": (DenseSkips(),),
    "dynamic": (DenseSkips(dynamic=True),),
    "all": (LayerSkips(), SkipScales(), DenseSkips(dynamic=True, dilation=2)),
}
DEPTH = Residual(mixer_scale="depth")


def spec(wiring, *, layers=5):
    return replace(shrink(find("nocap")).model, layers=layers, wiring=wiring)


@pytest.mark.parametrize("name", SKIPS)
def test_skips_start_as_the_plain_stream_bit_for_bit(name):
    plain, skipping = (
        build_model(spec(wiring), seed=0) for wiring in (DEPTH, Skipping(residual=DEPTH, skips=SKIPS[name]))
    )
    tokens_BT = draw_tokens(plain)
    losses = [model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1)) for model in (plain, skipping)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(skipping.named_parameters())
    for key, weight in plain.named_parameters():
        torch.testing.assert_close(gradients[key].grad, weight.grad, rtol=1e-4, atol=1e-6)
    learning = [key for key, weight in gradients.items() if "wiring" in key and weight.grad.any()]
    assert bool(learning) == bool(SKIPS[name])


@pytest.mark.parametrize("check", CONTRACT)
def test_all_skips_together_keep_the_contract(check):
    CONTRACT[check](build(spec(Skipping(residual=DEPTH, skips=SKIPS["all"]), layers=3)))


class Recorder(torch.nn.Module):
    """A block that adds a random vector of its own; what it read is in `read`."""

    def __init__(self, index):
        super().__init__()
        self.added = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(index))

    def mixer(self, x_BTD, context):
        self.read = x_BTD
        return self.added

    def feedforward(self, x_BTD, context):
        return torch.zeros_like(x_BTD)


def reads(skip, *, layers=4, context=None):
    """(module, what each reader read, s_0 and the states after each layer)"""
    torch.manual_seed(0)
    stream = Skipping(skips=(skip,)).build(dim=16, num_layers=layers, vocab_size=5)
    with torch.no_grad():
        for weight in stream.parameters():
            weight += torch.randn(weight.shape)
    blocks, seen, states = [Recorder(index) for index in range(layers)], [], []
    read = stream.read
    stream.read = lambda given, context: seen.append(read(given, context)) or seen[-1]
    x_BTD = torch.randn(2, 3, 16)
    out = stream(x_BTD, blocks, context or Context())
    states = [x_BTD, *(seen[index] + block.added for index, block in enumerate(blocks))]
    for block, read_BTD in zip(blocks, seen, strict=False):
        torch.testing.assert_close(block.read, rms_norm(read_BTD))
    torch.testing.assert_close(out, rms_norm(seen[-1]))
    return stream.skips[0], seen, states


def test_scales_are_their_formula_and_the_head_reads_the_last_state():
    module, seen, states = reads(SkipScales(residual=0.5, embedding=0.1))
    for layer in range(4):
        expected = module.residual_L[layer] * states[layer] + module.embedding_L[layer] * states[0]
        torch.testing.assert_close(seen[layer], expected)
    assert torch.equal(seen[4], states[4])


@pytest.mark.parametrize(("period", "scaled"), [(2, [0, 2]), (3, [0, 3]), (9, [0])])
def test_layers_between_the_multiples_of_the_period_read_the_stream(period, scaled):
    module, seen, states = reads(SkipScales(residual=0.5, embedding=0.1, period=period))
    assert len(module.residual_L) == len(module.embedding_L) == len(scaled)
    for reader in range(5):
        expected = states[reader]
        if reader in scaled:
            index = scaled.index(reader)
            expected = module.residual_L[index] * expected + module.embedding_L[index] * states[0]
        torch.testing.assert_close(seen[reader], expected)


def test_pairs_are_added_to_what_the_inner_layers_read():
    pair_BTD = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(9))
    module, seen, states = reads(PairSkips(start=0.3), context=Context(pair_BTD=pair_BTD))
    for reader in range(5):
        expected = states[reader]
        if 0 < reader < 4:
            gate_BT1 = 2 * torch.sigmoid(states[0][..., :12] @ module.gates_LD[reader])[..., None]
            expected = expected + module.scales_L[reader] * gate_BT1 * pair_BTD
        torch.testing.assert_close(seen[reader], expected)


def test_pairs_in_every_layer_need_an_embedding_that_has_them_and_start_as_nothing():
    skipping = Skipping(residual=DEPTH, skips=(PairSkips(),))
    assert any("hashes none" in problem for problem in spec(skipping).problems())
    hashed = replace(spec(skipping), embedding=BigramHash(rows=50))
    model = build_model(hashed, seed=0)
    plain = build_model(replace(hashed, wiring=DEPTH), seed=0)
    tokens_BT = draw_tokens(plain)
    assert torch.equal(model(tokens_BT), plain(tokens_BT))
    with torch.no_grad():
        for each in (model, plain):
            each.embedding.pairs_RD.normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(tokens_BT), plain(tokens_BT))


@pytest.mark.parametrize(
    ("skip", "layers", "sources"),
    [
        (LayerSkips(), 4, {2: 1, 3: 0}),
        (LayerSkips(), 5, {3: 1, 4: 0}),
        (LayerSkips(pairs=((0.25, 0.5), (0.5, 1.0))), 4, {2: 1, 4: 2}),
    ],
)
def test_layer_skips_add_gated_outputs_of_the_layers_that_they_name(skip, layers, sources):
    module, seen, states = reads(skip, layers=layers)
    assert module.sources == sources
    for reader in range(layers + 1):
        expected = states[reader]
        if reader in sources:
            row = list(sources).index(reader)
            gate_BT1 = 2 * torch.sigmoid(states[0][..., :12] @ module.gates_PD[row])[..., None]
            expected = expected + module.scales_P[row] * gate_BT1 * states[sources[reader] + 1]
        torch.testing.assert_close(seen[reader], expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("period", "dilation", "sources"),
    [
        (1, 1, {1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4]}),
        (2, 1, {2: [0, 1, 2], 4: [0, 1, 2, 3, 4]}),
        (1, 2, {2: [0, 2], 3: [1, 3], 4: [0, 2, 4]}),
    ],
)
def test_dense_skips_sum_the_states_that_period_and_dilation_name(dynamic, period, dilation, sources):
    module, seen, states = reads(DenseSkips(dynamic=dynamic, period=period, dilation=dilation))
    assert module.sources == sources
    for reader in range(5):
        expected = states[reader]
        if reader in sources:
            key = str(reader)
            weights = module.static[key].expand(2, 3, -1)
            if dynamic:
                inner = F.gelu(rms_norm(states[reader]) @ module.down[key].T)
                weights = weights + 0.1 * inner @ module.up[key].T
            summed = torch.stack([states[source] for source in sources[reader]], dim=-1)
            expected = (summed * weights[..., None, :]).sum(-1)
        torch.testing.assert_close(seen[reader], expected)


@pytest.mark.parametrize(
    ("skip", "said"),
    [
        (LayerSkips(pairs=((0.1, 0.2),)), "each must go to a later layer"),
        (LayerSkips(pairs=((0.0, 0.6), (0.3, 0.7))), "no two to the same"),
        (DenseSkips(period=5), "no reader of 4 layers sums two states"),
    ],
)
def test_skips_that_a_depth_does_not_have_are_refused(skip, said):
    with pytest.raises(ValueError, match=said):
        skip.build(dim=16, num_layers=4)


def test_fields_out_of_range_are_named():
    assert LayerSkips(pairs=((0.5, 0.5),)).problems()
    assert SkipScales(period=0).problems()
    assert not SkipScales(period=3).problems()
    assert len(DenseSkips(period=0, dilation=0).problems()) == 2
