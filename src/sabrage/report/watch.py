"""The live view of a run in the terminal, read from its folder while another process writes it."""

import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sabrage.report import history
from sabrage.run.folder import Run, RunError, RunFolder, read_run
from sabrage.run.units import count, duration, size

SECONDS_BETWEEN_LOOKS = 1.0
LEVELS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48
# A run whose log is older than this is told to be silent: it may have been killed, or it compiles.
SILENT_SECONDS = 30.0


def watch(path: Path, console: Console, *, once: bool, pause: Callable[[float], None] = time.sleep) -> Run:
    """Shows the run until its result is there, or one frame; returns the run. Raises RunError or LogError."""
    run = read_run(path)
    if once or run.result is not None:
        console.print(frame(run, silence(path)))
        return run
    with Live(frame(run, silence(path)), console=console, auto_refresh=False) as live:
        while run.result is None:
            pause(SECONDS_BETWEEN_LOOKS)
            run = read_run(path)
            live.update(frame(run, silence(path)), refresh=True)
    return run


def newest(root: Path = Path("runs")) -> Path:
    """The run in `root` that was started last. Raises RunError when there is none."""
    started = {
        path.parent: json.loads(path.read_text(encoding="utf-8"))["started"]
        for path in root.glob("*/manifest.json")
    }
    if not started:
        raise RunError(f"no run in {root}/; give the folder of a run")
    return max(started, key=lambda path: (started[path], path))


def silence(path: Path) -> float:
    """Seconds since something was written to the log."""
    log = RunFolder(path).log
    return max(0.0, time.time() - log.stat().st_mtime) if log.exists() else 0.0


def frame(run: Run, silent: float) -> Group:
    """How the run stands: progress, losses, their curve, speed and clocks; what is not known is left out."""
    recipe, facts = run.manifest["recipe"], history.standing(run)
    steps, total = facts.get("steps", 0), recipe["plan"]["steps"]
    ended = run.result is not None
    title = Text.assemble(
        (recipe["name"], "bold"),
        f"  {run.path}  track {run.manifest['track']}, {run.manifest['device']['name']}",
    )
    progress = Table.grid(padding=(0, 2))
    told = [f"step {steps:,}/{total:,}", f"{steps / total:.0%}"]
    if ended:
        told.append(facts["ending"])
    elif steps < total and (seconds := remaining(run, steps, total)) is not None:
        told.append(f"about {duration(seconds)} of training left")
    progress.add_row(ProgressBar(total=total, completed=steps, width=30), *told)

    table = Table.grid(padding=(0, 2))
    for name, value in rows(run, facts, recipe.get("budget", {}).get("target")):
        table.add_row(Text(name, style="dim"), Text(value))
    parts: list[RenderableType] = [title, progress, table]
    if not ended and silent > SILENT_SECONDS:
        parts.append(Text(f"nothing was logged for {duration(silent)}", style="yellow"))
    return Group(*parts)


def rows(run: Run, facts: dict, target: float | None) -> list[tuple[str, str]]:
    """(name, value) of what is known."""
    told = []
    if "train_loss" in facts:
        losses = [float(record["loss"]) for record in run.events("train")]
        told.append(("training loss", f"{losses[-1]:.4f}  {sparkline(losses)}"))
    if facts.get("validation_loss") is not None:
        losses = [float(record["loss"]) for record in run.events("validation")]
        goal = "" if target is None else f"  target {target}"
        told.append(("validation loss", f"{float(facts['validation_loss']):.4f}  {sparkline(losses)}{goal}"))
    status = [f"{count(facts['tokens_per_second'])} tokens/s"] if "tokens_per_second" in facts else []
    status += [f"MFU {facts['mfu']:.1%}"] if facts.get("mfu") else []
    status += [size(facts["peak_memory"])] if facts.get("peak_memory") else []
    status += [f"{count(facts['tokens'])} tokens done"] if "tokens" in facts else []
    told.append(("speed", ", ".join(status) or "not known yet"))
    clocks = [
        f"{name.removesuffix('_seconds')} {duration(facts[name])}"
        for name in ("train_seconds", "nocap_seconds", "wall_seconds")
        if facts.get(name) is not None
    ]
    if run.result is None:
        began = datetime.fromisoformat(run.manifest["started"])
        clocks.append(f"started {duration((datetime.now(UTC) - began).total_seconds())} ago")
    told.append(("clocks", ", ".join(clocks)))
    return told


def remaining(run: Run, steps: int, total: int) -> float | None:
    """Seconds of training left at the pace of the newest steps; None before it is known."""
    marks = [(0, 0.0), *((record["step"], record["train_seconds"]) for record in history.speeds(run))][-10:]
    (first, start), (last, end) = marks[0], marks[-1]
    return (total - steps) * (end - start) / (last - first) if last > first else None


def sparkline(values: Sequence[float]) -> str:
    """The values as a line of blocks, the newest at the right; on a log scale, so that the end shows."""
    each = max(1, math.ceil(len(values) / CURVE_WIDTH))
    shown = [min(values[index : index + each]) for index in range(0, len(values), each)]
    known = [math.log(value) for value in shown if math.isfinite(value) and value > 0]
    if len(known) < 2:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(
        LEVELS[round((math.log(value) - low) / span * (len(LEVELS) - 1))]
        if math.isfinite(value) and value > 0
        else " "
        for value in shown
    )
