"""What a training step costs, recipe by recipe, side by side on one device.

    python -m sabrage.bench.step base base-adamw --out FILE

Each recipe is built as `sabrage train` builds it and fed made-up tokens: the time of a whole step and of its
optimizer alone (median, CUDA events), tokens per second, model FLOP utilisation, peak memory and seconds to
compile. A recipe that this device refuses is a row that says so. Needs a CUDA device.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sabrage.bench.result import Column, write_result
from sabrage.config import resolve
from sabrage.model.counts import flops_per_token
from sabrage.optim.groups import Optimizers
from sabrage.recipe import Recipe
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts, probe
from sabrage.train.loop import build_learner, micro_batch_tokens, use_compile_cache
from sabrage.train.step import TrainStep
from sabrage.train.warmup import made_up
from sabrage.train.world import World

STEPS = 7
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


def milliseconds(work: Callable[[], Any], *, repeats: int = STEPS) -> float:
    """Median device time of `work` over `repeats` runs."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(recipe: Recipe, facts: DeviceFacts, device: torch.device) -> dict[str, Any]:
    """One row of the table."""
    refusals = recipe.refusals(facts)
    if refusals:
        return {"recipe": recipe.name, "note": "; ".join(refusals)}
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    recipe = resolve(recipe, facts).validate(facts)
    began = time.perf_counter()
    world = World(device)
    learner = build_learner(recipe, world)
    masters = recipe.precision.masters()
    optimizers = Optimizers(recipe.optim, learner.named_parameters(), device, masters=masters)
    micro_tokens = micro_batch_tokens(recipe, facts, size=1)
    step = TrainStep(learner, optimizers, world, micro_tokens=micro_tokens, compile=True)
    knobs = recipe.plan.at(0)
    shape = (knobs.tokens_per_step // knobs.sequence_length, knobs.sequence_length)
    batch = made_up(shape, recipe.model.vocab_size, device, documents=recipe.data.separates)
    for _ in range(2):
        step(batch, knobs)
    torch.cuda.synchronize(device)
    compiled = time.perf_counter() - began
    step_ms = milliseconds(lambda: step(batch, knobs))
    for parameter in learner.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer_ms = milliseconds(lambda: optimizers.step(knobs))
    speed = knobs.tokens_per_step / step_ms * 1e3
    peak = facts.peaks.get(recipe.precision.peak())
    flops = flops_per_token(recipe.model, knobs.sequence_length, recipe.objective, active=knobs.layers)
    return {
        "recipe": recipe.name,
        "step_ms": step_ms,
        "optimizer_ms": optimizer_ms,
        "optimizer_share": optimizer_ms / step_ms,
        "tokens_per_second": speed,
        "mfu": flops * speed / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "compile_seconds": compiled,
        "note": "",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", help="names of recipes, compared in this order")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    parser.add_argument("--name", default="steps", help="name of the result")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    args = parser.parse_args(arguments)
    device = torch.device("cuda", 0)
    facts = probe(device)
    use_compile_cache(True)
    rows = []
    for name in args.recipes:
        try:
            rows.append(measure(find(name), facts, device))
        except RuntimeError as error:
            # Out of memory, or what the compiler cannot do: the others are still measured.
            rows.append({"recipe": name, "note": f"failed: {str(error).splitlines()[0]}"})
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        # After every row: what was measured outlasts what stops the rest.
        named = {"name": args.name, "device": facts.name, "commit": args.commit}
        write_result(args.out, columns=COLUMNS, rows=rows, **named)


if __name__ == "__main__":
    main()
