"""The files of a submission to the NoCap benchmark: IDEA.md, RESULTS.md and the git bundle.

Every number is read from the runs; speed-up = mean seconds of the baseline / mean seconds of the submission,
both by the benchmark's clock.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sabrage.config import MISSING, diff
from sabrage.recipes import find
from sabrage.run.folder import Run
from sabrage.run.units import duration
from sabrage.study.statistics import against_target
from sabrage.study.submission import (
    BASELINE,
    MAX_SHARDS,
    TARGET,
    TARGETS,
    Submission,
    SubmissionError,
    git,
    problems,
    recipe_of,
)
from sabrage.study.summary import final_loss, result

BUNDLE = "code.bundle"
NEGATIVE = re.compile(
    r"\b(negative|no gain|not help|no help|no difference|worse|slower|brings? nothing|not confirmed|refuted|"
    r"rejected|dropped|failed)\b",
    flags=re.IGNORECASE,
)


def write(submission: Submission, folder: Path, *, log: Path) -> list[Path]:
    """Writes the files and returns their paths; an IDEA.md that is there is the author's and stays.

    Raises SubmissionError naming every broken rule, and then writes nothing.
    """
    found = problems(submission)
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise SubmissionError(f"this cannot be submitted:\n{lines}")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"IDEA.md": idea(submission, log), "RESULTS.md": results(submission)}
    for name, text in texts.items():
        if name != "IDEA.md" or not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
    bundle = (folder / BUNDLE).resolve()
    branch = git(submission.code, "symbolic-ref", "--quiet", "--short", "HEAD").stdout.split()
    done = git(submission.code, "bundle", "create", str(bundle), "HEAD", *branch)
    if done.returncode:
        raise SubmissionError(f"git could not write {bundle}: {done.stderr.strip()}")
    return [*(folder / name for name in texts), folder / BUNDLE]


def idea(submission: Submission, log: Path) -> str:
    """The text of IDEA.md, for the author to go on with."""
    recipe = recipe_of(submission.runs[0])
    failures = negatives(log) or [f"(Author: what was tried and did not help; {log.name} tells of nothing.)"]
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            recipe.summary,
            "",
            "## Motivation",
            "",
            "(Author: what made you expect this to help, and what it builds on.)",
            "",
            "## Method",
            "",
            f"The baseline (`{BASELINE}`) with these fields of its recipe changed:",
            "",
            *table(("field", "baseline", "here"), method(submission)),
            "",
            "(Author: what each change does, and what it brings alone.)",
            "",
            "## Results",
            "",
            headline(submission),
            "",
            "Timing, hardware, settings and commands: `RESULTS.md`.",
            "",
            "## What did not help",
            "",
            "\n\n".join(failures),
            "",
        ]
    )


def results(submission: Submission) -> str:
    """The text of RESULTS.md."""
    run = submission.runs[0]
    device, versions = run.manifest["device"], run.manifest["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    memory = device.get("memory")
    return "\n".join(
        [
            "# Results",
            "",
            headline(submission),
            "",
            "## Timing",
            "",
            "`nocap seconds` is the benchmark's clock: from just before step 0, compile included, validation",
            "left out. `train seconds` leaves compile out, `wall seconds` counts the whole process.",
            "",
            *table(
                ("run", "seed", "steps", "tokens", "loss", "nocap seconds", "train seconds", "wall seconds"),
                map(timing, [*submission.runs, *submission.baselines]),
            ),
            "",
            "## Hardware and versions",
            "",
            f"One {device['name']}" + (f", {memory / 2**30:.1f} GiB" if memory else "") + f". {told}.",
            "",
            "## Rules kept",
            "",
            *(f"- {rule}" for rule in rules(submission)),
            "",
            "## Exact commands",
            "",
            "```sh",
            f"git clone {BUNDLE} sabrage && cd sabrage && pip install -e .",
            f"sabrage data fineweb --shards {len(run.manifest['data']['train'])}",
            *dict.fromkeys(map(command, [*submission.runs, *submission.baselines])),
            "```",
            "",
            "## Settings",
            "",
            f"Seeds {', '.join(str(run.manifest['seed']) for run in submission.runs)}; the whole recipe:",
            "",
            "```json",
            json.dumps(run.manifest["recipe"], indent=1),
            "```",
            "",
        ]
    )


def headline(submission: Submission) -> str:
    """The result in a paragraph, with what limits it."""
    runs, baselines = submission.runs, submission.baselines
    seconds, before = (fmean(result(run)["nocap_seconds"] for run in group) for group in (runs, baselines))
    losses = [final_loss(run) for run in runs]
    device = runs[0].manifest["device"]["name"]
    told = [
        f"Validation loss {fmean(losses):.5f} (target {TARGET}, n={len(runs)}) in {duration(seconds)} by the "
        f"benchmark's clock on one {device}: **{before / seconds:.2f} times as fast as the baseline**, which "
        f"took {duration(before)} on the same GPU (n={len(baselines)})."
    ]
    if len(runs) > 1:
        claim = against_target(losses, TARGET)
        told.append(f"The mean lies below the target with p = {claim.p_below:.2g} (sd {claim.sd:.5f}).")
    else:
        told.append("One seed: chance may have helped.")
    if any(result(run)["ending"] == "target" for run in runs):
        told.append("The run was ended when its curve met the target, which flatters noise.")
    return " ".join(told)


def rules(submission: Submission) -> list[str]:
    """What was checked, and what was seen."""
    runs = submission.runs
    shards = runs[0].manifest["data"]["train"]
    available, trained = sum(shard["tokens"] for shard in shards), result(runs[0])["tokens"]
    checks = [check["name"] for check in runs[0].manifest["legality"]["checks"]]
    commits = sorted({run.manifest["code"]["commit"][:10] for run in submission.all_runs})
    return [
        f"data: FineWeb, {len(shards)} of at most {MAX_SHARDS} training shards ({shards[0]['file']} to "
        f"{shards[-1]['file']}, {available:,} tokens) and the benchmark's validation shard, the same files "
        "for submission and baseline",
        f"tokens trained on: {trained:,}, {trained / available:.3f} epochs",
        f"metric: mean cross-entropy over the first {TARGETS:,} validation targets, the last validation of "
        "each run",
        f"legal model, checked before step 0: {', '.join(checks)}",
        f"baseline: `{BASELINE}` unchanged, every step, on the same GPU",
        f"code: commits {', '.join(commits)}, nothing uncommitted, all in `{BUNDLE}`",
    ]


def method(submission: Submission) -> list[tuple[str, str, str]]:
    """(field, the baseline's value, the submission's) for all that makes the recipe another one."""
    aside = ("name", "summary", "data.path", "budget.seed")
    changed = diff(find(BASELINE), recipe_of(submission.runs[0]))
    return [
        (f"`{path}`", "-" if before is MISSING else str(before), "-" if after is MISSING else str(after))
        for path, before, after in changed
        if path not in aside
    ]


def negatives(log: Path) -> list[str]:
    """The sections of a log that speak of what did not work, a level deeper."""
    if not log.is_file():
        return []
    sections = re.split(r"^(?=## )", log.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [f"#{each.strip()}" for each in sections if each.startswith("## ") and NEGATIVE.search(each)]


def timing(run: Run) -> tuple[str, ...]:
    """A run's line of the table."""
    ended = result(run)
    clocks = (f"{ended[clock]:,.1f}" for clock in ("nocap_seconds", "train_seconds", "wall_seconds"))
    counts = (f"{ended['steps']:,}", f"{ended['tokens']:,}", f"{final_loss(run):.5f}")
    return run.manifest["recipe"]["name"], str(run.manifest["seed"]), *counts, *clocks


def command(run: Run) -> str:
    """The command that made a run."""
    return shlex.join(["sabrage", *run.manifest["command"][1:]])


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
