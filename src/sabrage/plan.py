"""Everything that varies in time, as functions of the step: `Plan.at(step) -> Knobs`.

Floats reach compiled code as tensors and optimizer hyperparameters. Sequence lengths, batch sizes, windows
and active layers are built into compiled code, so they come in few stages, which the warm-up can list and
compile beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

from sabrage.config import Part
from sabrage.parts import Knobs
from sabrage.schedule import Schedule

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same value throughout."""

    value: float = 1.0

    def at(self, step: int, steps: int) -> float:
        return self.value

    def scaled(self, factor: float) -> Self:
        return self


@dataclass(frozen=True, kw_only=True)
class Anneal(Schedule):
    """`first` up to step `begin`, then linearly to `last`, which holds from step `end` on."""

    first: float
    last: float = 0.0
    begin: int = 0
    end: int

    def problems(self) -> list[str]:
        if not 0 <= self.begin <= self.end:
            return [f"{self}: begin must be at least 0 and end at least begin"]
        return []

    def at(self, step: int, steps: int) -> float:
        if step >= self.end:
            return self.last
        share = max(step - self.begin, 0) / (self.end - self.begin)
        return self.first + (self.last - self.first) * share

    def scaled(self, factor: float) -> Self:
        return replace(self, begin=round(self.begin * factor), end=round(self.end * factor))


