"""What a course in time offers: a number for every step of a run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

from sabrage.config import Part


@dataclass(frozen=True, kw_only=True)
class Schedule(Part, ABC):
    """A number as a function of the step, most often a multiplier."""

    @abstractmethod
    def at(self, step: int, steps: int) -> float:
        """The value at `step`, counted from 0, of a run of `steps`."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The same course for a run `factor` times as long: step numbers move, values stay."""
