"""Rescoring against the plain computation over the whole vocabulary, and that it learns from candidates."""

from dataclasses import replace

import pytest
import torch

from sabrage.blend import rescoring
from sabrage.blend.candidates import Offered
from sabrage.blend.evidence import Evidence
from sabrage.blend.gate import Gate, fit
from sabrage.blend.rescoring import Rescoring

VOCABULARY, CANDIDATES, FEATURES, EACH = 9, 5, 3, 4


def drawn(places, seed=0):
    """(log p (N, V), tokens of candidates (N, C) with -1 for none, their features, features of places)."""
    generator = torch.Generator().manual_seed(seed)
    log_NV = torch.randn(places, VOCABULARY, generator=generator).log_softmax(1)
    tokens_NC = torch.rand(places, VOCABULARY, generator=generator).argsort(1)[:, :CANDIDATES]
    tokens_NC[torch.rand(places, CANDIDATES, generator=generator) < 0.4] = -1
    tokens_NC[3:5] = -1
    features_NCX = torch.randn(places, CANDIDATES, EACH, generator=generator)
    return log_NV, tokens_NC, features_NCX, torch.randn(places, FEATURES, generator=generator)


def of_targets(log_NV, tokens_NC, features_NCX, target_N):
    """(the network's log-probabilities of targets, the candidates with these targets)."""
    log_NC = log_NV.gather(1, tokens_NC.clamp(min=0)).masked_fill(tokens_NC < 0, -torch.inf)
    same_NC = tokens_NC == target_N[:, None]
    number_N = torch.where(same_NC.any(1), same_NC.int().argmax(1), -1)
    return log_NV.gather(1, target_N[:, None])[:, 0], Offered(log_NC, features_NCX, number_N)


def by_hand(module, log_NV, tokens_NC, features_NCX, features_NF):
    """log p' of the whole vocabulary: a softmax of log p + a."""
    a_NC = module.raised(features_NF, features_NCX)
    # One column more takes what is added to no candidate.
    place_NC = torch.where(tokens_NC < 0, VOCABULARY, tokens_NC)
    a_NV = torch.zeros(len(log_NV), VOCABULARY + 1).scatter_add(1, place_NC, a_NC)[:, :VOCABULARY]
    return (log_NV + a_NV).log_softmax(1)


