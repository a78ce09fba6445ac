"""Copying: its formula, that it starts as nothing, and that it copies what was never copied before."""

from dataclasses import replace

import pytest
import torch

from sabrage.attention.copying import Copying
from sabrage.config import ConfigError
from sabrage.context import Context
from sabrage.model.lm import build_model
from sabrage.norms import rms_norm
from sabrage.recipes import find

PART = Copying(head_width=8, sharpness=5.0)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = PART.build(dim=16, layer=0)
    with torch.no_grad():
        made.scale.fill_(0.7)
        made.gate_D.normal_()
    return made


def given(*, documents=None):
    generator = torch.Generator().manual_seed(1)
    context = Context(tokens_BT=torch.randint(9, (2, 6), generator=generator), documents_BT=documents)
    context.head_VD = torch.randn(9, 16, generator=generator)
    return torch.randn(2, 6, 16, generator=generator), context


def by_hand(layer, h_BTD, context):
    tokens_BT, documents_BT = context.tokens_BT, context.documents_BT
    rows_VD = rms_norm(context.head_VD)
    y_BTD = torch.zeros_like(h_BTD)
    for b in range(2):
        q_TK, k_TK = (
            torch.nn.functional.normalize(each(h_BTD[b]), dim=1) for each in (layer.query, layer.key)
        )
        for t in range(6):
            seen = [
                j for j in range(t + 1) if documents_BT is None or documents_BT[b, j] == documents_BT[b, t]
            ]
            before = [j - 1 if j - 1 in seen else j for j in seen]
            weight_J = torch.softmax(5.0 * k_TK[before] @ q_TK[t], 0)
            gate = 0.7 * 2 * torch.sigmoid(h_BTD[b, t] @ layer.gate_D)
            y_BTD[b, t] = gate * weight_J @ rows_VD[tokens_BT[b, seen]]
    return y_BTD


@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])])
def test_it_is_its_formula(layer, documents):
    h_BTD, context = given(documents=documents)
    torch.testing.assert_close(layer(h_BTD, context), by_hand(layer, h_BTD, context))


def test_a_fresh_one_changes_nothing(one_thread):
    recipe = find("copying")
    spec = replace(recipe.model, layers=2, dim=64, vocab_size=257, mixers=find("demo").model.mixers)
    tokens_BT = torch.randint(257, (2, 30))
    model = build_model(spec, seed=0)
    plain = build_model(replace(spec, last=None), seed=0)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "last." not in key})
    assert torch.equal(model.logits(tokens_BT), plain.logits(tokens_BT))


def test_the_token_after_an_earlier_state_like_this_one_gets_the_largest_logit(layer):
    """Every token is new, each state is that of its token, and the fifth repeats the second."""
    head_VD = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    tokens_BT = torch.tensor([[31, 7, 44, 12, 7]])
    h_BTD = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))[tokens_BT]
    with torch.no_grad():
        layer.key.weight.copy_(layer.query.weight)
        layer.gate_D.zero_()
    part = replace(PART, sharpness=60.0)
    layer.part = part
    context = Context(tokens_BT=tokens_BT, head_VD=head_VD)
    assert (layer(h_BTD, context) @ rms_norm(head_VD).T)[0, -1].argmax() == 44


def test_the_head_learns_nothing_from_being_copied(layer):
    h_BTD, context = given()
    context.head_VD.requires_grad_()
    layer(h_BTD, context).sum().backward()
    assert context.head_VD.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_what_cannot_be_built_is_told():
    recipe = find("copying")
    odd = replace(recipe, model=replace(recipe.model, last=Copying(head_width=7)))
    with pytest.raises(ConfigError, match="head_width=7 does not divide"):
        odd.validate()
    assert any("sharpness" in problem for problem in Copying(sharpness=0.0).problems())
