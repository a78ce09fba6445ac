"""Checkpoints: a folder each with the tensors (safetensors) and what describes them (JSON).

A checkpoint appears whole or not at all: it is written into a hidden folder beside its place, synced and
renamed. Loading trusts nothing: sizes and hashes are compared, no code is run, and a damaged newest
checkpoint gives way to the one before it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sabrage.run.folder import sync_file, sync_folder, write_json
from sabrage.run.log import encode

TENSORS = "tensors.safetensors"
DESCRIPTION = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that could not be written or read: says why and what is left."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes `folder/step-XXXXXXXX` and leaves the newest `keep` checkpoints; returns its path.

    `meta` holds plain JSON values. Aliases are written as tensors of their own. Checkpoints of the same or
    of later steps belong to a past that this run has left, and go when the new one is complete. Raises
    CheckpointError, with earlier checkpoints untouched, when the disk is full or fails.
    """
    assert keep >= 1, f"keep={keep}"
    name = f"step-{step:08d}"
    temporary = folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.partial"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        save_file(_portable(tensors), temporary / TENSORS)
        sync_file(temporary / TENSORS)
        body = {"step": step, "tensors": _fingerprint(temporary / TENSORS), "meta": meta}
        write_json(temporary / DESCRIPTION, {**body, "sha256": _digest(body)})
        place = _free_place(folder, name)
        temporary.rename(place)
        sync_folder(folder)
        for old in _superseded(folder, place, step=step, keep=keep):
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); earlier ones are "
            "untouched; free some disk space"
        ) from error
    return place


def load_newest(
    folder: Path, *, warn: Callable[[str], None], device: torch.device | str = "cpu"
) -> Checkpoint | None:
    """The newest whole checkpoint, or None where none was ever written.

    `warn` is told of each damaged one that is passed over. Raises CheckpointError when all are damaged.
    """
    for path, body in _whole(folder, warn):
        return Checkpoint(body["step"], load_file(path / TENSORS, device=str(device)), body["meta"], path)
    if damaged := _checkpoints(folder):
        names = ", ".join(path.name for path in damaged)
        raise CheckpointError(f"every checkpoint in {folder} is damaged ({names}); start the run anew")
    return None


def newest(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, what was noted) of the newest whole checkpoint, without its tensors; None without any."""
    return next(((body["step"], body["meta"]) for _, body in _whole(folder, lambda _: None)), None)


def newest_step(folder: Path) -> int | None:
    """The step of the newest whole checkpoint, or None."""
    found = newest(folder)
    return found[0] if found else None


def _whole(folder: Path, warn: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in reversed(_checkpoints(folder)):
        try:
            body = _verified(path)
        except (OSError, ValueError) as error:
            warn(f"checkpoint {path.name} is damaged and passed over: {error}")
        else:
            yield path, body


def _portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    portable: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        # The format has no aliases: whatever shares memory with an earlier tensor is written again.
        if copy.untyped_storage().data_ptr() in storages:
            copy = copy.clone()
        storages.add(copy.untyped_storage().data_ptr())
        portable[name] = copy
    return portable


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first; names sort by step, then by attempt."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _free_place(folder: Path, name: str) -> Path:
    # A step saved again after going back must not be deleted before its successor is in place.
    places = [folder / name, *(folder / f"{name}-{attempt}" for attempt in range(2, 100))]
    return next(place for place in places if not place.exists())


def _superseded(folder: Path, newest: Path, *, step: int, keep: int) -> list[Path]:
    others = [path for path in _checkpoints(folder) if path != newest]
    earlier = [path for path in others if int(path.name.split("-")[1]) < step]
    kept = earlier[len(earlier) - (keep - 1) :]
    return [path for path in others if path not in kept]


def _verified(path: Path) -> dict[str, Any]:
    body = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
        raise CheckpointError(f"{DESCRIPTION} does not match its own hash")
    expected, found = body["tensors"], _fingerprint(path / TENSORS)
    if found != expected:
        raise CheckpointError(
            f"{TENSORS} has {found['bytes']} bytes, sha256 {found['sha256'][:12]}; "
            f"{expected['bytes']} bytes, {expected['sha256'][:12]} were written"
        )
    return body


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _digest(body: dict[str, Any]) -> str:
    # Through JSON once, so that tuples and keys look as they will when they are read back.
    return hashlib.sha256(json.dumps(json.loads(encode(body)), sort_keys=True).encode()).hexdigest()