@pytest.fixture(params=[1, 3])
def module(request):
    """A module that says something, of one layer or three."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Rescoring(FEATURES, EACH, 8, request.param)
        torch.nn.init.normal_(made.outer.weight, std=2)
        torch.nn.init.normal_(made.outer.bias)
    return made


@pytest.mark.parametrize("at_once", [4096, 7, 1])
@pytest.mark.parametrize("places", [63, 217])
def test_probabilities_and_gradients_are_those_of_the_whole_vocabulary(monkeypatch, module, places, at_once):
    monkeypatch.setattr(rescoring, "PLACES_AT_ONCE", at_once)
    log_NV, tokens_NC, features_NCX, features_NF = drawn(places)
    expected_NV = by_hand(module, log_NV, tokens_NC, features_NCX, features_NF)
    found = []
    for token in range(VOCABULARY):
        network_N, of = of_targets(log_NV, tokens_NC, features_NCX, torch.full((places,), token))
        found.append(module(network_N, features_NF, of))
    found_NV = torch.stack(found, 1)
    torch.testing.assert_close(found_NV, expected_NV)
    torch.testing.assert_close(found_NV.exp().sum(1), torch.ones(places))
    weight_NV = torch.randn(places, VOCABULARY, generator=torch.Generator().manual_seed(9))
    sums = [(weight_NV * log_NV).sum() for log_NV in (found_NV, expected_NV)]
    pairs = zip(*(torch.autograd.grad(total, list(module.parameters())) for total in sums), strict=True)
    for one, other in pairs:
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_at_first_the_network_is_left_as_it_is():
    log_NV, tokens_NC, features_NCX, features_NF = drawn(63)
    network_N, of = of_targets(log_NV, tokens_NC, features_NCX, torch.arange(63) % VOCABULARY)
    torch.testing.assert_close(Rescoring(FEATURES, EACH, 8)(network_N, features_NF, of), network_N)


def test_a_place_without_candidates_keeps_the_network(module):
    log_NV, tokens_NC, features_NCX, features_NF = drawn(63)
    network_N, of = of_targets(log_NV, torch.full_like(tokens_NC, -1), features_NCX, torch.zeros(63).long())
    found_N = module(network_N, features_NF, of)
    torch.testing.assert_close(found_N, network_N)
    found_N.sum().backward()
    assert all((weight.grad == 0).all() for weight in module.parameters())


@pytest.mark.parametrize("bias", [200.0, -200.0])
def test_nothing_overflows_however_far_candidates_are_raised_or_lowered(module, bias):
    torch.nn.init.constant_(module.outer.bias, bias)
    log_NV, tokens_NC, features_NCX, features_NF = drawn(63)
    expected_NV = by_hand(module, log_NV, tokens_NC, features_NCX, features_NF)
    for token in range(VOCABULARY):
        network_N, of = of_targets(log_NV, tokens_NC, features_NCX, torch.full((63,), token))
        found_N = module(network_N, features_NF, of)
        torch.testing.assert_close(found_N, expected_NV[:, token], atol=1e-4, rtol=1e-5)


def test_no_place_at_all_is_no_error(module):
    log_NV, tokens_NC, features_NCX, features_NF = (table[:0] for table in drawn(63))
    network_N, of = of_targets(log_NV, tokens_NC, features_NCX, torch.zeros(0).long())
    assert module(network_N, features_NF, of).shape == (0,)


@pytest.fixture
def telling():
    """Evidence in which a feature of a candidate tells, in part, whether it is the target."""
    log_NV, _, features_NCX, features_NF = drawn(4000)
    generator = torch.Generator().manual_seed(4)
    target_N = torch.multinomial(log_NV.exp(), 1, generator=generator)[:, 0]
    tokens_NC = log_NV.topk(CANDIDATES).indices
    told_NC = (tokens_NC == target_N[:, None]) & (torch.rand(4000, 1, generator=generator) < 0.7)
    features_NCX[..., 2] += 3 * told_NC
    network_N, of = of_targets(log_NV, tokens_NC, features_NCX, target_N)
    useless_N1 = torch.full((4000, 1), -torch.inf)
    return Evidence(useless_N1, torch.zeros(4000, 1, dtype=torch.bool), features_NF, network_N, of)


SETTINGS = {"hidden": 8, "steps": 150, "batch": 512, "lr": 0.02, "seed": 1}


@pytest.mark.parametrize("layers", [1, 2])
def test_fitting_finds_what_tells_and_repeats_itself(telling, layers):
    gate = fit(telling, **SETTINGS, rescoring_hidden=8, rescoring_layers=layers)
    assert -gate(telling).mean() < -telling.network_N.mean() - 0.4
    again = fit(telling, **SETTINGS, rescoring_hidden=8, rescoring_layers=layers)
    assert torch.equal(again.rescoring.each.weight, gate.rescoring.each.weight)


def test_a_fresh_gate_with_candidates_says_what_one_without_says(telling):
    plain = replace(telling, candidates=None)
    gates = []
    for given in (telling, plain):
        torch.manual_seed(0)
        gates.append(Gate.of(given, hidden=8, rescoring_hidden=8))
    torch.testing.assert_close(gates[0](telling), gates[1](plain))
    assert [name for name, _ in gates[1].named_parameters()] == [
        "inner.weight",
        "inner.bias",
        "outer.weight",
        "outer.bias",
    ]


def test_a_gate_is_not_asked_without_the_candidates_that_it_knows(telling):
    gate = Gate.of(telling, hidden=8, rescoring_hidden=8)
    with pytest.raises(AssertionError):
        gate(replace(telling, candidates=None))
