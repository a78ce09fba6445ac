r"""The fast recipes: what learns most in a second of one GPU; all that a run needs is on this page.

Read `fast` from its model down. Why it is fast:

- Muon moves the matrices. NorMuon evens out their rows, and decay is cautious. In the long run its rate times
  the decay says how fast they turn, and its rate over the decay how large they are: smaller than usual here,
  since with larger ones deep networks lost what they had been ahead of shallow ones.
- Tables are cheap: a row is read where its token occurs and costs no product. Pairs of tokens and the values
  of six layers have tables of their own, so that the matrices need not learn word-pair statistics.
- Small batches early: one GPU pays no communication, and the first tokens teach more in small steps.
- Rows hold whole documents that do not see each other; four layers in five look 512 tokens back. What no
  token sees costs no time, and validation, in long rows, gives nearly every token its whole document.
- The fifth finds what followed a token earlier: half of its keys are those of the token before.
- The head is a third of the work: fused, so that its logits are never held, at zero to begin with, two of its
  three products in FP8, and in training over two fifths of the vocabulary: the targets, and others drawn by
  how often they have been targets and weighed so that their sum stays what it is.
- What stands between the products is traffic: a stream in bf16 halves it, kernels of our own read each number
  once (QK-norm, rotation and values in one pass, ReLU^2 within the products), and attention knows one span of
  keys a query, which is all that documents and windows ask. What this saved pays for two more layers.
- The card works at its limit of power, so that fewer bits save time twice: two of the four products of a
  perceptron's backward pass are FP8.
- A network that sees each token once remembers and copies worse than a lookup. At the end the text that it
  was trained on is counted, and a small gate mixes these counts, and what the document has shown so far, in.
  Tokens that the counts, the document or the network name are looked at one by one.

What each part bought is told in LOG.md and docs/results.md.

FineWeb, an estimate and no result: on the stand-in track this recipe ends one pass of 143M tokens at 3.4954
with its blend (four seeds), as good as the target of 3.50 there. A peer needs 1.6 times as many tokens for
3.3821 on FineWeb as for 3.50 here (210M and 130M). That makes 230M tokens, three of the fifty shards,

    sabrage train fast --set plan.steps=2340 --set plan.lr.warmdown=1404 \
      --set plan.tokens_per_step.starts=[0,1170] --set data.path=data/fineweb

in about 6 minutes of training on an H200 at the 630k tokens/s that were measured. With `fast-24gb`, which
took 239.5 steps of the baseline for 143M tokens on an H200 (3.4942), and by the baseline's 4.1 s a step on a
4090, it is 26 minutes there and twice that on a 3090. FineWeb has more text than that, and to count is cheap:
a network of 25.8M tokens gained 0.05 with every factor e of text that was counted beside what it was trained
on. With blend.unseen_tokens=700000000, as much as 80 GB hold for a moment, and half of that gain, 0.03, the
tokens to train on fall by a tenth.
"""

from dataclasses import replace

from sabrage.attention.multi_head import MultiHead
from sabrage.attention.rotary import Rotary
from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.feedforward.fused_mlp import FusedMlp
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

NEAR = MultiHead(heads=6, qk_norm=True, zero_init=True, window=512, rotary_backend="auto")
# As long as a row in training, so that the longer rows of validation hold no distance that is new. Half of a
# key does not turn and is that of the token before: what followed this token earlier takes one layer to find.
FAR = replace(NEAR, window=2048, rotary=Rotary(share=0.5), key_offset=True)
MUON = Muon(lr=0.0125, normuon=True, cautious=True, weight_decay=0.2, orthogonalise="polar_express")
HEAD = FusedHead(
    tied=False,
    zero_init=True,
    softcap=15.0,
    fp8=True,
    columns=20_480,
    sample_tokens=16_384,
    proposal="counts",
)

