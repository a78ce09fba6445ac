"""The pieces around the mixers: norm, head, perceptron, residual stream, objective."""

import math

import pytest
import torch
import torch.nn.functional as F

from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context
from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import LinearHead, TokenTable
from sabrage.model.lm import Block, ModelSpec, build_model
from sabrage.norms import rms_norm
from sabrage.objective.next_token import NextToken
from sabrage.parts import Batch
from sabrage.recipes import find
from sabrage.wiring.residual import Residual


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spec(**changes):
    values = {
        "layers": 3,
        "dim": 16,
        "vocab_size": 50,
        "embedding": TokenTable(),
        "mixers": (MultiHead(heads=2),),
        "feedforwards": (Mlp(),),
        "wiring": Residual(),
        "head": LinearHead(),
    }
    return ModelSpec(**(values | changes))


@pytest.mark.parametrize("width", [1, 7, 768])
def test_rms_norm_gives_unit_root_mean_square(width):
    y = rms_norm(draw(5, width, scale=3.0), eps=0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5))


def test_rms_norm_of_zero_is_zero_and_of_tiny_values_is_held_by_eps():
    assert not rms_norm(torch.zeros(2, 8)).any()
    torch.testing.assert_close(
        rms_norm(torch.full((8,), 1e-6)), torch.full((8,), 1e-6 / math.sqrt(1e-12 + 1e-6))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_computes_in_fp32_and_rounds_once(dtype):
    # In fp16 the squares of these overflow, in bf16 their sum loses all small terms.
    x = draw(4, 768, scale=300.0).to(dtype)
    y = rms_norm(x)
    assert y.dtype == dtype
    assert torch.equal(y, rms_norm(x.float()).to(dtype))


def make_head(vocab_size, dim=16):
    torch.manual_seed(0)
    return LinearHead().build(dim=dim, vocab_size=vocab_size)


@pytest.mark.parametrize("left_out", [0, 1, 9])
def test_the_heads_loss_is_the_mean_cross_entropy_of_the_targets_that_count(left_out):
    head, h_BTD = make_head(50), draw(2, 5, 16)
    targets_BT = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(1))
    targets_BT.view(-1)[:left_out] = -1
    chances = head(h_BTD).double().softmax(-1).flatten(0, 1)
    counted = [-chances[n, v].log() for n, v in enumerate(targets_BT.flatten().tolist()) if v >= 0]
    torch.testing.assert_close(head.loss(h_BTD, targets_BT).double(), torch.stack(counted).mean())


def test_targets_that_are_left_out_give_no_gradient():
    head, h_BTD = make_head(50), draw(2, 5, 16).requires_grad_()
    targets_BT = torch.full((2, 5), 3)
    targets_BT[0, 2:] = -1
    head.loss(h_BTD, targets_BT).backward()
    assert not h_BTD.grad[0, 2:].any()
    assert h_BTD.grad[0, :2].all()


@pytest.mark.parametrize("vocab_size", [1, 50, 64, 65, 257])
@pytest.mark.parametrize("multiple", [64, 128])
def test_padding_the_heads_product_changes_neither_logits_nor_gradients(vocab_size, multiple):
    found = []
    for padding in (1, multiple):
        head, h_BTD = make_head(vocab_size), draw(2, 5, 16).requires_grad_()
        logits = head.padded(h_BTD, padding)
        pull = draw(*logits.shape, seed=2)
        found.append((logits, *torch.autograd.grad(logits, (h_BTD, head.weight), pull)))
    for plain, padded in zip(*found, strict=True):
        assert padded.shape == plain.shape
        torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-6)


def test_a_bf16_head_takes_its_softmax_in_fp32():
    head, h_BTD = make_head(5003), draw(1, 3, 16)
    targets_BT = torch.tensor([[1, 2, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = head.loss(h_BTD, targets_BT), head(h_BTD)
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), targets_BT[0]))


