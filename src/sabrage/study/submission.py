"""What a submission to the NoCap benchmark may be: the runs of one recipe, the baseline's, and the rules.

One GPU; FineWeb, at most 50 training shards; the mean loss over the first 1,048,576 validation targets at or
below 3.3821; a legal model; the exact baseline on the same GPU; all code in a commit. Every rule that is
broken is told at once.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from sabrage.config import ConfigError, diff, from_json
from sabrage.recipe import Recipe
from sabrage.recipes import find
from sabrage.run.folder import Run, RunFolder, read_run
from sabrage.run.manifest import code_state
from sabrage.study.launch import WHOLE
from sabrage.study.plan import StudyError, Variant
from sabrage.study.runner import PLAN

TARGET = 3.3821
TARGETS = 1_048_576
MAX_SHARDS = 50
TRAIN_NAMES = frozenset(f"fineweb_train_{number:06d}.bin" for number in range(1, MAX_SHARDS + 1))
VALIDATION_NAMES = ["fineweb_val_000000.bin"]
BASELINE = "nocap"
# Where the data lies and how the work is laid out change nothing of what the baseline is.
LAYOUT = ("name", "summary", "data", "runtime", "budget")


class SubmissionError(ValueError):
    """A submission that the rules forbid, or that cannot be put together: every reason with its remedy."""


@dataclass(frozen=True)
class Submission:
    """The runs of one recipe over seeds, the baseline's runs, and a file of the checkout of the code."""

    runs: list[Run]
    baselines: list[Run]
    code: Path

    @property
    def all_runs(self) -> list[Run]:
        return [*self.runs, *self.baselines]


def gather(
    path: Path, *, baseline: Path | None = None, variant: str | None = None, code: Path = Path(__file__)
) -> Submission:
    """The submission of a run, or of one variant of a study.

    The baseline's runs are those in the study unless one is given. Raises StudyError or RunError where runs
    cannot be found.
    """
    if RunFolder(path).manifest.is_file():
        runs, baselines = [read_run(path)], []
    else:
        groups = variants_of(path)
        baselines = [run for group in groups.values() for run in group if is_baseline(run)]
        runs = chosen_runs(path, groups, variant)
    if baseline is not None:
        baselines = [read_run(baseline)]
    return Submission(runs, baselines, code.resolve())


def variants_of(folder: Path) -> dict[str, list[Run]]:
    """The runs of a study by variant, in the order of their seeds. Raises StudyError when there are none."""
    groups: dict[str, list[Run]] = {}
    for manifest in folder.glob("runs/*--seed-*/manifest.json"):
        run = read_run(manifest.parent)
        groups.setdefault(run.path.name.rpartition("--seed-")[0], []).append(run)
    if not groups or not (folder / PLAN).is_file():
        raise StudyError(f"{folder} holds neither a run (manifest.json) nor a study with runs ({PLAN})")
    return {
        name: sorted(group, key=lambda run: run.manifest["seed"]) for name, group in sorted(groups.items())
    }


def chosen_runs(folder: Path, groups: dict[str, list[Run]], variant: str | None) -> list[Run]:
    """The runs that are submitted: the named variant's, a race's confirmation, or the only challenger's."""
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if variant is None and plan["part"] == "RacePlan":
        summary = folder / "summary.json"
        if not summary.is_file():
            raise StudyError(f"the race in {folder} has not ended; run the same command again to go on")
        last = json.loads(summary.read_text(encoding="utf-8"))["rows"][-1]
        name = replace(from_json(plan["variant"], Variant), name=f"{plan['variant']['name']}@{last['steps']}")
        # The seed that found the step count is left out: it was chosen for its luck.
        return [run for run in groups.get(name.slug, []) if run.manifest["seed"] in last["seeds"]]
    challengers = [name for name, group in groups.items() if not all(map(is_baseline, group))]
    if variant is None and len(challengers) == 1:
        return groups[challengers[0]]
    if variant not in groups:
        raise StudyError(f"got --variant {variant}, allowed: {', '.join(challengers) or 'none'}")
    return groups[variant]


def recipe_of(run: Run) -> Recipe:
    """The recipe of a run. Raises ConfigError when a part of it is not known here."""
    return from_json(run.manifest["recipe"], Recipe)


def is_baseline(run: Run) -> bool:
    """Whether the run is of the baseline's recipe, by its name or all but."""
    return run.manifest["recipe"].get("name") == BASELINE and not departures(run)


def departures(run: Run) -> list[str]:
    """The fields in which a run's recipe is not the baseline's, layout aside."""
    try:
        found = [path for path, _, _ in diff(find(BASELINE), recipe_of(run))]
    except ConfigError as error:
        return [str(error)]
    return [path for path in found if path.split(".")[0] not in LAYOUT]


def problems(submission: Submission) -> list[str]:
    """Sentences about everything that the rules forbid, each with what to do; empty when it may be sent."""
    found = []
    for run in submission.all_runs:
        found += [f"{run.path}: {problem}" for problem in run_problems(run)]
    for run in submission.runs:
        found += [f"{run.path}: {problem}" for problem in legality_problems(run)]
    found += [*group_problems(submission), *code_problems(submission)]
    return list(dict.fromkeys(found))


