"""Trackers: TensorBoard and Weights & Biases, fed from a thread of their own.

The run's log is the truth and a tracker a convenience: one that fails, hangs or falls behind loses records,
says so once, and never stops or slows the training.
"""

import importlib.util
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Name = Literal["none", "tensorboard", "wandb"]
NAMES: tuple[Name, ...] = ("none", "tensorboard", "wandb")


class TrackerError(ValueError):
    """A tracker that was asked for and is not there."""


class Service(ABC):
    """The far end: called from one background thread only; it may raise and it may hang."""

    @abstractmethod
    def write(self, step: int, values: dict[str, float]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class Tracker:
    """Passes numbers to a service in the background. `say` is told once, by the caller's thread, of trouble.

    `open_service` runs in the background too; None makes a tracker that does nothing.
    """

    def __init__(
        self,
        open_service: Callable[[], Service] | None,
        *,
        say: Callable[[str], None] = print,
        capacity: int = 1000,
    ) -> None:
        self._say = say
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(maxsize=capacity)
        self._trouble: str | None = None
        self._said = False
        self._thread: threading.Thread | None = None
        if open_service is not None:
            # A daemon: a hanging service must not keep the process alive.
            self._thread = threading.Thread(target=self._work, args=(open_service,), daemon=True)
            self._thread.start()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Hands over the numbers of one step, by name; never blocks and never raises."""
        if self._thread is None or self._told():
            return
        try:
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._trouble = "the tracker does not keep up; it gets no more records"
            self._told()

    def close(self, *, timeout: float = 20.0) -> None:
        """Waits at most `timeout` seconds for the service to take the rest."""
        if self._thread is None:
            return
        if not self._told():
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                self._trouble = "the tracker does not keep up; its last records are lost"
            else:
                self._thread.join(timeout)
                if self._thread.is_alive():
                    self._trouble = (
                        f"the tracker did not finish within {timeout:g} s; its last records are lost"
                    )
            self._told()
        self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _told(self) -> bool:
        if self._trouble and not self._said:
            self._said = True
            self._say(f"{self._trouble}; training goes on and the run's log is complete")
        return self._trouble is not None

    def _work(self, open_service: Callable[[], Service]) -> None:
        try:
            service = open_service()
            while (record := self._queue.get()) is not None:
                service.write(*record)
            service.close()
        # Whatever a foreign library raises ends the tracker and nothing else.
        except Exception as error:
            self._trouble = f"the tracker failed: {type(error).__name__}: {error}"


def make_tracker(
    name: str, folder: Path, *, config: dict[str, Any] | None = None, say: Callable[[str], None] = print
) -> Tracker:
    """The named tracker, writing below `folder`; `config` is the recipe's JSON. Raises TrackerError."""
    if name not in NAMES:
        raise TrackerError(f"got tracker {name!r}, allowed: {', '.join(NAMES)}")
    if name == "none":
        return Tracker(None)
    if importlib.util.find_spec(name) is None:
        raise TrackerError(f"tracker {name!r} is not installed; pip install 'sabrage[track]', or use 'none'")
    if name == "tensorboard":
        return Tracker(lambda: TensorBoard(folder / "tensorboard"), say=say)
    return Tracker(lambda: WeightsAndBiases(folder, config or {}), say=say)


class TensorBoard(Service):
    """Event files for `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Service):
    """A run of wandb, offline unless wandb's own WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        mode = None if "WANDB_MODE" in os.environ else "offline"
        self._run = wandb.init(project="sabrage", name=folder.name, dir=folder, config=config, mode=mode)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
