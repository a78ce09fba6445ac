"""Mixtures of experts in every layer of the study base, and in every second one of `fast`, at the FLOPs a
token costs there, but for the gate.

The pairs have a softmax gate and the auxiliary loss. The eights have a sigmoid gate, which starts at a half
however many experts there are, and are balanced by the bias alone. Muon moves each expert as a matrix of its
own, AdamW the gates.
"""

from dataclasses import replace

from sabrage.feedforward.moe import MixtureOfExperts
from sabrage.feedforward.routing import Gate
from sabrage.optim.adamw import AdamW
from sabrage.optim.sign_descent import SignDescent
from sabrage.parts import OptimizerGroup
from sabrage.recipe import Recipe
from sabrage.recipes.base import base
from sabrage.recipes.fast import fast

TOKEN = Gate(balance_loss=0.01, z_loss=0.001)
CONTEXT = replace(TOKEN, block=64)
EVEN = Gate(scores="sigmoid", z_loss=0.0001)


def _variant(
    name: str, summary: str, part: MixtureOfExperts, *, bias_rate: float, of: Recipe = base, every: int = 1
) -> Recipe:
    """The recipe `of` with this part in every `every`-th layer."""
    groups = (
        OptimizerGroup(pattern=r"router\.bias$", optimizer=SignDescent(lr=bias_rate)),
        OptimizerGroup(pattern=r"router\.weight$", optimizer=AdamW(lr=0.0018, weight_decay=0.0)),
        *of.optim,
    )
    layers = (*of.model.feedforwards * (every - 1), replace(part, zero_init=True))
    model = replace(of.model, feedforwards=layers)
    return replace(of, name=name, summary=summary, model=model, optim=groups)


experts = (
    _variant(
        "moe-2",
        "base with two experts, a token goes to one: softmax gate, auxiliary loss",
        MixtureOfExperts(experts=2, gate=TOKEN),
        bias_rate=0.0,
    ),
    _variant(
        "moe-2-context",
        "moe-2 with stretches of 64 tokens that go together, by the text so far",
        MixtureOfExperts(experts=2, gate=CONTEXT),
        # Means over texts have much in common, and all would go to one expert: the bias makes up for that.
        bias_rate=0.001,
    ),
    _variant(
        "moe-8",
        "base with eight experts, a token goes to one: sigmoid gate, balanced by a bias",
        MixtureOfExperts(gate=EVEN),
        bias_rate=0.001,
    ),
    _variant(
        "moe-8-shared",
        "moe-8 with experts half as wide beside one of that width that takes every token",
        MixtureOfExperts(gate=EVEN, expansion=2.0, shared=2),
        bias_rate=0.001,
    ),
    _variant(
        "fast-moe",
        "fast with four experts in every second layer, a token goes to one",
        MixtureOfExperts(experts=4, gate=EVEN),
        bias_rate=0.001,
        of=fast,
        every=2,
    ),
)
