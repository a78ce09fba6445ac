"""What came of a study, as one JSON object that is also a result file for the tables of the documents.

`rows` hold a variant each: means over its done runs, and paired differences from the reference (the first
variant) over the seeds that both finished. Losses at equal tokens and equal seconds are read off the
validation curves; `sentences` say what may be said of each, `notes` what limits it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean, median
from typing import Any

from sabrage.run.folder import Run
from sabrage.study.launch import Job
from sabrage.study.plan import StudyError, StudyPlan
from sabrage.study.runner import finished
from sabrage.study.statistics import (
    Curve,
    Estimate,
    against_target,
    detectable,
    estimate,
    paired,
    pooled_sd,
    verdict,
)

CLOCKS = ("train_seconds", "nocap_seconds", "wall_seconds")
MANY_COMPARISONS = 5
# Columns of studies in which networks have a loss of their own.
NETWORK = [
    ("network_loss", "of the network alone", ".4f"),
    ("network_loss_difference", "difference", "+.4f"),
]
Runs = dict[int, Run]
Measure = Callable[[Run], float | None]


def facts(runs: Sequence[Run]) -> dict[str, Any]:
    """Track, device, versions, commit and date of the runs, as result files have them. Raises StudyError."""
    tracks = sorted({run.manifest["track"] for run in runs})
    if len(tracks) > 1:
        raise StudyError(f"the runs are of the tracks {', '.join(tracks)}, whose losses do not compare")
    if not runs:
        return dict.fromkeys(("track", "device", "versions", "commit", "date"))
    newest = max(runs, key=lambda run: run.manifest["started"]).manifest
    return {
        "track": tracks[0],
        "device": " and ".join(sorted({run.manifest["device"]["name"] for run in runs})),
        "versions": newest["versions"],
        "commit": (newest["code"] or {}).get("commit"),
        "date": newest["started"][:10],
    }


def cautions(runs: Sequence[Run]) -> list[str]:
    """Sentences about what makes these runs compare less well than they seem to."""
    found = []
    if len({run.manifest["device"]["name"] for run in runs}) > 1:
        found.append("the runs are of different devices: their seconds do not compare")
    codes = {((run.manifest["code"] or {}).get("commit"), _changed(run)) for run in runs}
    if len(codes) > 1:
        found.append("the code changed between the runs")
    if any(_changed(run) for run in runs):
        found.append("the code had changes that are not in the commit; the manifests hold them")
    if any(run.inline for run in runs):
        found.append("runs shared a process (inline) or took turns on a GPU: no wall and no nocap seconds")
    if any(run.result and run.result["ending"] == "until" for run in runs):
        found.append("runs ended on the way (budget.until): these are no losses of an end, nor of a blend")
    return found


def _changed(run: Run) -> str:
    return (run.manifest["code"] or {}).get("diff", "")


def failures(jobs: Iterable[Job]) -> dict[str, str]:
    """What is known of each failed run, by name."""
    return {job.name: str(job.failure) for job in jobs if job.state() == "failed"}


def result(run: Run) -> dict[str, Any]:
    """The result of a done run."""
    assert run.result is not None, run.path
    return run.result


def curve(run: Run) -> Curve:
    """The validations of a run; losses that were not numbers are float("nan")."""
    records = run.events("validation")
    return Curve(
        [record["tokens"] for record in records],
        [record["train_seconds"] for record in records],
        [float(record["loss"]) for record in records],
    )


def mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None when there is nothing or any value is missing: a mean of the rest would flatter."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return fmean(known) if known and len(known) == len(listed) else None


def compared(runs: Runs, reference: Runs, value: Measure) -> Estimate | None:
    """The paired estimate of a value over the seeds that both finished; None without any, or with a gap."""
    pairs = [(value(reference[seed]), value(runs[seed])) for seed in sorted(runs) if seed in reference]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known or len(known) < len(pairs):
        return None
    before, after = zip(*known, strict=True)
    return paired(before, after)


def network_loss(run: Run) -> float | None:
    """The loss of a blend's network alone; None without a blend."""
    return result(run).get("network_loss")


def steady(run: Run) -> float:
    """Tokens a second in the median stretch between two lines of the log, whatever disturbs a few."""
    return median(record["tokens_per_second"] for record in run.events("speed"))


def final_loss(run: Run) -> float:
    return float(result(run)["validation_loss"])


