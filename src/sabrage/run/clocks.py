"""The three clocks of a run, kept apart so that no claim can borrow seconds from another.

`train_seconds` counts training steps only; `nocap_seconds` counts from just before step 0, compile included,
validation and checkpoints left out (the NoCap benchmark's rule); `wall_seconds` counts everything since the
process started. The caller synchronises the device wherever a phase begins or ends.

In a process that makes several runs, one after another, only the first of the three can be told: what the
later runs find ready was paid for by the first. The same holds for a run that waits for its turn on a device.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Phase = Literal["train", "validation", "checkpoint", "warm-up", "other"]
PHASES: tuple[Phase, ...] = ("train", "validation", "checkpoint", "warm-up", "other")
OUTSIDE_NOCAP: tuple[Phase, ...] = ("validation", "checkpoint")

# Where the system does not tell when the process started, this is the earliest moment known.
IMPORTED = time.perf_counter()


def process_age() -> float:
    """Seconds since this process started, or since this module was imported where nobody says."""
    since_import = time.perf_counter() - IMPORTED
    try:
        # The command name, field 2, may hold spaces; the start, field 22, is in ticks since boot.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return since_import
    # A sandbox that does not keep the start reports 0, which would count its whole uptime.
    return max(age, since_import) if started > 0 else since_import


class Clocks:
    """Times the phases of a run. `now` is a monotonic clock in seconds, `age` the process's age at the start.

    Phases do not nest. Readings are right at any moment, also within a phase. `inline` says that the process
    makes several runs or waits for others; a run keeps that mark when another process goes on with it.
    """

    def __init__(
        self,
        *,
        now: Callable[[], float] = time.perf_counter,
        age: float | None = None,
        inline: bool = False,
    ) -> None:
        self._now, self.inline = now, inline
        self._started = now() - max(0.0, process_age() if age is None else age)
        self._totals: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._earlier = {"nocap": 0.0, "wall": 0.0}
        self._open: tuple[Phase, float] | None = None
        self._nocap: tuple[float, float] | None = None
        # Seconds of each stage of the start-up, in order.
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Ends a stage of the start-up, which lasted since the one before, or since the process started."""
        self.laps[name] = self._now() - self._started - sum(self.laps.values())

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Counts the time within the `with` block to one phase."""
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def start(self, name: Phase) -> None:
        assert self._open is None, f"phase {name!r} inside phase {self._open}"
        assert name in PHASES, f"phase {name!r} is none of {PHASES}"
        self._open = (name, self._now())

    def stop(self) -> None:
        assert self._open is not None, "no phase is open"
        name, since = self._open
        self._totals[name] += self._now() - since
        self._open = None

    def start_nocap(self) -> None:
        """Starts the benchmark's clock: call it once, just before step 0, when the model is built."""
        assert self._nocap is None, "the benchmark's clock runs already"
        self._nocap = (self._now(), self._outside())

    def seconds(self, name: Phase) -> float:
        """The time spent in one phase so far."""
        running = self._now() - self._open[1] if self._open and self._open[0] == name else 0.0
        return self._totals[name] + running

    def _outside(self) -> float:
        return sum(self.seconds(name) for name in OUTSIDE_NOCAP)

    @property
    def train_seconds(self) -> float:
        """Training steps only."""
        return self.seconds("train")

    @property
    def nocap_seconds(self) -> float:
        """Since just before step 0, without validation and checkpoints; 0 before `start_nocap`."""
        if self._nocap is None:
            return self._earlier["nocap"]
        since, outside = self._nocap
        return self._earlier["nocap"] + (self._now() - since) - (self._outside() - outside)

    @property
    def wall_seconds(self) -> float:
        """Since the start of the process, everything counted."""
        return self._earlier["wall"] + self._now() - self._started

    def readings(self) -> dict[str, float | None]:
        """The three clocks by name; inline the last two are None."""
        rest = ("nocap_seconds", "wall_seconds")
        told = {name: None if self.inline else getattr(self, name) for name in rest}
        return {"train_seconds": self.train_seconds, **told}

    def state(self) -> dict[str, float]:
        """Plain values from which `restore` goes on in another process."""
        phases: dict[str, float] = {name: self.seconds(name) for name in PHASES}
        return {**phases, "nocap": self.nocap_seconds, "wall": self.wall_seconds, "inline": self.inline}

    def restore(self, state: dict[str, float]) -> None:
        """Adds what an earlier process had counted; what it did after saving `state` is not counted."""
        # Checkpoints of earlier versions do not say it.
        self.inline = self.inline or bool(state.get("inline"))
        for name in PHASES:
            self._totals[name] += state[name]
        self._earlier = {name: self._earlier[name] + state[name] for name in self._earlier}
        if self._nocap is not None:
            since, outside = self._nocap
            self._nocap = (since, outside + sum(state[name] for name in OUTSIDE_NOCAP))
