"""What a report is made from: run folders, study folders and result files, read from disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sabrage.report.tables import read_result
from sabrage.run.folder import Run, RunFolder, read_run

PLAN, SUMMARY = "study.json", "summary.json"


class ReportError(ValueError):
    """A path that no report can be made from: says what was found and the remedy."""


@dataclass
class Sources:
    """Runs in the order given, result files, and each study's name with its summary, None until it ends."""

    runs: list[Run] = field(default_factory=list)
    studies: list[tuple[str, dict[str, Any] | None]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def read_sources(paths: Sequence[Path]) -> Sources:
    """Reads run folders, study folders, folders of runs and result files. Raises ReportError or RunError."""
    found = Sources()
    for path in paths:
        if path.is_file():
            found.results.append(read_result(path))
        elif RunFolder(path).manifest.is_file():
            found.runs.append(read_run(path))
        elif (path / PLAN).is_file():
            found.studies.append((path.resolve().name, _summary(path / SUMMARY)))
            found.runs += _runs_within(path / "runs")
        elif inside := _runs_within(path):
            found.runs += inside
        else:
            raise ReportError(
                f"{path} holds neither a run (manifest.json) nor a study ({PLAN}) nor a result; give the "
                "folder of a run or of a study, a folder of runs, or a file of results/"
            )
    if not (found.runs or found.studies or found.results):
        raise ReportError("got no path, allowed: one or more runs, studies or result files")
    return found


def _summary(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _runs_within(folder: Path) -> list[Run]:
    """Its runs by seed and start, in which order a study's begin with its reference."""
    runs = [read_run(manifest.parent) for manifest in folder.glob("*/manifest.json")]
    return sorted(runs, key=lambda run: (run.manifest["seed"], run.manifest["started"], run.path))
