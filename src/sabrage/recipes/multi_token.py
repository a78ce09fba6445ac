"""More than the next token to learn from, each way an objective on the study base; validation is next-token.

Weights fall to zero where the further targets only help to learn. The sequential module keeps a tenth to the
end, as DeepSeek-V3 does, since it drafts in decoding: `sabrage generate RUN --speculate`.
"""

from dataclasses import replace

from sabrage.feedforward.mlp import Mlp
from sabrage.losses import Objective
from sabrage.objective.heads import HeadsAhead
from sabrage.objective.prefix import PrefixTarget
from sabrage.objective.sequential import SequentialAhead
from sabrage.objective.shared import SharedAhead
from sabrage.plan import Anneal, Constant, Schedule
from sabrage.recipe import Recipe
from sabrage.recipes.base import base

PERCEPTRON = Mlp(activation="relu_squared", zero_init=True)


def _variant(name: str, summary: str, objective: Objective, *weights: Schedule) -> Recipe:
    plan = replace(base.plan, loss_weights=(Constant(), *weights))
    return replace(base, name=name, summary=summary, objective=objective, plan=plan)


multi_token = (
    _variant(
        "mtp-shared",
        "base with two more tokens ahead from the same head, their weights falling to zero",
        SharedAhead(tokens=3),
        Anneal(first=0.5, begin=120, end=240),
        Anneal(first=0.25, end=120),
    ),
    _variant(
        "mtp-heads",
        "base with the token after next from a transform of its own, its weight falling to zero",
        HeadsAhead(tokens=2, feedforward=PERCEPTRON),
        Anneal(first=0.5, begin=120, end=240),
    ),
    _variant(
        "mtp-sequential",
        "base with a module that sees the next token, predicts the one after, and drafts in decoding",
        SequentialAhead(depth=1, mixer=base.model.mixers[0], feedforward=PERCEPTRON),
        Anneal(first=0.3, last=0.1, begin=240, end=360),
    ),
    _variant(
        "mtp-prefix",
        "base with the longest prefix of the next token as a second target, its weight falling to zero",
        PrefixTarget(),
        Anneal(first=0.1, end=240),
    ),
)
