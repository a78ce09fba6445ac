"""Attention to pooled blocks: who sees what, two ways to compute it, and the leak that it must not have."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from contracts import CONTRACT, build, shrink
from torch.utils.flop_counter import FlopCounterMode

from sabrage.attention.multi_head import MultiHead
from sabrage.attention.near_and_pooled import Sight, attend_by_blocks, attend_everywhere
from sabrage.attention.pooled import Pooled, PooledAttention
from sabrage.attention.pools import Latents, Max, Mean, Reservoir
from sabrage.attention.rotary import Rotary
from sabrage.context import Context
from sabrage.model.legality import quick
from sabrage.optim.groups import assign
from sabrage.optim.muon import Muon
from sabrage.parts import Mixer
from sabrage.recipes import find

DIM = 16
POOLS = [Mean(), Max(), Reservoir(entries=2), Latents(entries=3)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_mixer(**changes):
    torch.manual_seed(0)
    return Pooled(**{"heads": 2, "block": 4, "window": 3} | changes).build(dim=DIM, layer=0)


def sees(sight, t, documents=None, length=12):
    """The keys, and the entries of pools, that query t of a row of `length` sees."""
    documents_BT = None if documents is None else torch.tensor([documents])
    num_entries = length // sight.block * sight.entries
    index = torch.arange(length)
    mask = sight.mask(index, index, num_entries, documents_BT).view(-1, length, num_entries + length)
    pooled, exact = mask[0, t].split([num_entries, length])
    return exact.nonzero().flatten().tolist(), pooled.nonzero().flatten().tolist()


def test_its_own_block_and_the_window_are_seen_token_by_token_and_passed_blocks_pooled():
    sight = Sight(block=4, window=3, entries=1)
    assert sees(sight, 0) == ([0], [])
    assert sees(sight, 3) == ([0, 1, 2, 3], [])
    assert sees(sight, 4) == ([2, 3, 4], [0])
    assert sees(sight, 7) == ([4, 5, 6, 7], [0])
    assert sees(sight, 8) == ([6, 7, 8], [0, 1])
    assert sees(Sight(block=4, window=1, entries=2), 9) == ([8, 9], [0, 1, 2, 3])


def test_a_pool_is_seen_by_the_document_to_which_its_whole_block_belongs():
    sight = Sight(block=4, window=3, entries=1)
    shared = [5, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7]
    assert sees(sight, 4, shared) == ([3, 4], [])
    assert sees(sight, 11, shared) == ([8, 9, 10, 11], [1])
    own = [5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7, 7]
    assert sees(sight, 4, own) == ([2, 3, 4], [0])
    assert sees(sight, 5, own) == ([5], [])
    between = [5, 5, 7, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    assert sees(sight, 4, between) == ([3, 4], [])


def brute_force(q, tokens, pools, sight, documents_BT=None):
    """One query at a time over the lists of `sees`."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        documents = None if documents_BT is None else documents_BT[b].tolist()
        for t in range(q.shape[1]):
            exact, pooled = sees(sight, t, documents, q.shape[1])
            k, v = (
                torch.cat((pool[b, pooled], token[b, exact]))
                for pool, token in zip(pools, tokens, strict=True)
            )
            weights = (torch.einsum("hk,shk->hs", q[b, t], k) / q.shape[-1] ** 0.5).softmax(-1)
            out[b, t] = torch.einsum("hs,shk->hk", weights, v)
    return out


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 32])
@pytest.mark.parametrize(
    "sight",
    [
        Sight(block=4, window=1, entries=1),
        Sight(block=4, window=6, entries=3),
        Sight(block=5, window=5, entries=1),
        Sight(block=4, window=100, entries=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("documents", [False, True])
def test_attention_by_blocks_and_everywhere_and_one_by_one_are_the_same(sight, length, documents):
    num_entries = length // sight.block * sight.entries
    q, k, v = (draw(2, length, 2, 4, seed=seed).requires_grad_() for seed in range(3))
    pooled_k, pooled_v = (draw(2, num_entries, 2, 4, seed=seed).requires_grad_() for seed in (3, 4))
    documents_BT = (torch.arange(length) >= torch.tensor([[length // 3], [9]])).long() if documents else None
    inputs, pull = [q, k, v, pooled_k, pooled_v], draw(2, length, 2, 4, seed=5)
    results = []
    for function in (attend_everywhere, attend_by_blocks):
        context = Context(documents_BT=documents_BT)
        out = function(q, (k, v), (pooled_k, pooled_v), context, sight)
        results.append([out, *torch.autograd.grad(out, inputs, pull)])
    for everywhere, by_blocks in zip(*results, strict=True):
        assert by_blocks.isfinite().all()
        torch.testing.assert_close(by_blocks, everywhere, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        expected = brute_force(q, (k, v), (pooled_k, pooled_v), sight, documents_BT)
    torch.testing.assert_close(results[0][0], expected, atol=1e-5, rtol=1e-5)


def test_a_row_of_one_block_is_plain_multi_head_attention():
    x_BTD = draw(2, 9, DIM)
    plain = MultiHead(heads=2, qk_norm=True).build(dim=DIM, layer=0)
    pooled = build_mixer(block=16, window=1, qk_norm=True)
    pooled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(pooled(x_BTD, Context()), plain(x_BTD, Context()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_only_differences_of_positions_count_for_pools_too(pool):
    mixer, x_BTD = build_mixer(pool=pool, qk_norm=True), draw(2, 14, DIM)
    shifted = Context(positions_BT=torch.arange(14).expand(2, -1) + 100)
    torch.testing.assert_close(mixer(x_BTD, shifted), mixer(x_BTD, Context()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_far_tokens_are_seen_through_their_pool_and_matter(pool):
    mixer, x_BTD = build_mixer(pool=pool), draw(1, 14, DIM).requires_grad_()
    (gradient_BTD,) = torch.autograd.grad(mixer(x_BTD, Context())[0, 13].sum(), x_BTD)
    seen = gradient_BTD[0].any(-1).tolist()
    if isinstance(pool, Reservoir):
        kept = mixer.pool.draw(3, 4, torch.device("cpu")) + torch.arange(0, 12, 4)[:, None]
        assert seen == [t in kept or t > 10 for t in range(14)]
    else:
        assert all(seen)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_flops_count_the_keys_that_are_seen(pool):
    part = Pooled(heads=2, pool=pool, block=4, window=6)
    sight = Sight(block=4, window=6, entries=pool.num_entries)
    counts = [len(exact) + len(pooled) for exact, pooled in (sees(sight, t, length=23) for t in range(23))]
    seen = 2 * 2 * DIM * sum(counts) // 23
    assert part.flops(DIM, 23) == 2 * 4 * DIM * DIM + pool.flops(DIM) + seen


def test_pooling_by_latents_costs_what_its_products_cost():
    k = torch.zeros(1, 5, 8, 2, 4)
    with FlopCounterMode(display=False) as counter:
        Latents(entries=3).build(heads=2, width=4, layer=0)(k, k)
    assert counter.get_total_flops() == 5 * 8 * Latents(entries=3).flops(8)


def test_learned_latents_are_not_orthogonalised_and_matrices_are():
    recipe = find("pool-latent")
    mixer = recipe.model.mixers[0].build(dim=768, layer=0)
    named = [(f"model.blocks.0.mixer.{name}", weight) for name, weight in mixer.named_parameters()]
    taken = {
        type(group.optimizer): [name.rpartition("mixer.")[2] for name, _ in pairs]
        for group, pairs in assign(recipe.optim, named)
    }
    assert taken.pop(Muon) == ["qkv.weight", "out.weight"]
    assert list(taken.values()) == [["pool.latents_EHK"]]


def test_a_zero_initialised_mixer_adds_nothing_and_can_learn():
    mixer = build_mixer(zero_init=True)
    y_BTD = mixer(draw(1, 9, DIM), Context())
    assert not y_BTD.any()
    y_BTD.sum().backward()
    assert mixer.out.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block": 0}, "block=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"block": 4, "pool": Latents(entries=5)}, "entries=5 of blocks of 4"),
    ],
)
def test_sizes_without_meaning_are_problems(changes, said):
    part = Pooled(heads=2, **changes)
    assert any(said in sentence for sentence in part.problems())
    assert Pooled(heads=2).problems() == []


def test_heads_that_do_not_cut_the_width_are_refused():
    with pytest.raises(ValueError, match=r"heads=7 does not cut dim=768 .*divisor of 384"):
        Pooled(heads=7).build(dim=768, layer=0)


def test_a_sequence_beyond_the_rotary_tables_is_refused():
    mixer = build_mixer(rotary=Rotary(max_length=4))
    with pytest.raises(ValueError, match=r"raise rotary.max_length"):
        mixer(draw(1, 5, DIM), Context())


@dataclass(frozen=True, kw_only=True)
class NaivePooled(Mixer):
    """The tempting form: every query sees the pools of all blocks up to its own, which holds its future."""

    pool: Mean | Max | Reservoir | Latents
    block: int = 16

    def build(self, *, dim, layer):
        return Naive(Pooled(heads=2, pool=self.pool, block=self.block), dim=dim, layer=layer)

    def streams(self, dim):
        return {}

    def flops(self, dim, sequence_length):
        return 0


class Naive(PooledAttention):
    def forward(self, x_BTD, context):
        # Whole blocks only, as is usual where this form is seen.
        length, block = x_BTD.shape[1], self.sight.block
        x_BTD = F.pad(x_BTD, (0, 0, 0, -length % block))
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        k, v = self.pools(k, v, None)
        time = torch.arange(x_BTD.shape[1])
        mask = time[: k.shape[1]] // self.sight.entries <= time[:, None] // block
        q, k, v = (x.transpose(1, 2) for x in (self.place(q, None), k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))[:, :length]


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
@pytest.mark.parametrize("check", ["causal", "causal_by_gradient"])
def test_the_contract_catches_a_query_that_reads_the_pool_of_its_own_block(check, pool):
    model = build(replace(shrink(find("base")).model, mixers=(NaivePooled(pool=pool),)))
    with pytest.raises(AssertionError, match=r"changes an output before it|depends on a later token"):
        CONTRACT[check](model)


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: type(pool).__name__)
def test_the_legality_check_names_the_mixer_that_reads_the_pool_of_its_own_block(pool):
    spec = replace(shrink(find("base")).model, mixers=(NaivePooled(pool=pool, block=64),))
    failed = {check.name: check.detail for check in quick(spec, max_length=1024).checks if not check.passed}
    # By gradient only what lies behind the 63rd token of a block is looked for, and few of them are drawn.
    for name in ("causality",) if isinstance(pool, Reservoir) else ("causality", "causality by gradient"):
        assert "blocks.0.mixer (NaivePooled) leaks" in failed[name]


@pytest.mark.parametrize("name", ["pool-mean", "pool-max", "pool-reservoir", "pool-latent"])
def test_the_honest_form_is_legal_with_documents(name):
    assert quick(find(name).model, max_length=1024, documents=True).require().passed
