"""What a person sees of a study: a live table of its runs on a terminal, elsewhere a line for a change."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sabrage.run.folder import RunError, read_run
from sabrage.run.units import count
from sabrage.study.launch import Job

SECONDS_BETWEEN_LOOKS = 1.0


class Board:
    """Shows `jobs` while they run; call the board often, it looks at the folders once a second."""

    def __init__(self, jobs: Sequence[Job], *, console: Console | None = None) -> None:
        self.jobs = jobs
        self.console = console or Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.states = {job.folder: job.state() for job in jobs}
        self.looked = 0.0
        done = sum(state == "done" for state in self.states.values())
        self.console.print(f"{len(jobs)} runs, {done} of them done", markup=False)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.look()
        if self.live:
            self.live.stop()

    def __call__(self) -> None:
        if time.monotonic() - self.looked >= SECONDS_BETWEEN_LOOKS:
            self.look()
            self.looked = time.monotonic()

    def look(self) -> None:
        """Shows how things stand now."""
        if self.live:
            self.live.update(self.table(), refresh=True)
            return
        for job in self.jobs:
            state = job.state()
            if state != self.states[job.folder]:
                self.states[job.folder] = state
                self.console.print(f"{job.name}: {', '.join(standing(job))}", markup=False, soft_wrap=True)

    def table(self) -> Table:
        """Every run with its state, last step, loss and speed."""
        table = Table("run", "state", "step", "loss", "speed", box=None)
        for job in self.jobs:
            state, *cells = standing(job)
            colour = {"done": "green", "failed": "red", "started": "yellow"}.get(state, "dim")
            table.add_row(job.name, f"[{colour}]{state}[/{colour}]", *cells)
        return table


def standing(job: Job) -> list[str]:
    """State, last step, loss and speed of a run, as far as there are any."""
    cells: list[str] = [job.state()]
    try:
        records = read_run(job.folder).records
    except RunError:
        # Nothing has been written yet.
        return cells
    last = {name: value for record in records for name, value in record.items()}
    if "loss" in last:
        cells += [f"step {last['step']:,}", f"loss {float(last['loss']):.4f}"]
    if "tokens_per_second" in last:
        cells.append(f"{count(last['tokens_per_second'])} tokens/s")
    return cells
