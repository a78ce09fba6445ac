"""The runs of a race as one result file: what each reached, what it cost, and its whole curve.

    python -m sabrage.study.race_table RUNS --out FILE [--target LOSS] [--peer FILE ...]

RUNS is a folder of runs that went to their end. A run's cost is its training seconds over the seconds of one
step of the baseline on the same card: RUN.nocap.json beside the run's folder is what `sabrage bench step
nocap` wrote there. A peer is a result file whose rows have tokens, train_seconds and loss: somebody else's
curve, drawn beside ours. Runs that did not end are told and left out. Of several seeds of a recipe the mean
is a line of its own, with p of the claim that it lies below the target (one-sided t-test).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sabrage.run.folder import Run, read_run, write_json
from sabrage.study.launch import WHOLE
from sabrage.study.plan import StudyError
from sabrage.study.statistics import against_target
from sabrage.study.summary import CLOCKS, cautions, curve, facts, final_loss, result

POINT = ("tokens", "train_seconds", "loss")
COLUMNS = (
    ("recipe", "recipe", ""),
    ("seed", "seed", ""),
    ("steps", "steps", ","),
    ("tokens", "tokens", ",d"),
    ("loss", "validation loss", ".4f"),
    ("sd", "sd over seeds", ".4f"),
    ("p", "p of loss <= {target}", ".4f"),
    ("network_loss", "of the network alone", ".4f"),
    ("train_seconds", "train s", ".1f"),
    ("nocap_seconds", "nocap s", ".1f"),
    ("wall_seconds", "wall s", ".1f"),
    ("warmup_seconds", "of it warm-up s", ".1f"),
    ("peak_gib", "peak GiB", ".1f"),
    ("base_step_seconds", "s of a baseline step", ".4f"),
    ("base_steps", "cost in baseline steps", ",.1f"),
)
# What seeds of a recipe share, and what is averaged over them: not walls, with and without compiling.
ALIKE = ("steps", "tokens")
AVERAGED = ("loss", "network_loss", "train_seconds", "peak_gib", "base_step_seconds", "base_steps")


def ended_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """(runs that went to their end, by recipe and seed, sentences about the others). Raises StudyError."""
    ended, others = [], []
    for manifest in sorted(folder.glob("*/manifest.json")):
        run = read_run(manifest.parent)
        ending = run.result["ending"] if run.result else "not ended"
        if ending in WHOLE:
            ended.append(run)
        else:
            others.append(f"{run.path.name} is left out: {ending}")
    if not ended:
        told = f" ({'; '.join(others)})" if others else ""
        raise StudyError(f"{folder} holds no run that went to its end{told}; give the folder of the runs")
    return sorted(ended, key=lambda run: (named(run), run.manifest["seed"])), others


def named(run: Run) -> str:
    """The name of the run's recipe."""
    return run.manifest["recipe"]["name"]


def baseline_seconds(run: Run) -> float | None:
    """Seconds of a baseline step on the run's card; None where it was not timed. Raises StudyError."""
    path = run.path.with_name(f"{run.path.name}.nocap.json")
    if not path.is_file():
        return None
    timed = json.loads(path.read_text(encoding="utf-8"))
    device = run.manifest["device"]["name"]
    if timed["device"] != device:
        raise StudyError(f"{path} was timed on {timed['device']} and the run is of {device}; time it there")
    milliseconds = timed["rows"][0].get("step_ms")
    return milliseconds / 1e3 if milliseconds else None


def row(run: Run) -> dict[str, Any]:
    """One run as a line of the table."""
    told, seconds = result(run), baseline_seconds(run)
    peak = told["peak_memory"]
    return {
        "recipe": named(run),
        "seed": run.manifest["seed"],
        "loss": final_loss(run),
        "network_loss": told.get("network_loss"),
        **{key: told[key] for key in ("steps", "tokens", *CLOCKS, "warmup_seconds")},
        "peak_gib": peak / 2**30 if peak else None,
        "base_step_seconds": seconds,
        "base_steps": told["train_seconds"] / seconds if seconds else None,
    }


