"""The report: a single HTML file with leaderboards, charts, studies, benchmarks and the environment.

Everything is inside the file, so it opens without a network and can be sent to somebody. It is made from
run folders and result files only, also while the runs go on.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sabrage.report import history
from sabrage.report.bars import intervals, result_bars, step_bars, wall_bars
from sabrage.report.curve import Look, Series, draw
from sabrage.report.difference import recipe_rows
from sabrage.report.figure import drawn
from sabrage.report.leaderboard import Entry, Group, leaderboard, make_groups, remarks
from sabrage.report.sources import Sources, read_sources
from sabrage.report.tables import cells, source
from sabrage.run.folder import RunFolder
from sabrage.run.units import count, duration, size

PAGE, LOSS = "report.html", "loss (nats per token)"
CLOCKS = {
    "train_seconds": ("train", "training steps only"),
    "nocap_seconds": ("nocap", "since step 0, compile included, validation left out"),
    "wall_seconds": ("wall", "since the process started, everything"),
}
# Together they keep the page under a megabyte: a point is written twice, in the drawing and to point at.
POINTS_OF_A_PAGE, POINTS_OF_A_LINE = 16_000, 1000
CHARACTERS_OF_DIFFS = 120_000


def write_page(run_folder: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path; works while the run goes on, too."""
    return write_report([run_folder], out=RunFolder(run_folder).path / PAGE)


