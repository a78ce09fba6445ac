"""Bars and intervals as plain numbers: shares of a width in percent, which the page's template draws.

Stacked bars say where time went, intervals what a study found, grouped bars what a benchmark measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sabrage.report.history import standing
from sabrage.run.folder import Run
from sabrage.run.units import duration

# What the end of a column's key says about its numbers.
UNITS = {
    "_ms": "milliseconds", "_us": "microseconds", "_tflops": "TFLOP/s", "_gbs": "GB/s", "_tbs": "TB/s",
    "_gib": "GiB",
}  # fmt: skip
MOST_ROWS = 64


@dataclass(frozen=True)
class Piece:
    """A bar, or a segment of one: `share` is its width in percent, `text` what it says."""

    name: str
    share: float
    text: str
    colour: int


@dataclass(frozen=True)
class Bars:
    """A chart of bars: rows of pieces that stand below each other, or behind each other when stacked."""

    title: str
    rows: Sequence[tuple[str, Sequence[Piece]]]
    stacked: bool = False


def wall_bars(runs: Mapping[str, Run]) -> Bars | None:
    """Where the wall-clock time of ended runs went, by the name given; None when none has ended.

    Runs of a process that makes several are left out: they have no wall time of their own.
    """
    parts = {}
    for name, run in runs.items():
        facts = standing(run)
        if run.result is None or "warmup_seconds" not in facts or facts["wall_seconds"] is None:
            continue
        known = {
            "training": facts["train_seconds"],
            "compile and warm-up": facts["warmup_seconds"],
            "validation": facts["validation_seconds"],
        }
        rest = max(0.0, facts["wall_seconds"] - sum(known.values()))
        parts[name] = known | {"start, checkpoints, rest": rest}
    return _stacked("Where the wall time went", parts)


def step_bars(runs: Mapping[str, Run]) -> Bars | None:
    """Where the time of a step goes: from a `breakdown`, a list of {"name", "seconds"}, of result or log."""
    parts = {}
    for name, run in runs.items():
        events = [record["parts"] for record in run.events("breakdown")]
        found = (run.result or {}).get("breakdown") or (events[-1] if events else None)
        if found:
            parts[name] = {part["name"]: part["seconds"] for part in found}
    return _stacked("Where the time of a step goes", parts)


def _stacked(title: str, parts: Mapping[str, Mapping[str, float]]) -> Bars | None:
    longest = max((sum(row.values()) for row in parts.values()), default=0.0)
    if not longest:
        return None
    rows = []
    for name, row in parts.items():
        total = sum(row.values())
        pieces = [
            Piece(part, 100 * seconds / longest, f"{part} {_time(seconds)} ({seconds / total:.0%})", index)
            for index, (part, seconds) in enumerate(row.items())
            if seconds
        ]
        rows.append((f"{name}: {_time(total)}", pieces))
    return Bars(title, rows, stacked=True)


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def result_bars(result: Mapping[str, Any]) -> Iterator[Bars]:
    """A chart for every unit that the result's columns have: implementations of a row below each other.

    Several implementations are drawn relative to the row's largest, one alone over all rows.
    """
    columns, rows = result["columns"], result["rows"][:MOST_ROWS]
    for ending, unit in UNITS.items():
        measured = {
            column["key"]: column["key"].removesuffix(ending)
            for column in columns
            if column["key"].endswith(ending)
        }
        known = [
            (row, {key: row[key] for key in measured if isinstance(row.get(key), int | float)})
            for row in rows
        ]
        drawn = [(row, numbers) for row, numbers in known if numbers]
        overall = max((max(numbers.values()) for _, numbers in drawn), default=0.0)
        if not overall:
            continue
        told = []
        for row, numbers in drawn:
            most = max(numbers.values()) if len(measured) > 1 else overall
            pieces = [
                Piece(name, 100 * numbers[key] / most if most else 0.0, f"{numbers[key]:.4g}", index)
                for index, (key, name) in enumerate(measured.items())
                if key in numbers
            ]
            told.append((_row_name(row, columns), pieces))
        what = (
            f"{unit}, each row to its own scale" if len(measured) > 1 else f"{min(measured.values())}, {unit}"
        )
        yield Bars(f"{result['name']}: {what}", told)


def _row_name(row: Mapping[str, Any], columns: Sequence[Mapping[str, str]]) -> str:
    """What a row is about: the texts and whole numbers to the left of what was measured."""
    told = []
    for column in columns:
        if column["key"].endswith(tuple(UNITS)):
            break
        value = row.get(column["key"])
        if isinstance(value, str):
            told.append(value)
        elif isinstance(value, int):
            told.append(f"{column['title']} {value:,}")
    return ", ".join(told)


@dataclass(frozen=True)
class Interval:
    """A difference from the reference with its 95% interval; places in percent, `width` 0 without one."""

    name: str
    place: float
    start: float
    width: float
    text: str
    verdict: str


def intervals(summary: Mapping[str, Any]) -> tuple[float, list[Interval]]:
    """(place of zero, intervals) of a study's paired differences in loss; negative is better."""
    known = [row for row in summary["rows"] if row.get("loss_difference") is not None]
    found = [(row, row["loss_difference"], row.get("loss_half")) for row in known]
    ends = [0.0, *(middle + sign * (half or 0.0) for _, middle, half in found for sign in (-1, 1))]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return 4 + 92 * (value - low) / span

    made = []
    for row, middle, half in found:
        start, end = place(middle - (half or 0.0)), place(middle + (half or 0.0))
        text = f"{middle:+.4f}" + ("" if half is None else f" ± {half:.4f}")
        decided = half is not None and abs(middle) > half
        verdict = ("better" if middle < 0 else "worse") if decided else "open"
        made.append(Interval(row["variant"], place(middle), start, end - start, text, verdict))
    return place(0.0), made
