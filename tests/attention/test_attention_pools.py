"""Pools of blocks: what each computes, and that a reservoir draws evenly and always the same."""

from collections import Counter
from math import comb

import pytest
import torch

from sabrage.attention.pools import Latents, Max, Mean, Reservoir, scatter


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keys_and_values(*, blocks=3, block=8, heads=2, width=4):
    return draw(2, blocks, block, heads, width), draw(2, blocks, block, heads, width, seed=1)


def build(pool, *, heads=2, width=4, layer=0):
    torch.manual_seed(0)
    return pool.build(heads=heads, width=width, layer=layer)


def drawn(part, *, blocks, block, layer=0):
    """(N, E) offsets, sorted within a block."""
    offset_NE = build(part, layer=layer).draw(blocks, block, torch.device("cpu"))
    assert offset_NE.shape == (blocks, part.entries)
    return offset_NE.sort(1).values


def chi_square(counts, num_kinds):
    """Deviation from even counts, in standard deviations of the statistic (about normal for many kinds)."""
    expected = sum(counts.values()) / num_kinds
    seen = sum((count - expected) ** 2 / expected for count in counts.values())
    statistic = seen + (num_kinds - len(counts)) * expected
    return (statistic - (num_kinds - 1)) / (2 * (num_kinds - 1)) ** 0.5


def test_the_mean_and_the_largest_are_those_of_the_block():
    k, v = keys_and_values()
    for part, function in ((Mean(), torch.mean), (Max(), torch.amax)):
        pooled_k, pooled_v, offset_NE = build(part)(k, v)
        assert torch.equal(pooled_k[:, :, 0], function(k, dim=2))
        assert torch.equal(pooled_v[:, :, 0], function(v, dim=2))
        assert offset_NE.tolist() == [[4]]


@pytest.mark.parametrize("entries", [1, 3, 8])
def test_a_reservoir_keeps_whole_tokens_in_their_places(entries):
    k, v = keys_and_values()
    pooled_k, pooled_v, offset_NE = build(Reservoir(entries=entries))(k, v)
    for n in range(3):
        assert len(set(offset_NE[n].tolist())) == entries
        assert torch.equal(pooled_k[:, n], k[:, n, offset_NE[n]])
        assert torch.equal(pooled_v[:, n], v[:, n, offset_NE[n]])


@pytest.mark.parametrize("block", [64, 48])
def test_every_token_of_a_block_is_drawn_equally_often(block):
    over_blocks = Counter(drawn(Reservoir(seed=3), blocks=64_000, block=block).flatten().tolist())
    assert abs(chi_square(over_blocks, block)) < 4
    over_layers = Counter(
        offset
        for layer in range(48)
        for offset in drawn(Reservoir(), blocks=100, block=block, layer=layer)[:, 0].tolist()
    )
    assert abs(chi_square(over_layers, block)) < 4
    over_seeds = Counter(
        offset
        for seed in range(400)
        for offset in drawn(Reservoir(seed=seed), blocks=20, block=block)[:, 0].tolist()
    )
    assert abs(chi_square(over_seeds, block)) < 4


def test_every_set_of_tokens_is_drawn_equally_often():
    sets = Counter(map(tuple, drawn(Reservoir(entries=3), blocks=40_000, block=8).tolist()))
    assert abs(chi_square(sets, comb(8, 3))) < 4


def test_what_is_drawn_of_one_block_says_nothing_of_the_next():
    first, second = drawn(Reservoir(), blocks=64_000, block=8)[:, 0].view(-1, 2).unbind(1)
    pairs = Counter(zip(first.tolist(), second.tolist(), strict=True))
    assert abs(chi_square(pairs, 64)) < 4


def test_an_uneven_draw_would_be_seen():
    even = Counter(dict.fromkeys(range(64), 1000))
    assert chi_square(even + Counter({5: 50}), 64) < 4 < chi_square(even + Counter({5: 500}), 64)


def test_later_blocks_change_no_draw_and_layers_and_seeds_do():
    few, many = (drawn(Reservoir(entries=2), blocks=blocks, block=64) for blocks in (5, 40))
    assert torch.equal(many[:5], few)
    assert not torch.equal(drawn(Reservoir(entries=2), blocks=40, block=64, layer=1), many)
    assert not torch.equal(drawn(Reservoir(entries=2, seed=1), blocks=40, block=64), many)


def test_a_stream_sampled_token_by_token_keeps_what_the_block_does():
    """The reservoir of a longer block is that of a shorter one, but for what the last token replaces."""
    sizes = range(2, 17)
    kept = [set(drawn(Reservoir(entries=2), blocks=1, block=size)[0].tolist()) for size in sizes]
    for size, before, after in zip(sizes[1:], kept[:-1], kept[1:], strict=True):
        assert after <= before | {size - 1}


def test_scattering_is_one_to_one_and_wraps_nowhere():
    numbers = torch.cat((torch.arange(50_000), 2**32 - 1 - torch.arange(50_000)))
    scattered = scatter(numbers)
    assert scattered.unique().numel() == numbers.numel()
    assert 0 <= scattered.min() < scattered.max() < 2**32
    assert [scatter(number) for number in numbers[-3:].tolist()] == scattered[-3:].tolist()


def test_latents_average_keys_and_values_by_attention_inside_the_block():
    k, v = keys_and_values()
    pool = build(Latents(entries=3))
    pooled_k, pooled_v, offset_NE = pool(k, v)
    assert offset_NE.tolist() == [[4, 4, 4]]
    for b, n, e, h in ((0, 0, 0, 0), (1, 2, 1, 1), (0, 1, 2, 1)):
        keys, values = k[b, n, :, h], v[b, n, :, h]
        unit = keys / keys.square().mean(-1, keepdim=True).sqrt()
        weights = (unit @ pool.latents_EHK[e, h] / 2).softmax(0)
        torch.testing.assert_close(pooled_k[b, n, e, h], weights @ keys)
        torch.testing.assert_close(pooled_v[b, n, e, h], weights @ values)


def test_a_latent_of_zero_is_the_mean():
    k, v = keys_and_values()
    pool = build(Latents(entries=1))
    torch.nn.init.zeros_(pool.latents_EHK)
    for pooled, mean in zip(pool(k, v), build(Mean())(k, v), strict=True):
        torch.testing.assert_close(pooled, mean)


@pytest.mark.parametrize("part", [Reservoir(entries=0), Reservoir(seed=-1), Latents(entries=0)])
def test_values_without_meaning_are_problems(part):
    assert len(part.problems()) == 1
    assert type(part)().problems() == []
