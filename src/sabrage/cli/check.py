"""`sabrage check`: is it a legal model, and would its result count?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    import torch

    from sabrage.model.legality import Legality
    from sabrage.model.lm import LM
    from sabrage.recipe import Recipe


@dataclass(frozen=True)
class Check:
    """Try whether a model may see only what it has a right to see, and name the part that leaks.

    Causality by value and by gradient, batch independence, normalisation, row length, how validation is
    scored and what is trained on: on a shrunken copy on the CPU, and with --full at full size and precision.
    The command ends with 1 when a check fails.

    Try:
      sabrage check demo
      sabrage check nocap --set model.mixers.0.heads=6 --full
      sabrage check runs/demo-20260101-120000 --full --device cpu
    """

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE|RUN")]
    """Name of a recipe, or the folder of a run."""

    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change one field of the recipe: a.b=c, as often as needed."""

    full: bool = False
    """Also examine the model at its own size, row length and precision; of a run, its newest checkpoint."""

    data: Path | None = None
    """Folder of the data set, where it is not where the recipe says."""

    device: str = "auto"
    """Where --full runs: cpu, cuda, mps or auto."""

    def run(self) -> int:
        from sabrage.cli.console import say
        from sabrage.parts import DataError
        from sabrage.run.device import probe
        from sabrage.study.legality import check_data, check_full, check_model, first_batch

        recipe = self.recipe()
        documents, verdicts = False, {}
        try:
            corpus = recipe.data.open(self.data)
        except DataError as error:
            say(f"the data cannot be opened, so its use is not checked: {error}", markup=False)
        else:
            documents = first_batch(recipe, corpus).documents_BT is not None
            documents |= recipe.budget.evaluation_documents
            verdicts["data"] = check_data(recipe, corpus)
        verdicts["a shrunken copy, fp32, cpu"] = check_model(recipe, documents=documents)
        if self.full:
            device, model = self.model()
            recipe.validate(probe(device))
            title = f"full size, {type(recipe.precision).__name__}, {probe(device).name}"
            verdicts[title] = check_full(recipe, device, model=model, documents=documents)
        for title, verdict in verdicts.items():
            show(title, verdict)
        return 0 if all(verdict.passed for verdict in verdicts.values()) else 1

    @property
    def is_run(self) -> bool:
        return (Path(self.subject) / "manifest.json").is_file()

    def recipe(self) -> "Recipe":
        """The recipe in question. Raises ConfigError."""
        from sabrage.cli.choose import recipe_of_run
        from sabrage.config import ConfigError
        from sabrage.recipes import changed

        if not self.is_run:
            return changed(self.subject, self.set).validate()
        if self.set:
            raise ConfigError("a run is checked as it was; leave out --set, or name a recipe")
        return recipe_of_run(Path(self.subject)).validate()

    def model(self) -> tuple["torch.device", "LM | None"]:
        """Where the full form runs, and the trained model of a run."""
        from sabrage.cli.choose import model_of_run, named_device

        device = named_device(self.device)
        return device, model_of_run(Path(self.subject), device=device)[1] if self.is_run else None


def show(title: str, verdict: "Legality") -> None:
    """One table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "what was seen", title=title, title_justify="left", box=None)
    for check in verdict.checks:
        mark = "[green]holds[/green]" if check.passed else "[bold red]fails[/bold red]"
        table.add_row(check.name, mark, Text(check.detail))
    Console().print(table)
