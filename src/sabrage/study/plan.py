"""What a study runs: variants of recipes, seeds, and how long; plain values, so that a study can be resumed.

A variant is a recipe's name and the assignments that change it, the very words that `sabrage train` takes,
so every run of a study can be repeated by hand.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import nn

from sabrage.config import ConfigError, Part, override
from sabrage.model.lm import LM
from sabrage.optim.groups import assign, matches
from sabrage.recipe import Recipe
from sabrage.recipes import changed, written
from sabrage.study.changes import Change, assignment, by_owner, changes, tricks
from sabrage.train.step import Learner


class StudyError(ValueError):
    """A study that cannot be made or read: says what was got and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Variant(Part):
    """A recipe by name with assignments in order, such as ("model.layers=6",); `name` is for tables."""

    name: str
    recipe: str
    sets: tuple[str, ...] = ()

    def make(self) -> Recipe:
        """The recipe itself. Raises ConfigError for what is unknown or cannot run."""
        return changed(self.recipe, self.sets).validate()

    def become(self, wanted: Recipe) -> Self:
        """This variant with the assignments added that make it `wanted`."""
        more = tuple(assignment(change) for change in changes(self.make(), wanted))
        return replace(self, sets=(*self.sets, *more))

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.+=,@-]+", "-", self.name).strip("-")


@dataclass(frozen=True, kw_only=True)
class StudyPlan(Part):
    """Variants, the first being the reference, times seeds.

    At most one of `steps`, `tokens` and `minutes` (of training) sets the length of every run, its schedules
    keeping their shape; without any, each recipe says its own. `target` (nats) only asks when it was met.
    """

    kind: Literal["compare", "ablate", "sweep", "screen"]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    target: float | None = None

    def check(self) -> Self:
        """The plan itself when it can be run. Raises StudyError or ConfigError."""
        lengths = {name: getattr(self, name) for name in ("steps", "tokens", "minutes")}
        given = {name: value for name, value in lengths.items() if value is not None}
        if len(given) > 1 or any(value <= 0 for value in given.values()):
            raise StudyError(f"got {given}; give one of steps, tokens and minutes, above 0")
        if not self.seeds or not self.variants:
            raise StudyError("a study needs at least one variant and one seed")
        slugs = [variant.slug for variant in self.variants]
        if len(set(slugs)) < len(slugs):
            raise StudyError(f"two variants have the same name: {', '.join(slugs)}; name each once")
        scored = {variant.name: variant.make().budget.evaluation_tokens for variant in self.variants}
        if len(set(scored.values())) > 1:
            raise StudyError(f"losses over different budget.evaluation_tokens do not compare: {scored}")
        return self


def parse_variant(text: str, common: Sequence[str] = ()) -> Variant:
    """RECIPE or RECIPE+a.b=c+d.e=f, the `common` assignments first. Raises ConfigError."""
    name, own = written(text)
    variant = Variant(name=text, recipe=name, sets=(*common, *own))
    variant.make()
    return variant


def fitted(recipe: Recipe, *, steps: int | None = None, tokens: int | None = None) -> Recipe:
    """The recipe over that many steps, or as many as take these tokens, its schedules and its evaluations
    keeping their share of the run."""
    if tokens is not None:
        steps = max(1, round(recipe.plan.steps * tokens / recipe.plan.tokens()))
    if steps is None or steps == recipe.plan.steps:
        return recipe
    every = recipe.budget.evaluate_every
    every = max(round(every * steps / recipe.plan.steps), min(every, 1))
    return replace(recipe.scaled(steps), budget=replace(recipe.budget, evaluate_every=every))


def sweep(recipe: str, over: Sequence[str], common: Sequence[str] = ()) -> tuple[Variant, ...]:
    """A variant for every combination of values; each of `over` is a.b=1,2,3. Raises StudyError."""
    axes = []
    for axis in over:
        path, separator, values = axis.partition("=")
        if not separator or not all(values.split(",")):
            raise StudyError(f"got --over {axis!r}, allowed: FIELD.FIELD=VALUE,VALUE, such as plan.steps=1,2")
        axes.append([f"{path}={value}" for value in values.split(",")])
    if not axes:
        raise StudyError("a sweep needs at least one --over FIELD.FIELD=VALUE,VALUE")
    return tuple(parse_variant("+".join([recipe, *point]), common) for point in itertools.product(*axes))


