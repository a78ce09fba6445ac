"""What a run sets up before its first step, and how one process uses it again for the next run.

In a short run most of the time goes to imports, tracing and loading compiled code. Runs that differ in rates,
schedules, seed, target and cadences alone build the very same learner and graphs, so a process that makes
several may keep them: weights and buffers are drawn anew and copied into their places, optimizers are made
anew, and nothing else of the earlier run is left.
"""

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain

import torch

from sabrage.model.legality import Legality
from sabrage.optim.groups import Optimizers
from sabrage.parts import Corpus, DataSource
from sabrage.recipe import Recipe
from sabrage.train.evaluate import Evaluator
from sabrage.train.session import Session
from sabrage.train.step import Learner, TrainStep
from sabrage.train.world import World


def blueprint(recipe: Recipe, world: World) -> Hashable:
    """Everything that learner, step and evaluator are made from: equal for runs that may share them.

    `recipe` has every "auto" decided. Left out are optimizers, the values of schedules, at which step a
    stage begins, the seed, the target and the cadences.
    """
    stages, budget = recipe.plan.stages(), recipe.budget
    shapes = dict.fromkeys(
        (knobs.tokens_per_step, knobs.sequence_length, knobs.window, knobs.layers) for knobs in stages
    )
    scored = (budget.evaluation_tokens, budget.evaluation_length, budget.evaluation_documents)
    parts = (recipe.data, recipe.model, recipe.objective, recipe.precision, recipe.runtime)
    return (*parts, *shapes, *scored, *recipe.evaluation_shapes(), world)


@dataclass
class Workshop:
    """Learner, step and evaluator; `used` says whether an earlier run of this process has used them."""

    learner: Learner
    step: TrainStep
    evaluator: Evaluator
    used: bool = False

    @torch.no_grad()
    def renew(self, fresh: Learner) -> None:
        """Puts the weights and buffers of `fresh`, a learner built alike, in the places of the own ones.

        In place, so that compiled graphs stay valid.
        """
        for parameter in self.learner.parameters():
            parameter.grad = None
        # Buffers that are not saved with the weights as well: all that a module may have written to.
        own, new = (chain(each.named_parameters(), each.named_buffers()) for each in (self.learner, fresh))
        for (name, tensor), (other, value) in zip(own, new, strict=True):
            assert name == other, (name, other)
            tensor.copy_(value)
        self.learner.train()

    def begin(self, recipe: Recipe) -> Session:
        """The state of a run before its first step, with optimizers made for the weights as they are."""
        device, masters = self.step.world.device, recipe.precision.masters()
        named = self.learner.named_parameters()
        self.step.optimizers = Optimizers(recipe.optim, named, device, masters=masters)
        return Session(self.learner, self.step.optimizers)

    def end(self) -> None:
        """Lets go of what only the last run needed: the optimizers' state is twice the weights and more."""
        self.step.optimizers = Optimizers((), (), self.step.world.device)
        self.step.parts = {}


class Shelf:
    """What one process keeps from a run for the next: the data, the verdicts on models, one workshop."""

    def __init__(self) -> None:
        self._corpus: tuple[DataSource, Corpus] | None = None
        self._workshop: tuple[Hashable, Workshop] | None = None
        self._verdicts: dict[Hashable, Legality] = {}

    def open(self, data: DataSource) -> Corpus:
        """The opened data set, that of the last run where it is the same one. Raises DataError."""
        if self._corpus is None or self._corpus[0] != data:
            self._corpus = data, data.open()
        return self._corpus[1]

    def verdict(self, key: Hashable, examine: Callable[[], Legality]) -> Legality:
        """What `examine` says of the runs with this blueprint, asked once."""
        if key not in self._verdicts:
            self._verdicts[key] = examine()
        return self._verdicts[key]

    def take(self, key: Hashable) -> Workshop | None:
        """The workshop with this blueprint, its last run ended; one with another is given up.

        On CUDA the peak of the memory is counted anew from here on.
        """
        if self._workshop is None:
            return None
        kept, workshop = self._workshop
        workshop.end()
        workshop.used = True
        if kept != key:
            del workshop
            self.clear()
            return None
        tidy()
        return workshop

    def keep(self, key: Hashable, workshop: Workshop) -> None:
        """Holds on to a workshop for the runs to come, in the place of any other."""
        self._workshop = key, workshop

    def clear(self) -> None:
        """Gives the workshop and all compiled graphs up, as if the process were a new one."""
        self._workshop = None
        # Graphs belong to code, not to the modules that they were made for, and their number has a limit.
        torch._dynamo.reset()
        tidy()


def tidy() -> None:
    """Frees what nothing refers to, on the device too, and counts the peak of its memory anew."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
