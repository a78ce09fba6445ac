"""The run's log: one JSON object a line, appended while the run goes on and readable all the time.

A record is `{"event": "train", "step": 7, "loss": 4.2, ...}`. The events that readers know are `train`
(once a logged step), `validation` (after `step` steps) and `resume` (training goes on at `step`, so the
train records from there on are repeated); any other event is kept as it is.
"""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Record = dict[str, Any]


class LogError(ValueError):
    """A log that cannot be read: names the file, the line and the remedy."""


def encode(data: Any, *, indent: int | None = None) -> str:
    """Strict JSON text; a number that is not finite becomes "nan", "inf" or "-inf", which float() reads."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """Appends records to a file, each with a single write, so that a reader never waits for a buffer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _cut_half_line(path)
        # It lives as long as the run; close() and the context manager end it.
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> Record:
        """Appends one record of plain values and returns it. Raises OSError when the disk is full."""
        record = {"event": event, **fields}
        line = (encode(record) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: the last record was written only in part; is the disk full?")
        return record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut_half_line(path: Path) -> None:
    # What a killed process left without its newline would otherwise merge with the next record.
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_log(path: Path) -> list[Record]:
    """The records in order, each step once; a half-written last line is left out. Raises LogError."""
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise LogError(
                f"{path}, line {number}: not JSON ({error}); remove that line to read the rest"
            ) from error
    return _each_step_once(records)


def _each_step_once(records: list[Record]) -> list[Record]:
    kept: list[Record] = []
    for record in records:
        event = record["event"]
        if event == "resume":
            start = record["step"]
            # A validation after `start` steps still holds: the model of that step is the one loaded.
            kept = [
                old
                for old in kept
                if not (old["event"] == "train" and old["step"] >= start)
                and not (old["event"] == "validation" and old["step"] > start)
            ]
        elif event == "validation":
            kept = [old for old in kept if old["event"] != event or old["step"] != record["step"]]
        kept.append(record)
    return kept
