"""Embeddings that look back: their formulas, their beginnings, documents and decoding."""

from dataclasses import replace

import pytest
import torch
from contracts import CONTRACT, build, draw_tokens, shrink

from sabrage.context import Context
from sabrage.hashing import scramble
from sabrage.model.ends import TokenTable
from sabrage.model.lm import build_model
from sabrage.model.previous import BigramHash, Smear, TrigramHash
from sabrage.norms import rms_norm
from sabrage.recipes import find

BOTH = Smear(
    inner=TrigramHash(inner=BigramHash(inner=TokenTable(normalise=True), rows=50, width=16), rows=40, width=8)
)


def spec(embedding):
    return replace(shrink(find("nocap")).model, embedding=embedding)


def made(part, *, dim=8, vocab_size=300, seed=0):
    """The module with noise on all its weights."""
    torch.manual_seed(seed)
    module = part.build(dim=dim, vocab_size=vocab_size)
    with torch.no_grad():
        for weight in module.parameters():
            weight += torch.randn(weight.shape)
    return module


@pytest.mark.parametrize("part", [Smear(), BigramHash(rows=50), TrigramHash(rows=50), BOTH])
def test_an_embedding_starts_as_the_one_it_wraps_bit_for_bit(part):
    model, plain = (build_model(spec(each), seed=0) for each in (part, TokenTable()))
    if part is BOTH:
        plain = build_model(spec(TokenTable(normalise=True)), seed=0)
    tokens_BT = draw_tokens(model)
    logits, expected = model.logits(tokens_BT), plain.logits(tokens_BT)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(model.embedding.weight.grad, plain.embedding.weight.grad)
    assert model.head.weight is model.embedding.weight


def test_a_smear_is_its_formula():
    module, tokens_BT = made(Smear()), torch.tensor([[3, 1, 4]])
    x_BTD = module.inner.weight[tokens_BT]
    gate_BT = module.scale * torch.sigmoid(x_BTD @ module.gate_D)
    expected = torch.stack([x_BTD[0, 0], *(x_BTD[0, t] + gate_BT[0, t] * x_BTD[0, t - 1] for t in (1, 2))])
    torch.testing.assert_close(module(tokens_BT, Context())[0], expected)


def test_a_smear_after_a_normalised_table_smears_normalised_vectors():
    module, tokens_BT = made(Smear(inner=TokenTable(normalise=True))), torch.tensor([[3, 1]])
    x_BTD = rms_norm(module.inner.weight[tokens_BT])
    gate = module.scale * torch.sigmoid(x_BTD[0, 1] @ module.gate_D)
    torch.testing.assert_close(module(tokens_BT, Context())[0, 1], x_BTD[0, 1] + gate * x_BTD[0, 0])


def test_a_pair_adds_its_row_with_signs_wherever_it_occurs():
    module = made(BigramHash(rows=50, width=4))
    tokens_BT = torch.tensor([[7, 3, 1, 9, 3, 1]])
    added_TD = (module(tokens_BT, Context()) - module.inner.weight[tokens_BT])[0]
    assert torch.equal(added_TD[2] != 0, torch.arange(8) < 4)
    torch.testing.assert_close(added_TD[2], added_TD[5])
    sizes = added_TD[:, :4].abs()
    rows = (sizes[:, None] - module.pairs_RD.abs()).abs().amax(-1).amin(-1)
    assert rows.max() < 1e-5, "what a pair adds is a row of the table but for signs"


def test_a_triple_adds_what_only_its_three_tokens_decide():
    module = made(TrigramHash(rows=5000))
    tokens_BT = torch.tensor([[7, 3, 1, 9, 3, 1, 7, 3, 1]])
    added_TD = (module(tokens_BT, Context()) - module.inner.weight[tokens_BT])[0]
    torch.testing.assert_close(added_TD[2], added_TD[8])
    assert not torch.isclose(added_TD[2], added_TD[5]).any(), "9 3 1 is not 7 3 1"
    assert not torch.isclose(added_TD[1], added_TD[7]).any(), "nothing, 7, 3 is not 1, 7, 3"
    sizes = added_TD.abs()
    rows = (sizes[:, None] - module.triples_RD.abs()).abs().amax(-1).amin(-1)
    assert rows.max() < 1e-5, "what a triple adds is a row of the table but for signs"


def test_pairs_of_one_row_have_signs_that_average_out():
    """What many pairs add from a table of one row has mean zero, number by number and pair by pair."""
    module = BigramHash(rows=1, width=512).build(dim=512, vocab_size=300)
    with torch.no_grad():
        module.inner.weight.zero_()
        module.pairs_RD.fill_(1.0)
        tokens_BT = torch.randperm(300, generator=torch.Generator().manual_seed(0))[None]
        signs_TD = module(tokens_BT, Context())[0]
    assert set(signs_TD.unique().tolist()) == {-1.0, 1.0}
    assert signs_TD.mean(0).abs().max() < 5 * 300**-0.5
    products = signs_TD @ signs_TD.T / 512
    assert (products - torch.eye(300)).abs().max() < 6 * 512**-0.5


def test_pairs_spread_evenly_over_the_rows():
    first, second = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    counts = (scramble(first * 65536 + second) % 100).flatten().bincount(minlength=100)
    assert (counts - 900).abs().max() < 5 * 30


@pytest.mark.parametrize("part", [Smear(start=1.0), BigramHash(rows=50), TrigramHash(rows=50)])
def test_a_document_begins_as_a_sequence_does(part):
    module = made(part)
    tokens_BT, documents_BT = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    whole = module(tokens_BT, Context(documents_BT=documents_BT))
    torch.testing.assert_close(whole[:, 2:], module(tokens_BT[:, 2:], Context()))
    assert not torch.equal(whole[:, 2], module(tokens_BT, Context())[:, 2])


@pytest.mark.parametrize("check", CONTRACT)
def test_both_together_keep_the_contract(check):
    CONTRACT[check](build(spec(BOTH)))


@pytest.mark.parametrize("part", [BigramHash(rows=5000), TrigramHash(rows=5000)])
def test_a_token_survives_a_narrow_cache(part):
    """Ids that bf16 cannot hold are cached as digits that it can."""
    module = made(part, vocab_size=50257)
    tokens_BT = torch.tensor([[50256, 50255, 777, 50001, 256, 255]])

    class NarrowCache:
        paged = False

        def extend(self, layer, **streams):
            return {name: stream.bfloat16() for name, stream in streams.items()}

    cached = Context(positions_BT=torch.arange(6)[None], cache=NarrowCache())
    assert torch.equal(module(tokens_BT, cached), module(tokens_BT, Context()))


def test_sizes_that_cannot_be_are_refused():
    assert BigramHash(rows=0, width=-1).problems()
    with pytest.raises(ValueError, match="use 8 or less"):
        BigramHash(width=9).build(dim=8, vocab_size=10)
    for part in (BigramHash(), TrigramHash()):
        with pytest.raises(ValueError, match=f"{type(part).__name__} takes up to 65535"):
            part.build(dim=8, vocab_size=65536)
