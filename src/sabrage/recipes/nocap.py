"""The NoCap benchmark's baseline, exactly: a 124M GPT-2 with rotary positions, AdamW and 2.5B tokens.

`nocap_mini` is the same with its horizon cut to one pass of a 143M-token corpus. It shows whether the
baseline is the baseline; it learns too little to judge ideas on.
"""

from dataclasses import replace

from sabrage.attention.multi_head import MultiHead
from sabrage.data.folder import ShardFolder
from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import LinearHead, TokenTable
from sabrage.model.lm import ModelSpec
from sabrage.objective.next_token import NextToken
from sabrage.optim.adamw import AdamW
from sabrage.parts import OptimizerGroup
from sabrage.plan import Plan, Trapezoid
from sabrage.precision.autocast import Bf16
from sabrage.recipe import Budget, Recipe
from sabrage.wiring.residual import Residual

nocap = Recipe(
    name="nocap",
    summary="the NoCap GPT-2 baseline, exactly: 124M parameters, AdamW, 4,768 steps of 524,288 tokens",
    data=ShardFolder(path="data/fineweb"),
    model=ModelSpec(
        layers=12,
        dim=768,
        vocab_size=50257,
        embedding=TokenTable(),
        mixers=(MultiHead(heads=12),),
        feedforwards=(Mlp(),),
        wiring=Residual(mixer_scale="depth"),
        head=LinearHead(),
    ),
    objective=NextToken(),
    optim=(OptimizerGroup(pattern=".*", optimizer=AdamW(lr=0.0018)),),
    plan=Plan(
        steps=4768,
        lr=Trapezoid(warmup=256, warmdown=1024),
        tokens_per_step=524_288,
        sequence_length=1024,
    ),
    precision=Bf16(),
    budget=Budget(evaluate_every=128, checkpoint_every=512),
)

nocap_mini = replace(
    nocap,
    name="nocap-mini",
    summary="the same with its horizon cut to 272 steps (142.6M tokens): one pass of the stand-in track",
    plan=replace(nocap.plan, steps=272, lr=Trapezoid(warmup=15, warmdown=58)),
    budget=Budget(evaluate_every=128),
)
