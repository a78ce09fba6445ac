"""The page of one run: a single HTML file with the loss curve, the clocks, the recipe and the environment.

Everything is inside the file, so it opens without a network and can be sent to somebody.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sabrage.report.curve import Series, draw
from sabrage.run.folder import Run, RunFolder, read_run
from sabrage.run.units import count, duration, size

CLOCKS = {
    "train_seconds": ("train", "training steps only"),
    "nocap_seconds": ("nocap", "since step 0, compile included, validation left out"),
    "wall_seconds": ("wall", "since the process started, everything"),
}
PAGE = "report.html"


def write_page(run_folder: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path; works while the run goes on, too."""
    run = read_run(run_folder)
    target = RunFolder(run_folder).path / PAGE
    target.write_text(render_page(run), encoding="utf-8")
    return target


def render_page(run: Run) -> str:
    """The page's HTML."""
    # Strict: a name that the template misspells is an error, not an empty place on the page.
    environment = Environment(
        loader=PackageLoader("sabrage.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    result = run.result or {}
    recipe = run.manifest["recipe"]
    target = recipe.get("budget", {}).get("target")
    return environment.get_template("run.html").render(
        title=recipe.get("name", run.path.name),
        ending=result.get("ending", "not ended"),
        started=run.manifest["started"].replace("T", " ").replace("+00:00", " UTC"),
        target=target,
        figures=list(_figures(run)),
        charts={kind: _chart(run, log_x=kind == "log", target=target) for kind in ("linear", "log")},
        sample=result.get("sample"),
        recipe=list(recipe_rows(recipe)),
        environment=list(_environment(run.manifest)),
        diff=(run.manifest["code"] or {}).get("diff", ""),
    )


def _chart(run: Run, *, log_x: bool, target: float | None) -> str:
    # float() also reads the "nan" that stands for a loss that was not a number.
    lines = [
        Series(event, [(record["step"], float(record["loss"])) for record in run.events(event)], dots=dots)
        for event, dots in (("train", False), ("validation", True))
    ]
    return draw(lines, x_label="step", y_label="loss (nats per token)", log_x=log_x, target=target)


def _figures(run: Run) -> Iterator[tuple[str, str, str]]:
    """(name, value, explanation) of the numbers at the top of the page."""
    result = run.result or {}
    validations = run.events("validation")
    last = (validations[-1] if validations else {}) | result
    loss = result.get("validation_loss", last.get("loss"))
    if loss is not None:
        yield "validation loss", f"{float(loss):.4f}", "nats per token, the last one"
    for key, (name, meaning) in CLOCKS.items():
        if key in last:
            yield name, duration(last[key]), meaning
    if result.get("tokens_per_second"):
        yield "speed", count(result["tokens_per_second"]), "tokens per second of training"
    if result.get("mfu"):
        yield "MFU", f"{result['mfu']:.1%}", "of the device's peak matrix rate"
    if result.get("peak_memory"):
        yield "memory", size(result["peak_memory"]), "most that was allocated on the device"


def recipe_rows(value: Any, *, name: str = "recipe", depth: int = 0) -> Iterator[tuple[int, str, str]]:
    """(depth, name, value) for every part and plain value of a recipe's JSON, in its own order."""
    if isinstance(value, dict):
        yield depth, name, str(value.get("part", ""))
        for key, item in value.items():
            if key != "part":
                yield from recipe_rows(item, name=key, depth=depth + 1)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        yield depth, name, ""
        for index, item in enumerate(value):
            yield from recipe_rows(item, name=str(index), depth=depth + 1)
    elif isinstance(value, list):
        yield depth, name, ", ".join(map(str, value))
    else:
        yield depth, name, "none" if value is None else str(value)


def _environment(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    device = manifest["device"]
    yield "device", f"{device['name']}, {size(device['memory'])}"
    yield (
        "versions",
        ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version),
    )
    code = manifest["code"]
    if code and code["commit"]:
        yield "commit", code["commit"] + (" with uncommitted changes" if code["dirty"] else "")
    yield "seed", str(manifest["seed"])
    yield "command", " ".join(manifest["command"])
    if manifest["backends"]:
        yield "backends", ", ".join(f"{name}: {choice}" for name, choice in manifest["backends"].items())
    for _, name, value in recipe_rows(manifest["data"], name="data"):
        if value:
            yield name if name == "data" else f"data: {name}", value
