"""Gates: losses that balance, the bias that evens out, and the choice by context."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from sabrage.context import Context
from sabrage.feedforward.routing import Gate, Router
from sabrage.optim.groups import Optimizers
from sabrage.optim.sign_descent import SignDescent
from sabrage.parts import Knobs, OptimizerGroup

DIM, BLOCK = 16, 8
KNOBS = Knobs(step=0, lr=0.5, sequence_length=8, tokens_per_step=8)


def make(gate, *, experts=4, active=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Router(gate, dim=DIM, experts=experts, active=active, layer=0)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def losses(router, x_BTD):
    context = Context()
    router.train()(x_BTD, context)
    return context


def test_the_auxiliary_loss_is_its_weight_where_all_is_even_and_its_weight_times_experts_at_worst():
    router = make(Gate(balance_loss=0.1))
    with torch.no_grad():
        # Four directions, one an expert, and then all of one.
        router.weight.copy_(200 * torch.eye(4, DIM))
    x_BTD = torch.eye(4, DIM).repeat(3, 1)[None]
    assert losses(router, x_BTD).losses["balance"].item() == pytest.approx(0.1)
    assert losses(router, x_BTD[:, :1]).losses["balance"].item() == pytest.approx(0.4)


def test_the_auxiliary_loss_pulls_the_scores_of_a_crowded_expert_down():
    router = make(Gate(balance_loss=1.0))
    logits = nn.Parameter(torch.tensor([[2.0, 0.0, 0.0, 0.0]]))
    scores = logits.softmax(-1)
    context = Context()
    router.balance(logits, scores, torch.tensor([1.0, 0.0, 0.0, 0.0]), context)
    context.losses["balance"].backward()
    assert logits.grad[0, 0] > 0
    assert (logits.grad[0, 1:] < 0).all()


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_z_loss_is_the_mean_square_of_the_log_of_the_partition_function(scores):
    router = make(Gate(scores=scores, z_loss=0.5))
    x_BTD = draw(2, 5, DIM)
    logits_BTE = (x_BTD @ router.weight.T).detach()
    wanted = 0.5 * logits_BTE.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(losses(router, x_BTD).losses["router_z"].detach(), wanted)


def test_without_weights_the_loss_is_left_exactly_as_it_was():
    context = losses(make(Gate()), draw(2, 9, DIM))
    assert context.losses.keys() == {"balance"}
    assert context.losses["balance"].item() == 0.0


def test_nothing_is_added_to_the_loss_or_the_log_outside_of_training():
    context = Context()
    make(Gate(balance_loss=1.0, z_loss=1.0)).eval()(draw(2, 9, DIM), context)
    assert not context.losses
    assert not context.readings


def test_the_gradient_of_the_bias_is_the_load_less_the_mean_load():
    router = make(Gate(scores="sigmoid"))
    x_BTD = draw(3, 40, DIM)
    context = losses(router, x_BTD)
    context.losses["balance"].backward()
    experts_NA, _, load_E = router(x_BTD, Context())
    torch.testing.assert_close(router.bias.grad, load_E / len(experts_NA) - 1 / 4)


def test_entropies_are_one_where_all_is_even_and_nothing_where_one_expert_takes_all():
    router = make(Gate())
    with torch.no_grad():
        router.weight.zero_()
    even = losses(router, draw(1, 6, DIM)).readings
    assert even["router_entropy"][0].item() == pytest.approx(1.0)
    # Equal scores: the first expert takes all.
    assert even["load_entropy"][0].item() == 0.0


@pytest.mark.parametrize(("scores", "active"), [("softmax", 1), ("sigmoid", 1), ("sigmoid", 2)])
def test_the_bias_evens_out_a_skewed_router(scores, active):
    router = make(Gate(scores=scores), experts=8, active=active)
    optimizers = Optimizers(
        [OptimizerGroup(pattern="bias", optimizer=SignDescent(lr=0.005))],
        [("bias", router.bias)],
        "cpu",
    )
    # All tokens have much in common, so that one expert is everybody's favourite.
    common = 2 * draw(DIM, seed=5)
    entropies = []
    for step in range(120):
        context = losses(router, common + draw(2, 128, DIM, seed=10 + step))
        entropies.append(context.readings["load_entropy"][0].item())
        context.losses["balance"].backward()
        optimizers.step(KNOBS)
        optimizers.zero_grad()
    assert entropies[0] < 0.85
    assert sum(entropies[-10:]) / 10 > 0.95


def test_sign_descent_moves_by_its_rate_whatever_the_plan_and_the_size_of_the_gradient():
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizers = Optimizers(
        [OptimizerGroup(pattern=".*", optimizer=SignDescent(lr=0.25))], [("w", weight)], "cpu"
    )
    weight.grad = torch.tensor([3.0, -1e-6, 0.0])
    optimizers.step(KNOBS)
    assert weight.tolist() == [0.75, 1.25, 1.0]


def test_sign_descent_stays_where_a_gradient_overflowed_or_is_missing():
    weight, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    group = OptimizerGroup(pattern=".*", optimizer=SignDescent())
    optimizers = Optimizers([group], [("w", weight), ("idle", idle)], "cpu")
    weight.grad = torch.tensor([float("nan"), 1.0])
    optimizers.step(KNOBS, found_inf=torch.ones(()))
    assert weight.tolist() == [1.0, 1.0]
    assert idle.tolist() == [1.0, 1.0]


def test_a_stretch_goes_where_the_mean_of_the_text_up_to_its_first_token_points():
    router = make(Gate(block=BLOCK)).eval()
    x_BTD = draw(2, 30, DIM)
    experts_NA, weights_NA, _ = router(x_BTD, Context())
    for start in range(0, 30, BLOCK):
        summary_BD = x_BTD[:, : start + 1].mean(1)
        scores_BE = (summary_BD @ router.weight.T).softmax(-1)
        stretch_BT = experts_NA.view(2, 30)[:, start : start + BLOCK]
        assert (stretch_BT == scores_BE.argmax(-1, keepdim=True)).all()
        held_BT = weights_NA.view(2, 30)[:, start : start + BLOCK]
        torch.testing.assert_close(held_BT, scores_BE.amax(-1, keepdim=True).expand_as(held_BT))


def test_within_a_stretch_later_tokens_change_no_choice_before_the_next():
    router = make(Gate(block=BLOCK)).eval()
    x_BTD = draw(1, 32, DIM)
    other_BTD = x_BTD.clone()
    other_BTD[:, 9:] = draw(1, 23, DIM, seed=8)
    (before, weights, _), (after, other_weights, _) = (router(x, Context()) for x in (x_BTD, other_BTD))
    assert torch.equal(before[:16], after[:16])
    assert torch.equal(weights[:16], other_weights[:16])
    assert not torch.equal(weights[16:], other_weights[16:])


def test_a_document_is_routed_as_if_it_stood_alone():
    router = make(Gate(block=BLOCK)).eval()
    x_BTD = draw(1, 40, DIM)
    # The second document begins within a stretch, the third on a border, the fourth is one token.
    borders = [0, 13, 24, 37, 38, 40]
    lengths = torch.tensor([end - start for start, end in pairwise(borders)])
    documents_BT = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    _, weights_NA, _ = router(x_BTD, Context(documents_BT=documents_BT))
    for start, end in pairwise(borders):
        first = (x_BTD[:, start] @ router.weight.T).softmax(-1).amax()
        torch.testing.assert_close(weights_NA[start], first[None])
        other_BTD = draw(1, 40, DIM, seed=9)
        other_BTD[:, start:end] = x_BTD[:, start:end]
        _, other, _ = router(other_BTD, Context(documents_BT=documents_BT))
        assert torch.equal(weights_NA[start:end], other[start:end])


class Entries:
    """A cache of one layer whose memory beyond the end is NaN."""

    paged = False

    def __init__(self, capacity):
        self.stored = torch.full((1, capacity, 4), math.nan)
        self.length = 0

    def extend(self, layer, *, gate):
        self.stored[:, self.length : self.length + gate.shape[1]] = gate
        self.length += gate.shape[1]
        return {"gate": self.stored}


def test_choosing_from_a_cache_equals_choosing_in_the_whole_sequence():
    router = make(Gate(block=BLOCK)).eval()
    x_BTD = draw(1, 30, DIM)
    experts_NA, weights_NA, _ = router(x_BTD, Context())
    cache, pieces = Entries(30), []
    for piece_BTD in x_BTD.split([11, 1, 1, 5, *[1] * 12], dim=1):
        positions_BT = torch.arange(cache.length, cache.length + piece_BTD.shape[1])[None]
        pieces.append(router(piece_BTD, Context(positions_BT=positions_BT, cache=cache)))
    assert torch.equal(torch.cat([experts for experts, _, _ in pieces]), experts_NA)
    torch.testing.assert_close(torch.cat([weights for _, weights, _ in pieces]), weights_NA)
