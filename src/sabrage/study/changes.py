"""How recipes differ, as changes that turn one into the other, and the single tricks of a recipe.

Every part has neutral defaults, so a trick is what a recipe has turned on and its base has not: a flag, a
choice by name or a value where the default is none; a part around another ("inner"); one of several optional
parts in a tuple. Numbers alone are rates and sizes, not tricks.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from sabrage.config import Part, to_json, walk
from sabrage.recipe import Recipe

ROOMS = ("data", "model", "objective", "optim", "plan", "precision")
WITHIN = "inner"


@dataclass(frozen=True)
class Change:
    """`path` of a recipe becomes `value`; `owner` is the part that it belongs to."""

    path: str
    value: Any
    owner: str


def changes(before: Any, after: Any, path: str = "", owner: str = "") -> Iterator[Change]:
    """The smallest replacements that turn `before` into `after`: plain values, parts of another class,
    tuples of another length."""
    if isinstance(before, Part) and type(before) is type(after):
        for field in fields(before):
            where = f"{path}.{field.name}" if path else field.name
            yield from changes(getattr(before, field.name), getattr(after, field.name), where, path)
    elif isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from changes(old, new, f"{path}.{index}", owner)
    elif before != after:
        whole = any(isinstance(value, Part | tuple) for value in (before, after))
        yield Change(path, after, path if whole else owner)


def assignment(change: Change) -> str:
    """The change as `sabrage train --set` takes it."""
    return f"{change.path}={json.dumps(to_json(change.value))}"


def by_owner(found: Iterator[Change]) -> dict[str, list[Change]]:
    """Changes by the part that they belong to, without those that are no idea: names, budget, runtime."""
    groups: dict[str, list[Change]] = {}
    for change in found:
        if change.owner not in ("", "budget", "runtime"):
            groups.setdefault(change.owner, []).append(change)
    return groups


def tricks(whole: Recipe, base: Recipe) -> dict[str, list[Change]]:
    """By name the changes to `whole` that leave out one trick, for every one that `base` has not."""
    found: dict[str, list[Change]] = {}
    known = {trick for room in ROOMS for trick, _ in _within(getattr(base, room), room)}
    for room in ROOMS:
        for trick, change in _within(getattr(whole, room), room):
            if trick not in known:
                found.setdefault(trick, []).append(change)
    return found


def _within(root: Any, path: str) -> Iterator[tuple[str, Change]]:
    """(name, the change that leaves it out) of every trick in a tree; that of many parts comes often."""
    for where, part in walk(root, path):
        kind = type(part).__name__
        for field in fields(part):
            value, place, neutral = getattr(part, field.name), f"{where}.{field.name}", default_of(field)
            if field.name == WITHIN:
                yield kind, Change(where, value, where)
            elif neutral == () and all(isinstance(item, Part) for item in value):
                for each in dict.fromkeys(map(type, value)):
                    rest = tuple(item for item in value if type(item) is not each)
                    yield each.__name__, Change(place, rest, where)
            elif value != neutral and (neutral is None or isinstance(neutral, bool | str)):
                yield f"{kind}.{field.name}", Change(place, neutral, where)


def default_of(field: Field) -> Any:
    """The field's default value, MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()
