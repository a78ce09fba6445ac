"""The verdict that is in before a run starts: is what the recipe describes a legal model?"""

from functools import partial

from sabrage.blend.audit import fault
from sabrage.model.legality import Check, Legality, quick
from sabrage.recipe import Recipe


def examined(recipe: Recipe) -> Legality:
    """The verdict on a small copy of the model, as training and validation use it. Raises ConfigError.

    Where the run begins with fewer layers the model has to be legal with those as well.
    """
    documents = recipe.data.separates or recipe.budget.evaluation_documents
    first, length = recipe.plan.at(0), longest_row(recipe)
    look = partial(quick, recipe.model, max_length=length, documents=documents, window=first.window)
    if first.layers is not None:
        look(layers=first.layers).require()
    return Legality((*look().checks, *blend_checks(recipe))).require()


def blend_checks(recipe: Recipe) -> tuple[Check, ...]:
    """Whether the recipe's blend, if it has one, is a probability that knows only what came before."""
    if recipe.blend is None:
        return ()
    wrong = fault(recipe.blend)
    return (Check("blend", wrong is None, wrong or "sums to one, and knows only what came before"),)


def longest_row(recipe: Recipe) -> int:
    """Tokens of the longest row that training or validation gives the model."""
    lengths = [knobs.sequence_length for knobs in recipe.plan.stages()]
    return max(*lengths, recipe.budget.evaluation_length)
