"""`sabrage submit`: a result as the NoCap benchmark wants it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Submit:
    """Write IDEA.md, RESULTS.md and the git bundle of a submission, or say which rules forbid it.

    The rules: one GPU, FineWeb and at most 50 of its training shards, the first 1,048,576 validation targets,
    a loss of 3.3821 or less, a legal model, the baseline on the same GPU, all code committed. IDEA.md is a
    draft for you to edit and is never written over.

    Try:
      sabrage submit runs/mine --baseline runs/nocap-20260101-120000
      sabrage submit studies/race-mine-1a2b3c4d --baseline runs/nocap-20260101-120000
      sabrage submit studies/compare-nocap-1a2b3c4d --variant muon
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|STUDY")]
    """Folder of a run or of a study."""

    baseline: Path | None = None
    """Run of the recipe nocap on the same GPU, where the study has none."""

    variant: str | None = None
    """Which variant of the study, where it has several."""

    log: Path = Path("LOG.md")
    """Your log: what it says did not work goes into IDEA.md."""

    out: Path | None = None
    """The folder to write; by default submissions/ and the name of the run or study."""

    def run(self) -> int:
        from sabrage.cli.console import say
        from sabrage.study.submission import gather
        from sabrage.study.submission_files import headline, write

        submission = gather(self.source, baseline=self.baseline, variant=self.variant)
        folder = self.out or Path("submissions") / self.source.resolve().name
        for path in write(submission, folder, log=self.log):
            say(str(path), markup=False)
        say(headline(submission), markup=False)
        return 0
