"""The recipes, by name: the only room that names concrete parts."""

import re
from collections.abc import Iterable

from sabrage.config import ConfigError, nearest, override
from sabrage.recipe import Recipe
from sabrage.recipes.architecture import architecture
from sabrage.recipes.attention import attention
from sabrage.recipes.base import base, base_adamw, muon
from sabrage.recipes.blends import blends
from sabrage.recipes.demo import demo
from sabrage.recipes.experts import experts
from sabrage.recipes.fast import fast, fast_24gb, fast_min
from sabrage.recipes.fused import fused
from sabrage.recipes.growth import growth
from sabrage.recipes.latent import latent
from sabrage.recipes.multi_token import multi_token
from sabrage.recipes.nocap import nocap, nocap_mini
from sabrage.recipes.precisions import precisions

GROUPS = (
    (nocap, nocap_mini, demo, base, base_adamw, muon),
    (fast, fast_24gb, fast_min),
    fused,
    precisions,
    attention,
    experts,
    multi_token,
    latent,
    architecture,
    growth,
    blends,
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for group in GROUPS for recipe in group}


def find(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}{nearest(name, RECIPES)}; `sabrage list` shows them all: "
            + ", ".join(RECIPES)
        )
    return RECIPES[name]


def changed(name: str, assignments: Iterable[str]) -> Recipe:
    """The recipe of that name with changes such as "model.layers=6" applied in order. Raises ConfigError."""
    recipe = find(name)
    for assignment in assignments:
        recipe = override(recipe, assignment)
    return recipe


def written(text: str) -> tuple[str, tuple[str, ...]]:
    """(name, assignments) of a recipe written RECIPE or RECIPE+a.b=c+d.e=f."""
    name, *assignments = re.split(r"\+(?=[A-Za-z_][\w.]*=)", text)
    return name, tuple(assignments)
