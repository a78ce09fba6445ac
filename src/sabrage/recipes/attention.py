"""Variants of multi-head attention, each one change to the study base.

Gates get AdamW with a rate of their own and no decay. `key-offset` is one change to `partial-rotary`, and is
to be read beside it.
"""

from dataclasses import replace
from typing import Any

from sabrage.attention.copying import Copying
from sabrage.attention.none import NoMixer
from sabrage.attention.rotary import Rotary
from sabrage.attention.scores import Alibi, RelativeBias, SoftCap
from sabrage.optim.adamw import AdamW
from sabrage.parts import OptimizerGroup
from sabrage.recipe import Recipe
from sabrage.recipes.base import base, variant

GATES = OptimizerGroup(pattern=r"mixer\.gate", optimizer=AdamW(lr=0.005, weight_decay=0.0))
HALF = Rotary(share=0.5)


def _variant(name: str, summary: str, *groups: OptimizerGroup, **changes: Any) -> Recipe:
    return variant(name, summary, *groups, mixers=(replace(base.model.mixers[0], **changes),))


attention = (
    _variant("gqa", "base with 4 key/value heads for its 12 query heads", kv_heads=4),
    _variant("mqa", "base with one key/value head", kv_heads=1),
    _variant("window", "base where each layer sees the last 256 tokens", window=256),
    _variant("alibi", "base with ALiBi in place of rotary positions", rotary=None, scores=(Alibi(),)),
    _variant("alibi-rope", "base with ALiBi beside rotary positions", scores=(Alibi(),)),
    _variant(
        "relbias",
        "base with a learned bias by distance in place of rotary positions",
        rotary=None,
        scores=(RelativeBias(),),
    ),
    _variant("softcap-attention", "base with attention scores capped at 50", scores=(SoftCap(),)),
    _variant("attention-gate", "base with a gate on the output of each head", GATES, gate=True),
    _variant(
        "exclusive-self",
        "base with the token's own value taken out of what it attends to",
        exclusive_self=True,
    ),
    _variant("attention-scale", "base with attention scores a good third sharper", scale=0.17),
    _variant("paired-heads", "base with heads that see each other's keys, two by two", paired=True),
    _variant("partial-rotary", "base with positions in the faster half of each head", rotary=HALF),
    _variant(
        "key-offset",
        "partial-rotary with the other half of each key from the token before",
        rotary=HALF,
        key_offset=True,
    ),
    variant(
        "fewer-mixers",
        "base without attention in every fourth layer",
        mixers=(*base.model.mixers * 3, NoMixer()),
    ),
    variant(
        "copying",
        "base with attention after the last layer whose values are the head's rows",
        OptimizerGroup(pattern=r"last\.(query|key)", optimizer=base.optim[0].optimizer),
        OptimizerGroup(pattern=r"last\.", optimizer=AdamW(lr=0.005, weight_decay=0.0)),
        last=Copying(head_width=64),
    ),
)