def test_an_untied_head_has_a_table_of_its_own():
    tied, untied = (build_model(spec(head=LinearHead(tied=value)), seed=0) for value in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("tied", tied), ("untied", untied))}
    assert count["untied"] - count["tied"] == 50 * 16
    # What both have starts the same.
    for name, weight in tied.state_dict().items():
        if name != "head.weight":
            assert torch.equal(weight, untied.state_dict()[name])


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("relu_squared", lambda x: torch.where(x > 0, x * x, 0)),
    ],
)
def test_a_perceptron_is_its_formula(activation, function):
    torch.manual_seed(0)
    module, x_BTD = Mlp(expansion=3, activation=activation).build(dim=8, layer=0), draw(2, 5, 8)
    expected = function(x_BTD @ module.up.weight.T) @ module.down.weight.T
    torch.testing.assert_close(module(x_BTD, Context()), expected)
    assert module.up.weight.shape == (24, 8)
    assert Mlp(expansion=3).flops(8) == 2 * 2 * 8 * 24


def test_blocks_that_start_at_zero_leave_the_embedding_as_it_is():
    model = build_model(
        spec(mixers=(MultiHead(heads=2, zero_init=True),), feedforwards=(Mlp(zero_init=True),)), seed=0
    )
    tokens_BT = torch.tensor([[3, 1, 4, 1]])
    assert torch.equal(model(tokens_BT), rms_norm(model.embedding.weight[tokens_BT]))


@pytest.mark.parametrize(("scale", "factor"), [("one", 1.0), ("depth", 8**-0.5)])
def test_the_residual_stream_scales_the_mixer_and_nothing_else(scale, factor):
    stream = Residual(mixer_scale=scale, eps=1e-3).build(dim=8, num_layers=4, vocab_size=9)
    block = Block(torch.nn.Identity(), Mlp(expansion=1).build(dim=8, layer=0))
    block.mixer.forward = lambda x_BTD, context: x_BTD.cumsum(1)
    x_BTD = draw(2, 5, 8)
    middle_BTD = x_BTD + factor * rms_norm(x_BTD, eps=1e-3).cumsum(1)
    expected = middle_BTD + block.feedforward(rms_norm(middle_BTD, eps=1e-3), Context())
    torch.testing.assert_close(stream(x_BTD, [block], Context()), rms_norm(expected, eps=1e-3))


def test_layers_take_their_parts_from_the_repeating_patterns():
    made = spec(
        layers=5,
        mixers=(MultiHead(heads=1), MultiHead(heads=2)),
        feedforwards=(Mlp(), Mlp(expansion=2), Mlp(expansion=1)),
    )
    model = build_model(made, seed=0)
    assert [block.mixer.heads for block in model.blocks] == [1, 2, 1, 2, 1]
    assert [block.mixer.layer for block in model.blocks] == [0, 1, 2, 3, 4]
    assert [block.feedforward.up.weight.shape[0] // 16 for block in model.blocks] == [4, 2, 1, 4, 2]


def test_the_next_token_objective_is_the_heads_loss_with_no_other_parts():
    model = build_model(spec(), seed=0)
    tokens_BT = torch.tensor([[3, 1, 4, 1, 5]])
    h_BTD, batch = model(tokens_BT), Batch(tokens_BT, tokens_BT.roll(-1, 1))
    loss = NextToken().build(dim=16, vocab_size=50)(h_BTD, batch, model, None)
    assert torch.equal(loss.total, model.head.loss(h_BTD, batch.targets_BT))
    assert loss.parts == {}


def test_an_untrained_model_is_near_the_loss_of_a_uniform_guess():
    model = build_model(spec(vocab_size=1000), seed=0)
    tokens_BT = torch.randint(1000, (4, 65), generator=torch.Generator().manual_seed(0))
    loss = model.head.loss(model(tokens_BT[:, :-1]), tokens_BT[:, 1:])
    assert loss.item() == pytest.approx(math.log(1000), abs=0.5)


def test_a_narrow_stream_has_the_format_of_the_products_and_is_idle_without_autocast():
    tokens_BT = torch.arange(12).view(2, 6)
    wide, narrow = (build_model(spec(narrow_stream=on), seed=0) for on in (False, True))
    assert torch.equal(narrow(tokens_BT), wide(tokens_BT))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact, rounded = wide(tokens_BT), narrow(tokens_BT)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)


def test_no_skip_of_the_fast_recipe_widens_a_narrow_stream():
    wiring = find("fast").model.wiring.inner.build(dim=16, num_layers=4, vocab_size=50)
    x_BTD = draw(1, 5, 16).bfloat16()
    states = [x_BTD]
    for _ in range(4):
        assert wiring.read(states, Context()).dtype == torch.bfloat16
        states.append(x_BTD)
