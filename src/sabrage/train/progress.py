"""What a person sees while a run goes on: a live bar on a terminal, a line now and then elsewhere.

Losing the display (a closed pipe, a terminal that cannot print) never costs the run: it goes quiet.
"""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from sabrage.run.units import count, duration, size

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.25


class Display(Console):
    """A console whose closed pipe is an error to its caller; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("nobody reads the output any more")


class Progress:
    """Shows a run of `total` steps. Used as a context manager; cheap enough to be called every step."""

    def __init__(
        self, total: int, *, console: Console | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self._now = now
        self._console = console or Display(highlight=False)
        self._bar = self._make_bar() if self._console.is_terminal else None
        self._pace = SECONDS_BETWEEN_FRAMES if self._bar else SECONDS_BETWEEN_LINES
        self._shown_at: float | None = None
        self._pending: tuple[int, str] | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)

    def _make_bar(self) -> Bar:
        columns = (
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
        )
        # Frames are drawn by update(), not by a thread that would compete with the training loop.
        bar = Bar(*columns, console=self._console, auto_refresh=False)
        bar.add_task("starting", total=self.total)
        return bar

    def __enter__(self) -> Self:
        bar, self._bar = self._bar, None
        if bar and self._attempt(bar.start):
            self._bar = bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending:
            self._show(*self._pending)
        if self._bar:
            self._attempt(self._bar.stop)

    def update(
        self,
        *,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
        memory: int | None = None,
    ) -> None:
        """Shows that `step` steps are done; what is None is left out. MFU is a fraction, memory bytes."""
        now = self._now()
        self._recent.append((now, step))
        parts = [f"step {step}/{self.total}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if tokens_per_second is not None:
            parts.append(f"{count(tokens_per_second)} tokens/s")
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        remaining = self._remaining()
        if remaining is not None and step < self.total:
            parts.append(f"ETA {duration(remaining)}")
        if memory is not None:
            parts.append(size(memory))
        self._pending = (step, "  ".join(parts))
        if self._shown_at is None or now - self._shown_at >= self._pace or step >= self.total:
            self._shown_at = now
            self._show(*self._pending)

    def validation(self, step: int, loss: float, network_loss: float | None = None) -> None:
        """Shows a validation loss, in nats, and that of the network alone where there is a blend."""
        alone = "" if network_loss is None else f"  (the network alone {network_loss:.4f})"
        self.message(f"step {step}/{self.total}  validation loss {loss:.4f}{alone}")

    def message(self, text: str) -> None:
        """Shows a line that stays."""
        encoding = self._console.encoding
        # Text(): square brackets in a message are no markup.
        line = Text(text.encode(encoding, "replace").decode(encoding))
        self._attempt(lambda: self._console.print(line, soft_wrap=True))

    def _remaining(self) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._recent[0], self._recent[-1]
        if last_step <= first_step:
            return None
        return (self.total - last_step) * (last_time - first_time) / (last_step - first_step)

    def _show(self, step: int, line: str) -> None:
        self._pending = None
        if self._bar is None:
            self.message(line)
            return
        bar = self._bar
        bar.update(bar.task_ids[0], completed=step, description=line)
        self._attempt(bar.refresh)

    def _attempt(self, draw: Callable[[], None]) -> bool:
        try:
            draw()
        except (OSError, ValueError):
            # A closed pipe or file. Once quiet, the bar can be taken down, which frees standard output.
            self._console.quiet = True
            bar, self._bar = self._bar, None
            if bar:
                bar.stop()
            return False
        return True
