"""Architecture parts on the study base, one a recipe: embeddings, heads and skips.

Scalars and gates get AdamW with a rate of their own and no decay, which would pull a scale of 1 to 0. A table
of pairs or of values moves only where its tokens occur, so it gets a higher rate and no decay either.
"""

from dataclasses import replace

from sabrage.model.ends import LinearHead, Rescale, TokenTable
from sabrage.model.previous import BigramHash, Smear, TrigramHash
from sabrage.optim.adamw import AdamW
from sabrage.optim.tied_adamw import TiedAdamW
from sabrage.parts import OptimizerGroup
from sabrage.recipes.base import base, variant
from sabrage.wiring.dense_skips import DenseSkips
from sabrage.wiring.layer_skips import LayerSkips
from sabrage.wiring.pair_skips import PairSkips
from sabrage.wiring.residual import Residual
from sabrage.wiring.skip_scales import SkipScales
from sabrage.wiring.skips import Skip, Skipping
from sabrage.wiring.value_embeddings import ValueEmbeddings

UNTIED = LinearHead(tied=False, zero_init=True)
NORMALISED = TokenTable(normalise=True)
RESCALED = LinearHead(tied=False, zero_init=True, rescale=Rescale())
SCALARS = OptimizerGroup(
    pattern=r"embedding\.(inner\.)*(scale|gate)|wiring\.", optimizer=AdamW(lr=0.005, weight_decay=0.0)
)
PAIRS = OptimizerGroup(pattern=r"pairs|triples", optimizer=AdamW(lr=0.02, weight_decay=0.0))


def _skips(*skips: Skip) -> Skipping:
    return Skipping(residual=Residual(mixer_scale="depth"), skips=skips)


tied_then_untied = replace(
    variant(
        "tied-then-untied",
        "base whose head leaves the table at two thirds of the run",
        head=LinearHead(tied=False, copied=True),
    ),
    optim=(
        base.optim[0],
        OptimizerGroup(pattern=".*", optimizer=TiedAdamW(until=240, adamw=AdamW(lr=0.0018))),
    ),
)

VALUES = OptimizerGroup(pattern=r"wiring\.tables", optimizer=AdamW(lr=0.02, weight_decay=0.0))

architecture = (
    variant(
        "value-embeddings",
        "base with three gated value tables, each for a layer at either end",
        VALUES,
        SCALARS,
        wiring=ValueEmbeddings(inner=Residual(mixer_scale="depth")),
    ),
    variant(
        "value-pairs",
        "value-embeddings with hashed pairs of tokens, at the input and in the values of two layers",
        PAIRS,
        VALUES,
        SCALARS,
        embedding=BigramHash(),
        wiring=ValueEmbeddings(inner=Residual(mixer_scale="depth"), pairs=262_144),
    ),
    variant("norm-embedding", "base with token vectors normalised", embedding=NORMALISED),
    variant("untied", "base with a head of its own, from zero", head=UNTIED),
    variant(
        "ends",
        "base with both: normalised token vectors and an untied head",
        embedding=NORMALISED,
        head=UNTIED,
    ),
    tied_then_untied,
    variant("softcap", "base with logits capped at 15", head=LinearHead(softcap=15.0)),
    variant(
        "logit-rescale", "ends with logits of 23 sigmoid((x + 5) / 7.5)", embedding=NORMALISED, head=RESCALED
    ),
    variant("smear", "base with a gated share of the token before", SCALARS, embedding=Smear()),
    variant("bigram", "base with a hashed table of token pairs", PAIRS, embedding=BigramHash()),
    variant(
        "bigram-layers",
        "base with a hashed table of token pairs that every layer reads",
        PAIRS,
        SCALARS,
        embedding=BigramHash(),
        wiring=_skips(PairSkips()),
    ),
    variant(
        "trigram",
        "base with hashed tables of token pairs and triples",
        PAIRS,
        embedding=TrigramHash(inner=BigramHash()),
    ),
    variant(
        "skip-scales",
        "base with learned residual and embedding-skip scales",
        SCALARS,
        wiring=_skips(SkipScales()),
    ),
    variant("unet", "base with U-net skips", SCALARS, wiring=_skips(LayerSkips())),
    variant(
        "dense-skips",
        "base with learned sums of all states after every fourth layer",
        SCALARS,
        wiring=_skips(DenseSkips(period=4)),
    ),
    variant(
        "dynamic-dense",
        "the same with weights that depend on the token",
        SCALARS,
        wiring=_skips(DenseSkips(dynamic=True, period=4)),
    ),
)
