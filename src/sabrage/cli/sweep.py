"""`sabrage sweep context`: what does a longer context cost, and what does it bring?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sabrage.cli.study import Common

if TYPE_CHECKING:
    from sabrage.study.context_sweep import ContextPlan


@dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Train recipes at several row lengths and equal tokens per step: speed, memory, loss, loss by position.

    Every cell of the table is a run of its own with a micro-batch fitted to the memory. A cell that runs out
    of memory is told as such; the same command goes on and repeats no finished cell.

    Try:
      sabrage sweep context base mla --tokens 23592960
      sabrage sweep context base --over model.mixers.0.window=null,1024 --over data.order=stream,documents
      sabrage sweep context demo --lengths 64 256 1024 --steps 50
    """

    axis: tyro.conf.Positional[Literal["context"]]
    """What is swept: the number of tokens of a row."""
    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")]
    """One or more recipes; a changed one is written RECIPE+a.b=c+d.e=f."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens of a row, each a divisor of the tokens of a step."""
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field and its values, every combination of which is a line: a.b=1,2, as often as needed."""
    seeds: int = 1
    """Seeds 0, 1, ... of every cell; raising it later adds runs to the same sweep."""
    steps: int | None = None
    """Steps of every run; schedules and evaluations keep their share of it."""
    tokens: int | None = None
    """Training tokens of every run, instead."""

    def run(self) -> int:
        from sabrage.report.figure import figure
        from sabrage.study.context_sweep import run_context, summarise_context
        from sabrage.study.runner import default_folder

        plan = self.plan()
        folder = self.out or default_folder(plan, kind="context", name=plan.variants[0].recipe)
        jobs = run_context(plan, folder, self.launcher())
        summary = summarise_context(plan, jobs, name=folder.name)
        status = self.conclude(summary, folder)
        for path in (folder / "summary.json", *([self.result] if self.result else [])):
            path.with_suffix(".svg").write_text(figure(summary), encoding="utf-8")
        return status

    def plan(self) -> "ContextPlan":
        """What is to be run. Raises StudyError or ConfigError."""
        from sabrage.study.context_sweep import ContextPlan
        from sabrage.study.plan import parse_variant, sweep

        variants = [
            variant
            for recipe in self.recipes
            for variant in (
                sweep(recipe, self.over, self.set) if self.over else [parse_variant(recipe, self.set)]
            )
        ]
        return ContextPlan(
            variants=tuple(variants),
            lengths=self.lengths,
            seeds=tuple(range(self.seeds)),
            steps=self.steps,
            tokens=self.tokens,
        )
