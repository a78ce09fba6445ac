"""What a longer context costs and brings: recipes trained at several row lengths, at equal tokens per step.

Every cell, a variant at one length, is an ordinary run in a process of its own, validated in rows of the
length that it trained on. The last validation is told by the position in the row: targets far into their row
have a longer context, so that a curve which goes on falling shows that the context is used. All cells read
the same blocks of the data in the same order. Those that keep documents apart in training do so in validation
as well.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from sabrage.config import Part, override
from sabrage.recipe import Recipe
from sabrage.run.folder import Run
from sabrage.study.launch import Job, Launcher
from sabrage.study.plan import StudyError, Variant, fitted
from sabrage.study.runner import blocks_of, carry_out, claim, finished
from sabrage.study.summary import CLOCKS, cautions, facts, failures, final_loss, mean, result

Stretches = Sequence[tuple[int, int, float]]
OUT_OF_MEMORY = ("out of memory", "does not fit into this device's memory")
COLUMNS = [
    ("variant", "variant", ""),
    ("length", "length", ",d"),
    ("outcome", "outcome", ""),
    ("loss", "loss", ".4f"),
    ("shared_loss", "loss at shared positions", ".4f"),
    ("last_loss", "loss in the last stretch", ".4f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("memory_gib", "memory GiB", ".1f"),
    ("train_seconds", "train seconds", ".1f"),
]


@dataclass(frozen=True, kw_only=True)
class ContextPlan(Part):
    """Variants times lengths (tokens of a row, in training and in validation) times seeds.

    At most one of `steps` and `tokens` sets the length of every run; without any, each recipe says its own.
    """

    variants: tuple[Variant, ...]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    tokens: int | None = None

    def check(self) -> Self:
        """The plan itself when every cell can be run. Raises StudyError or ConfigError."""
        if not self.variants or not self.seeds or not self.lengths or min(self.lengths) < 1:
            raise StudyError(
                f"got lengths {self.lengths}; give recipes, seeds and lengths of 1 or more tokens"
            )
        given = [value for value in (self.steps, self.tokens) if value is not None]
        if len(given) > 1 or any(value < 1 for value in given):
            raise StudyError(f"got steps={self.steps}, tokens={self.tokens}; give at most one, above 0")
        cells = [cell.make() for cell, _, _ in cells_of(self)]
        slugs = [cell.slug for cell, _, _ in cells_of(self)]
        if len(set(slugs)) < len(slugs):
            raise StudyError(f"two cells have the same name: {', '.join(slugs)}; name each once")
        scored = {recipe.budget.evaluation_tokens for recipe in cells}
        trained = {recipe.plan.tokens() for recipe in cells}
        if len(scored) > 1 or len(trained) > 1:
            raise StudyError(
                f"cells that train on {sorted(trained)} tokens and score {sorted(scored)} do not compare; "
                "give --tokens, and the same budget.evaluation_tokens to all"
            )
        return self

    def at_length(self, recipe: Recipe, length: int) -> Recipe:
        """The recipe in rows of `length`, in blocks that rows of every length of the plan divide."""
        recipe = fitted(recipe, steps=self.steps, tokens=self.tokens)
        documents = recipe.budget.evaluation_documents or recipe.data.separates
        for path, limit in recipe.model.max_lengths().items():
            recipe = override(recipe, f"{path}={max(limit, length)}")
        return replace(
            recipe,
            data=replace(recipe.data, block_tokens=math.lcm(recipe.data.block_tokens, *self.lengths)),
            plan=replace(recipe.plan, sequence_length=length),
            budget=replace(
                recipe.budget, evaluation_length=length, evaluation_documents=documents, by_position=True
            ),
            runtime=replace(recipe.runtime, micro_batch=0),
        )


@cache
def cells_of(plan: ContextPlan) -> list[tuple[Variant, Variant, int]]:
    """(cell, its variant, its length), all lengths of a variant after another."""
    return [
        (
            replace(variant.become(plan.at_length(variant.make(), length)), name=f"{variant.name}@{length}"),
            variant,
            length,
        )
        for variant in plan.variants
        for length in plan.lengths
    ]


def run_context(plan: ContextPlan, folder: Path, launcher: Launcher) -> list[Job]:
    """Carries the plan out and returns its jobs, whatever became of them. Raises StudyError.

    Neither a finished cell is repeated nor one that ran out of memory.
    """
    claim(folder, plan.check())
    cells = [cell for cell, _, _ in cells_of(plan)]
    jobs = [job for block in blocks_of(folder / "runs", cells, plan.seeds) for job in block]
    carry_out([[job] for job in jobs if not out_of_memory(job)], launcher)
    return jobs


def out_of_memory(job: Job) -> bool:
    """Whether the run failed for want of memory."""
    if job.state() != "failed":
        return False
    said = "\n".join(json.loads(job.failure.read_text())["last_lines"])
    return any(words in said.lower() for words in OUT_OF_MEMORY)


def summarise_context(plan: ContextPlan, jobs: Sequence[Job], *, name: str) -> dict[str, Any]:
    """The summary, whatever part of it is done; also a result file for the tables of the documents."""
    by_cell: dict[str, list[Job]] = {}
    for job in jobs:
        by_cell.setdefault(job.variant.name, []).append(job)
    shared = min(plan.lengths)
    rows = [
        row(variant.name, length, by_cell[cell.name], shared=shared)
        for cell, variant, length in cells_of(plan)
    ]
    runs = [run for job in jobs if (run := finished(job))]
    first = finished(jobs[0])
    return {
        "name": name,
        **facts(runs),
        "recipe": first.manifest["recipe"] if first else None,
        "seeds": list(plan.seeds),
        "clocks": {clock: result(first)[clock] for clock in CLOCKS} if first else None,
        "columns": [{"key": key, "title": title, "format": form} for key, title, form in COLUMNS],
        "rows": rows,
        "kind": "context",
        "variants": {cell.name: [cell.recipe, *cell.sets] for cell, _, _ in cells_of(plan)},
        "charts": charts(rows, plan),
        "sentences": [sentence for made in rows if (sentence := told(made, shared))],
        "notes": [
            f"the shared positions are the first {shared:,} of a row; stretches hold different targets, so "
            "that the fewer are scored, the more of their differences is chance",
            *cautions(runs),
            *(["one seed: this screens, it proves nothing"] if len(plan.seeds) < 2 else []),
        ],
        "failures": failures(job for job in jobs if not out_of_memory(job)),
    }


def row(variant: str, length: int, jobs: Sequence[Job], *, shared: int) -> dict[str, Any]:
    """One cell's line: means over its done runs, or what became of it."""
    runs = [run for job in jobs if (run := finished(job))]
    made: dict[str, Any] = {"variant": variant, "length": length, "runs": len(runs), "by_position": []}
    if not runs:
        return made | {"outcome": "out of memory" if any(map(out_of_memory, jobs)) else jobs[0].state()}
    stretches = by_position(runs)
    made |= {"outcome": "done", "by_position": stretches, "loss": fmean(map(final_loss, runs))}
    made["shared_loss"] = mean_within(stretches, shared)
    made["last_loss"] = stretches[-1][2]
    for key in ("tokens_per_second", "train_seconds", "tokens"):
        made[key] = mean(result(run)[key] for run in runs)
    most = max(result(run)["peak_memory"] or 0 for run in runs)
    return made | {"memory_gib": most / 2**30 if most else None}