def summarise(plan: StudyPlan, jobs: Sequence[Job], skipped: dict[str, str], *, name: str) -> dict[str, Any]:
    """The summary of a study, whatever part of it is done."""
    groups: dict[str, Runs] = {job.variant.name: {} for job in jobs}
    for job in jobs:
        if run := finished(job):
            groups[job.variant.name][job.seed] = run
    runs = [run for group in groups.values() for run in group.values()]
    first, *others = groups
    reference = groups[first]
    losses = {name: [final_loss(run) for run in group.values()] for name, group in groups.items()}
    # Without a target of its own a study asks for the loss that every run of the reference reaches.
    target = plan.target if plan.target is not None else max(losses[first], default=None)
    tokens = min((result(run)["tokens"] for run in runs), default=0)
    seconds = min((result(run)["train_seconds"] for run in runs), default=0.0)
    measures: dict[str, Measure] = {
        "loss": final_loss,
        "network_loss": network_loss,
        "at_tokens": lambda run: curve(run).at_tokens(tokens),
        "at_seconds": lambda run: curve(run).at_seconds(seconds),
    }
    differences = {name: compared(groups[name], reference, final_loss) for name in others}
    seen = [difference for difference in differences.values() if difference]
    noise = pooled_sd(estimate(group) for group in losses.values() if group)
    spread, num_pairs = pooled_sd(seen), max((difference.n for difference in seen), default=0)
    least = detectable(spread, num_pairs) if spread is not None and num_pairs > 1 else None
    rows = [row(name, group, reference, measures, target) for name, group in groups.items()]
    if plan.target is not None:
        for made, group in zip(rows, losses.values(), strict=True):
            made["p_below_target"] = against_target(group, plan.target).p_below if group else None
    return {
        "name": name,
        **facts(runs),
        "recipe": next(iter(reference.values())).manifest["recipe"] if reference else None,
        "seeds": list(plan.seeds),
        "clocks": {clock: rows[0][clock] for clock in CLOCKS} if reference else None,
        "columns": columns(plan, target, blended=any(row["network_loss"] is not None for row in rows)),
        "rows": rows,
        "kind": plan.kind,
        "variants": {job.variant.name: [job.variant.recipe, *job.variant.sets] for job in jobs},
        "equal_tokens": tokens,
        "equal_seconds": seconds,
        "target": target,
        "noise_floor": noise,
        "detectable": least,
        "sentences": [f"{name}: {verdict(difference)}" for name, difference in differences.items()],
        "notes": [*floors(noise, least, num_pairs), *notes(plan, runs, len(others))],
        "failures": failures(jobs),
        "skipped": skipped,
    }


def row(
    name: str, runs: Runs, reference: Runs, measures: dict[str, Measure], target: float | None
) -> dict[str, Any]:
    """One variant's line: seconds are `train_seconds` unless named otherwise, `speed` is a paired ratio of
    steady speeds."""
    losses = [final_loss(run) for run in runs.values()]
    made: dict[str, Any] = {"variant": name, "runs": len(runs), "sd": estimate(losses).sd if losses else None}
    for key, value in measures.items():
        made[key] = mean(map(value, runs.values()))
        if runs is not reference and (difference := compared(runs, reference, value)):
            found = {"difference": difference.mean, "half": difference.half, "p": difference.p}
            made |= {f"{key}_{what}": number for what, number in found.items()}
    for key in (*CLOCKS, "steps", "tokens", "tokens_per_second"):
        made[key] = mean(result(run)[key] for run in runs.values())
    if target is not None:
        made["seconds_to_target"] = mean(curve(run).seconds_to(target) for run in runs.values())
    made["speed"] = mean(
        steady(run) / steady(reference[seed]) for seed, run in runs.items() if seed in reference
    )
    made["peak_memory"] = max((result(run)["peak_memory"] or 0 for run in runs.values()), default=0) or None
    return made


def columns(plan: StudyPlan, target: float | None, *, blended: bool) -> list[dict[str, str]]:
    """The columns of the table; `blended` when networks have a loss of their own."""
    shown = [
        ("variant", "variant", ""),
        ("runs", "n", ""),
        ("loss", "loss", ".4f"),
        ("loss_difference", "difference", "+.4f"),
        ("loss_half", "±95%", ".4f"),
        ("loss_p", "p", ".2g"),
        *([("p_below_target", f"p below {plan.target}", ".2g")] if plan.target is not None else []),
        *(NETWORK if blended else []),
        ("at_tokens", "loss at equal tokens", ".4f"),
        ("at_seconds", "loss at equal seconds", ".4f"),
        *([("seconds_to_target", f"seconds to {target:.4f}", ".1f")] if target is not None else []),
        ("train_seconds", "train seconds", ".1f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("speed", "speed", ".3f"),
    ]
    return [{"key": key, "title": title, "format": form} for key, title, form in shown]


def floors(noise: float | None, least: float | None, num_pairs: int) -> Iterator[str]:
    """What this study could have seen at all."""
    if noise is not None:
        yield f"noise floor {noise:.4f} (sd of a loss over seeds)"
    if least is not None:
        yield f"{num_pairs} pairs find a difference of {least:.4f} four times in five, smaller ones less"


def notes(plan: StudyPlan, runs: Sequence[Run], num_comparisons: int) -> list[str]:
    """What limits the conclusions, in sentences."""
    found = cautions(runs)
    if len(plan.seeds) < 2:
        found.append("one seed: this screens, it proves nothing; on several GPUs speeds compare them, too")
    if num_comparisons >= MANY_COMPARISONS:
        found.append(f"{num_comparisons} comparisons at 95%: expect one in twenty by chance alone")
    times = [result(run)["train_seconds"] for run in runs]
    if times and max(times) > 1.02 * median(times) and plan.minutes is None:
        found.append(
            "equal seconds are read within longer schedules, which flatters the fast; --minutes fits each "
            "schedule to the time"
        )
    return found
