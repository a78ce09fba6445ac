"""The study base: the NoCap model made quick to learn, on 47M tokens, the ground on which ideas are judged.

`base` is `nocap` with QK-norm, ReLU^2, zero-initialised output projections and Muon for the matrices of the
blocks (AdamW for the tied table). Its few rates were tuned once, on a small grid, and are left alone.
"""

from dataclasses import replace
from typing import Any

from sabrage.attention.multi_head import MultiHead
from sabrage.feedforward.mlp import Mlp
from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.plan import Plan, Trapezoid
from sabrage.recipe import Budget, Recipe
from sabrage.recipes.nocap import nocap

MATRICES = r"blocks\..*weight"

base = replace(
    nocap,
    name="base",
    summary="the study base: nocap with QK-norm, ReLU^2, zero-initialised outputs and Muon; 47.2M tokens",
    model=replace(
        nocap.model,
        mixers=(MultiHead(heads=12, qk_norm=True, zero_init=True),),
        feedforwards=(Mlp(activation="relu_squared", zero_init=True),),
    ),
    optim=(
        OptimizerGroup(pattern=MATRICES, optimizer=Muon(lr=0.03)),
        OptimizerGroup(pattern=".*", optimizer=AdamW(lr=0.0054)),
    ),
    plan=Plan(
        steps=360,
        lr=Trapezoid(warmup=20, warmdown=180),
        tokens_per_step=131_072,
        sequence_length=1024,
    ),
    budget=Budget(evaluate_every=60),
)

base_adamw = replace(
    base, name="base-adamw", summary="base without Muon: AdamW for everything", optim=nocap.optim
)

muon = replace(nocap, name="muon", summary="nocap with Muon for the matrices of the blocks", optim=base.optim)


def variant(name: str, summary: str, *groups: OptimizerGroup, **changes: Any) -> Recipe:
    """`base` with fields of its model changed, and with optimizer groups that come before its own."""
    model, optim = replace(base.model, **changes), (*groups, *base.optim)
    return replace(base, name=name, summary=summary, model=model, optim=optim)
