"""Parts: frozen dataclasses of plain values that build things, and their way to JSON and back.

A run is described by a tree of `Part`s. The tree is hashable, goes to JSON with the class names in it,
comes back from JSON checked field by field, and can be changed at one leaf with `override("a.b=c")`.
"""

import dataclasses
import difflib
import functools
import json
import operator
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

    def refusal(self, facts: Any) -> str | None:
        """A sentence saying why the device that `facts` describes cannot do it, or None when it can."""
        return None

    def resolve(self, facts: Any) -> Self:
        """The same part with every "auto" replaced by a choice for the device that `facts` describes."""
        return self

    def narrow(self, facts: Any) -> Any:
        """What the parts inside this one need to know beside the device, added to `facts`."""
        return facts


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
    if not isinstance(data, list):
        return check_type(data, expected, path)
    kinds = item_types(expected, len(data), path)
    pairs = enumerate(zip(data, kinds, strict=True))
    made = [from_json(item, kind, path=f"{path}.{index}") for index, (item, kind) in pairs]
    return check_type(tuple(made), expected, path)


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


def item_types(expected: Any, length: int, path: str) -> list[Any]:
    """The type of each item of a tuple of `length` in a field of type `expected`. Raises ConfigError.

    Where several tuple types are allowed, an item may be what any of them says.
    """
    union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    fitting = []
    for choice in typing.get_args(expected) if union else (expected,):
        kinds = typing.get_args(choice)
        if typing.get_origin(choice) is not tuple:
            continue
        if kinds[-1:] == (Ellipsis,):
            fitting.append([kinds[0]] * length)
        elif len(kinds) == length:
            fitting.append(list(kinds))
    if not fitting:
        raise ConfigError(f"{path}: got a list of {length}, allowed: {describe(expected)}")
    return [functools.reduce(operator.or_, kinds) for kinds in zip(*fitting, strict=True)]


def describe(expected: Any) -> str:
    """The allowed values of a field's type, in words."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    if origin is tuple:
        endless = arguments[-1:] == (Ellipsis,)
        items = [describe(kind) for kind in (arguments[:1] if endless else arguments)]
        return f"a list of {'any number' if endless else len(items)} ({', '.join(items)})"
    if isinstance(expected, type) and issubclass(expected, Part):
        return "a part: " + ", ".join(choices(expected))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        expected, "none" if expected in (None, type(None)) else str(expected)
    )


def choices(expected: Any) -> list[str]:
    """The names that a field of this type may be given: text literals and part classes."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return [choice for choice in arguments if isinstance(choice, str)]
    if origin in (typing.Union, types.UnionType):
        return [name for choice in arguments for name in choices(choice)]
    if isinstance(expected, type) and issubclass(expected, Part):
        return [name for name, part in sorted(part_classes().items()) if issubclass(part, expected)]
    return []


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
        # By type too: True equals 1.
        if any(type(value) is type(choice) and value == choice for choice in arguments):
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
    hint = nearest(value, choices(expected)) if isinstance(value, str) else ""
    raise ConfigError(f"{path}: got {got}{hint}, allowed: {describe(expected)}")


def override(part: PartType, assignment: str) -> PartType:
    """`part` with one leaf changed by "a.b=c"; c is JSON, bare text, or the class name of a part."""
    path, separator, text = assignment.partition("=")
    if not separator or not path:
        raise ConfigError(f"got {assignment!r}, allowed: FIELD.FIELD=VALUE, such as plan.steps=100")
    return _replace(part, path.split("."), text, done="", expected=type(part))


def _read(text: str, expected: Any) -> Json:
    """What was typed, as JSON data for a field of this type."""
    if expected is not str and text in part_classes():
        return {"part": text}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)
    # A folder may well be called 2024.
    return text if expected is str and not isinstance(value, str) else value


def _replace(value: Any, keys: list[str], text: str, *, done: str, expected: Any) -> Any:
    here = done or type(value).__name__
    if not keys:
        return from_json(_read(text, expected), expected, path=here)
    key, rest = keys[0], keys[1:]
    path = f"{done}.{key}" if done else key
    if isinstance(value, tuple):
        if not key.isdecimal() or int(key) >= len(value):
            allowed = f"0 to {len(value) - 1}" if value else "none, it is empty"
            raise ConfigError(f"{here}: got index {key!r}, allowed: {allowed}")
        index = int(key)
        kind = item_types(expected, len(value), here)[index]
        item = _replace(value[index], rest, text, done=path, expected=kind)
        return check_type((*value[:index], item, *value[index + 1 :]), expected, here)
    if not isinstance(value, Part):
        raise ConfigError(f"{here} is {value!r} and has no field {key!r}")
    names = [field.name for field in dataclasses.fields(value)]
    if key not in names:
        fields = ", ".join(names) or "none"
        raise ConfigError(f"{here} has no field {key!r}{nearest(key, names)}; its fields: {fields}")
    hint = typing.get_type_hints(type(value))[key]
    changed = _replace(getattr(value, key), rest, text, done=path, expected=hint)
    return dataclasses.replace(value, **{key: changed})


def resolve(value: Any, facts: Any) -> Any:
    """The tree with every part's `resolve(facts)` applied, leaves first."""
    if isinstance(value, tuple):
        return tuple(resolve(item, facts) for item in value)
    if not isinstance(value, Part):
        return value
    names, within = [field.name for field in dataclasses.fields(value)], value.narrow(facts)
    children = {name: resolve(getattr(value, name), within) for name in names}
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