def run_problems(run: Run) -> Iterator[str]:
    """What is wrong with one run's end, device, data and metric."""
    manifest, data = run.manifest, run.manifest["data"]
    ending = (run.result or {}).get("ending")
    if ending == "until":
        yield "the run was to end before its plan does (budget.until); run it without"
    elif ending not in WHOLE:
        yield f"the run has not come to its end ({ending or 'no result'}); go on with --resume"
    if run.inline:
        yield (
            "was made inline, in a process that makes several runs, or took turns with others on its GPU, so "
            "that the benchmark's clock is not known; run it without --inline, and no more runs than GPUs"
        )
    if manifest["device"].get("kind") == "cpu" or manifest.get("processes", 1) != 1:
        device = manifest["device"]["name"]
        yield f"ran on {manifest.get('processes', 1)} x {device}; the benchmark is for one GPU"
    if manifest["track"] != "nocap":
        yield (
            f"is of the track {manifest['track']!r}, another data set; train on FineWeb, which `sabrage data "
            "fineweb` fetches"
        )
    names = [shard["file"] for shard in data.get("train", [])]
    if len(names) > MAX_SHARDS:
        yield f"had {len(names)} training shards, allowed: {MAX_SHARDS}; train with data.num_shards=50"
    elif strange := sorted({*names} - TRAIN_NAMES):
        yield f"trained on {', '.join(strange[:3])}; allowed: fineweb_train_000001.bin to ..._000050.bin"
    held = [shard["file"] for shard in data.get("validation", [])]
    if held != VALIDATION_NAMES:
        yield f"was validated on {', '.join(held) or 'an unknown file'}; allowed: {VALIDATION_NAMES[0]}"
    scored = manifest["recipe"]["budget"]["evaluation_tokens"]
    if scored != TARGETS:
        yield f"scored {scored:,} validation targets, the metric is the first {TARGETS:,}"


def legality_problems(run: Run) -> Iterator[str]:
    """What is wrong with the checks that were made before step 0."""
    legality = run.manifest.get("legality")
    if legality is None:
        yield "the model was not checked before step 0; train again with this version"
    elif not legality["passed"]:
        failed = [
            f"{check['name']} ({check['detail']})" for check in legality["checks"] if not check["passed"]
        ]
        yield f"the model is not legal: {'; '.join(failed)}; mend the part and see `sabrage check`"


def group_problems(submission: Submission) -> Iterator[str]:
    """What is wrong between the runs: the loss, the baseline, the same GPU and the same data."""
    runs, baselines = submission.runs, submission.baselines
    ended = [run.result["validation_loss"] for run in runs if run.result]
    losses = [float(loss) for loss in ended if loss is not None]
    # Not "above": a loss that is not a number does not meet it either.
    if losses and not fmean(losses) <= TARGET:
        yield f"the mean loss {fmean(losses):.5f} does not meet {TARGET}; train longer"
    if not runs:
        yield "there is no run to submit; finish the study"
    devices = {run.manifest["device"]["name"] for run in runs}
    named = ", ".join(sorted(devices))
    if len(devices) > 1:
        yield f"the runs are of different GPUs ({named}); submit those of one"
    if not baselines:
        yield (
            f"there is no run of the baseline on {named}; train it there with `sabrage train {BASELINE}` and "
            "name it with --baseline RUN"
        )
    for run in baselines:
        if run.result and run.result["ending"] == "target":
            yield f"{run.path}: the baseline was ended at a target; train {BASELINE} to its last step"
        if changed := departures(run):
            yield f"{run.path}: not the baseline, it differs in {', '.join(changed[:5])}; train {BASELINE}"
        if (device := run.manifest["device"]["name"]) not in devices:
            yield (
                f"{run.path}: the baseline ran on {device}, the submission on {named}; run `sabrage train "
                f"{BASELINE}` on the same GPU"
            )
    shards: dict[str, str] = {}
    for run in submission.all_runs:
        data = run.manifest["data"]
        for shard in [*data.get("train", []), *data.get("validation", [])]:
            name, digest = shard["file"], shard["sha256_of_edges"]
            if shards.setdefault(name, digest) != digest:
                yield f"{run.path}: its {name} is another file than in the other runs; fetch it again"


def code_problems(submission: Submission) -> Iterator[str]:
    """What keeps the bundle from holding the code that was run."""
    code = code_state(submission.code)
    if code is None:
        yield (
            "the code in use is no git checkout; clone the repository, install it from there (pip install -e "
            ".) and train with it"
        )
    elif code["dirty"]:
        yield "the checkout has changes that are in no commit, and the bundle would lack them; commit them"
    for run in submission.all_runs:
        ran = run.manifest.get("code") or {}
        if not ran.get("commit"):
            yield f"{run.path}: its code was no git checkout; train from a clone of the repository"
        elif ran["dirty"]:
            yield f"{run.path}: its code had changes that are in no commit; commit them and train again"
        elif code and git(submission.code, "merge-base", "--is-ancestor", ran["commit"], "HEAD").returncode:
            yield f"{run.path}: its commit {ran['commit'][:10]} is not part of this checkout; check it out"


def git(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One git command in the checkout of a file."""
    return subprocess.run(
        ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False
    )
