"""`sabrage list`, `sabrage show` and `sabrage doctor`: what there is, what it costs and what runs here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from sabrage.recipe import Recipe
    from sabrage.run.device import DeviceFacts
    from sabrage.run.doctor import Needs


@dataclass(frozen=True)
class List:
    """Name every recipe, with one line each.

    Try:
      sabrage list
    """

    def run(self) -> int:
        from rich.console import Console
        from rich.table import Table

        from sabrage.recipes import RECIPES

        table = Table("recipe", "what it is", box=None)
        for name, recipe in RECIPES.items():
            table.add_row(f"[bold]{name}[/bold]", recipe.summary)
        Console().print(table)
        return 0


@dataclass(frozen=True)
class Show:
    """Show a recipe: every part and value, parameters, FLOPs per token, memory and tokens needed.

    Each line of the parts is a field that `--set` can change.

    Try:
      sabrage show nocap
      sabrage show demo --set model.layers=6
      sabrage show nocap --json
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Name of the recipe."""

    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change a field first: a.b=c, as often as needed."""

    json: bool = False
    """Print the recipe as JSON and nothing else."""

    def run(self) -> int:
        from sabrage.config import leaves, to_json
        from sabrage.recipes import changed

        recipe = changed(self.recipe, self.set)
        if self.json:
            print(json.dumps(to_json(recipe), indent=2))
            return 0
        for path, value in leaves(recipe):
            print(f"{path} = {json.dumps(value)}")
        print()
        show_costs(recipe.validate())
        return 0


def show_costs(recipe: "Recipe") -> None:
    """Parameters, FLOPs, tokens and memory by micro-batch."""
    from sabrage.model.counts import (
        flops_per_token,
        memory_estimate,
        num_active,
        num_parameters,
        objective_parameters,
    )
    from sabrage.run.units import count, size

    length = recipe.plan.at(0).sequence_length
    tokens = recipe.plan.tokens()
    flops = flops_per_token(recipe.model, length, recipe.objective)
    print(f"parameters        {num_parameters(recipe.model):,}")
    print(f"active parameters {num_active(recipe.model):,} (those that one token uses)")
    if more := objective_parameters(recipe.objective, recipe.model):
        print(f"in training only  {more:,} more, the objective's")
    print(f"FLOPs per token   {flops:,} (forward and backward matrix products, {length:,} tokens of context)")
    print(f"tokens needed     {tokens:,} ({tokens / 1e8:.2f} shards of 100M)")
    print(f"FLOPs in all      {count(flops * tokens)}")
    wide = recipe.precision.wide()
    rows = [1 << power for power in range(8) if (length << power) <= recipe.plan.at(0).tokens_per_step]
    estimates = (
        memory_estimate(recipe.model, n * length, objective=recipe.objective, wide=wide) for n in rows
    )
    sizes = (f"{n}: {size(estimate)}" for n, estimate in zip(rows, estimates, strict=True))
    print(f"memory by rows of a micro-batch (estimate)   {', '.join(sizes)}")


@dataclass(frozen=True)
class Doctor:
    """Look at this machine and say for each recipe whether it runs here, and if not, why.

    Try:
      sabrage doctor
      sabrage doctor --device cpu
    """

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    def run(self) -> int:
        from rich.console import Console

        from sabrage.cli.choose import data_folder, named_device
        from sabrage.recipes import RECIPES
        from sabrage.run.doctor import examine, judge, render

        folders = {Path(path) for recipe in RECIPES.values() if (path := data_folder(recipe))}
        found = examine(named_device(self.device), folder=Path(), data_folders=sorted(folders))
        verdicts = [judge(needs(recipe, found.device), found) for recipe in RECIPES.values()]
        Console().print(render(found, verdicts))
        return 0


def needs(recipe: "Recipe", facts: "DeviceFacts") -> "Needs":
    """What the recipe asks of this device."""
    from sabrage.cli.choose import data_folder
    from sabrage.model.counts import memory_estimate, num_parameters
    from sabrage.run.doctor import Needs, find_data
    from sabrage.train.loop import micro_batch_tokens

    wide = recipe.precision.wide()
    length = recipe.plan.at(0).sequence_length
    rows = (length, micro_batch_tokens(recipe, facts, size=1))
    smallest, default = (
        memory_estimate(recipe.model, tokens, objective=recipe.objective, wide=wide) for tokens in rows
    )
    folder = data_folder(recipe)
    missing = None
    if folder and find_data(Path(folder)).num_shards == 0:
        missing = f"no shards in {folder}; fetch them with: sabrage data fineweb"
    return Needs(
        name=recipe.name,
        num_parameters=num_parameters(recipe.model),
        smallest_memory=smallest,
        default_memory=default,
        refusal="; ".join(recipe.refusals(facts)) or None,
        missing_data=missing,
    )