def by_position(runs: Sequence[Run]) -> list[tuple[int, int, float]]:
    """(first, end, mean loss over the runs) of every stretch of positions."""
    each = [result(run)["by_position"] for run in runs]
    return [
        (same[0][0], same[0][1], fmean(float(loss) for *_, loss in same)) for same in zip(*each, strict=True)
    ]


def mean_within(stretches: Stretches, end: int) -> float:
    """The mean loss of the positions before `end`, by the stretches that end there or earlier."""
    inside = [(last - first, loss) for first, last, loss in stretches if last <= end]
    return sum(width * loss for width, loss in inside) / sum(width for width, _ in inside)


def told(made: dict[str, Any], shared: int) -> str | None:
    """What the positions beyond those that all lengths share bring in this cell."""
    if made["outcome"] != "done" or made["length"] == shared:
        return None
    gain = made["shared_loss"] - made["last_loss"]
    return (
        f"{made['variant']} at {made['length']:,}: the last stretch of positions is "
        f"{'better' if gain > 0 else 'worse'} than the first {shared:,} by {abs(gain):.4f} nats"
    )


def charts(rows: Sequence[dict[str, Any]], plan: ContextPlan) -> list[dict[str, Any]]:
    """Charts as plain data, (x, y) points by the name of a line, for whoever draws them."""
    done = [made for made in rows if made["outcome"] == "done"]

    def against_length(key: str) -> dict[str, list[tuple[float, float]]]:
        """A line for every variant that has such a number."""
        lines = {
            variant.name: [
                (made["length"], made[key]) for made in done if made["variant"] == variant.name and made[key]
            ]
            for variant in plan.variants
        }
        return {name: points for name, points in lines.items() if points}

    positions = {
        f"{made['variant']} @ {made['length']:,}": [
            ((first + end) / 2, loss) for first, end, loss in made["by_position"]
        ]
        for made in done
    }
    shown = [
        ("Loss by the position in the row", "position", "loss (nats per token)", positions),
        ("Loss at equal tokens", "tokens of a row", "loss (nats per token)", against_length("loss")),
        ("Speed", "tokens of a row", "tokens per second", against_length("tokens_per_second")),
        ("Memory", "tokens of a row", "GiB at most", against_length("memory_gib")),
    ]
    return [
        {"title": title, "x": x, "y": y, "log_x": True, "lines": lines}
        for title, x, y, lines in shown
        if lines
    ]