@dataclass(frozen=True, kw_only=True)
class Trapezoid(Schedule):
    """Linear warm-up over `warmup` steps, constant, linear warm-down over the last `warmdown` steps.

    Step i counts from 0: (i + 1) / warmup, then 1, then (steps - i) / warmdown, never below `floor`.
    """

    warmup: int
    warmdown: int
    floor: float = 0.0

    def problems(self) -> list[str]:
        if min(self.warmup, self.warmdown) < 0 or not 0 <= self.floor <= 1:
            return [f"{self}: warmup and warmdown must be at least 0, and floor lie in 0 to 1"]
        return []

    def at(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step >= steps - self.warmdown:
            return max((steps - step) / self.warmdown, self.floor)
        return 1.0

    def scaled(self, factor: float) -> Self:
        # A ramp that is there stays there, if only for one step.
        warmup, warmdown = (max(round(n * factor), min(n, 1)) for n in (self.warmup, self.warmdown))
        return replace(self, warmup=warmup, warmdown=warmdown)


@dataclass(frozen=True, kw_only=True)
class Staged(Schedule):
    """Another schedule times a factor that changes at given steps: `factors[i]` from step `starts[i]` on.

    A batch that grows in stages allows a higher rate in the later ones; modded-nanogpt's are 1, 1.52 and 1.73
    for batches of 1, 2 and 3 units.
    """

    inner: Schedule
    factors: tuple[float, ...]
    starts: tuple[int, ...] = (0,)

    def problems(self) -> list[str]:
        if len(self.factors) != len(self.starts) or self.starts[:1] != (0,):
            return [f"{self}: needs as many starts as factors, the first one 0"]
        if list(self.starts) != sorted(self.starts) or min(self.factors) < 0:
            return [f"{self}: starts must not fall and factors be at least 0"]
        return []

    def at(self, step: int, steps: int) -> float:
        return holding(self.factors, self.starts, step) * self.inner.at(step, steps)

    def scaled(self, factor: float) -> Self:
        starts = tuple(round(start * factor) for start in self.starts)
        return replace(self, inner=self.inner.scaled(factor), starts=starts)


@dataclass(frozen=True, kw_only=True)
class Ramp(Schedule):
    """From `first` to `last` over `rise` steps, on a straight line, and back over the last `fall` steps."""

    first: float
    last: float
    rise: int
    fall: int = 0

    def problems(self) -> list[str]:
        if min(self.rise, self.fall) < 0:
            return [f"{self}: rise and fall must be at least 0"]
        return []

    def at(self, step: int, steps: int) -> float:
        risen = min(step / self.rise, 1.0) if self.rise else 1.0
        left = min((steps - 1 - step) / self.fall, 1.0) if self.fall else 1.0
        return self.first + min(risen, left) * (self.last - self.first)

    def scaled(self, factor: float) -> Self:
        rise, fall = (max(round(n * factor), min(n, 1)) for n in (self.rise, self.fall))
        return replace(self, rise=rise, fall=fall)


@dataclass(frozen=True, kw_only=True)
class Stages(Part):
    """A whole number that changes at given steps: `values[i]` holds from step `starts[i]` on."""

    values: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    def problems(self) -> list[str]:
        if len(self.values) != len(self.starts) or self.starts[:1] != (0,):
            return [
                f"stages {self.values} from {self.starts}: need as many starts as values, the first one 0"
            ]
        if list(self.starts) != sorted(set(self.starts)) or min(self.values) < 1:
            return [f"stages {self.values} from {self.starts}: starts must rise and values be at least 1"]
        return []

    def at(self, step: int) -> int:
        """The value that holds at `step`."""
        return holding(self.values, self.starts, step)

    def scaled(self, factor: float) -> Self:
        """The same stages for a run `factor` times as long; one that vanishes gives way to the next."""
        stages = dict(zip((round(start * factor) for start in self.starts), self.values, strict=True))
        return replace(self, starts=tuple(stages), values=tuple(stages.values()))


@dataclass(frozen=True, kw_only=True)
class Plan(Part):
    """The course of a run; `tokens_per_step`, `sequence_length` and `window` are in tokens.

    `window` is how many tokens a windowed layer sees and `layers` how many layers are active, as
    `sabrage.model.depth` chooses them; None means all. `momentum` is a value, not a multiplier: it overrides
    that of the optimizers that have one; None leaves them their own.
    `loss_weights` are the objective's, as many as it takes.
    """

    steps: int
    lr: Schedule
    tokens_per_step: int | Stages
    sequence_length: int | Stages
    weight_decay: Schedule = Constant()
    loss_weights: tuple[Schedule, ...] = ()
    momentum: Schedule | None = None
    window: int | Stages | None = None
    layers: Stages | None = None

    def problems(self) -> list[str]:
        found = []
        if self.steps < 1:
            found.append(f"plan.steps={self.steps} must be at least 1")
        shapes = self.shapes()
        if any(value.problems() for value in shapes if isinstance(value, Stages)):
            # The stages say so themselves; until they are mended there is nothing to ask them.
            return found
        for knobs in self.stages():
            tokens, length = knobs.tokens_per_step, knobs.sequence_length
            if length < 1:
                found.append(f"at step {knobs.step}: plan.sequence_length={length} must be at least 1")
            elif tokens < 1 or tokens % length:
                found.append(
                    f"at step {knobs.step}: plan.tokens_per_step={tokens} is not a whole number of rows of "
                    f"plan.sequence_length={length}; use {max(-(-tokens // length), 1) * length}"
                )
        if isinstance(self.window, int) and self.window < 1:
            found.append(f"plan.window={self.window} must be at least 1, or null for all tokens")
        return found + self.unstable()

    def unstable(self) -> list[str]:
        """A sentence about the first step at which the momentum is none."""
        for step in range(self.steps if self.momentum and not self.momentum.problems() else 0):
            value = self.at(step).momentum
            if value is not None and not 0 <= value < 1:
                return [f"at step {step}: plan.momentum is {value}, allowed: from 0 to below 1"]
        return []

    def shapes(self) -> tuple[int | Stages | None, ...]:
        """What is built into compiled code."""
        return self.tokens_per_step, self.sequence_length, self.window, self.layers

    def at(self, step: int) -> Knobs:
        """All knobs at `step` (from 0)."""
        return Knobs(
            step=step,
            steps=self.steps,
            lr=self.lr.at(step, self.steps),
            weight_decay=self.weight_decay.at(step, self.steps),
            momentum=None if self.momentum is None else self.momentum.at(step, self.steps),
            sequence_length=staged(self.sequence_length, step),
            tokens_per_step=staged(self.tokens_per_step, step),
            loss_weights=tuple(weight.at(step, self.steps) for weight in self.loss_weights),
            window=None if self.window is None else staged(self.window, step),
            layers=None if self.layers is None else self.layers.at(step),
        )

    def stages(self) -> list[Knobs]:
        """The knobs at the first step of every stretch of constant shapes."""
        starts = {0}
        for value in self.shapes():
            if isinstance(value, Stages):
                starts.update(start for start in value.starts if start < self.steps)
        return [self.at(step) for step in sorted(starts)]

    def scaled(self, steps: int) -> Self:
        """The same course in `steps` steps: warm-ups, warm-downs and stages keep their share of the run."""
        factor = steps / self.steps
        moved = {field.name: _scaled(getattr(self, field.name), factor) for field in fields(self)}
        return replace(self, **{**moved, "steps": steps})

    def tokens(self, steps: int | None = None) -> int:
        """Training tokens of the first `steps` steps, by default of all."""
        starts = [knobs.step for knobs in self.stages()]
        last = self.steps if steps is None else steps
        return sum(
            max(min(end, last) - start, 0) * staged(self.tokens_per_step, start)
            for start, end in zip(starts, [*starts[1:], self.steps], strict=True)
        )


def holding(values: Sequence[Number], starts: Sequence[int], step: int) -> Number:
    """The value at `step` of those that each hold from a start of their own on, starts rising from 0."""
    return [value for value, start in zip(values, starts, strict=True) if start <= step][-1]


def staged(value: int | Stages, step: int) -> int:
    """The value at `step` of a number that may come in stages."""
    return value.at(step) if isinstance(value, Stages) else value


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(item, factor) for item in value)
    return value.scaled(factor) if isinstance(value, Schedule | Stages) else value
