"""Blends on the study base: the same network, and another last validation."""

from dataclasses import replace

from sabrage.blend.blend import Blend
from sabrage.blend.candidates import Candidates
from sabrage.recipes.base import base

blends = (
    replace(base, name="blend", summary="base with counts and a cache mixed in at the end", blend=Blend()),
    replace(
        base,
        name="blend-counts",
        summary="base with counts of the training text and of the row so far mixed in at the end",
        blend=Blend(seen=False, cache=()),
    ),
    replace(
        base,
        name="blend-candidates",
        summary="blend, and likely tokens are looked at one by one to change what the network says of them",
        blend=Blend(candidates=Candidates()),
    ),
)