def by_recipe(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each recipe with its own lines, in the order in which they come first."""
    recipes = dict.fromkeys(row["recipe"] for row in rows)
    return [(recipe, [row for row in rows if row["recipe"] == recipe]) for recipe in recipes]


def means(rows: Sequence[dict[str, Any]], target: float | None) -> list[dict[str, Any]]:
    """A line for each recipe of several seeds: what they reached and took on average, and how sure it is."""
    found = []
    for recipe, own in by_recipe(rows):
        if len(own) < 2:
            continue
        columns = {key: [row[key] for row in own] for key in (*ALIKE, *AVERAGED)}
        mean: dict[str, Any] = {"recipe": f"{recipe}, mean of {len(own)}"}
        mean |= {key: columns[key][0] for key in ALIKE if len(set(columns[key])) == 1}
        mean |= {key: fmean(columns[key]) for key in AVERAGED if None not in columns[key]}
        mean["sd"] = stdev(columns["loss"])
        if target is not None:
            mean["p"] = against_target(columns["loss"], target).p_below
        found.append(mean)
    return found


def points(run: Run) -> list[list[float]]:
    """(tokens, train seconds, loss) of every validation."""
    found = curve(run)
    return [list(point) for point in zip(found.tokens, found.seconds, found.losses, strict=True)]


def read_peer(path: Path) -> tuple[str, list[list[float]]]:
    """(what the line is called, its points) of somebody else's curve. Raises StudyError."""
    told = json.loads(path.read_text(encoding="utf-8"))
    try:
        return told["recipe"], [[float(each[key]) for key in POINT] for each in told["rows"]]
    except KeyError as error:
        raise StudyError(
            f"{path} lacks {error}; a peer's file has a recipe, and {', '.join(POINT)} in its rows"
        ) from error


def charts(curves: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """The losses against training seconds and against tokens, as `sabrage.report.figure` draws them."""
    shown = [("seconds of training", "train seconds", 1), ("tokens", "training tokens", 0)]
    return [
        {
            "title": f"Validation loss against {title}",
            "x": x,
            "y": "validation loss (nats per token)",
            "log_x": True,
            "lines": {name: [(point[place], point[2]) for point in line] for name, line in curves.items()},
        }
        for title, x, place in shown
    ]


def sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What each recipe reached on average, and what that cost."""
    said = []
    for recipe, own in by_recipe(rows):
        costs = [row["base_steps"] for row in own if row["base_steps"] is not None]
        text = f"{recipe}: mean loss {fmean(row['loss'] for row in own):.4f} (n={len(own)})"
        text += f" after {fmean(row['train_seconds'] for row in own):.1f} s of training"
        said.append(text + (f", {fmean(costs):,.1f} baseline steps" if len(costs) == len(own) else ""))
    return said


def race_table(
    folder: Path, *, name: str, target: float | None = None, peers: Sequence[Path] = ()
) -> dict[str, Any]:
    """The result of all runs in the folder. Raises StudyError or RunError."""
    runs, left_out = ended_runs(folder)
    rows = [row(run) for run in runs]
    lines = [*rows, *means(rows, target)]
    shown = [column for column in COLUMNS if any(column[0] in line for line in lines)]
    curves = {f"{named(run)}, seed {run.manifest['seed']}": points(run) for run in runs}
    curves |= dict(map(read_peer, peers))
    told = {line: [dict(zip(POINT, each, strict=True)) for each in found] for line, found in curves.items()}
    return {
        "name": name,
        **facts(runs),
        "recipe": None,
        "seeds": sorted({each["seed"] for each in rows}),
        "clocks": None,
        "columns": [
            {"key": key, "title": title.format(target=target), "format": form} for key, title, form in shown
        ],
        "rows": lines,
        "curves": told,
        "charts": charts(curves),
        "sentences": sentences(rows),
        "notes": [*cautions(runs), *left_out],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, writes the result file and prints what came of each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    parser.add_argument("--target", type=float, help="a loss that the mean of the seeds is held against")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="a result file with a curve")
    given = parser.parse_args(arguments)
    try:
        made = race_table(given.runs, name=given.out.stem, target=given.target, peers=given.peer)
    except ValueError as error:
        parser.error(str(error))
    made["commit"] = given.commit or made["commit"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, made)
    for each in made["rows"]:
        print(" ".join(f"{key}={value}" for key, value in each.items()))
    for sentence in (*made["sentences"], *made["notes"]):
        print(f"- {sentence}")


if __name__ == "__main__":
    main()
