"""A small byte-level model on the text that comes with Python: minutes on a laptop's CPU, no network."""

from sabrage.attention.multi_head import MultiHead
from sabrage.data.embedded import EmbeddedText
from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import LinearHead, TokenTable
from sabrage.model.lm import ModelSpec
from sabrage.objective.next_token import NextToken
from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.plan import Plan, Trapezoid
from sabrage.precision.autocast import Fp32
from sabrage.recipe import Budget, Recipe
from sabrage.wiring.residual import Residual

demo = Recipe(
    name="demo",
    summary="a byte-level model of Python's own documentation: under three minutes on two CPU cores",
    data=EmbeddedText(block_tokens=2048),
    model=ModelSpec(
        layers=4,
        dim=192,
        vocab_size=257,
        embedding=TokenTable(),
        mixers=(MultiHead(heads=4, qk_norm=True, zero_init=True),),
        feedforwards=(Mlp(activation="gelu", zero_init=True),),
        wiring=Residual(mixer_scale="depth"),
        head=LinearHead(),
    ),
    objective=NextToken(),
    optim=(
        OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02)),
        OptimizerGroup(pattern=".*", optimizer=AdamW(lr=0.004)),
    ),
    plan=Plan(
        steps=270,
        lr=Trapezoid(warmup=10, warmdown=135),
        tokens_per_step=4096,
        sequence_length=256,
    ),
    precision=Fp32(),
    budget=Budget(evaluate_every=54, evaluation_tokens=65_536, evaluation_length=256, log_every=10),
)
