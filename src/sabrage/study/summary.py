"""What came of a study, as one JSON object that is also a result file for the tables of the documents.

`rows` hold a variant each: means over its done runs, and paired differences from the reference (the first
variant) over the seeds that both finished. Losses at equal tokens and equal seconds are read off the
validation curves; `sentences` say what may be said of each, `notes` what limits it.
"""

from collections.abc import Callable, Sequence
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
    noise_floor,
    paired,
    verdict,
)

CLOCKS = ("train_seconds", "nocap_seconds", "wall_seconds")
MANY_COMPARISONS = 5
Runs = dict[int, Run]


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
    return found


def _changed(run: Run) -> str:
    return (run.manifest["code"] or {}).get("diff", "")


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


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None when there is nothing or any value is missing: a mean of the rest would flatter."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def compared(runs: Runs, reference: Runs, value: Callable[[Run], float | None]) -> Estimate | None:
    """The paired estimate of a value over the seeds that both finished; None without any."""
    pairs = [(value(reference[seed]), value(runs[seed])) for seed in sorted(runs) if seed in reference]
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known or len(known) < len(pairs):
        return None
    return paired([before for before, _ in known], [after for _, after in known])


def half(estimate: Estimate | None) -> float | None:
    """Half the width of the 95% interval."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / 2


def final_loss(run: Run) -> float:
    return float(result(run)["validation_loss"])


def summarise(plan: StudyPlan, jobs: Sequence[Job], skipped: dict[str, str], *, name: str) -> dict[str, Any]:
    """The summary of a study, whatever part of it is done."""
    names = list(dict.fromkeys(job.variant.name for job in jobs))
    groups: dict[str, Runs] = {name: {} for name in names}
    for job in jobs:
        if run := finished(job):
            groups[job.variant.name][job.seed] = run
    runs = [run for group in groups.values() for run in group.values()]
    reference = groups[names[0]]
    losses = {name: [final_loss(run) for run in group.values()] for name, group in groups.items()}
    # Without a target of its own a study asks for the loss that every run of the reference reaches.
    target = plan.target if plan.target is not None else max(losses[names[0]], default=None)
    tokens = min((result(run)["tokens"] for run in runs), default=None)
    seconds = min((result(run)["train_seconds"] for run in runs), default=None)
    differences = {name: compared(groups[name], reference, final_loss) for name in names[1:]}
    rows = [
        row(name, groups[name], reference, differences.get(name), tokens, seconds, target) for name in names
    ]
    if plan.target is not None:
        for made, group in zip(rows, losses.values(), strict=True):
            made["p_below_target"] = against_target(group, plan.target).p_below if group else None
    sentences = [f"{name}: {verdict(difference)}" for name, difference in differences.items()]
    floor = noise_floor(list(losses.values()))
    num_pairs = max((difference.n for difference in differences.values() if difference), default=0)
    return {
        "name": name,
        **facts(runs),
        "recipe": next(iter(reference.values())).manifest["recipe"] if reference else None,
        "seeds": list(plan.seeds),
        "clocks": {clock: mean([result(run)[clock] for run in reference.values()]) for clock in CLOCKS}
        if reference
        else None,
        "columns": columns(plan, target),
        "rows": rows,
        "kind": plan.kind,
        "reference": names[0],
        "variants": {job.variant.name: [job.variant.recipe, *job.variant.sets] for job in jobs},
        "equal_tokens": tokens,
        "equal_seconds": seconds,
        "target": target,
        "noise_floor": floor,
        # Without pairs that say otherwise, a difference of two runs has twice the variance of one.
        "detectable": detectable(floor * 2**0.5, num_pairs) if floor and num_pairs > 1 else None,
        "sentences": sentences,
        "notes": notes(plan, runs, differences),
        "failures": {job.name: str(job.failure) for job in jobs if job.state() == "failed"},
        "skipped": skipped,
    }


def row(
    name: str,
    runs: Runs,
    reference: Runs,
    difference: Estimate | None,
    tokens: int | None,
    seconds: float | None,
    target: float | None,
) -> dict[str, Any]:
    """One variant's line: seconds are `train_seconds` unless named otherwise, ratios are to the reference."""

    def averaged(value: Callable[[Run], float | None]) -> float | None:
        return mean([value(run) for run in runs.values()])

    def measured(key: str) -> float | None:
        return averaged(lambda run: result(run)[key])

    def ratio(value: Callable[[Run], float]) -> float | None:
        pairs = [(value(reference[seed]), value(run)) for seed, run in runs.items() if seed in reference]
        return fmean(after / before for before, after in pairs) if pairs else None

    def at_tokens(run: Run) -> float | None:
        return None if tokens is None else curve(run).at_tokens(tokens)

    def at_seconds(run: Run) -> float | None:
        return None if seconds is None else curve(run).at_seconds(seconds)

    by_tokens, by_seconds = (compared(runs, reference, value) for value in (at_tokens, at_seconds))
    return {
        "variant": name,
        "runs": len(runs),
        "loss": averaged(final_loss),
        "sd": noise_floor([[final_loss(run) for run in runs.values()]]),
        "difference": difference.mean if difference else None,
        "half": half(difference),
        "p": difference.p if difference else None,
        "at_tokens": averaged(at_tokens),
        "at_tokens_difference": by_tokens.mean if by_tokens else None,
        "at_tokens_half": half(by_tokens),
        "at_seconds": averaged(at_seconds),
        "at_seconds_difference": by_seconds.mean if by_seconds else None,
        "at_seconds_half": half(by_seconds),
        "seconds_to_target": averaged(lambda run: None if target is None else curve(run).seconds_to(target)),
        **{key: measured(key) for key in (*CLOCKS, "steps", "tokens", "tokens_per_second")},
        "speed_ratio": ratio(lambda run: result(run)["tokens_per_second"]),
        "peak_memory": max((result(run)["peak_memory"] or 0 for run in runs.values()), default=0) or None,
    }


def columns(plan: StudyPlan, target: float | None) -> list[dict[str, str]]:
    """The columns of the table."""
    goal = "seconds to target" if target is None else f"seconds to {target:.4f}"
    shown = [
        ("variant", "variant", ""),
        ("runs", "n", ""),
        ("loss", "loss", ".4f"),
        ("difference", "difference", "+.4f"),
        ("half", "±95%", ".4f"),
        ("p", "p", ".2g"),
        ("at_tokens", "loss at equal tokens", ".4f"),
        ("at_seconds", "loss at equal seconds", ".4f"),
        ("seconds_to_target", goal, ".1f"),
        ("train_seconds", "train seconds", ".1f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("speed_ratio", "speed", ".3f"),
    ]
    if plan.target is not None:
        shown.insert(6, ("p_below_target", f"p below {plan.target}", ".2g"))
    return [{"key": key, "title": title, "format": form} for key, title, form in shown]


def notes(plan: StudyPlan, runs: Sequence[Run], differences: dict[str, Estimate | None]) -> list[str]:
    """What limits the conclusions, in sentences."""
    found = cautions(runs)
    if len(plan.seeds) < 2:
        found.append("one seed: this screens, it proves nothing")
    if len(differences) >= MANY_COMPARISONS:
        found.append(f"{len(differences)} comparisons at 95%: expect one in twenty by chance alone")
    times = [result(run)["train_seconds"] for run in runs]
    if times and max(times) > 1.02 * median(times) and plan.minutes is None:
        found.append(
            "equal seconds are read within longer schedules, which flatters the fast; --minutes fits each "
            "schedule to the time"
        )
    return found