fast = replace(
    base,
    name="fast",
    summary="the fastest recipe on one H100-class card: 143M tokens",
    data=replace(base.data, order="documents", block_tokens=65_536),
    model=replace(
        base.model,
        layers=13,
        embedding=BigramHash(inner=TokenTable(normalise=True)),
        mixers=(NEAR, NEAR, NEAR, NEAR, FAR),
        feedforwards=(FusedMlp(zero_init=True, fp8_gradients=True),),
        wiring=ValueEmbeddings(
            inner=Skipping(residual=Residual(), skips=(SkipScales(), LayerSkips())), gates=6
        ),
        head=HEAD,
        narrow_stream=True,
    ),
    optim=(
        OptimizerGroup(pattern=MATRICES, optimizer=MUON),
        # A row of these learns only where its token or pair occurs, so that its gradients are tiny and rare.
        OptimizerGroup(
            pattern=r"wiring\.tables",
            optimizer=AdamW(lr=0.3, betas=(0.75, 0.95), eps=1e-12, weight_decay=0.0, every=2),
        ),
        # One occurrence moves a row by about five times the rate, and most pairs are rare.
        OptimizerGroup(
            pattern=r"pairs|triples",
            optimizer=AdamW(lr=0.03, betas=(0.75, 0.95), eps=1e-12, weight_decay=0.0, every=2),
        ),
        OptimizerGroup(
            pattern=r"wiring\.", optimizer=AdamW(lr=0.005, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0)
        ),
        OptimizerGroup(
            pattern=".*", optimizer=AdamW(lr=0.0055, betas=(0.5, 0.95), eps=1e-10, weight_decay=0.0)
        ),
    ),
    plan=Plan(
        steps=1452,
        lr=Trapezoid(warmup=40, warmdown=871, floor=0.03),
        tokens_per_step=Stages(values=(65_536, 131_072), starts=(0, 726)),
        sequence_length=2048,
        momentum=Ramp(first=0.85, last=0.95, rise=280, fall=70),
    ),
    budget=Budget(evaluate_every=240, evaluation_length=8192, evaluation_documents=True),
    blend=Blend(candidates=Candidates(most=72), steps=1000),
)

# Half the pairs and 16 rows at a time: weights, gradients and moments of the tables leave room for no more in
# 22 GB, and with 8 rows a fast card waits for the host. Nothing in it needs FP8 or Hopper. It leaves out the
# U-net's skips, which bring nothing, and candidates are also looked up after contexts with gaps.
fast_24gb = replace(
    fast,
    name="fast-24gb",
    summary="fast for 24 GB cards such as the RTX 3090 and 4090",
    model=replace(
        fast.model,
        embedding=BigramHash(inner=TokenTable(normalise=True), rows=131_072),
        feedforwards=(FusedMlp(zero_init=True),),
        wiring=ValueEmbeddings(inner=Skipping(residual=Residual(), skips=(SkipScales(),)), gates=6),
        head=replace(HEAD, fp8=False),
    ),
    runtime=replace(fast.runtime, micro_batch=16),
    blend=Blend(candidates=Candidates(gaps=((3, 2), (3, 1), (4, 2, 1)), hidden=128, layers=2), steps=1000),
)

# Muon, QK-norm, ReLU^2 and outputs that start at zero are the base's.
fast_min = replace(
    base,
    name="fast-min",
    summary="five simple tricks: base, embedding skips, documents, windows, small batches early",
    data=fast.data,
    model=replace(
        base.model,
        embedding=TokenTable(normalise=True),
        mixers=(MultiHead(heads=12, qk_norm=True, zero_init=True, window=512),),
        wiring=Skipping(residual=Residual(mixer_scale="depth"), skips=(SkipScales(),)),
        head=FusedHead(tied=False, zero_init=True),
    ),
    optim=(
        base.optim[0],
        OptimizerGroup(pattern=r"wiring\.", optimizer=AdamW(lr=0.005, weight_decay=0.0)),
        base.optim[1],
    ),
    plan=replace(fast.plan, lr=Trapezoid(warmup=40, warmdown=864), momentum=None),
    budget=fast.budget,
)
