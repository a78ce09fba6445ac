"""`sabrage report` and `sabrage watch`: what came of runs, and how one stands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Report:
    """Make one HTML page of runs, studies and result files: leaderboard, charts, differences, environment.

    The page opens without a network and can be sent to somebody. Runs may still be going on.

    Try:
      sabrage report runs/demo-20260101-120000
      sabrage report runs/* results/kernels.json --out compare.html
      sabrage report studies/NAME
      sabrage report --markdown
    """

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH...")] = ()
    """Folders of runs or studies, folders that hold runs, and files of results/."""

    out: Path | None = None
    """The page; by default report.html in the folder where only one is given, else in this one."""

    markdown: bool = False
    """Bring the tables of README.md and docs/, and the charts beside results/, up to date with results/."""

    def run(self) -> int:
        from sabrage.cli.console import say
        from sabrage.report.figure import write_figures
        from sabrage.report.page import PAGE, write_report
        from sabrage.report.tables import write_tables

        if self.markdown:
            written = [f"tables brought up to date: {document}" for document in write_tables(Path())]
            written += [f"chart brought up to date: {drawing}" for drawing in write_figures(Path())]
            for line in written or ["the tables and charts of the documents are up to date"]:
                say(line, markup=False)
        if self.paths or not self.markdown:
            alone = len(self.paths) == 1 and self.paths[0].is_dir()
            out = self.out or (self.paths[0] / PAGE if alone else Path(PAGE))
            say(f"report: {write_report(self.paths, out=out)}", markup=False)
        return 0


@dataclass(frozen=True)
class Watch:
    """Show how a run stands, live: progress, losses, speed, memory and clocks; ends when the run does.

    It only reads the run's folder, so it may start, stop and start again at any time.

    Try:
      sabrage watch
      sabrage watch runs/demo-20260101-120000 --once
    """

    run_folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """Folder of the run; by default the newest one in runs/."""

    once: bool = False
    """Show one frame and end."""

    def run(self) -> int:
        from rich.console import Console

        from sabrage.report.watch import newest, watch

        watch(self.run_folder or newest(), Console(highlight=False), once=self.once)
        return 0
