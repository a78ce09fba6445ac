"""Neighbours among remembered states, against comparing each with each."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sabrage.blend import neighbours
from sabrage.blend.audit import fault
from sabrage.blend.blend import Blend
from sabrage.blend.neighbours import Memory, Neighbours, Tiled, nearest, principal

WIDTH, VOCABULARY = 12, 5
ALL = Neighbours(cells=6, probes=6, width=8, sharpness=(4.0, 20.0))
ALONE = Blend(text_orders=0, document_orders=0, seen=False, cache=())


@pytest.fixture(params=[None, (4, 8, 3)], ids=["large tiles", "small tiles"])
def text(request, monkeypatch):
    """(states, what followed them, queries, targets); cells of 50 states or fewer."""
    monkeypatch.setattr(neighbours, "SAMPLE", 50)
    if request.param:
        for name, value in zip(("QUERIES", "STATES", "TILES"), request.param, strict=True):
            monkeypatch.setattr(neighbours, name, value)
    generator = torch.Generator().manual_seed(0)
    states_MD, queries_ND = (torch.randn(size, WIDTH, generator=generator) + 1 for size in (301, 67))
    following_M, targets_N = (torch.randint(VOCABULARY, (size,), generator=generator) for size in (301, 67))
    return states_MD, following_M, queries_ND, targets_N


def made(part, text):
    states_MD, following_M, *_ = text
    return Memory(part, [(states_MD[:200], following_M[:200]), (states_MD[200:], following_M[200:])])


def by_hand(memory, query_D, target, b):
    """log p of the target and the nearest cosine, over the cells that the memory would search."""
    query_1K = memory.keys(query_D[None])
    ends = memory.sizes_C.cumsum(0).tolist()
    places = []
    for cell in nearest(query_1K, memory.centres_CK, memory.probes)[0].tolist():
        places += range(ends[cell] - int(memory.sizes_C[cell]), ends[cell])
    alike_M = memory.keys_MK[places] @ query_1K[0]
    weight_M = torch.softmax(b * alike_M, 0)
    return weight_M[memory.following_M[places] == target].sum().log(), alike_M.max()


@pytest.mark.parametrize("probes", [1, 2, 6])
def test_what_followed_the_neighbours_as_by_hand(text, probes):
    part = replace(ALL, probes=probes)
    memory, (_, _, queries_ND, targets_N) = made(part, text), text
    log_NS, features_NX = memory.say(queries_ND, targets_N)
    assert log_NS.shape == (67, 2)
    assert features_NX.shape == (67, 3)
    for index, (query_D, target) in enumerate(zip(queries_ND, targets_N, strict=True)):
        for kind, b in enumerate(part.sharpness):
            expected, near = by_hand(memory, query_D, target, b)
            torch.testing.assert_close(log_NS[index, kind], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(features_NX[index, 0], near)


def test_every_state_is_remembered_in_the_cell_of_the_nearest_centre(text):
    memory, (states_MD, following_M, *_) = made(ALL, text), text
    assert int(memory.sizes_C.sum()) == 301
    cell_M = torch.arange(6).repeat_interleave(memory.sizes_C)
    assert torch.equal(nearest(memory.keys_MK, memory.centres_CK, 1)[:, 0], cell_M)
    keys_MK = memory.keys(states_MD)
    for key_K, following in zip(keys_MK, following_M, strict=True):
        place = int((memory.keys_MK - key_K).square().sum(1).argmin())
        assert memory.following_M[place] == following
        torch.testing.assert_close(memory.keys_MK[place], key_K)


def test_what_is_said_of_all_tokens_sums_to_one(text):
    memory, (_, _, queries_ND, _) = made(replace(ALL, probes=2), text), text
    every = [memory.say(queries_ND, torch.full((67,), token))[0].exp() for token in range(VOCABULARY)]
    torch.testing.assert_close(sum(every), torch.ones(67, 2))


def test_a_query_is_told_the_same_in_any_company(text):
    memory, (_, _, queries_ND, targets_N) = made(replace(ALL, probes=2), text), text
    whole, alone = memory.say(queries_ND, targets_N), memory.say(queries_ND[5:6], targets_N[5:6])
    for one, other in zip(whole, alone, strict=True):
        torch.testing.assert_close(one[5:6], other)


def test_a_query_whose_cells_are_empty_is_told_nothing(text):
    memory, (_, _, queries_ND, targets_N) = made(replace(ALL, probes=1), text), text
    cell = int(nearest(memory.keys(queries_ND[:1]), memory.centres_CK, 1))
    keep_M = torch.arange(6).repeat_interleave(memory.sizes_C) != cell
    memory.keys_MK, memory.following_M = memory.keys_MK[keep_M], memory.following_M[keep_M]
    memory.sizes_C[cell] = 0
    _, features_NX = memory.say(queries_ND[:1], targets_N[:1])
    assert features_NX[0, 0] == -1
    assert features_NX.isfinite().all()


def test_components_are_those_of_the_largest_variance():
    generator = torch.Generator().manual_seed(1)
    scale_D = torch.tensor([0.1, 3.0, 0.2, 1.0])
    h_MD = torch.randn(4000, 4, generator=generator) * scale_D + 5
    mean_D, basis_DK = principal(h_MD, 2)
    torch.testing.assert_close(mean_D, h_MD.mean(0))
    assert basis_DK.abs().argmax(0).tolist() == [1, 3]
    assert principal(h_MD, 99)[1].shape == (4, 4)


def test_tiles_hold_each_thing_once_and_one_cell_each():
    tiled = Tiled(torch.tensor([3, 0, 9, 4]), 4)
    assert tiled.tiles.tolist() == [1, 0, 3, 1]
    cell_T, number_T = torch.tensor([0, 2, 2, 2, 3]), torch.tensor([0, 0, 1, 2, 0])
    place_TW, held_TW = tiled.places(cell_T, number_T)
    assert place_TW[held_TW].tolist() == list(range(16))
    assert held_TW.sum(1).tolist() == [3, 4, 4, 1, 4]


def test_near_states_that_agree_are_trusted_to_the_letter():
    """Two heaps of states, each followed by one token."""
    generator = torch.Generator().manual_seed(2)
    heaps_2D = F.normalize(torch.randn(2, WIDTH, generator=generator), dim=1) * 10
    of_M = torch.arange(400) % 2
    states_MD = heaps_2D[of_M] + torch.randn(400, WIDTH, generator=generator) * 0.1
    memory = Memory(replace(ALL, cells=2, probes=1), [(states_MD, of_M)])
    log_NS, features_NX = memory.say(heaps_2D, torch.arange(2))
    assert log_NS.exp().min() > 0.99
    assert features_NX[:, 0].min() > 0.9
    assert memory.say(heaps_2D, 1 - torch.arange(2))[0].exp().max() < 0.01


def test_mixtures_are_legal():
    assert fault(replace(ALONE, neighbours=Neighbours(probes=2))) is None
    assert fault(Blend(neighbours=Neighbours())) is None


def test_a_leak_of_the_target_is_caught(monkeypatch):
    honest = Memory.say

    def leaking(self, h_ND, targets_N):
        return honest(self, h_ND + 0.1 * targets_N[:, None], targets_N)

    monkeypatch.setattr(Memory, "say", leaking)
    assert fault(replace(ALONE, neighbours=Neighbours(probes=2)))


def test_a_memory_of_nothing_is_refused():
    with pytest.raises(ValueError, match="without states"):
        Memory(ALL, [])


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 0}, {"width": 0}, {"cells": 0}, {"probes": 0}, {"sharpness": ()}, {"sharpness": (41.0,)}],
)
def test_what_cannot_be_is_told(changes):
    assert replace(ALL, **changes).problems()
    assert not ALL.problems()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_finds_what_the_cpu_finds():
    """The same states in the same cells, in 16 bits; cells of thousands, where tiles are cut."""
    generator = torch.Generator().manual_seed(3)
    heaps_CD = torch.randn(16, 64, generator=generator)
    of_M = torch.randint(16, (20_000,), generator=generator)
    states_MD = heaps_CD[of_M] + torch.randn(20_000, 64, generator=generator) * 0.3
    queries_ND = heaps_CD[of_M[:3000]] + torch.randn(3000, 64, generator=generator) * 0.3
    part = Neighbours(width=32, cells=16, probes=16, sharpness=(10.0, 40.0))
    memory = Memory(part, [(states_MD.cuda(), of_M.cuda())])
    found = memory.say(queries_ND.cuda(), of_M[:3000].cuda())
    exact = Memory(part, [(states_MD, of_M)]).say(queries_ND, of_M[:3000])
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=0.03, rtol=0.02)
