"""Prompts from a file, one JSON object a line: a prompt and whatever it wants otherwise than the rest."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sabrage.generate.sampling import Sampling
from sabrage.parts import DataError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text to go on from and how."""

    prompt: str
    max_tokens: int
    seed: int
    stop: tuple[str, ...]
    sampling: Sampling


SAMPLING = tuple(field.name for field in fields(Sampling))
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(SAMPLING, (int, float)), "top_k": int, "prompt": str, "max_tokens": int, "seed": int,
    "stop": list,
}  # fmt: skip


def read_prompts(path: Path, default: Prompt) -> list[Prompt]:
    """The prompts of a file; what a line leaves out is the default's, the seed raised by one a prompt.

    Raises DataError naming the line.
    """
    if not path.is_file():
        raise DataError(f'{path}: no such file; give one with a line such as {{"prompt": "The "}}')
    found: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            check(row)
            sampling = replace(default.sampling, **{name: row[name] for name in SAMPLING if name in row})
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        rest = {name: value for name, value in row.items() if name not in SAMPLING}
        rest = {"seed": default.seed + len(found)} | rest
        rest["stop"] = tuple(rest.get("stop", default.stop))
        found.append(replace(default, sampling=sampling, **rest))
    if not found:
        raise DataError(f"{path}: holds no prompt; write one JSON object a line")
    return found


def check(row: Any) -> None:
    """Raises ValueError for what is no prompt."""
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError('not an object with a prompt; write {"prompt": "The "}')
    for name, value in row.items():
        if name not in KINDS:
            raise ValueError(f"unknown field {name!r}; allowed: {', '.join(sorted(KINDS))}")
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is of the wrong kind")
    if not all(isinstance(stop, str) for stop in row.get("stop", [])):
        raise ValueError("stop must be a list of texts")
