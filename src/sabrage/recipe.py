"""A run as a value: `Recipe` names the data, the model, the loss, the optimizers, the plan and the budget."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch

from sabrage.blend.blend import Blend
from sabrage.config import ConfigError, Part, leaves, walk
from sabrage.losses import Objective
from sabrage.model.lm import ModelSpec, max_lengths
from sabrage.parts import DataSource, OptimizerGroup, Precision
from sabrage.plan import Plan
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Budget(Part):
    """How far to go and how often to look; cadences in steps, 0 meaning never.

    `target` (nats) ends the run at the first validation that reaches it: for exploring, not for claims,
    which fix the number of steps beforehand. `until` ends it after that step with a validation, its courses
    those of the whole plan: what a change costs on the way, for part of the price. `evaluation_tokens`
    targets are scored in rows of `evaluation_length`, through windows of at least `evaluation_window` where
    the plan has windows; with `evaluation_documents` attention stays within the documents that the inputs so
    far show, and with `by_position` the last validation is also told by the position in the row. Checkpoints
    are also written at the end and when the run is interrupted.
    """

    seed: int = 0
    target: float | None = None
    until: int | None = None
    evaluate_every: int = 128
    evaluation_tokens: int = 1_048_576
    evaluation_length: int = 1024
    evaluation_window: int | None = None
    evaluation_documents: bool = False
    by_position: bool = False
    log_every: int = 10
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def problems(self) -> list[str]:
        least = {"evaluation_tokens": 1, "evaluation_length": 1, "log_every": 1, "keep_checkpoints": 1}
        least |= {"evaluate_every": 0, "checkpoint_every": 0, "seed": 0}
        least |= {name: 1 for name in ("evaluation_window", "until") if getattr(self, name) is not None}
        return [
            f"budget.{name}={getattr(self, name)} must be at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]


@dataclass(frozen=True, kw_only=True)
class Runtime(Part):
    """How the work is laid out on the device; no setting changes what is computed, up to rounding.

    `compile` "auto" compiles on CUDA only. `micro_batch` is the rows of one forward pass, 0 deriving it
    from the device's memory; a step's rows are split into micro-batches at equal tokens per step.
    """

    compile: Literal["auto", "on", "off"] = "auto"
    micro_batch: int = 0
    memory_fraction: float = 0.85

    def resolve(self, facts: DeviceFacts) -> Self:
        if self.compile != "auto":
            return self
        return replace(self, compile="on" if facts.kind == "cuda" else "off")

    def problems(self) -> list[str]:
        found = []
        if self.micro_batch < 0:
            found.append(f"runtime.micro_batch={self.micro_batch} must be 0 (derive it) or more")
        if not 0 < self.memory_fraction <= 1:
            found.append(f"runtime.memory_fraction={self.memory_fraction} must lie in (0, 1]")
        return found


@dataclass(frozen=True, kw_only=True)
class Recipe(Part):
    """Everything that decides a run; `summary` is the one line that `sabrage list` prints."""

    name: str
    summary: str
    data: DataSource
    model: ModelSpec
    objective: Objective
    optim: tuple[OptimizerGroup, ...]
    plan: Plan
    precision: Precision
    budget: Budget = Budget()
    runtime: Runtime = Runtime()
    blend: Blend | None = None

    def problems(self) -> list[str]:
        found = [] if self.optim else ["optim is empty; name at least one group, such as pattern='.*'"]
        declared = dict(leaves(self.data)).get("vocab_size")
        if isinstance(declared, int) and declared > self.model.vocab_size:
            found.append(
                f"the data has {declared:,} token ids and the model {self.model.vocab_size:,}; use "
                f"model.vocab_size={declared} or more, or the data that the model is meant for"
            )
        found += self.unfit_objective()
        found += self.blend.unfit_vocabulary(self.model.vocab_size) if self.blend else []
        lengths = {"budget.evaluation_length": self.budget.evaluation_length}
        if not self.plan.problems() and not self.data.problems():
            found += self.misfits() + self.unfit_layers()
            longest = max(knobs.sequence_length for knobs in self.plan.stages())
            lengths |= {"plan.sequence_length": longest}
        limits = self.model.max_lengths() | max_lengths(self.objective, "objective")
        return found + [
            f"{name}={length} is more than {path}={limit}; use {path}={length} or more"
            for path, limit in limits.items()
            for name, length in lengths.items()
            if length > limit
        ]

    def unfit_objective(self) -> list[str]:
        """Sentences about an objective that the plan or the model does not go with."""
        given, taken = len(self.plan.loss_weights), self.objective.num_weights()
        found = []
        if given != taken:
            kind = type(self.objective).__name__
            found.append(
                f"plan.loss_weights has {given} and {kind} takes {taken}; give one schedule for each"
            )
        if self.model.dim < 1 or any(part.problems() for _, part in walk(self.objective)):
            return found
        try:
            with torch.device("meta"):
                self.objective.build(dim=self.model.dim, vocab_size=self.model.vocab_size)
        except ValueError as error:
            found.append(f"objective: {error}")
        return found

    def misfits(self) -> list[str]:
        """Sentences about stages of the plan that the data's blocks cannot be cut into."""
        found, block = [], self.data.block_tokens
        for knobs in self.plan.stages():
            tokens, length = knobs.tokens_per_step, knobs.sequence_length
            if tokens % block:
                more = -(-tokens // block) * block
                found.append(
                    f"at step {knobs.step}: plan.tokens_per_step={tokens} is not whole blocks of "
                    f"data.block_tokens={block}; use {more}, or data.block_tokens={length}"
                )
            if block % length:
                found.append(
                    f"at step {knobs.step}: data.block_tokens={block} is not whole rows of "
                    f"plan.sequence_length={length}; use data.block_tokens={-(-block // length) * length}"
                )
        return found

    def unfit_layers(self) -> list[str]:
        """Sentences about active layers that the model does not have, or that are not all in the end."""
        has, stages = self.model.layers, [(knobs.step, knobs.layers) for knobs in self.plan.stages()]
        found = [
            f"at step {step}: plan.layers is {active} and model.layers={has}; allowed: 1 to {has}"
            for step, active in stages
            if active is not None and active > has
        ]
        _, last = stages[-1]
        if last is not None and last < has:
            found.append(
                f"plan.layers is {last} at the last of plan.steps={self.plan.steps}, and the model is used "
                f"with all model.layers={has}; let the plan reach {has}, or use plan.layers=null"
            )
        return found

    def narrow(self, facts: Any) -> Any:
        documents = self.data.separates
        return replace(facts, products=self.precision.peak(), dim=self.model.dim, documents=documents)

    def scaled(self, steps: int) -> Self:
        """The same course in `steps` steps, as `Plan.scaled`; the groups' own schedules come along."""
        factor = steps / self.plan.steps
        optim = tuple(replace(g, lr=g.lr.scaled(factor)) if g.lr else g for g in self.optim)
        return replace(self, plan=self.plan.scaled(steps), optim=optim)

    def last_step(self) -> int:
        """After which step a run ends: the plan's last, or the budget's where that is an earlier one."""
        return min(self.plan.steps, self.budget.until or self.plan.steps)

    def evaluation_window(self, step: int) -> int | None:
        """The window of a validation after `step` steps: that of the last step, or budget's if larger."""
        window = self.plan.at(max(step - 1, 0)).window
        return None if window is None else max(window, self.budget.evaluation_window or 0)

    def evaluation_shape(self, step: int) -> tuple[int | None, int | None]:
        """The window and the active layers of a validation after `step` steps, those of the last step.

        Idle layers that add nothing yet are computed with the others, so that one graph serves the whole run.
        """
        layers = None if self.model.starts_silent() else self.plan.at(max(step - 1, 0)).layers
        return self.evaluation_window(step), layers

    def evaluation_shapes(self) -> list[tuple[int | None, int | None]]:
        """Those of all validations of the run, each once."""
        every, steps = self.budget.evaluate_every, self.last_step()
        ends = [*range(every, steps, every), steps] if every else [steps]
        return list(dict.fromkeys(map(self.evaluation_shape, ends)))

    def validate(self, facts: DeviceFacts | None = None) -> Self:
        """The recipe itself when nothing is wrong; ConfigError naming ALL problems otherwise."""
        found = [
            problem if problem.startswith(path) else f"{path}: {problem}"
            for path, part in walk(self)
            for problem in part.problems()
        ]
        if facts:
            found += self.refusals(facts)
        if found:
            lines = "\n".join(f"  - {problem}" for problem in found)
            raise ConfigError(f"recipe {self.name!r} cannot run:\n{lines}")
        return self

    def refusals(self, facts: DeviceFacts) -> list[str]:
        """Sentences about what this device cannot do."""
        told = [part.refusal(self.narrow(facts)) for _, part in walk(self)]
        return [sentence for sentence in dict.fromkeys(told) if sentence]
