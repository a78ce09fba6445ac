"""The fast recipes: what learns most in a second of one GPU.

Read `fast` from its model down. Why it is fast:

- Muon moves the matrices. NorMuon evens out their rows, and decay is cautious.
- Tables are cheap: a row is read where its token occurs and costs no product. Pairs of tokens and the values
  of six layers have tables of their own, so that the matrices need not learn word-pair statistics.
- Small batches early: one GPU pays no communication, and the first tokens teach more in small steps.
- Rows hold whole documents that do not see each other; four layers in five look 512 tokens back. What no
  token sees costs no time, and validation, in long rows, gives nearly every token its whole document.
- The head is a third of the work: fused, so that its logits are never held, and at zero to begin with.
- Ten layers for twelve: at so few tokens a smaller model that sees more of them comes further.

What each part bought is told in LOG.md and docs/results.md.
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

NEAR = MultiHead(heads=6, qk_norm=True, zero_init=True, window=512)
# As long as a row in training, so that the longer rows of validation hold no distance that is new.
FAR = replace(NEAR, window=2048)

fast = replace(
    base,
    name="fast",
    summary="the fastest recipe on one H100-class card: 118M tokens",
    data=replace(base.data, order="documents", block_tokens=65_536),
    model=replace(
        base.model,
        layers=10,
        embedding=BigramHash(inner=TokenTable(normalise=True)),
        mixers=(NEAR, NEAR, NEAR, NEAR, FAR),
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
                lr=0.025, normuon=True, cautious=True, weight_decay=0.1, orthogonalise="polar_express"
            ),
        ),
        # A row of these learns only where its token or pair occurs, so that its gradients are tiny and rare.
        OptimizerGroup(
            pattern=r"pairs|wiring\.tables",
            optimizer=AdamW(lr=0.3, betas=(0.75, 0.95), eps=1e-12, weight_decay=0.0),
        ),
        OptimizerGroup(
            pattern=r"wiring\.", optimizer=AdamW(lr=0.005, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0)
        ),
        OptimizerGroup(
            pattern=".*", optimizer=AdamW(lr=0.006, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
        ),
    ),
    plan=Plan(
        steps=1050,
        lr=Trapezoid(warmup=30, warmdown=630, floor=0.03),
        tokens_per_step=Stages(values=(65_536, 131_072), starts=(0, 300)),
        sequence_length=2048,
        momentum=Ramp(first=0.85, last=0.95, rise=200, fall=50),
    ),
    budget=Budget(evaluate_every=150, evaluation_length=8192, evaluation_documents=True),
)
