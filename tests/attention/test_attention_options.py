"""Options of multi-head attention: neutral they change nothing, else they keep the contract in one graph."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_options import HALF, OPTIONS
from contracts import CONTRACT, build, draw_tokens, shrink

from sabrage.attention import multi_head
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.scores import Alibi
from sabrage.context import Context
from sabrage.model.lm import build_model
from sabrage.recipes import find


def spec(**changes):
    base = shrink(find("base")).model
    return replace(base, mixers=(replace(base.mixers[0], heads=4, **changes),))


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("name", ["paired in a window", "offset of few keys", "all"])
def test_what_no_recipe_has_keeps_the_contract(name, check):
    CONTRACT[check](build(spec(**OPTIONS[name])))


@pytest.mark.parametrize("options", [{"gate": True}, {"rotary": replace(HALF, share=1.0)}])
def test_a_neutral_option_is_the_plain_model_bit_for_bit(options):
    found = []
    for changes in ({}, options):
        model = build_model(spec(zero_init=False, **changes), seed=0)
        tokens_BT = draw_tokens(model)
        logits_BTV = model.logits(tokens_BT)
        model.head.loss(model(tokens_BT), tokens_BT.roll(-1, 1)).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if "gate" not in name}
        found.append((logits_BTV, gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_a_layer_computes(name):
    x_BTD, outputs = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0)), []
    shared = {key: value for key, value in OPTIONS[name].items() if key in ("kv_heads", "window")}
    for changes in (shared, OPTIONS[name]):
        torch.manual_seed(0)
        layer = MultiHead(heads=4, **changes).build(dim=32, layer=0)
        if layer.gate_HX is not None:
            torch.nn.init.normal_(layer.gate_HX)
        outputs.append(layer(x_BTD, Context()))
    assert not torch.allclose(*outputs, atol=1e-3)


def test_all_options_together_are_one_graph_with_the_same_gradients():
    model = build(spec(**OPTIONS["all"])).train()
    tokens_BT = draw_tokens(model, rows=2)[:, :50]
    documents_BT = (torch.arange(50) > 20).long().expand(2, -1)

    def loss():
        h_BTD = model(tokens_BT, Context(documents_BT=documents_BT))
        return model.head.loss(h_BTD, tokens_BT)

    torch._dynamo.reset()
    plain = torch.autograd.grad(loss(), list(model.parameters()))
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    for expected, got in zip(plain, torch.autograd.grad(compiled(), list(model.parameters())), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_caches_what_plain_attention_caches(name):
    plain = MultiHead(heads=4, kv_heads=OPTIONS[name].get("kv_heads", 0))
    assert MultiHead(heads=4, **OPTIONS[name]).streams(96) == plain.streams(96)


def test_flops_count_a_gate_and_what_pairs_see():
    plain = MultiHead(heads=2)
    assert MultiHead(heads=2, gate=True).flops(64, 5) == plain.flops(64, 5) + 2 * 2 * 12
    assert MultiHead(heads=2, exclusive_self=True).flops(64, 5) == plain.flops(64, 5)
    # 1, 2, ... 10 entries are seen by the ten entries of five tokens, 55 in all, half as wide.
    assert MultiHead(heads=2, paired=True).flops(64, 5) == 2 * 4 * 64 * 64 + 2 * 2 * 32 * 55 // 5
    # In a window of two tokens 1, 2, 3, 3, ... and 3.
    assert MultiHead(heads=2, paired=True, window=2).flops(64, 5) == 2 * 4 * 64 * 64 + 2 * 2 * 32 * 27 // 5


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (MultiHead(heads=3, paired=True), "heads=3, kv_heads=0; use even ones"),
        (MultiHead(heads=4, kv_heads=1, paired=True), "heads=4, kv_heads=1; use even ones"),
        (MultiHead(heads=4, paired=True, scores=(Alibi(),)), "paired=true has no scores"),
        (MultiHead(heads=4, key_offset=True), "use rotary.share=0.5"),
        (MultiHead(heads=4, key_offset=True, rotary=None), "use rotary.share=0.5"),
    ],
)
def test_options_without_meaning_are_problems(part, said):
    (problem,) = part.problems()
    assert said in problem


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_work_are_no_problem(name):
    assert MultiHead(heads=4, **OPTIONS[name]).problems() == []


def test_pages_are_read_in_place_only_where_their_entries_are_what_is_attended_to(monkeypatch):
    monkeypatch.setattr(multi_head, "cannot_run", lambda device: None)
    query = SimpleNamespace(shape=(1, 1, 4, 8), dtype=torch.bfloat16, is_cuda=True, device="cuda")
    reads = {}
    for name, changes in {"plain": {}, **OPTIONS}.items():
        layer = MultiHead(heads=4, **changes).build(dim=32, layer=0)
        reads[name] = layer.reads_pages(query, SimpleNamespace(paged=True))
    assert {name for name, read in reads.items() if read} == {
        "plain",
        "gate",
        "exclusive",
        "scaled",
        "partial",
    }
