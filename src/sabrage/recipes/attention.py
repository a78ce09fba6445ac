"""Variants of multi-head attention, each one change to the study base."""

from dataclasses import replace
from typing import Any

from sabrage.attention.scores import Alibi, RelativeBias, SoftCap
from sabrage.recipe import Recipe
from sabrage.recipes.base import base, variant


def _variant(name: str, summary: str, **changes: Any) -> Recipe:
    return variant(name, summary, mixers=(replace(base.model.mixers[0], **changes),))


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
)
