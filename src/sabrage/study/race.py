"""A race: the smallest number of steps that meets a target, found with one seed, confirmed with fresh ones.

Stopping a run when its curve touches the target would flatter noise, so every step count is a run of its
own with its schedules fitted to it. The claim is a confirmation: N fresh seeds at a step count fixed
beforehand, mean final loss below the target with p < 0.01 (one-sided t-test), and the mean time of that.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from sabrage.config import Part
from sabrage.run.folder import Run
from sabrage.study.launch import Job, Launcher
from sabrage.study.plan import StudyError, Variant, fitted
from sabrage.study.runner import blocks_of, carry_out, claim, finished
from sabrage.study.statistics import Estimate, distributions, estimate
from sabrage.study.summary import CLOCKS, cautions, facts, final_loss, result

SIGNIFICANCE = 0.01
BASE_STEPS = 40
EXPLORING_SEED = 0


@dataclass(frozen=True, kw_only=True)
class RacePlan(Part):
    """`variant` against `target` (nats), or against the final loss of `base` where no target is given.

    Step counts are multiples of `grid` up to `most`; each of at most `attempts` confirmations takes `seeds`
    fresh seeds. With a target, `base` only runs 40 steps a seed, for the seconds of one of its steps.
    """

    variant: Variant
    base: Variant | None = None
    target: float | None = None
    grid: int
    most: int
    seeds: int = 5
    attempts: int = 3

    def check(self) -> Self:
        """The plan itself when it can be run. Raises StudyError."""
        if self.target is None and self.base is None:
            raise StudyError("a race needs --target LOSS, --base RECIPE, or both")
        if self.seeds < 2 or self.attempts < 1:
            raise StudyError(f"got {self.seeds} seeds, allowed: 2 or more; one seed confirms nothing")
        if not 1 <= self.grid <= self.most:
            raise StudyError(f"got a grid of {self.grid} steps, allowed: 1 to the {self.most} of --most")
        return self


def smallest(meets: Callable[[int], bool], *, start: int, grid: int, most: int) -> int:
    """The smallest multiple of `grid` that meets, by bracketing from `start` and bisection.

    Sound where `meets` is monotonic; noise at the edge is what the confirmation is for. Raises StudyError
    when `most` steps do not meet.
    """
    highest = most // grid
    at = min(max(round(start / grid), 1), highest)
    low, high = 0, None
    while high is None or high - low > 1:
        if meets(at * grid):
            high = at
        elif at == highest:
            raise StudyError(f"even {at * grid} steps do not meet the target; raise --most or the target")
        else:
            low = at
        if high is None:
            at = min(max(at + 1, at * 4 // 3), highest)
        elif low == 0:
            at = max(1, min(high - 1, high * 3 // 4))
            if high == 1:
                break
        else:
            at = (low + high) // 2
    return high * grid


@dataclass(frozen=True)
class Confirmation:
    """What `seeds` runs of `steps` steps showed: `margin` is loss - target, or loss - base's of that seed."""

    steps: int
    seeds: tuple[int, ...]
    margin: Estimate
    runs: tuple[Run, ...]
    base_runs: tuple[Run, ...]

    @property
    def holds(self) -> bool:
        return self.margin.p_below is not None and self.margin.p_below < SIGNIFICANCE


