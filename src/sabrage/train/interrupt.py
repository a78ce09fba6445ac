"""Ctrl-C and SIGTERM as a flag that the loop reads between steps; a second one ends the process at once."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interruption:
    """with Interruption() as stop: ... `stop.signal` is the first signal received, or None."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Notes the signal and gives the next one its old meaning."""
        self.signal = number
        for known, handler in self.before.items():
            signal.signal(known, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
