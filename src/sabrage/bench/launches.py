"""What a step asks of the device: kernels launched, and the share of the step in which none of them runs.

The profiler notes when each kernel began and ended on the device. It slows the host, so the time in which the
device had nothing to do is told against a step that was timed without it.
"""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from sabrage.bench.trial import Work

STEPS = 3
# What the profiler's trace calls work of the device: kernels, and copies that run beside them.
KERNELS, COPIES = ("kernel",), ("gpu_memcpy", "gpu_memset")
Interval = tuple[float, float]


def trace(work: Work, *, repeats: int = STEPS) -> list[dict[str, Any]]:
    """The events of `repeats` runs of `work` on CUDA, as the profiler's trace has them; in microseconds.

    The host's own events are left out: noting them would slow it further.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def covered(intervals: Iterable[Interval]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def longest(events: Sequence[dict[str, Any]], most: int, *, repeats: int = STEPS) -> list[dict[str, Any]]:
    """The `most` kernels that take longest in a step: name, milliseconds, launches, by what they take.

    Launches of the same name are one kernel. Kernels that run beside each other count in full.
    """
    spent: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in KERNELS:
            spent.setdefault(event["name"], []).append(event["dur"])
    rows: list[dict[str, Any]] = [
        {"kernel": name, "ms": sum(each) / 1e3 / repeats, "launches": len(each) / repeats}
        for name, each in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:most]


def told(events: Sequence[dict[str, Any]], step_ms: float, *, repeats: int = STEPS) -> dict[str, Any]:
    """Launches of a step and its idle share, if it takes `step_ms`; None each where nothing was noted."""
    kernels = [event for event in events if event.get("cat") in KERNELS]
    busy = [event for event in events if event.get("cat") in KERNELS + COPIES]
    if not kernels:
        return {"launches": None, "idle": None}
    busy_ms = covered((event["ts"], event["ts"] + event["dur"]) for event in busy) / 1e3 / repeats
    return {"launches": round(len(kernels) / repeats), "idle": 1 - busy_ms / step_ms}