class Race:
    """Carries a race plan out in a folder. Deterministic but for the runs, so calling again goes on."""

    def __init__(self, plan: RacePlan, folder: Path, launcher: Launcher) -> None:
        distributions()
        self.plan, self.folder, self.launcher = plan.check(), folder, launcher
        claim(folder, plan)
        self.explored: dict[int, float] = {}

    def run(self) -> dict[str, Any]:
        """The whole race; returns its summary. Raises StudyError when a run fails or none meets."""
        plan = self.plan
        target = self.target()
        start = plan.variant.make().plan.steps
        steps = smallest(
            lambda count: self.explore(count) <= target, start=start, grid=plan.grid, most=plan.most
        )
        confirmations: list[Confirmation] = []
        for attempt in range(plan.attempts):
            first = EXPLORING_SEED + 1 + attempt * plan.seeds
            confirmations.append(self.confirm(steps, tuple(range(first, first + plan.seeds))))
            if confirmations[-1].holds:
                break
            steps += plan.grid
        return self.summary(target, confirmations)

    def target(self) -> float:
        """The target in nats for exploring: the plan's, or what the base reaches with that seed."""
        if self.plan.target is not None:
            return self.plan.target
        assert self.plan.base is not None
        return final_loss(self.done([self.plan.base], (EXPLORING_SEED,))[0][0])

    def explore(self, steps: int) -> float:
        """The final loss of a run of that many steps."""
        loss = final_loss(self.done([self.at(self.plan.variant, steps)], (EXPLORING_SEED,))[0][0])
        self.explored[steps] = loss
        return loss

    def confirm(self, steps: int, seeds: tuple[int, ...]) -> Confirmation:
        """Fresh seeds at that many steps, the base in turn with them."""
        plan = self.plan
        variants = [self.at(plan.variant, steps)]
        if plan.base is not None:
            short = min(BASE_STEPS, plan.base.make().plan.steps)
            variants.append(plan.base if plan.target is None else self.at(plan.base, short))
        runs = self.done(variants, seeds)
        mine, others = runs[0], runs[1] if plan.base is not None else []
        goals = [plan.target if plan.target is not None else final_loss(run) for run in others or mine]
        margin = estimate([final_loss(run) - goal for run, goal in zip(mine, goals, strict=True)])
        return Confirmation(steps, seeds, margin, tuple(mine), tuple(others))

    def at(self, variant: Variant, steps: int) -> Variant:
        """The variant over that many steps, which no target ends early."""
        recipe = fitted(variant.make(), steps=steps)
        named = replace(variant, name=f"{variant.name}@{steps}")
        return named.become(replace(recipe, budget=replace(recipe.budget, target=None)))

    def done(self, variants: list[Variant], seeds: tuple[int, ...]) -> list[list[Run]]:
        """The runs of each variant by seed, carried out where need be. Raises StudyError naming failures."""
        blocks = blocks_of(self.folder / "runs", variants, seeds)
        carry_out(blocks, self.launcher)
        jobs: list[Job] = [job for block in blocks for job in block]
        runs = {(job.variant, job.seed): finished(job) for job in jobs}
        failed = [str(job.output) for job in jobs if runs[job.variant, job.seed] is None]
        if failed:
            raise StudyError(
                f"runs of the race failed, see {', '.join(failed)}; the same command retries them"
            )
        return [[run for seed in seeds if (run := runs[variant, seed])] for variant in variants]

    def summary(self, target: float, confirmations: list[Confirmation]) -> dict[str, Any]:
        """The summary, also a result file: a row for each confirmation, those that failed included."""
        plan, last = self.plan, confirmations[-1]
        runs = [run for one in confirmations for run in (*one.runs, *one.base_runs)]
        rows = [row(one, plan) for one in confirmations]
        goal = f"the target {target}" if plan.target is not None else "the base's loss"
        claim = f"{last.steps} steps meet {goal} with p = {last.margin.p_below:.2g} (n={plan.seeds})"
        if not last.holds:
            claim = f"not confirmed: {claim}, and {SIGNIFICANCE} is asked for; raise --attempts or --grid"
        notes = [f"explored with seed {EXPLORING_SEED}: {self.path()}", *cautions(runs)]
        if len(confirmations) > 1:
            notes.append(f"{len(confirmations)} confirmations were tried, each longer and with fresh seeds")
        return {
            "name": "race",
            **facts(runs),
            "recipe": last.runs[0].manifest["recipe"],
            "seeds": list(last.seeds),
            "clocks": {clock: rows[-1][clock] for clock in CLOCKS},
            "columns": [{"key": key, "title": title, "format": form} for key, title, form in COLUMNS],
            "rows": rows,
            "kind": "race",
            "target": target,
            "confirmed": last.holds,
            "explored": {str(steps): loss for steps, loss in sorted(self.explored.items())},
            "sentences": [claim],
            "notes": notes,
        }

    def path(self) -> str:
        """The step counts that were explored, with their losses."""
        return ", ".join(f"{steps} steps {loss:.4f}" for steps, loss in sorted(self.explored.items()))


COLUMNS = (
    ("steps", "steps", ","),
    ("runs", "n", ""),
    ("loss", "mean loss", ".4f"),
    ("sd", "sd", ".4f"),
    ("margin", "above target", "+.4f"),
    ("p", "p", ".2g"),
    ("train_seconds", "train seconds", ".1f"),
    ("nocap_seconds", "nocap seconds", ".1f"),
    ("wall_seconds", "wall seconds", ".1f"),
    ("base_step_seconds", "seconds of a base step", ".4f"),
    ("base_steps", "cost in base steps", ",.1f"),
)


def row(one: Confirmation, plan: RacePlan) -> dict[str, Any]:
    """One confirmation's line: means over its seeds."""
    clocks = {clock: fmean(result(run)[clock] for run in one.runs) for clock in CLOCKS}
    loss = estimate([final_loss(run) for run in one.runs])
    base = fmean(result(run)["median_step_seconds"] for run in one.base_runs) if one.base_runs else None
    return {
        "steps": one.steps,
        "tokens": result(one.runs[0])["tokens"],
        "runs": len(one.runs),
        "seeds": list(one.seeds),
        "loss": loss.mean,
        "sd": loss.sd,
        "margin": one.margin.mean,
        "p": one.margin.p_below,
        "confirmed": one.holds,
        **clocks,
        "base": plan.base.name if plan.base else None,
        "base_step_seconds": base,
        "base_steps": clocks["train_seconds"] / base if base else None,
    }
