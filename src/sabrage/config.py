"""Parts: frozen dataclasses of plain values that build things, and their way to JSON and back.

A run is described by a tree of `Part`s. The tree is hashable, goes to JSON with the class names in it,
comes back from JSON checked field by field, and can be changed at one leaf with `override("a.b=c")`.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

Plain = None | bool | int | float | str
Json = Any
PartType = TypeVar("PartType", bound="Part")
MISSING = object()


class ConfigError(ValueError):
    """A configuration that cannot be used: says what was got, what is allowed and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a recipe: plain values (numbers, text, tuples, other parts), hashable, JSON both ways.

    Every subclass carries `@dataclass(frozen=True, kw_only=True)` and is either abstract or final.
    """

    def problems(self) -> list[str]:
        """Sentences about what is wrong with this part's own values; empty when it can be used."""
        return []

    def resolve(self, facts: Any) -> Self:
        """The same part with every "auto" replaced by a choice for the device that `facts` describes."""
        return self


def part_classes() -> dict[str, type[Part]]:
    """Every concrete part class that has been imported, by class name."""
    found: dict[str, type[Part]] = {}
    pending = [Part]
    while pending:
        for subclass in pending.pop().__subclasses__():
            pending.append(subclass)
            if not getattr(subclass, "__abstractmethods__", None):
                found[subclass.__name__] = subclass
    return found


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """' (did you mean X?)' for the allowed name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_json(value: Any) -> Json:
    """Plain JSON data for a part, a tuple or a plain value; parts carry their class name as "part"."""
    if isinstance(value, Part):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"part": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return value


def from_json(data: Json, expected: Any = Part, *, path: str = "recipe") -> Any:
    """The value that `to_json` wrote, checked against the type `expected`. Raises ConfigError."""
    if isinstance(data, dict):
        return _part_from_json(data, expected, path)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if isinstance(data, list) and (origin in (typing.Union, types.UnionType)):
        tuples = [choice for choice in arguments if typing.get_origin(choice) is tuple]
        if tuples:
            return from_json(data, tuples[0], path=path)
    if isinstance(data, list):
        if origin is not tuple:
            raise ConfigError(f"{path}: got a list, allowed: {describe(expected)}")
        homogeneous = len(arguments) == 2 and arguments[1] is Ellipsis
        if not homogeneous and len(arguments) != len(data):
            raise ConfigError(f"{path}: got {len(data)} values, allowed: {len(arguments)}")
        kinds = [arguments[0]] * len(data) if homogeneous else arguments
        pairs = enumerate(zip(data, kinds, strict=True))
        return tuple(from_json(item, kind, path=f"{path}.{index}") for index, (item, kind) in pairs)
    return check_type(data, expected, path)


def _part_from_json(data: dict[str, Json], expected: Any, path: str) -> Part:
    name = data.get("part")
    classes = part_classes()
    if not isinstance(name, str) or name not in classes:
        raise ConfigError(f"{path}: unknown part {name!r}{nearest(str(name), classes)}")
    hints = typing.get_type_hints(classes[name])
    known = [field.name for field in dataclasses.fields(classes[name])]
    values = {}
    for key, item in data.items():
        if key == "part":
            continue
        if key not in known:
            raise ConfigError(
                f"{path}: {name} has no field {key!r}{nearest(key, known)}; its fields: {', '.join(known)}"
            )
        values[key] = from_json(item, hints[key], path=f"{path}.{key}")
    try:
        made = classes[name](**values)
    except TypeError as error:
        raise ConfigError(f"{path}: {name} cannot be made: {error}") from error
    check_type(made, expected, path)
    return made


def describe(expected: Any) -> str:
    """The allowed values of a field's type, in words."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is tuple:
        return f"a list of {describe(arguments[0])}"
    if isinstance(expected, type) and issubclass(expected, Part):
        names = [name for name, part in sorted(part_classes().items()) if issubclass(part, expected)]
        return "a part: " + ", ".join(names)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        expected, "none" if expected in (None, type(None)) else str(expected)
    )


