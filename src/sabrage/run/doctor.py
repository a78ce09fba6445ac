"""What this machine can do, and whether a given recipe would run on it.

A verdict takes plain numbers, so that this room needs to know no recipe.
"""

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Group
from rich.table import Table

from sabrage.run.device import DeviceFacts, driver_version, free_memory, probe
from sabrage.run.units import count, size

# Beyond this a processor needs days where a GPU needs minutes.
LARGE_FOR_A_PROCESSOR = 10_000_000


@dataclass(frozen=True)
class DataFound:
    """Token shards (`*.bin`) in one folder; sizes in bytes."""

    folder: Path
    num_shards: int
    num_bytes: int


@dataclass(frozen=True)
class Examination:
    """The machine as found; sizes in bytes, versions None where a thing is missing."""

    python: str
    torch: str
    cuda: str | None
    driver: str | None
    device: DeviceFacts
    free_memory: int
    free_disk: int
    data: tuple[DataFound, ...]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a recipe asks for: memory in bytes at the smallest and at its own micro-batch.

    `refusal` says what the device lacks and `missing_data` which data, None where all is well.
    """

    name: str
    num_parameters: int
    smallest_memory: int
    default_memory: int
    refusal: str | None = None
    missing_data: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a recipe runs here, and why."""

    name: str
    num_parameters: int
    answer: Literal["runs", "runs slower", "cannot"]
    why: str


def examine(device: torch.device | str, *, folder: Path, data_folders: Sequence[Path] = ()) -> Examination:
    """Looks at the device, the disk under `folder` and the shards in `data_folders`."""
    return Examination(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=driver_version(),
        device=probe(device),
        free_memory=free_memory(device),
        free_disk=shutil.disk_usage(folder).free,
        data=tuple(found for place in data_folders if (found := find_data(place)).num_shards),
    )


def find_data(folder: Path) -> DataFound:
    """The token shards that lie directly in `folder`, which need not exist."""
    sizes = [path.stat().st_size for path in folder.glob("*.bin")]
    return DataFound(folder, len(sizes), sum(sizes))


def judge(needs: Needs, found: Examination) -> Verdict:
    """The verdict on one recipe; what makes it impossible comes before what makes it slow."""
    answer: Literal["runs", "runs slower", "cannot"] = "cannot"
    if needs.refusal:
        why = needs.refusal
    elif needs.smallest_memory > found.free_memory:
        why = (
            f"needs {size(needs.smallest_memory)} with its smallest micro-batch and "
            f"{size(found.free_memory)} are free; close other programs or take a smaller model"
        )
    elif needs.missing_data:
        why = needs.missing_data
    elif slower := _slower(needs, found):
        answer, why = "runs slower", slower
    else:
        answer, why = "runs", f"{size(needs.default_memory)} of {size(found.free_memory)} free memory"
    return Verdict(needs.name, needs.num_parameters, answer, why)


def _slower(needs: Needs, found: Examination) -> str | None:
    if found.device.kind != "cuda" and needs.num_parameters > LARGE_FOR_A_PROCESSOR:
        return f"{count(needs.num_parameters)} parameters without an NVIDIA GPU take days"
    if needs.default_memory > found.free_memory:
        return (
            f"with a smaller micro-batch: its own needs {size(needs.default_memory)} and "
            f"{size(found.free_memory)} are free"
        )
    if found.device.kind == "cuda" and found.device.triton is None:
        return "Triton is not installed, so nothing is compiled; pip install triton"
    return None


def render(found: Examination, verdicts: Sequence[Verdict] = ()) -> Group:
    """The examination and the verdicts as two tables for a rich console."""
    machine = Table(title="This machine", show_header=False)
    for name, value in _facts(found):
        machine.add_row(name, value)
    if not verdicts:
        return Group(machine)
    recipes = Table("recipe", "parameters", "verdict", "why", title="Recipes")
    colors = {"runs": "green", "runs slower": "yellow", "cannot": "red"}
    for verdict in verdicts:
        answer = f"[{colors[verdict.answer]}]{verdict.answer}[/]"
        recipes.add_row(verdict.name, count(verdict.num_parameters), answer, verdict.why)
    return Group(machine, recipes)


def _facts(found: Examination) -> list[tuple[str, str]]:
    device = found.device
    facts = [
        ("Python", found.python),
        ("torch", found.torch),
        ("Triton", device.triton or "not installed"),
        ("device", f"{device.name} ({device.kind})"),
        ("memory", f"{size(found.free_memory)} free of {size(device.memory)}"),
        ("bf16", "yes" if device.has_bf16 else "no (needs compute capability 8.0)"),
        ("fp8", "yes" if device.has_fp8 else "no (needs compute capability 8.9)"),
    ]
    if device.capability:
        major, minor = device.capability
        facts += [
            ("CUDA, driver", f"{found.cuda}, {found.driver or 'unknown driver'}"),
            ("compute capability", f"{major}.{minor}, {device.num_multiprocessors} multiprocessors"),
            ("shared memory per block", size(device.shared_memory_per_block)),
            ("bf16 peak", f"{device.peaks['bf16'] / 1e12:.0f} TFLOP/s" if device.peaks else "not listed"),
        ]
    facts.append(("disk free", size(found.free_disk)))
    shards = [
        f"{data.folder}: {data.num_shards} shard{'s' * (data.num_shards > 1)}, {size(data.num_bytes)}"
        for data in found.data
    ]
    return [*facts, ("data", "\n".join(shards) or "none found")]
