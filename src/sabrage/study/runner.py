"""Runs a study in its folder: `study.json` says what it is, `runs/VARIANT--seed-N` holds what came of it.

Seeds are blocks and variants take turns within them, in reverse order in every second block, so that a
device that drifts favours nobody. The same call goes on where the last one stopped; done runs stay.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sabrage.config import Part, from_json, to_json
from sabrage.run.folder import Run, read_run, write_json
from sabrage.study.board import Board
from sabrage.study.launch import Block, Job, Launcher
from sabrage.study.plan import StudyError, StudyPlan, Variant, fitted
from sabrage.study.statistics import distributions

CALIBRATION_STEPS = 20
PLAN = "study.json"


def default_folder(plan: Part, *, kind: str, name: str, root: Path = Path("studies")) -> Path:
    """The folder of a study that is given none: the same for the same plan, however many seeds."""
    digest = hashlib.sha256(json.dumps(_without_seeds(plan), sort_keys=True).encode()).hexdigest()
    return root / f"{kind}-{name}-{digest[:8]}"


def claim(folder: Path, plan: Part) -> None:
    """Writes the plan into a new folder, or checks that the folder is this plan's; seeds may be added."""
    path = folder / PLAN
    if path.is_file():
        # Through Part and back, so that fields added since keep their defaults.
        if _without_seeds(from_json(json.loads(path.read_text()), type(plan))) != _without_seeds(plan):
            raise StudyError(f"{folder} holds another study (see {path}); choose another folder with --out")
    elif folder.is_dir() and any(folder.iterdir()):
        raise StudyError(f"{folder} is neither empty nor a study; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, to_json(plan))


def _without_seeds(plan: Part) -> dict:
    return {name: value for name, value in to_json(plan).items() if name != "seeds"}


def blocks_of(folder: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> list[list[Job]]:
    """A block for each seed with every variant in it, in reverse order in every second one."""
    blocks = []
    for index, seed in enumerate(seeds):
        block = [Job(variant, seed, folder / f"{variant.slug}--seed-{seed}") for variant in variants]
        blocks.append(block[::-1] if index % 2 else block)
    return blocks


def carry_out(blocks: Sequence[Block], launcher: Launcher) -> None:
    """Runs what is not done. Raises KeyboardInterrupt, all runs saved, when stopped."""
    with Board([job for block in blocks for job in block]) as board:
        if not launcher.run(blocks, watch=board):
            board.console.print("stopped; the same command goes on")
            raise KeyboardInterrupt


def run_study(plan: StudyPlan, folder: Path, launcher: Launcher) -> list[Job]:
    """Carries the plan out and returns its jobs, whatever became of them. Raises StudyError."""
    distributions()
    claim(folder, plan.check())
    variants = lengthened(plan, folder, launcher)
    blocks = blocks_of(folder / "runs", variants, plan.seeds)
    # These ask for losses, or have nothing to pair: each of their runs may have a device of its own.
    alone = plan.kind in ("sweep", "screen") or len(plan.seeds) == 1
    carry_out([[job] for block in blocks for job in block] if alone else blocks, launcher)
    order = {variant.name: index for index, variant in enumerate(variants)}
    jobs = [job for block in blocks for job in block]
    return sorted(jobs, key=lambda job: (order[job.variant.name], job.seed))


def lengthened(plan: StudyPlan, folder: Path, launcher: Launcher) -> list[Variant]:
    """The variants at the length that the plan asks for; minutes are first measured as seconds a step."""
    if plan.minutes is None:
        return [_fit(variant, plan.steps, plan.tokens) for variant in plan.variants]
    short = []
    for variant in plan.variants:
        trial = fitted(variant.make(), steps=CALIBRATION_STEPS)
        budget = replace(trial.budget, log_every=CALIBRATION_STEPS // 4)
        short.append(variant.become(replace(trial, budget=budget)))
    blocks = blocks_of(folder / "calibration", short, plan.seeds[:1])
    carry_out(blocks, launcher)
    speeds = {job.variant.name: step_seconds(job) for job in blocks[0]}
    return [
        _fit(variant, max(1, round(plan.minutes * 60 / speeds[variant.name])), None)
        for variant in plan.variants
    ]


def _fit(variant: Variant, steps: int | None, tokens: int | None) -> Variant:
    return variant.become(fitted(variant.make(), steps=steps, tokens=tokens))


def step_seconds(job: Job) -> float:
    """Seconds a step of a calibration run, without the first few steps. Raises StudyError if it failed."""
    run = finished(job)
    if run is None:
        raise StudyError(f"the calibration of {job.variant.name!r} failed; see {job.output}")
    first, *_, last = run.events("speed")
    return (last["train_seconds"] - first["train_seconds"]) / (last["step"] - first["step"])


def finished(job: Job) -> Run | None:
    """What a done run left behind; None for every other."""
    return read_run(job.folder) if job.state() == "done" else None
