import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sabrage.attention.multi_head import MultiHead
from sabrage.context import Context
from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import LinearHead, TokenTable
from sabrage.model.lm import ModelSpec, build_model
from sabrage.precision.autocast import Fp32
from sabrage.train.evaluate import Evaluator
from sabrage.train.world import World
from sabrage.wiring.residual import Residual

CPU = torch.device("cpu")
VOCAB = 65


class Nothing(nn.Module):
    """Mixes nothing: the model then knows one token only, and its loss does not depend on the context."""

    def forward(self, x_BTD, context):
        return torch.zeros_like(x_BTD)


@pytest.fixture(scope="module")
def model():
    spec = ModelSpec(
        layers=2, dim=16, vocab_size=VOCAB, embedding=TokenTable(), mixers=(MultiHead(heads=1),),
        feedforwards=(Mlp(),), wiring=Residual(), head=LinearHead(),
    )  # fmt: skip
    model = build_model(spec, seed=3)
    for block in model.blocks:
        block.mixer = Nothing()
    with torch.no_grad():
        # Far from uniform, so that a target left out or scored twice shows.
        model.embedding.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(VOCAB, size=1500).astype(np.uint16)


def evaluate(model, tokens, *, num_targets=1000, length=63, rows=5, world=None):
    return Evaluator(
        model, Fp32(), world or World(CPU), tokens, num_targets=num_targets, length=length,
        batch_tokens=rows * length, compile=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def direct(model, tokens):
    """The mean over the first 1,000 targets, in one piece and in fp64."""
    inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in (tokens[:1000], tokens[1:1001]))
    with torch.no_grad():
        return F.cross_entropy(model.logits(inputs[None])[0].double(), targets).item()


@pytest.mark.parametrize("length", [1, 7, 63, 64, 250, 999, 1000, 1001, 4096])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_loss_is_that_of_one_direct_computation(model, tokens, direct, length, rows):
    assert evaluate(model, tokens, length=length, rows=rows)() == pytest.approx(direct, rel=1e-6)


@pytest.mark.parametrize(
    ("num_targets", "length", "rows"), [(1, 8, 4), (63, 64, 1), (1000, 217, 3), (999, 9, 5)]
)
def test_every_target_is_scored_exactly_once_after_its_own_token(model, tokens, num_targets, length, rows):
    evaluator = evaluate(model, tokens, num_targets=num_targets, length=length, rows=rows)
    pairs, shapes = [], set()
    for tokens_BT, targets_BT in evaluator.batches():
        shapes.add(tokens_BT.shape)
        scored = targets_BT >= 0
        pairs += zip(tokens_BT[scored].tolist(), targets_BT[scored].tolist(), strict=True)
    assert pairs == list(
        zip(tokens[:num_targets].tolist(), tokens[1 : num_targets + 1].tolist(), strict=True)
    )
    assert len(shapes) == 1


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_shares_of_all_processes_sum_to_the_loss_of_one(model, tokens, direct, size):
    class Alone(World):
        """One of several processes, whose sum over all is left to the test."""

        def total(self, value):
            return value

    shares = [evaluate(model, tokens, world=Alone(CPU, rank, size))() for rank in range(size)]
    assert math.fsum(shares) == pytest.approx(direct, rel=1e-6)


def test_the_rows_are_independent_contexts(tiny, assemble):
    session, _, evaluator = assemble(tiny)
    model, tokens = session.learner.model.eval(), torch.from_numpy(evaluator.tokens)
    rows = [
        model.head.loss(model(tokens[None, start:stop], Context()), tokens[None, start + 1 : stop + 1])
        * (stop - start)
        for start, stop in ((start, min(start + 32, 500)) for start in range(0, 500, 32))
    ]
    assert evaluator() == pytest.approx(sum(rows).item() / 500, rel=1e-6)


def test_evaluating_changes_nothing(tiny, assemble):
    session, _, evaluator = assemble(tiny)
    before = {name: tensor.clone() for name, tensor in session.tensors().items()}
    assert evaluator() == evaluator()
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.tensors().items())
    assert session.learner.training
    assert all(parameter.grad is None for parameter in session.learner.parameters())


def test_a_validation_split_that_is_too_short_is_an_error_with_the_remedy(model, tokens):
    evaluate(model, tokens, num_targets=1499)
    with pytest.raises(
        ValueError, match=r"1,500 tokens and budget.evaluation_tokens=1,500 needs one more .* lower"
    ):
        evaluate(model, tokens, num_targets=1500)
