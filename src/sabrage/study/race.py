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
from sabrage.study.statistics import against_target, distributions, estimate, paired
from sabrage.study.summary import CLOCKS, cautions, facts, final_loss, mean, result

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
    # No step at all does not meet; bracket first, then halve.
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
            at = max(1, high * 3 // 4)
        else:
            at = (low + high) // 2
    return high * grid


class Race:
    """Carries a race plan out in a folder. Deterministic but for the runs, so calling again goes on."""

    def __init__(self, plan: RacePlan, folder: Path, launcher: Launcher) -> None:
        distributions()
        self.plan, self.folder, self.launcher = plan.check(), folder, launcher
        claim(folder, plan)
        self.explored: dict[int, float] = {}
        self.confirming: list[Run] = []

    def run(self) -> dict[str, Any]:
        """The whole race; returns its summary. Raises StudyError when a run fails or none meets."""
        plan = self.plan
        target = self.target()
        start = plan.variant.make().plan.steps
        steps = smallest(
            lambda count: self.explore(count) <= target, start=start, grid=plan.grid, most=plan.most
        )
        rows: list[dict[str, Any]] = []
        for attempt in range(plan.attempts):
            first = EXPLORING_SEED + 1 + attempt * plan.seeds
            rows.append(self.confirm(steps, tuple(range(first, first + plan.seeds))))
            if rows[-1]["confirmed"] or steps + plan.grid > plan.most:
                break
            steps += plan.grid
        return self.summary(target, rows)

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

    def confirm(self, steps: int, seeds: tuple[int, ...]) -> dict[str, Any]:
        """What fresh seeds show at that many steps, the base in turn with them: a row of the summary.

        `margin` is loss - target, or loss - base's of the same seed; seconds are means over the seeds.
        """
        plan = self.plan
        variants = [self.at(plan.variant, steps)]
        if plan.base is not None:
            short = min(BASE_STEPS, plan.base.make().plan.steps)
            variants.append(plan.base if plan.target is None else self.at(plan.base, short))
        runs, *others = self.done(variants, seeds)
        losses = [final_loss(run) for run in runs]
        if plan.target is not None:
            margin = against_target(losses, plan.target)
        else:
            margin = paired([final_loss(run) for run in others[0]], losses)
        row: dict[str, Any] = {"steps": steps, "tokens": result(runs[0])["tokens"]}
        row |= {"runs": len(runs), "seeds": list(seeds), "loss": fmean(losses), "sd": estimate(losses).sd}
        assert margin.p_below is not None, "a confirmation has two seeds or more"
        row |= {"margin": margin.mean, "p": margin.p_below, "confirmed": margin.p_below < SIGNIFICANCE}
        row |= {clock: mean(result(run)[clock] for run in runs) for clock in CLOCKS}
        for base in others:
            seconds = fmean(result(run)["median_step_seconds"] for run in base)
            row |= {"base_step_seconds": seconds, "base_steps": row["train_seconds"] / seconds}
        self.confirming += [*runs, *(run for base in others for run in base)]
        return row

    def at(self, variant: Variant, steps: int) -> Variant:
        """The variant over that many steps, judged at its end alone."""
        recipe = fitted(variant.make(), steps=steps)
        named = replace(variant, name=f"{variant.name}@{steps}")
        return named.become(replace(recipe, budget=replace(recipe.budget, target=None, evaluate_every=0)))

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

    def summary(self, target: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The summary, also a result file: a row for each confirmation, those that failed included."""
        plan, last = self.plan, rows[-1]
        goal = f"the target {target}" if plan.target is not None else "the base's loss"
        claim = f"{last['steps']} steps meet {goal} with p = {last['p']:.2g} (n={plan.seeds})"
        if not last["confirmed"]:
            claim = f"not confirmed: {claim}, and {SIGNIFICANCE} is asked for; raise --attempts or --grid"
        path = ", ".join(f"{steps} steps {loss:.4f}" for steps, loss in sorted(self.explored.items()))
        notes = [f"explored with seed {EXPLORING_SEED}: {path}", *cautions(self.confirming)]
        if len(rows) > 1:
            notes.append(f"{len(rows)} confirmations were tried, each longer and with fresh seeds")
        return {
            "name": "race",
            **facts(self.confirming),
            "recipe": self.confirming[0].manifest["recipe"],
            "seeds": last["seeds"],
            "clocks": {clock: last[clock] for clock in CLOCKS},
            "columns": [{"key": key, "title": title, "format": form} for key, title, form in COLUMNS],
            "rows": rows,
            "kind": "race",
            "base": plan.base.name if plan.base else None,
            "target": target,
            "confirmed": last["confirmed"],
            "explored": {str(steps): loss for steps, loss in sorted(self.explored.items())},
            "sentences": [claim],
            "notes": notes,
        }


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
