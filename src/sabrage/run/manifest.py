"""The manifest: everything that is needed to say what was run, on what, with which code.

It names no user and no host, and its paths are relative to the working folder or to `~`, so that it can be
published with the result.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sabrage.run.device import DeviceFacts

MAX_DIFF_CHARACTERS = 200_000


def make_manifest(
    recipe: dict[str, Any],
    *,
    seed: int,
    device: "DeviceFacts",
    backends: dict[str, str],
    data: dict[str, Any],
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The manifest of a run that starts now, as JSON data.

    `recipe` is the recipe's JSON, `backends` the choice made for every "auto", `data` the corpus's
    fingerprint, `command` the command line (this process's own by default).
    """
    manifest = {
        "format": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv if command is None else command),
        "recipe": recipe,
        "seed": seed,
        "backends": backends,
        "data": data,
        "device": dataclasses.asdict(device),
        "versions": versions(),
        "code": code_state(Path(__file__).resolve()),
    }
    return _impersonal(manifest)


def versions() -> dict[str, str | None]:
    """Versions of what computes: None where it is not installed."""
    import torch

    from sabrage.run.device import driver_version, triton_version

    return {
        "sabrage": installed_version("sabrage"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "numpy": installed_version("numpy"),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "os": platform.platform(),
    }


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command_line(arguments: Sequence[str]) -> list[str]:
    """The command line with the program's name in place of its path."""
    return [Path(arguments[0]).name, *arguments[1:]] if arguments else []


def code_state(file: Path) -> dict[str, Any] | None:
    """Commit, uncommitted changes and untracked files of the git checkout that tracks `file`, or None.

    An installed copy that merely lies inside somebody's checkout is not tracked by it and gives None.
    """
    folder = file.parent
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    diff = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-color") or ""
    untracked = _git(folder, "ls-files", "--others", "--exclude-standard", "--full-name", ":/") or ""
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(diff),
        "diff": diff[:MAX_DIFF_CHARACTERS],
        "diff_characters": len(diff),
        "untracked": untracked.splitlines()[:100],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _impersonal(value: Any) -> Any:
    if isinstance(value, dict):
        return {_impersonal(key): _impersonal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_impersonal(item) for item in value]
    return impersonal(str(value)) if isinstance(value, str | Path) else value


def impersonal(text: str) -> str:
    """`text` with the working folder as `.`, the home folder as `~` and the user's name in a path as `~`."""
    home = os.path.expanduser("~")
    here = os.getcwd()
    # The longer first: the home folder may lie in the working folder or the other way round.
    for path, short in sorted(((here, "."), (home, "~")), key=lambda pair: -len(pair[0])):
        if len(Path(path).parts) > 1:
            text = re.sub(rf"(?<![\w.~]){re.escape(path)}(?![\w.-])", short, text)
    user = Path(home).name
    # Only whole components of absolute paths: a diff may well speak of a folder of that name.
    return re.sub(rf"(?<![\w.~/-])((?:/[\w.-]+)*/){re.escape(user)}(?=/|$)", r"\1~", text) if user else text
