"""Torch's compiler, set up for runs: a cache that outlives them, and room for every graph of a plan."""

import os

import torch

from sabrage.data.embedded import cache_folder
from sabrage.recipe import Recipe


def use_compile_cache(wanted: bool) -> None:
    """Keeps compiled graphs between runs, in the cache folder unless torch's own variable names another."""
    if wanted:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compile"))


def allow_graphs(recipe: Recipe) -> None:
    """Lets torch keep a graph for every stage of the plan; beyond its own limit it refuses the next one."""
    wanted = len(recipe.plan.stages()) + len(recipe.evaluation_shapes())
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, wanted)
