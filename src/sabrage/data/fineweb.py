"""FineWeb as the NoCap benchmark has it: GPT-2 shards of 100M tokens from `kjj0/fineweb10B-gpt2` on the
Hugging Face hub (Penedo et al. 2024; tokenised by Keller Jordan), of which training may use the first 50.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from sabrage.data.shards import read_header
from sabrage.parts import DataError

REPOSITORY = "kjj0/fineweb10B-gpt2"
VALIDATION_NAME = "fineweb_val_000000.bin"
MAX_SHARDS = 50
SHARD_BYTES = 200_001_024
STAGING_NAME = ".fetching"
ATTEMPTS = 2

Download = Callable[[str, Path], Path]


def fetch(
    folder: Path, *, num_shards: int, download: Download | None = None, console: Console | None = None
) -> list[Path]:
    """Fetches the validation shard and the first `num_shards` training shards; returns their paths.

    Shards that are there and whole are kept, short ones fetched again; a shard appears in the folder only
    when it is whole. `download(name, staging)` puts one file of the repository under `staging` and returns
    its path. Raises ValueError for a number of shards beyond 1 to 50, and DataError when the disk is too
    small, a download fails or a file stays short; the same call again goes on where it stopped.
    """
    if not 1 <= num_shards <= MAX_SHARDS:
        raise ValueError(
            f"got {num_shards} shards, allowed: 1 to {MAX_SHARDS} (the benchmark's 5B tokens); 26 cover its "
            "baseline without a repeated token"
        )
    names = [VALIDATION_NAME, *(f"fineweb_train_{index:06d}.bin" for index in range(1, num_shards + 1))]
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in names if fault_of(folder / name) is not None]
    check_disk(folder, len(wanted))
    staging = folder / STAGING_NAME
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("shards", total=len(names), completed=len(names) - len(wanted))
        for name in wanted:
            progress.update(task, description=name)
            whole = fetch_one(name, staging, download or from_hub)
            whole.replace(folder / name)
            progress.advance(task)
        progress.update(task, description="shards")
    if staging.exists():
        shutil.rmtree(staging)
    return [folder / name for name in names]


def fetch_one(name: str, staging: Path, download: Download) -> Path:
    """The path of one whole file under `staging`; a file that comes short is fetched once more."""
    fault = None
    for _ in range(ATTEMPTS):
        try:
            path = download(name, staging)
        except Exception as error:
            # The hub's three major versions raise different families of exceptions; all mean this.
            raise DataError(
                f"{name}: the download from {REPOSITORY} failed ({type(error).__name__}: {error}); check the "
                "network and run the same command again: it goes on where it stopped"
            ) from error
        fault = fault_of(path)
        if fault is None:
            return path
        path.unlink(missing_ok=True)
    raise DataError(f"{name}: came incomplete from {REPOSITORY} {ATTEMPTS} times ({fault}); try again later")


def fault_of(path: Path) -> str | None:
    """What is wrong with a shard's header or size, None for a whole one."""
    try:
        read_header(path)
    except DataError as error:
        return str(error)
    return None


def check_disk(folder: Path, num_files: int) -> None:
    """Raises DataError when the disk of `folder` has no room for so many shards."""
    free, needed = shutil.disk_usage(folder).free, num_files * SHARD_BYTES
    if free < needed:
        raise DataError(
            f"{folder}: {num_files} shards take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; ask for "
            f"at most {max(free // SHARD_BYTES - 1, 0)} more shards, or choose another disk with --out DIR"
        )


def from_hub(name: str, staging: Path) -> Path:
    """Downloads one file of the repository; a broken download is resumed."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=staging))
