"""The run folder: where everything that a run leaves behind lies, and how it is read back.

`manifest.json` says what was run, `log.jsonl` what happened, `checkpoints/` how to go on, `result.json` how
it ended. Everything but the log is written whole or not at all.
"""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from sabrage.run.log import Record, encode, read_log


class RunError(ValueError):
    """A folder that cannot be used as a run: says what was found and the remedy."""


def write_json(path: Path, data: Any) -> None:
    """Writes `data` whole or not at all: a temporary file beside `path`, synced, then renamed."""
    with whole(path) as temporary:
        temporary.write_text(encode(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The place to write a file that appears at `path` when the block ends well, synced, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Makes the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the folder's own entries durable, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def create(self, *, resume: bool = False) -> Self:
        """Makes the folder of a new run, or checks that there is one to resume. Raises RunError."""
        is_run = self.manifest.is_file()
        if resume and not is_run:
            raise RunError(
                f"{self.path} holds no run to resume (no manifest.json); give a run's folder, or start anew"
            )
        if is_run and not resume:
            raise RunError(f"{self.path} holds a run already; choose another folder, or resume that run")
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another folder")
        if not is_run and self.path.is_dir() and any(self.path.iterdir()):
            raise RunError(f"{self.path} is neither empty nor a run; choose a new or an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    @classmethod
    def fresh(cls, recipe: str, *, root: Path = Path("runs"), now: datetime | None = None) -> Self:
        """A new folder `root/<recipe>-<YYYYmmdd-HHMMSS>`, with `-2`, `-3`, ... when that is taken."""
        stamp = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
        for number in itertools.count(1):
            path = root / (f"{recipe}-{stamp}" + (f"-{number}" if number > 1 else ""))
            try:
                # Two runs started in the same second must not share a folder: mkdir decides.
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(path)
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class Run:
    """What a run folder says; `result` is None until the run has ended."""

    path: Path
    manifest: dict[str, Any]
    records: list[Record]
    result: dict[str, Any] | None

    @property
    def inline(self) -> bool:
        """Whether it shared its process or its device with other runs, or a part of it did: then only its
        train_seconds hold."""
        return any(told.get("inline", False) for told in (self.manifest, self.result or {}))

    def events(self, name: str) -> list[Record]:
        """The records of one kind, in order."""
        return [record for record in self.records if record["event"] == name]


def read_run(path: Path) -> Run:
    """Reads a run folder, also while the run goes on. Raises RunError or LogError."""
    folder = RunFolder(path)
    if not folder.manifest.is_file():
        raise RunError(f"{path} holds no run (no manifest.json); give the folder of a run")
    return Run(
        path=path,
        manifest=json.loads(folder.manifest.read_text(encoding="utf-8")),
        records=read_log(folder.log) if folder.log.exists() else [],
        result=json.loads(folder.result.read_text(encoding="utf-8")) if folder.result.exists() else None,
    )
