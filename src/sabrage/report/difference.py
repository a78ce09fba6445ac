"""How recipes differ, told from the JSON in their manifests, so that no part's class has to be imported."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# A recipe with another seed, name or sentence about itself trains the same model.
NOT_PART_OF_IT = ("name", "summary", "budget.seed")


@dataclass(frozen=True)
class Difference:
    """One field, by the path that `--set` takes, with its value in either recipe as text."""

    path: str
    before: str
    after: str


def differences(before: Any, after: Any, *, path: str = "") -> Iterator[Difference]:
    """The outermost fields that differ; a part replaced by one of another class is a single row."""
    if before == after or path in NOT_PART_OF_IT:
        return
    fields = _fields(before), _fields(after)
    if fields[0] is None or fields[1] is None or _kind(before) != _kind(after):
        yield Difference(path, in_words(before), in_words(after))
        return
    for key in dict.fromkeys([*fields[0], *fields[1]]):
        # A field that one recipe lacks was added to the part between the two runs.
        inner = f"{path}.{key}" if path else key
        yield from differences(fields[0].get(key, "-"), fields[1].get(key, "-"), path=inner)


def in_words(value: Any) -> str:
    """A value of a recipe as Python would write it, short: `MultiHead(heads=12, qk_norm=true)`."""
    if isinstance(value, dict):
        inside = ", ".join(f"{key}={in_words(item)}" for key, item in value.items() if key != "part")
        return f"{value.get('part', '')}({inside})"
    if isinstance(value, list):
        return f"[{', '.join(map(in_words, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def recipe_rows(value: Any, *, name: str = "recipe", depth: int = 0) -> Iterator[tuple[int, str, str]]:
    """(depth, name, value) for every part and plain value of a recipe's JSON, in its own order."""
    if isinstance(value, dict):
        yield depth, name, str(value.get("part", ""))
        for key, item in value.items():
            if key != "part":
                yield from recipe_rows(item, name=key, depth=depth + 1)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        yield depth, name, ""
        for index, item in enumerate(value):
            yield from recipe_rows(item, name=str(index), depth=depth + 1)
    elif isinstance(value, list):
        yield depth, name, ", ".join(map(str, value))
    else:
        yield depth, name, "none" if value is None else str(value)


def _fields(value: Any) -> dict[str, Any] | None:
    """The parts of a part, or of a list of parts; None for what is compared as a whole."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(index): item for index, item in enumerate(value)}
    return None


def _kind(value: Any) -> Any:
    return value.get("part") if isinstance(value, dict) else len(value)
