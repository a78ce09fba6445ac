"""Score modifiers: the published numbers, gradients of what is learned, and neutral settings."""

import pytest
import torch
from attention_cases import Case

from sabrage.attention.backends import attend
from sabrage.attention.multi_head import MultiHead
from sabrage.attention.scores import Alibi, RelativeBias, SoftCap, alibi_slopes, bucket
from sabrage.context import Context
from sabrage.model.lm import LM
from sabrage.optim.adamw import AdamW
from sabrage.optim.groups import assign
from sabrage.optim.muon import Muon
from sabrage.recipes import find


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == [2**-n for n in range(1, 9)]
    assert alibi_slopes(1) == [2**-8]
    # Twelve heads: eight of eight, and every other one of sixteen.
    assert alibi_slopes(12) == [*alibi_slopes(8), *(2 ** (-n / 2) for n in (1, 3, 5, 7))]


def test_alibi_takes_the_slope_times_the_distance_from_the_scores():
    case = Case("", queries=40, heads=2, groups=2, batch=1)
    q, k, v, _ = case.inputs()
    out = attend(q, k, v, Context(), backend="plain", scores=[Alibi().build(heads=2)])
    for head, slope in enumerate((2**-4, 2**-8)):
        scores = k[0, :31, head] @ q[0, 30, head] / 4 - slope * torch.arange(30, -1, -1)
        torch.testing.assert_close(out[0, 30, head], scores.softmax(0) @ v[0, :31, head])


def test_buckets_are_exact_nearby_then_widen_and_end():
    part = RelativeBias(buckets=32, max_distance=128)
    found = [bucket(distance, part) for distance in range(200)]
    assert found[:16] == list(range(16))
    assert found == sorted(found)
    assert set(found) == set(range(32))
    # 16 + 16 ln(n / 16) / ln 8: 20 is 17.7, 64 is 26.7, 127 is 31.9.
    assert [found[n] for n in (16, 20, 64, 127, 128, 199)] == [16, 17, 26, 31, 31, 31]


def test_a_fresh_relative_bias_changes_nothing_bit_for_bit():
    q, k, v, _ = Case("").inputs()
    plain = attend(q, k, v, Context(), backend="plain")
    biased = attend(q, k, v, Context(), backend="plain", scores=[RelativeBias().build(heads=4)])
    assert torch.equal(biased, plain)


def test_the_gradient_of_a_learned_bias_is_that_of_finite_differences():
    case = Case("", queries=40, heads=2, groups=1, width=8)
    q, k, v, pull = case.inputs(torch.float64)
    module = RelativeBias(buckets=8, max_distance=20).build(heads=2).double()
    torch.manual_seed(0)
    torch.nn.init.normal_(module.bias_HN)

    def loss():
        # The naive form, in double precision: a bias for every pair, then a softmax.
        distance = (torch.arange(40)[:, None] - torch.arange(40)).clamp(min=0)
        scores = torch.einsum("bthk,bsk->bhts", q, k[:, :, 0]) / 8**0.5
        numbers = torch.tensor([[bucket(int(n), RelativeBias(buckets=8, max_distance=20)) for n in row]
                                for row in distance])  # fmt: skip
        scores = scores + module.bias_HN[:, numbers]
        weights = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)
        return (torch.einsum("bhts,bsk->bthk", weights, v[:, :, 0]) * pull).sum()

    (naive,) = torch.autograd.grad(loss(), module.bias_HN)
    step = 1e-5
    for head, number in ((0, 0), (1, 3), (1, 7)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                module.bias_HN[head, number] += sign * step
                losses.append(loss().item())
                module.bias_HN[head, number] -= sign * step
        assert naive[head, number].item() == pytest.approx((losses[0] - losses[1]) / 2 / step, rel=1e-5)
    single = module.float()
    out = attend(*(x.float() for x in (q, k, v)), Context(), backend="plain", scores=[single])
    (gradient,) = torch.autograd.grad((out * pull.float()).sum(), single.bias_HN)
    torch.testing.assert_close(gradient, naive.float(), atol=1e-4, rtol=1e-4)


def test_a_soft_cap_bounds_scores_and_a_huge_one_changes_next_to_nothing():
    function = SoftCap(cap=5.0).build(heads=1).function(1)
    scores, nothing = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4]), torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(function(scores, nothing, nothing), torch.tensor([-5.0, -0.01, 0, 0.01, 5]))
    q, k, v, _ = Case("").inputs()
    capped = attend(q, k, v, Context(), backend="plain", scores=[SoftCap(cap=1e4).build(heads=4)])
    torch.testing.assert_close(capped, attend(q, k, v, Context(), backend="plain"))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (RelativeBias(buckets=1), "buckets=1"),
        (RelativeBias(buckets=32, max_distance=16), "max_distance=16"),
        (SoftCap(cap=0.0), "cap=0.0 must be above 0"),
    ],
)
def test_values_without_meaning_are_problems(part, said):
    assert said in part.problems()[0]
    assert type(part)().problems() == []


def test_a_learned_bias_goes_to_adamw_and_the_matrices_beside_it_to_muon():
    recipe = find("relbias")
    with torch.device("meta"):
        groups = assign(recipe.optim, LM(recipe.model).named_parameters())
    (muon, matrices), (adamw, others) = groups
    assert (type(muon.optimizer), type(adamw.optimizer)) == (Muon, AdamW)
    biases = [name for name, _ in others if "mixer" in name]
    assert biases == [f"blocks.{layer}.mixer.scores.0.bias_HN" for layer in range(12)]
    assert not any("scores" in name for name, _ in matrices)


@pytest.mark.parametrize("scores", [(Alibi(),), (RelativeBias(),), (SoftCap(),), (RelativeBias(), SoftCap())])
@pytest.mark.parametrize("rotary", [True, False])
def test_every_modifier_learns_with_rotary_positions_and_without(scores, rotary):
    part = MultiHead(heads=2, scores=scores, **({} if rotary else {"rotary": None}))
    mixer = part.build(dim=16, layer=0)
    x_BTD = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    mixer(x_BTD, Context()).square().sum().backward()
    assert all(parameter.grad.any() for parameter in mixer.parameters())
