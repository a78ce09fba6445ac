"""`sabrage experts`: which expert of a trained model takes which kind of text?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Experts:
    """Show which expert of a run takes which kind of text, layer by layer, as a table and a page.

    The newest checkpoint reads labelled documents. The bits between kind and expert are held against what
    shuffled labels give, by documents. The page shows each expert's load, who takes what, and the entropy of
    the routers over training; the numbers lie beside it as JSON.

    Try:
      sabrage experts runs/moe-8-20260101-120000 --kinds data/kinds
      sabrage experts runs/mine --kinds data/kinds --limit 50 --out experts.html
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""

    kinds: Path
    """Folder of KIND.jsonl files, an object with a "text" a line, or of folders KIND/ of text files."""

    limit: int | None = None
    """Take the first documents of each kind only."""

    length: int | None = None
    """Take the first tokens of a document only; by default as many as a row of the validation has."""

    out: Path | None = None
    """The page; by default experts.html in the run's folder."""

    device: str = "auto"
    """cpu, cuda, mps or auto."""

    ranks: Path | None = None
    """File of the GPT-2 ranks, where they cannot be downloaded."""

    def run(self) -> int:
        from rich.console import Console
        from rich.progress import track
        from rich.table import Table

        from sabrage.cli.choose import model_of_run, named_device, tokenizer_of
        from sabrage.cli.console import say
        from sabrage.config import ConfigError
        from sabrage.report.experts import MEASURES, PAGE, table, verdict, write_experts
        from sabrage.run.folder import read_run, write_json
        from sabrage.study.experts import count_choices, examine, read_kinds

        for name, value in (("--limit", self.limit), ("--length", self.length)):
            if value is not None and value < 2:
                raise ConfigError(f"got {name} {value}, allowed: 2 or more")
        documents = read_kinds(self.kinds, limit=self.limit)
        device = named_device(self.device)
        recipe, model = model_of_run(self.run_folder, device=device)
        recipe.precision.prepare_alone(model, device)
        tokenizer, length = (
            tokenizer_of(recipe, ranks=self.ranks),
            self.length or recipe.budget.evaluation_length,
        )
        counting = count_choices(model, documents, tokenizer, recipe.precision, length=length)
        counts = list(track(counting, "reading", total=len(documents), transient=True))
        found = examine(documents, counts)
        titles, rows = table(found)
        # Who takes each kind is a column for each, and too wide for a terminal.
        shown = Table(*titles[:MEASURES], box=None)
        for row in rows:
            shown.add_row(*row[:MEASURES])
        Console().print(shown)
        say(verdict(found), markup=False)
        page = write_experts(found, read_run(self.run_folder), out=self.out or self.run_folder / PAGE)
        write_json(page.with_suffix(".json"), found)
        say(f"experts: {page}", markup=False)
        return 0
