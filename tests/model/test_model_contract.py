"""Every recipe's model keeps the contract of tests/contracts.py, and the contract catches what breaks it."""

from dataclasses import dataclass, replace

import pytest
import torch.nn.functional as F
from contracts import CONTRACT, build, shrink
from torch import nn

from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import LinearHead, Projection
from sabrage.parts import FeedForward, Head, Mixer
from sabrage.recipes import RECIPES, find

# Recipes that differ in precision, objective or plan have one model, which is held to the contract once.
DISTINCT = {repr(shrink(recipe).model): name for name, recipe in reversed(RECIPES.items())}.values()


@pytest.fixture(scope="module")
def models():
    """Tiny models by recipe name, built when first asked for."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = build(shrink(find(name)).validate().model)
        return made[name]

    return model


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("name", DISTINCT)
def test_every_recipe_keeps_the_contract(models, name, check):
    CONTRACT[check](models(name))


class Function(nn.Module):
    """A module without weights."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_BTD, *context):
        return self.function(x_BTD, *context)


@dataclass(frozen=True, kw_only=True)
class FaultyMixer(Mixer):
    """Mixes along time in a way that breaks the contract."""

    fault: str

    def build(self, *, dim, layer):
        faults = {"bidirectional": bidirectional, "own future": block_means, "one number": cut_short(layer)}
        return Function(faults[self.fault])

    def streams(self, dim):
        return {"x": dim} if self.fault == "one number" else {}

    def flops(self, dim, sequence_length):
        return 0


def bidirectional(x_BTD, context):
    return F.scaled_dot_product_attention(x_BTD, x_BTD, x_BTD)


def block_means(x_BTD, context, size=8):
    """Each token gets the mean of its block, the block's later tokens included."""
    return x_BTD.unflatten(1, (-1, size)).mean(2).repeat_interleave(size, dim=1)


def cut_short(layer):
    """Declares a whole vector and caches its first number."""

    def mix(x_BTD, context):
        if context.cache is None:
            return x_BTD
        return context.cache.extend(layer, x=x_BTD[..., :1])["x"][:, -x_BTD.shape[1] :]

    return mix


@dataclass(frozen=True, kw_only=True)
class BatchStatistics(FeedForward):
    """Normalises with the mean of the whole batch."""

    def build(self, *, dim, layer):
        return Function(lambda x_BTD, context: x_BTD - x_BTD.mean((0, 1)))

    def flops(self, dim):
        return 0


@dataclass(frozen=True, kw_only=True)
class RowStatistics(FeedForward):
    """Subtracts the mean over the sequence."""

    def build(self, *, dim, layer):
        return Function(lambda x_BTD, context: x_BTD - x_BTD.mean(1, keepdim=True))

    def flops(self, dim):
        return 0


@dataclass(frozen=True, kw_only=True)
class MoodyFeedForward(FeedForward):
    """Computes otherwise in training ("louder"), or draws at random in evaluation ("random")."""

    fault: str

    def build(self, *, dim, layer):
        return Moody(self.fault)

    def flops(self, dim):
        return 0


class Moody(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x_BTD, context):
        if self.fault == "random":
            return F.dropout(x_BTD, 0.5, training=not self.training)
        return 2 * x_BTD if self.training else x_BTD


@dataclass(frozen=True, kw_only=True)
class OverconfidentHead(Head):
    """Its loss leaves half of the vocabulary out of the denominator."""

    def build(self, *, dim, vocab_size):
        return HalfDenominator(dim=dim, vocab_size=vocab_size)

    def flops(self, dim, vocab_size):
        return LinearHead().flops(dim, vocab_size)


class HalfDenominator(Projection):
    def loss(self, h_BTD, targets_BT):
        logits = self(h_BTD)
        chosen = logits.gather(-1, targets_BT[..., None])
        return (logits[..., ::2].logsumexp(-1, keepdim=True) - chosen).mean()


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("causal", {"mixers": (FaultyMixer(fault="bidirectional"),)}),
        ("causal_by_gradient", {"mixers": (FaultyMixer(fault="bidirectional"),)}),
        ("documents_isolated", {"mixers": (FaultyMixer(fault="bidirectional"),)}),
        ("causal", {"mixers": (FaultyMixer(fault="own future"),)}),
        ("causal_by_gradient", {"mixers": (FaultyMixer(fault="own future"),)}),
        ("decoding_equals_forward", {"mixers": (FaultyMixer(fault="one number"),)}),
        ("paged_decoding_equals_forward", {"mixers": (FaultyMixer(fault="one number"),)}),
        ("caches_what_it_declares", {"mixers": (FaultyMixer(fault="one number"),)}),
        ("causal", {"feedforwards": (RowStatistics(),)}),
        ("causal", {"feedforwards": (BatchStatistics(),)}),
        ("batch_independent", {"feedforwards": (BatchStatistics(),)}),
        ("same_in_training", {"feedforwards": (Mlp(), MoodyFeedForward(fault="louder"))}),
        ("same_in_training", {"feedforwards": (Mlp(), MoodyFeedForward(fault="random"))}),
        ("normalised", {"head": OverconfidentHead()}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value.values()))),
)
def test_the_contract_catches_a_model_that_breaks_it(check, changes):
    spec = replace(shrink(find("nocap")).model, **changes)
    model = build(spec)
    with pytest.raises(AssertionError):
        CONTRACT[check](model)
