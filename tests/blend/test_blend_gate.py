"""The gate: what it starts as, and that it learns whom to trust."""

from dataclasses import fields

import pytest
import torch

from sabrage.blend import replay
from sabrage.blend.blend import Blend
from sabrage.blend.evidence import Evidence
from sabrage.blend.gate import HEAD_START, Gate, fit


@pytest.fixture
def trustworthy():
    """Evidence in which one expert is right where a feature says so, and else the network is."""
    generator = torch.Generator().manual_seed(0)
    right_N = torch.rand(4000, generator=generator) < 0.3
    log_N2 = torch.stack((torch.where(right_N, 0.0, -torch.inf), torch.full((4000,), -torch.inf)), 1)
    network_N = torch.where(right_N, -5.0, -0.5)
    known_N2 = torch.ones(4000, 2, dtype=torch.bool)
    return Evidence(log_N2, known_N2, right_N[:, None].float(), network_N), right_N


def test_a_fresh_gate_trusts_the_network():
    known_N2 = torch.tensor([[False, False], [True, False], [True, True]])
    evidence = Evidence(torch.zeros(3, 2), known_N2, torch.randn(3, 5), torch.zeros(3))
    shares = Gate(5, 2, 4).shares(evidence).exp()
    start = torch.tensor(HEAD_START).exp()
    torch.testing.assert_close(shares[0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(shares[1], torch.stack((start, torch.ones(()), torch.zeros(()))) / (start + 1))
    assert (shares[2] > 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(3))


def test_without_any_expert_the_network_is_all():
    evidence = Evidence(
        torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), torch.randn(2, 1), torch.tensor([-2.0, -7.0])
    )
    torch.testing.assert_close(Gate(1, 3, 2)(evidence), evidence.network_N)


def test_fitting_finds_whom_to_trust_and_repeats_itself(trustworthy):
    evidence, right_N = trustworthy
    settings = {"hidden": 8, "steps": 150, "batch": 512, "lr": 0.02}
    before = torch.get_rng_state()
    gate = fit(evidence, **settings, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert -gate(evidence).mean() < 0.45 < -evidence.network_N.mean()
    shares = gate.shares(evidence).exp()
    assert shares[right_N, 1].mean() > 0.8 > 0.2 > shares[~right_N, 1].mean()
    again, other = fit(evidence, **settings, seed=1), fit(evidence, **settings, seed=2)
    assert torch.equal(again.inner.weight, gate.inner.weight)
    assert not torch.equal(other.inner.weight, gate.inner.weight)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"text_orders": 8}, "text_orders"),
        ({"document_orders": -1}, "document_orders"),
        ({"text_orders": 0, "document_orders": 0, "seen": False, "cache": ()}, "no expert"),
        ({"cache": (0.0,)}, "cache"),
        ({"held_out": 0}, "held_out"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_what_cannot_be_is_told(changes, word):
    assert any(word in problem for problem in Blend(**changes).problems())


def test_a_large_vocabulary_is_told():
    assert Blend().unfit_vocabulary(50_304) == []
    assert "text_orders=0" in Blend().unfit_vocabulary(100_000)[0]
    assert Blend(text_orders=0).unfit_vocabulary(100_000) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fitting_by_a_graph_is_fitting(trustworthy, monkeypatch):
    evidence, right_N = trustworthy
    there = Evidence(*(getattr(evidence, field.name).cuda() for field in fields(evidence)[:4]))
    settings = {"hidden": 8, "steps": 150, "batch": 512, "lr": 0.02, "seed": 1}
    gate, again = fit(there, **settings), fit(there, **settings)
    monkeypatch.setattr(replay, "CALLS_BEFORE", 1000)
    plain = fit(there, **settings)
    assert -gate(there).mean() < 0.45
    assert gate.shares(there).exp()[right_N.cuda(), 1].mean() > 0.8
    for one, same, other in zip(gate.parameters(), again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, same)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert one.grad is None