def check_type(value: Any, expected: Any, path: str) -> Any:
    """`value` as the type `expected` (a whole number passes as a float). Raises ConfigError."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        exact = [choice for choice in arguments if type(value) is choice]
        for choice in exact or arguments:
            try:
                return check_type(value, choice, path)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, tuple):
        kinds = [arguments[0]] * len(value) if arguments[-1:] == (Ellipsis,) else list(arguments)
        if len(kinds) == len(value):
            return tuple(check_type(item, kind, path) for item, kind in zip(value, kinds, strict=True))
    elif expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif expected is int and isinstance(value, bool):
        pass
    elif isinstance(expected, type) and isinstance(value, expected):
        return value
    elif expected is None and value is None:
        return None
    got = type(value).__name__ if isinstance(value, Part) else repr(value)
    raise ConfigError(f"{path}: got {got}, allowed: {describe(expected)}")


def override(part: PartType, assignment: str) -> PartType:
    """`part` with one leaf changed by "a.b=c"; c is JSON, bare text, or the class name of a part."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"got {assignment!r}, allowed: FIELD.FIELD=VALUE, such as plan.steps=100")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"None": None, "True": True, "False": False}.get(text, text)
    return _replace(part, path.split("."), value, done="")


def _replace(value: Any, keys: list[str], new: Json, *, done: str, expected: Any = Any) -> Any:
    here = done or type(value).__name__
    if not keys:
        if isinstance(new, str) and new in part_classes() and expected is not str:
            new = {"part": new}
        return from_json(new, expected, path=here)
    key, rest = keys[0], keys[1:]
    path = f"{done}.{key}" if done else key
    if isinstance(value, tuple):
        if not key.isdigit() or int(key) >= len(value):
            raise ConfigError(f"{here}: got index {key!r}, allowed: 0 to {len(value) - 1}")
        index = int(key)
        kind = typing.get_args(expected)[0] if typing.get_args(expected) else Any
        changed = _replace(value[index], rest, new, done=path, expected=kind)
        return (*value[:index], changed, *value[index + 1 :])
    if not isinstance(value, Part):
        raise ConfigError(f"{here} is {value!r} and has no field {key!r}")
    names = [field.name for field in dataclasses.fields(value)]
    if key not in names:
        fields = ", ".join(names) or "none"
        raise ConfigError(f"{here} has no field {key!r}{nearest(key, names)}; its fields: {fields}")
    hint = typing.get_type_hints(type(value))[key]
    changed = _replace(getattr(value, key), rest, new, done=path, expected=hint)
    return dataclasses.replace(value, **{key: changed})


def resolve(value: Any, facts: Any) -> Any:
    """The tree with every part's `resolve(facts)` applied, leaves first."""
    if isinstance(value, tuple):
        return tuple(resolve(item, facts) for item in value)
    if not isinstance(value, Part):
        return value
    names = [field.name for field in dataclasses.fields(value)]
    children = {name: resolve(getattr(value, name), facts) for name in names}
    changed = {name: child for name, child in children.items() if child != getattr(value, name)}
    return (dataclasses.replace(value, **changed) if changed else value).resolve(facts)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Plain]]:
    """(dotted path, plain value) for every leaf of the tree; a part's class name is a leaf "path.part"."""
    if isinstance(value, Part):
        yield (f"{path}.part" if path else "part"), type(value).__name__
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
    else:
        yield path, value


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Part]]:
    """(dotted path, part) for every part of the tree, the root first."""
    if isinstance(value, Part):
        yield path, value
        for field in dataclasses.fields(value):
            yield from walk(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from walk(item, f"{path}.{index}")


def diff(before: Part, after: Part) -> list[tuple[str, Plain | object, Plain | object]]:
    """(path, value before, value after) for every leaf that differs; MISSING where one has no such leaf."""
    old, new = dict(leaves(before)), dict(leaves(after))
    paths = [*old, *(path for path in new if path not in old)]
    rows = ((path, old.get(path, MISSING), new.get(path, MISSING)) for path in paths)
    return [row for row in rows if row[1] != row[2] or type(row[1]) is not type(row[2])]
