"""Where the time of a training step goes, recipe by recipe.

    python -m sabrage.bench.breakdown nocap base+model.head=FusedHead --out FILE [--stage N] [--kernels N]

Which kernel of a compiled graph belongs to what, nobody says; so each region is measured alone, at the
shapes, formats, documents and windows of the step: see `sabrage.bench.regions`. What the regions leave of the
whole step is "rest": norms, residuals, casts, sums of gradients, and what the compiler gained by fusing
across regions, which can make it negative. Every region's time holds its products; "attention" is that part
of the mixers which is neither projection nor norm nor rotation. The floor is the step's matrix products at
the vendor's peak rate; "of the ceiling" counts them at the rate of the fastest product of such shapes that
this very card made just before, in bf16. Launches and idle time are what the profiler noted: see
`sabrage.bench.launches`.

The last stage of the plan is measured, or stage N, counted from 0. Writes FILE (JSON) and a chart beside it
(SVG), and with --kernels the N kernels of each step that take longest, as the profiler names them
(FILE-kernels.json). Needs a CUDA device; a recipe takes one to three minutes, most of it compiling.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sabrage.bench import launches, regions
from sabrage.bench.breakdown_chart import chart
from sabrage.bench.result import Column, table, write_result
from sabrage.bench.trial import Trial, asked, ready, rows_of, times
from sabrage.config import ConfigError
from sabrage.parts import Knobs
from sabrage.recipe import Recipe
from sabrage.run.device import DeviceFacts, probe
from sabrage.train.compiling import use_compile_cache

COLUMNS: list[Column] = [
    {"key": "recipe", "title": "recipe"},
    {"key": "tokens", "title": "tokens a step", "format": ",d"},
    {"key": "window", "title": "window", "format": ",d"},
    {"key": "step_ms", "title": "step ms", "format": ".1f"},
    {"key": "floor_ms", "title": "floor ms", "format": ".1f"},
    {"key": "head_ms", "title": "head", "format": ".1f"},
    {"key": "feedforward_ms", "title": "MLP", "format": ".1f"},
    {"key": "mixer_ms", "title": "mixer", "format": ".1f"},
    {"key": "attention_ms", "title": "of it attention", "format": ".1f"},
    {"key": "embedding_ms", "title": "embedding", "format": ".1f"},
    {"key": "optimizer_ms", "title": "optimizer", "format": ".2f"},
    {"key": "rest_ms", "title": "rest", "format": ".1f"},
    {"key": "launches", "title": "launches", "format": ",d"},
    {"key": "idle", "title": "idle", "format": ".1%"},
    {"key": "tokens_per_second", "title": "tokens/s", "format": ",.0f"},
    {"key": "mfu", "title": "MFU", "format": ".1%"},
    {"key": "of_ceiling", "title": "of the ceiling", "format": ".1%"},
    {"key": "note", "title": "note"},
]
KERNELS: list[Column] = [
    {"key": "recipe", "title": "recipe"},
    {"key": "kernel", "title": "kernel"},
    {"key": "ms", "title": "ms a step", "format": ".2f"},
    {"key": "launches", "title": "launches", "format": ",.0f"},
]
# What adds up to the step, in the order of the chart.
PARTS = ("head_ms", "feedforward_ms", "mixer_ms", "embedding_ms", "optimizer_ms", "rest_ms")


# Of a product (tokens x inner) (inner x outer): the projections of the baseline, its head last.
SHAPES = ((768, 2304), (768, 3072), (3072, 768), (768, 50_304))
TOKENS = 65_536


def ceiling(
    device: torch.device, *, tokens: int = TOKENS, shapes: Sequence[tuple[int, int]] = SHAPES
) -> float:
    """FLOP/s of the fastest bf16 product of these shapes on this device, now."""
    rates = []
    for inner, outer in shapes:
        left = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
        right = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
        out = left @ right.T
        work = partial(torch.mm, left, right.T, out=out)
        rates.append(2e3 * tokens * inner * outer / statistics.median(times(work, device)))
    return max(rates)


def stage_of(recipe: Recipe, stage: int | None) -> Knobs:
    """The knobs of a stage of the plan, by default of the last. Raises ConfigError."""
    stages = recipe.plan.stages()
    if stage is not None and not 0 <= stage < len(stages):
        raise ConfigError(f"got stage {stage}, allowed: 0 to {len(stages) - 1} for {recipe.name}")
    return stages[-1 if stage is None else stage]


def row(
    recipe: Recipe,
    facts: DeviceFacts,
    device: torch.device,
    *,
    stage: int | None = None,
    highest: float | None = None,
    kernels: int = 0,
) -> dict[str, Any]:
    """One line of the table; a recipe that this device refuses has a note alone.

    `highest` is the rate of the ceiling in FLOP/s; with `kernels` so many that take longest are "kernels".
    """
    knobs, refusals = stage_of(recipe, stage), recipe.refusals(facts)
    if refusals:
        return {"recipe": recipe.name, "note": "; ".join(refusals)}
    trial = ready(recipe, facts, device, [knobs])
    found: dict[str, Any] = {"recipe": recipe.name, "tokens": knobs.tokens_per_step, "window": knobs.window}
    found |= parts(trial, knobs, kernels)
    peak = facts.peaks.get(recipe.precision.peak())
    share = found["mfu"] * peak / highest if found["mfu"] and peak and highest else None
    return found | {"of_ceiling": share, "note": ""}


def parts(trial: Trial, knobs: Knobs, kernels: int = 0) -> dict[str, Any]:
    """The numbers of one line. The whole step comes first: timing the pieces throws its graph away."""
    step_ms = trial.step_ms(knobs)
    noted = launches.trace(trial.steps(knobs)) if trial.device.type == "cuda" else []
    # Before the optimizer spoils the weights.
    pieces, micro_batches = regions.listen(trial, knobs)
    found: dict[str, Any] = {"step_ms": step_ms, "optimizer_ms": trial.optimizer_ms(knobs)}
    found |= {f"{kind}_ms": ms for kind, ms in regions.spent(trial, pieces, micro_batches).items()}
    found["rest_ms"] = step_ms - sum(found[name] for name in PARTS if name != "rest_ms")
    found |= {"kernels": launches.longest(noted, kernels)} if kernels else {}
    return found | launches.told(noted, step_ms) | trial.rates(knobs, step_ms)


def measure(
    recipes: Sequence[str],
    *,
    stage: int | None = None,
    kernels: int = 0,
    out: Path | None = None,
    name: str | None = None,
    commit: str | None = None,
) -> list[dict[str, Any]]:
    """Measures the recipes, prints the table and, with `out`, writes it there with its chart.

    Raises ConfigError for a recipe or a stage that there is not, and where there is no CUDA device.
    """
    chosen = [asked(text) for text in recipes]
    if not chosen:
        raise ConfigError("got no recipe to take apart; name at least one, such as base")
    for recipe in chosen:
        stage_of(recipe, stage)
    if kernels < 0:
        raise ConfigError(f"got kernels={kernels}, allowed: 0 or more")
    if not torch.cuda.is_available():
        raise ConfigError("benchmarks need a CUDA device and torch sees none; check nvidia-smi")
    device = torch.device("cuda", torch.cuda.current_device())
    facts = probe(device)
    use_compile_cache(True)
    peak, highest = facts.peaks.get("bf16"), ceiling(device)
    title = f"{facts.name}: " + (f"bf16 peak {peak / 1e12:,.0f}, " if peak else "")
    title += f"products reach {highest / 1e12:,.0f} TFLOP/s"
    rows: list[dict[str, Any]] = []
    longest: list[dict[str, Any]] = []
    asked_for: dict[str, Any] = {"stage": stage, "highest": highest, "kernels": kernels}
    for found in rows_of(chosen, lambda recipe: [row(recipe, facts, device, **asked_for)]):
        longest += [{"recipe": found["recipe"], **kernel} for kernel in found.pop("kernels", [])]
        rows.append(found)
        # After every row: what was measured outlasts what stops the rest.
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            told = {"name": name or out.stem, "device": title, "commit": commit}
            write_result(out, columns=COLUMNS, rows=rows, **told)  # type: ignore[arg-type]
            out.with_suffix(".svg").write_text(chart(rows, title), encoding="utf-8")
            if longest:
                told["name"] = f"{told['name']}-kernels"
                write_result(out.with_name(f"{out.stem}-kernels.json"), columns=KERNELS, rows=longest, **told)  # type: ignore[arg-type]
    if longest:
        Console().print(table(longest, title, KERNELS))
    Console().print(table(rows, title, COLUMNS))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", help="recipes, also RECIPE+a.b=c, in the order of the table")
    parser.add_argument("--out", type=Path, help="result file (JSON); the chart lies beside it")
    parser.add_argument("--stage", type=int, help="stage of the plan, from 0; by default the last")
    parser.add_argument("--kernels", type=int, default=0, help="also the kernels that take longest, so many")
    parser.add_argument("--commit", help="commit of the code, where this copy is no git checkout")
    given = parser.parse_args(arguments)
    try:
        measure(given.recipes, stage=given.stage, kernels=given.kernels, out=given.out, commit=given.commit)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