def write_report(paths: Sequence[Path], *, out: Path) -> Path:
    """Writes the page of runs, studies and result files to `out`. Raises ValueErrors that say the remedy."""
    page = render_page(read_sources(paths))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def render_page(sources: Sources) -> str:
    """The page's HTML."""
    # Strict: a name that the template misspells is an error, not an empty place on the page.
    environment = Environment(
        loader=PackageLoader("sabrage.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    groups = make_groups(sources.runs)
    most = max(16, min(POINTS_OF_A_LINE, POINTS_OF_A_PAGE // max(1, 8 * len(sources.runs))))
    alone = groups[0].entries[0] if len(sources.runs) == 1 else None
    return environment.get_template("page.html").render(
        title=_title(sources, groups),
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        alone=alone,
        figures=list(_figures(alone)) if alone else [],
        groups=[_group(group, most) for group in groups],
        studies=[_study(name, summary) for name, summary in sources.studies],
        results=[
            (result, cells(result), source(result), list(result_bars(result))) for result in sources.results
        ],
        samples=[
            (entry.variant.label, entry.facts["sample"])
            for group in groups
            for entry in group.entries
            if "sample" in entry.facts
        ][:4],
        environment=list(_shared([entry for group in groups for entry in group.entries])),
        diffs=_diffs(sources),
    )


def _title(sources: Sources, groups: Sequence[Group]) -> str:
    if len(sources.studies) == 1:
        return sources.studies[0][0]
    if len(sources.runs) == 1:
        return groups[0].variants[0].label
    if not sources.runs and len(sources.results) == 1:
        return str(sources.results[0]["name"])
    return f"{len(sources.runs)} runs" if sources.runs else "Results"


def _group(group: Group, most: int) -> dict[str, Any]:
    """What the template shows of a group of runs."""
    columns, rows = leaderboard(group)
    first = {entry.variant.label: entry.run for entry in reversed(group.entries)}
    ordered = {variant.label: first[variant.label] for variant in group.variants}
    keys = {
        variant.label: [entry.key for entry in group.entries if entry.variant is variant]
        for variant in group.variants
    }
    return {
        "group": group,
        "columns": columns,
        "rows": rows,
        "remarks": list(remarks(group)),
        "keys": keys,
        "charts": list(_charts(group, most)),
        "small": list(_small_charts(group, most // 2)),
        "bars": [bars for bars in (wall_bars(ordered), step_bars(ordered)) if bars],
        "legality": {entry.variant.label: entry.legality for entry in group.entries},
        "recipe": list(recipe_rows(group.variants[0].recipe))[1:],
    }


def _series(group: Group, points: Mapping[str, history.Points], look: Look = "line") -> list[Series]:
    """A line for every run; `points` are by the run's key."""
    return [
        Series(_name(group, entry), points[entry.key], entry.key, entry.variant.colour, look)
        for entry in group.entries
    ]


def _name(group: Group, entry: Entry) -> str:
    if len(group.entries) == 1:
        return ""
    same = sum(other.variant is entry.variant for other in group.entries)
    return entry.variant.label + (f", seed {entry.run.manifest['seed']}" if same > 1 else "")


def _charts(group: Group, most: int) -> Iterator[tuple[str, Markup]]:
    """(title, drawing) of the losses; validation in front of training."""
    runs = {entry.key: entry.run for entry in group.entries}
    for against, title, x_label in (
        ("tokens", "Loss against tokens", "tokens trained on"),
        ("train_seconds", "Loss against seconds", "train seconds"),
    ):
        training = {key: history.train_loss(run, against) for key, run in runs.items()}
        validation = {key: history.validation_loss(run, against) for key, run in runs.items()}
        lines = [*_series(group, training, "faint"), *_series(group, validation, "dots")]
        yield title, draw(lines, x_label=x_label, y_label=LOSS, target=group.target, most=most)


# How a reading of the log is shown: (title, unit, factor); any other one by its own name.
READINGS = {
    "tokens_per_second": ("Throughput", "tokens per second", 1.0),
    "mfu": ("Model FLOP utilisation", "percent of the peak", 100.0),
    "memory": ("Memory", "GiB at most", 2.0**-30),
}


def _small_charts(group: Group, most: int) -> Iterator[tuple[str, Markup]]:
    """(title, drawing) of the schedule and of every reading, against steps."""
    shown = {entry.key: dict(history.readings(entry.run)) for entry in group.entries}
    for name in dict.fromkeys([*READINGS, *(name for found in shown.values() for name in found)]):
        words = name.replace("_", " ")
        title, unit, factor = READINGS.get(name, (words, words, 1.0))
        points = {key: [(x, factor * y) for x, y in found.get(name, [])] for key, found in shown.items()}
        if any(points.values()):
            yield title, _small(group, points, unit, most, from_zero=name in READINGS)
    rates = {entry.key: history.learning_rate(entry.run) for entry in group.entries}
    if any(rates.values()):
        unit = "share of the peak"
        yield "Learning-rate schedule", _small(group, rates, unit, most, from_zero=True)


def _small(
    group: Group, points: Mapping[str, history.Points], unit: str, most: int, *, from_zero: bool
) -> Markup:
    lines = _series(group, points)
    return draw(lines, x_label="step", y_label=unit, from_zero=from_zero, width=360, height=240, most=most)


def _figures(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """(name, value, explanation) of the numbers at the top of the page of one run."""
    facts = entry.facts
    if facts.get("validation_loss") is not None:
        loss = float(facts["validation_loss"])
        yield "validation loss", f"{loss:.4f}", "nats per token, the last one"
    for key, (name, meaning) in CLOCKS.items():
        if facts.get(key) is not None:
            yield name, duration(facts[key]), meaning
    if facts.get("tokens_per_second"):
        yield "speed", count(facts["tokens_per_second"]), "tokens per second of training"
    if facts.get("mfu"):
        yield "MFU", f"{facts['mfu']:.1%}", "of the device's peak matrix rate"
    if facts.get("peak_memory"):
        yield "memory", size(facts["peak_memory"]), "most that was allocated on the device"


def _study(name: str, summary: dict[str, Any] | None) -> dict[str, Any]:
    """What the template shows of a study; `zero` and `intervals` are empty for a race."""
    if summary is None:
        return {"name": name, "summary": None}
    explored = [(float(steps), loss) for steps, loss in summary.get("explored", {}).items()]
    race = draw(
        [Series("one seed", sorted(explored), look="dots")] if explored else [],
        x_label="steps of the run",
        y_label=LOSS,
        target=summary.get("target"),
    )
    zero, found = intervals(summary)
    return {
        "name": name,
        "summary": summary,
        "table": cells(summary),
        "zero": zero,
        "intervals": found,
        "race": race if explored else None,
        "charts": list(drawn(summary)),
        "source": source(summary),
    }


def _environment(entry: Entry) -> Iterator[tuple[str, str]]:
    """(name, value) of what a run was made with."""
    manifest = entry.run.manifest
    device = manifest["device"]
    yield "started", manifest["started"].replace("T", " ").replace("+00:00", " UTC")
    yield "device", f"{device['name']}, {size(device['memory'])}"
    versions = (f"{name} {version}" for name, version in manifest["versions"].items() if version)
    yield "versions", ", ".join(versions)
    code = manifest["code"]
    if code and code["commit"]:
        yield "commit", code["commit"] + (" with uncommitted changes" if code["dirty"] else "")
    yield "seed", str(manifest["seed"])
    yield "command", " ".join(manifest["command"])
    if manifest["backends"]:
        yield "backends", ", ".join(f"{name}: {choice}" for name, choice in manifest["backends"].items())
    yield "track", manifest["track"]
    for _, name, value in recipe_rows(manifest["data"], name="data"):
        if value:
            yield name if name == "data" else f"data: {name}", value


def _shared(entries: Sequence[Entry]) -> Iterator[tuple[str, str, str]]:
    """(name, value, runs it holds for) of the environments; no runs where it holds for all."""
    holders: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        for name, value in dict(_environment(entry)).items():
            holders.setdefault(name, {}).setdefault(value, []).append(entry.run.path.name)
    for name, values in holders.items():
        for value, runs in values.items():
            yield name, value, "" if len(runs) == len(entries) else ", ".join(runs)


def _diffs(sources: Sources) -> list[tuple[str, str]]:
    """(run, uncommitted changes), each different text once, as far as there is room on the page."""
    found: dict[str, str] = {}
    for run in sources.runs:
        diff = (run.manifest["code"] or {}).get("diff", "")
        if diff and diff not in found.values():
            room = CHARACTERS_OF_DIFFS - sum(map(len, found.values()))
            found[run.path.name] = diff[:room] + (
                "" if len(diff) <= room else "\n(the manifest has the rest)"
            )
    return list(found.items())
