"""The fast recipes: what learns most in a second of one GPU.

Read `fast` from its model down. Why it is fast, in the order of what each part is predicted to buy (what was
measured stands in LOG.md and docs/results.md):

- Muon with even rows (NorMuon) moves the matrices; its steps are few, so a step may cost 10 ms.
- Tables are cheap: a row is read where its token occurs and costs no product. Pairs of tokens and the values
  of six layers have tables of their own, so that the matrices need not learn word-pair statistics.
- Small batches early: one GPU pays no communication, and the first tokens teach more in small steps.
- Rows hold whole documents that do not see each other, through windows that grow: no attention is spent on
  other documents, and validation gives every token its whole document.
- The head is a third of the work: it is fused, so that logits are never held, and starts at zero.
"""

from dataclasses import replace

from sabrage.attention.multi_head import MultiHead
from sabrage.feedforward.mlp import Mlp
from sabrage.model.ends import TokenTable
from sabrage.model.fused_head import FusedHead
from sabrage.model.previous import BigramHash
from sabrage.optim.adamw import AdamW
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.plan import Plan, Ramp, Stages, Trapezoid
from sabrage.recipe import Budget
from sabrage.recipes.base import MATRICES, base
from sabrage.wiring.layer_skips import LayerSkips
from sabrage.wiring.residual import Residual
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skipping
from sabrage.wiring.value_embeddings import ValueEmbeddings

NEAR = MultiHead(heads=6, qk_norm=True, zero_init=True, window_share=0.5)
FAR = replace(NEAR, window_share=1.0)

fast = replace(
    base,
    name="fast",
    summary="the fastest recipe on one H100-class card: 124.5M tokens",
    data=replace(base.data, order="documents", block_tokens=65_536),
    model=replace(
        base.model,
        layers=12,
        embedding=BigramHash(inner=TokenTable(normalise=True)),
        mixers=(NEAR, NEAR, FAR),
        feedforwards=(Mlp(activation="relu_squared", zero_init=True),),
        wiring=ValueEmbeddings(
            inner=Skipping(residual=Residual(), skips=(SkipScales(), LayerSkips())), gates=6
        ),
        head=FusedHead(tied=False, zero_init=True, softcap=15.0),
    ),
    optim=(
        OptimizerGroup(
            pattern=MATRICES,
            optimizer=Muon(
                lr=0.03, normuon=True, cautious=True, weight_decay=0.1, orthogonalise="polar_express"
            ),
        ),
        OptimizerGroup(
            pattern=r"pairs|wiring\.tables",
            optimizer=AdamW(lr=0.05, betas=(0.75, 0.95), eps=1e-12, weight_decay=0.0),
        ),
        OptimizerGroup(
            pattern=r"wiring\.", optimizer=AdamW(lr=0.005, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0)
        ),
        OptimizerGroup(
            pattern=".*", optimizer=AdamW(lr=0.008, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
        ),
    ),
    plan=Plan(
        steps=1100,
        lr=Trapezoid(warmup=30, warmdown=660, floor=0.05),
        tokens_per_step=Stages(values=(65_536, 131_072), starts=(0, 300)),
        sequence_length=2048,
        momentum=Ramp(first=0.85, last=0.95, rise=200, fall=50),
        window=Stages(values=(512, 1024), starts=(0, 550)),
    ),
    budget=Budget(
        evaluate_every=275, evaluation_length=2048, evaluation_window=2048, evaluation_documents=True
    ),
)
