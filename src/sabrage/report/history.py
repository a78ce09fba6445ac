"""What a run's log says over time, as points of lines; the clocks in it are read off its speed records."""

import bisect
from collections.abc import Iterator
from typing import Any

from sabrage.run.folder import Run
from sabrage.run.log import Record

Points = list[tuple[float, float]]


def speeds(run: Run) -> list[Record]:
    """The speed records, each step once: what a resumed run did again is told by its second attempt."""
    kept: list[Record] = []
    for record in run.records:
        if record["event"] == "resume":
            kept = [old for old in kept if old["step"] <= record["step"]]
        elif record["event"] == "speed":
            kept.append(record)
    return kept


def train_loss(run: Run, against: str) -> Points:
    """The loss of every step against "tokens" or "train_seconds" at the end of it."""
    marks = [(0.0, 0.0), *((record["step"], record[against]) for record in speeds(run))]
    steps = [step for step, _ in marks]
    points = []
    for record in run.events("train"):
        done = record["step"] + 1
        after = bisect.bisect_left(steps, done)
        if after < len(marks):
            (low, start), (high, end) = marks[after - 1], marks[after]
            share = (done - low) / (high - low)
            points.append((start + share * (end - start), float(record["loss"])))
    return points


def validation_loss(run: Run, against: str) -> Points:
    """The validation losses against "tokens" or any clock. float() also reads the "nan" of the log."""
    return [(record[against], float(record["loss"])) for record in run.events("validation")]


def learning_rate(run: Run) -> Points:
    """The learning rate of every step, relative or not as the plan says it."""
    return [(record["step"], record["lr"]) for record in run.events("train") if "lr" in record]


def readings(run: Run) -> Iterator[tuple[str, Points]]:
    """Every other number of the speed records by its name, as far as it was known: speed, MFU, memory, ..."""
    records = speeds(run)
    for name in dict.fromkeys(key for record in records for key in record):
        values = [(record["step"], record.get(name)) for record in records]
        if name not in ("event", "step", "tokens", "train_seconds"):
            points = [(step, float(value)) for step, value in values if value is not None]
            if points:
                yield name, points


def standing(run: Run) -> dict[str, Any]:
    """How far the run is: its newest speed and validation records, and over them its result.

    A run of a process that makes several has no other clock than `train_seconds`; the others are None.
    """
    found: dict[str, Any] = {}
    for record in run.records:
        if record["event"] == "train":
            found |= {"train_loss": float(record["loss"]), "steps": record["step"] + 1}
        elif record["event"] == "speed":
            known = ("tokens", "train_seconds", "tokens_per_second", "mfu")
            found |= {key: record[key] for key in known} | {"peak_memory": record["memory"]}
        elif record["event"] == "validation":
            clocks = ("train_seconds", "nocap_seconds", "wall_seconds")
            found |= {"validation_loss": record["loss"]} | {key: record[key] for key in clocks}
    return found | (run.result or {})
