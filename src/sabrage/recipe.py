"""A run as a value: `Recipe` names the data, the model, the loss, the optimizers, the plan and the budget."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from sabrage.config import ConfigError, Part, walk
from sabrage.model.lm import ModelSpec
from sabrage.parts import DataSource, Objective, OptimizerGroup, Precision
from sabrage.plan import Plan
from sabrage.run.device import DeviceFacts


@dataclass(frozen=True, kw_only=True)
class Budget(Part):
    """How far to go and how often to look; cadences in steps, 0 meaning never.

    `target` (nats) ends the run at the first validation that reaches it: for exploring, not for claims,
    which fix the number of steps beforehand. `evaluation_tokens` targets are scored in rows of
    `evaluation_length`. Checkpoints are also written at the end and when the run is interrupted.
    """

    seed: int = 0
    target: float | None = None
    evaluate_every: int = 128
    evaluation_tokens: int = 1_048_576
    evaluation_length: int = 1024
    log_every: int = 10
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def problems(self) -> list[str]:
        least = {"evaluation_tokens": 1, "evaluation_length": 1, "log_every": 1, "keep_checkpoints": 1}
        least |= {"evaluate_every": 0, "checkpoint_every": 0, "seed": 0}
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

    def problems(self) -> list[str]:
        return [] if self.optim else ["optim is empty; name at least one group, such as pattern='.*'"]

    def validate(self, facts: DeviceFacts | None = None) -> Self:
        """The recipe itself when nothing is wrong; ConfigError naming ALL problems otherwise."""
        found = [
            f"{path}: {problem}" if path else problem
            for path, part in walk(self)
            for problem in part.problems()
        ]
        refusal = self.precision.refusal(facts) if facts else None
        if refusal:
            found.append(refusal)
        if found:
            lines = "\n".join(f"  - {problem}" for problem in found)
            raise ConfigError(f"recipe {self.name!r} cannot run:\n{lines}")
        return self
