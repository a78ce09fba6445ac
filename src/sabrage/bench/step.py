"""What a training step costs, recipe by recipe, side by side on one device.

    python -m sabrage.bench.step base base-adamw+model.layers=6 --out FILE [--stages]

Each recipe is built and warmed up as `sabrage train` does it and fed made-up tokens: the time of a whole step
and of its optimizer alone (median, CUDA events), tokens per second, model FLOP utilisation, peak memory and
seconds to compile. It is the first step of the plan, or with --stages one of every stage, a row each: batch
and window may grow on the way. A recipe that this device refuses is a row that says so. Needs a CUDA device.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sabrage.bench.result import Column, write_result
from sabrage.bench.trial import Trial, asked, ready, rows_of
from sabrage.parts import Knobs
from sabrage.recipe import Recipe
from sabrage.run.device import DeviceFacts, probe
from sabrage.run.turn import turn
from sabrage.train.compiling import use_compile_cache

COLUMNS: list[Column] = [
    {"key": "recipe", "title": "recipe"},
    {"key": "step_ms", "title": "step ms", "format": ".1f"},
    {"key": "optimizer_ms", "title": "optimizer ms", "format": ".2f"},
    {"key": "optimizer_share", "title": "share", "format": ".1%"},
    {"key": "tokens_per_second", "title": "tokens/s", "format": ",.0f"},
    {"key": "mfu", "title": "MFU", "format": ".1%"},
    {"key": "peak_gib", "title": "peak GiB", "format": ".1f"},
    {"key": "compile_seconds", "title": "compile s", "format": ".0f"},
    {"key": "note", "title": "note"},
]
STAGE: list[Column] = [
    {"key": "stage", "title": "stage"},
    {"key": "from_step", "title": "from step", "format": ","},
    {"key": "tokens", "title": "tokens a step", "format": ",d"},
    {"key": "length", "title": "row", "format": ",d"},
    {"key": "window", "title": "window", "format": ",d"},
]


def told(stage: int, knobs: Knobs) -> dict[str, Any]:
    """What a stage of the plan is."""
    return {
        "stage": stage,
        "from_step": knobs.step,
        "tokens": knobs.tokens_per_step,
        "length": knobs.sequence_length,
        "window": knobs.window,
    }


def measure(
    recipe: Recipe, facts: DeviceFacts, device: torch.device, *, stages: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of the table: one, or one for each stage of the plan, all warmed up beforehand."""
    refusals = recipe.refusals(facts)
    if refusals:
        yield {"recipe": recipe.name, "note": "; ".join(refusals)}
        return
    chosen = recipe.plan.stages() if stages else [recipe.plan.at(0)]
    trial = ready(recipe, facts, device, chosen)
    for index, knobs in enumerate(chosen):
        # Beside a study whose runs take turns, this waits for one.
        with turn():
            found = cost(trial, knobs)
        yield {"recipe": recipe.name, **(told(index, knobs) if stages else {}), **found}


def cost(trial: Trial, knobs: Knobs) -> dict[str, Any]:
    """The numbers of one row."""
    device = trial.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_ms = trial.step_ms(knobs)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    optimizer_ms = trial.optimizer_ms(knobs)
    return {
        "step_ms": step_ms,
        "optimizer_ms": optimizer_ms,
        "optimizer_share": optimizer_ms / step_ms,
        **trial.rates(knobs, step_ms),
        "peak_gib": peak,
        "compile_seconds": trial.startup_seconds,
        "note": "",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", help="recipes, also RECIPE+a.b=c, compared in this order")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--name", default="steps", help="name of the result")
    parser.add_argument("--stages", action="store_true", help="a row for every stage of the plan")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    args = parser.parse_args(arguments)
    recipes = [asked(text) for text in args.recipes]
    device = torch.device("cuda", 0)
    facts = probe(device)
    use_compile_cache(True)
    named = {"name": args.name, "device": facts.name, "commit": args.commit}
    columns = [COLUMNS[0], *STAGE, *COLUMNS[1:]] if args.stages else COLUMNS
    rows: list[dict[str, Any]] = []
    for row in rows_of(recipes, lambda recipe: measure(recipe, facts, device, stages=args.stages)):
        # After every row: what was measured outlasts what stops the rest.
        rows.append(row)
        write_result(args.out, columns=columns, rows=rows, **named)


if __name__ == "__main__":
    main()