def ablation(
    recipe: str,
    base: str,
    common: Sequence[str] = (),
    *,
    alone: bool = False,
    keep: Sequence[str] = (),
    also: Sequence[str] = (),
) -> tuple[tuple[Variant, ...], dict[str, str]]:
    """Leave-one-out and add-one-in over the parts by which `recipe` differs from `base`, but for `keep`.

    With `alone` nothing is added in, and each of `tricks` is left out as well; `also` are changes of the
    recipe, a.b=c+d.e=f, such as tricks that are numbers. Returns the variants (the recipe itself, "with"
    those changes ..., "without X" ..., "only X" ..., the base) and, by name, why a variant is left out. Every
    variant trains on the recipe's tokens with its budget, and loses optimizer groups that match nothing.
    Raises StudyError for a part to keep that is none of those and ConfigError for a change that is none.
    """
    full, bare = parse_variant(recipe, common), parse_variant(base, common)
    whole, least = full.make(), bare.make()
    # At equal steps, so that schedules compare by their shape; tokens are made equal at the end.
    least = replace(least.scaled(whole.plan.steps), budget=whole.budget, runtime=whole.runtime)
    back, forth = by_owner(changes(whole, least)), by_owner(changes(least, whole))
    inner = tricks(whole, least) if alone else {}
    if len(back | inner) < 2:
        raise StudyError(
            f"{recipe!r} differs from {base!r} in {len(back)} parts and an ablation needs two or more; try: "
            f"sabrage study compare {base} {recipe}"
        )
    unknown = set(keep) - set(back | inner)
    if unknown:
        raise StudyError(f"got {', '.join(sorted(unknown))} to keep, allowed: {', '.join(back | inner)}")
    by_hand = [parse_variant(f"{recipe}+{change}", common) for change in also]
    made_already: list[Change] = []
    changing = [("with", each, each.make(), each.name, made_already) for each in by_hand]
    leaving_out = [("without", full, whole, part, group) for part, group in (back | inner).items()]
    adding_in = [] if alone else [("only", bare, least, part, group) for part, group in forth.items()]
    candidates = [each for each in (*changing, *leaving_out, *adding_in) if each[3] not in keep]
    tokens = whole.plan.tokens()
    made = {full.name: whole, bare.name: fitted(least, tokens=tokens)}
    variants, skipped = [full], {}
    for how, start, recipe_then, part, group in candidates:
        name = f"{how} {part}"
        try:
            for change in group:
                recipe_then = override(recipe_then, assignment(change))
            recipe_then = fitted(without_idle(recipe_then.validate()), tokens=tokens)
            buildable(recipe_then)
        except ConfigError as error:
            skipped[name] = str(error)
            continue
        twin = next((other for other in made if same(made[other], recipe_then)), None)
        if twin:
            skipped[name] = f"the same as {twin!r}"
        else:
            made[name] = recipe_then
            variants.append(replace(start, name=name).become(recipe_then))
    return (*variants, bare.become(made[bare.name])), skipped


def same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are alike but for their names."""
    return replace(one, name="", summary="") == replace(other, name="", summary="")


def learning_names(recipe: Recipe) -> Iterator[tuple[str, nn.Parameter]]:
    """Everything that learns, by name, built without memory or values. Raises ConfigError."""
    spec = recipe.model
    with torch.device("meta"):
        objective = recipe.objective.build(dim=spec.dim, vocab_size=spec.vocab_size)
        learner = Learner(LM(spec), objective, recipe.precision, torch.device("meta"))
    return learner.named_parameters()


def buildable(recipe: Recipe) -> None:
    """Raises ConfigError when parts do not fit, or parameters and optimizer groups."""
    assign(recipe.optim, learning_names(recipe))


def without_idle(recipe: Recipe) -> Recipe:
    """The recipe without the optimizer groups whose pattern no parameter matches."""
    names = [name for name, _ in learning_names(recipe)]
    kept = [group for group in recipe.optim if any(matches(group.pattern, name) for name in names)]
    return replace(recipe, optim=tuple(kept))
