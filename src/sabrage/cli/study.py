"""`sabrage study`: is an idea worth it? Paired runs over seeds, ablations, sweeps and races."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from sabrage.study.launch import Job, Launcher
    from sabrage.study.plan import StudyPlan


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every study takes."""

    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change a field of every recipe: a.b=c, as often as needed."""
    out: Path | None = None
    """Folder of the study; by default studies/ and a name made from the plan. The same command goes on."""
    result: Path | None = None
    """Also write the summary here, such as results/NAME.json for the tables of the documents."""
    parallel: int = 0
    """Runs at a time: 0 is one for each GPU, or one on a CPU. Of more than GPUs one trains at a time on each
    while the others start and compile; then only train_seconds are told, and speeds by medians."""
    ray: str | None = None
    """Hand the runs to Ray instead: local, auto or HOST:PORT (needs the extra `ray`)."""
    inline: bool = False
    """Make the runs in one process for each GPU, which keeps data, model and compiled graphs where the next
    run would build the very same: same losses, for screening many short runs. Only train_seconds are told."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of runs that are done."""

    def launcher(self) -> "Launcher":
        """What starts the runs."""
        from sabrage.study.launch import Local, OnRay
        from sabrage.study.workplace import INLINE

        inline = INLINE if self.inline else ()
        if self.ray:
            return OnRay(address=self.ray, keep_checkpoints=self.keep_checkpoints, inline=inline)
        return Local(parallel=self.parallel, keep_checkpoints=self.keep_checkpoints, inline=inline)

    def conclude(self, summary: dict[str, Any], folder: Path) -> int:
        """Writes and shows what came of it; 1 when a run failed, a race's claim is not confirmed included."""
        from rich.console import Console

        from sabrage.report.tables import table
        from sabrage.run.folder import write_json

        write_json(folder / "summary.json", summary)
        if self.result:
            self.result.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.result, summary | {"name": self.result.stem})
        said = [*summary["sentences"], *summary["notes"]]
        said += [f"failed: {name}, see {path}" for name, path in summary.get("failures", {}).items()]
        said += [f"left out: {name}: {reason}" for name, reason in summary.get("skipped", {}).items()]
        text = "\n".join([table(summary), *(f"- {sentence}" for sentence in said)])
        (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
        Console(soft_wrap=True, highlight=False).print(text, markup=False)
        return 1 if summary.get("failures") or summary.get("confirmed") is False else 0


@dataclass(frozen=True, kw_only=True)
class Paired(Common, ABC):
    """What every study takes that runs variants times seeds."""

    seeds: int = 5
    """Seeds 0, 1, ... of every variant; raising it later adds runs to the same study."""
    steps: int | None = None
    """Steps of every run; schedules and evaluations keep their share of it."""
    tokens: int | None = None
    """Training tokens of every run, instead."""
    minutes: float | None = None
    """Minutes of training of every run, instead: a short run of each is timed first."""
    target: float | None = None
    """A loss: when was it met, and does the mean lie below it?"""

    @abstractmethod
    def plan(self) -> tuple["StudyPlan", dict[str, str]]:
        """The plan, and what is left out of it and why."""

    def run(self) -> int:
        from sabrage.study.runner import default_folder, run_study

        plan, skipped = self.plan()
        first = plan.variants[0]
        folder = self.out or default_folder(plan, kind=plan.kind, name=first.recipe)
        jobs = run_study(plan, folder, self.launcher())
        return self.conclude(self.summarise(plan, jobs, skipped, folder.name), folder)

    def summarise(
        self, plan: "StudyPlan", jobs: "list[Job]", skipped: dict[str, str], name: str
    ) -> dict[str, Any]:
        """What came of the runs."""
        from sabrage.study.summary import summarise

        return summarise(plan, jobs, skipped, name=name)

    def lengths(self) -> dict[str, Any]:
        """The fields of the plan that these options are."""
        names = ("steps", "tokens", "minutes", "target")
        return {"seeds": tuple(range(self.seeds)), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, kw_only=True)
class Compare(Paired):
    """Paired runs of recipes, interleaved on one device: how much do they differ, and is it noise?

    The first one is the reference. A changed recipe is written RECIPE+a.b=c+d.e=f.

    Try:
      sabrage study compare demo demo+model.layers=6 --seeds 3 --steps 200
      sabrage study compare base base-adamw --seeds 3
      sabrage study compare nocap muon --minutes 20
      sabrage study compare fast fast+model.head.columns=16384 --seeds 1 --set budget.until=480
    """

    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")]
    """Two or more recipes."""

    def plan(self) -> tuple["StudyPlan", dict[str, str]]:
        from sabrage.study.plan import StudyError, StudyPlan, parse_variant

        if len(self.recipes) < 2:
            raise StudyError(f"got {len(self.recipes)} recipe, allowed: two or more to compare")
        variants = tuple(parse_variant(text, self.set) for text in self.recipes)
        return StudyPlan(kind="compare", variants=variants, **self.lengths()), {}


@dataclass(frozen=True, kw_only=True)
class Ablate(Paired):
    """Which part of a recipe bought what: leave one out, and add one alone, for every part that differs.

    Every run trains on equally many tokens; --steps counts the recipe's own.

    Try:
      sabrage study ablate base --base nocap --seeds 3
      sabrage study ablate base --base nocap --alone --seeds 2 --steps 120
      sabrage study ablate base --base nocap --keep plan --keep plan.lr
    """

    recipe: tyro.conf.Positional[str]
    """The recipe to take apart."""
    base: str = "nocap"
    """The recipe that it grew from."""
    alone: bool = False
    """Only leave out, and also each trick within a part: a flag, a part around another, one of many skips."""
    keep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A part or trick, as the study names it, that is left alone; as often as needed."""
    also: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A change of the recipe as a variant too: a.b=c+d.e=f, for a trick that is a number."""

    def plan(self) -> tuple["StudyPlan", dict[str, str]]:
        from sabrage.study.plan import StudyPlan, ablation, fitted

        variants, skipped = ablation(
            self.recipe, self.base, self.set, alone=self.alone, keep=self.keep, also=self.also
        )
        lengths = self.lengths()
        if self.steps:
            whole = fitted(variants[0].make(), steps=self.steps)
            lengths |= {"steps": None, "tokens": whole.plan.tokens()}
        return StudyPlan(kind="ablate", variants=variants, **lengths), skipped


@dataclass(frozen=True, kw_only=True)
class Sweep(Paired):
    """Every combination of values of some fields; the first one is the reference.

    Try:
      sabrage study sweep demo --over optim.0.optimizer.lr=0.001,0.003,0.01 --seeds 1 --steps 200
      sabrage study sweep base --over model.layers=8,12 --over model.dim=512,768 --minutes 5
    """

    recipe: tyro.conf.Positional[str]
    """The recipe to change."""
    over: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A field and its values: a.b=1,2,3, as often as needed."""

    def plan(self) -> tuple["StudyPlan", dict[str, str]]:
        from sabrage.study.plan import StudyPlan, sweep

        variants = sweep(self.recipe, self.over, self.set)
        return StudyPlan(kind="sweep", variants=variants, **self.lengths()), {}


@dataclass(frozen=True, kw_only=True)
class Screen(Paired):
    """Many changes of one recipe at once: every run has half of them, so that each run tells of all.

    7 changes take 8 runs, 11 take 12, and each is measured as well as by as many runs of its own (Plackett
    and Burman 1946). Effects are taken to add up; run what comes out as the best again.

    Try:
      sabrage study screen demo --change plan.lr.warmdown=270 --change optim.0.optimizer.lr=0.03 --steps 100
    """

    recipe: tyro.conf.Positional[str]
    """The recipe to change."""
    change: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A change that is on or off: a.b=c or a.b=c+d.e=f, two or more times; no two of the same field."""
    seeds: int = 1
    """Seeds 0, 1, ... of every run; raising it later adds runs to the same study."""

    def plan(self) -> tuple["StudyPlan", dict[str, str]]:
        from sabrage.study.plan import StudyPlan
        from sabrage.study.screening import lettered, screening

        variants = screening(self.recipe, lettered(self.change), self.set)
        return StudyPlan(kind="screen", variants=variants, **self.lengths()), {}

    def summarise(
        self, plan: "StudyPlan", jobs: "list[Job]", skipped: dict[str, str], name: str
    ) -> dict[str, Any]:
        from sabrage.study.screening import lettered, summarise_screening

        return summarise_screening(self.recipe, lettered(self.change), jobs, name=name)


@dataclass(frozen=True, kw_only=True)
class Race(Common):
    """The fewest steps that meet a target loss: found with one seed, confirmed with fresh ones (p < 0.01).

    With --base and no --target the base's own loss is the target. With both, the cost is also told in steps
    of the base, so that results of different devices compare.

    Try:
      sabrage study race base --target 3.5 --base nocap
      sabrage study race demo+model.layers=6 --base demo --seeds 3
    """

    recipe: tyro.conf.Positional[str]
    """The recipe that races."""
    target: float | None = None
    """The validation loss to meet, in nats."""
    base: str | None = None
    """A recipe to beat, or to count the cost in."""
    seeds: int = 5
    """Fresh seeds of a confirmation."""
    grid: int | None = None
    """Step counts are multiples of this; by default a fortieth of the recipe's steps."""
    most: int | None = None
    """The most steps to try; by default four times the recipe's."""
    attempts: int = 3
    """Confirmations to try, each a grid step longer than the last."""

    def run(self) -> int:
        from sabrage.study.plan import parse_variant
        from sabrage.study.race import Race, RacePlan
        from sabrage.study.runner import default_folder

        variant = parse_variant(self.recipe, self.set)
        steps = variant.make().plan.steps
        plan = RacePlan(
            variant=variant,
            base=parse_variant(self.base, self.set) if self.base else None,
            target=self.target,
            grid=self.grid or max(1, steps // 40),
            most=self.most or 4 * steps,
            seeds=self.seeds,
            attempts=self.attempts,
        )
        folder = self.out or default_folder(plan, kind="race", name=variant.recipe)
        summary = Race(plan, folder, self.launcher()).run()
        return self.conclude(summary | {"name": folder.name}, folder)


@dataclass(frozen=True)
class Study:
    """Find out with evidence: compare recipes, take one apart, sweep its values, screen many changes at once,
    race it to a target.

    A study is a folder of ordinary runs; it can be stopped at any time and the same command goes on.

    Try:
      sabrage study compare demo demo+model.layers=6 --seeds 3 --steps 200
      sabrage study ablate base --base nocap
      sabrage study sweep demo --over optim.0.optimizer.lr=0.001,0.003 --seeds 1
      sabrage study screen demo --change plan.lr.warmdown=270 --change optim.0.optimizer.lr=0.03 --steps 100
      sabrage study race base --target 3.5 --base nocap
    """

    command: Annotated[
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Ablate, tyro.conf.subcommand("ablate")]
        | Annotated[Sweep, tyro.conf.subcommand("sweep")]
        | Annotated[Screen, tyro.conf.subcommand("screen")]
        | Annotated[Race, tyro.conf.subcommand("race")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> int:
        """Runs the chosen study; 1 when a run failed or a claim was not confirmed."""
        return self.command.run()
