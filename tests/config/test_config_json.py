"""Parts to JSON and back: nothing is lost, and what does not fit is named."""

import json
import typing
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sabrage.config import (
    MISSING,
    ConfigError,
    Part,
    diff,
    from_json,
    leaves,
    override,
    part_classes,
    resolve,
    to_json,
    walk,
)
from sabrage.recipe import Recipe
from sabrage.recipes import RECIPES, find


@dataclass(frozen=True, kw_only=True)
class Cork(Part):
    """A leaf with one field of every plain kind."""

    width: float = 1.0
    count: int = 1
    wet: bool = False
    label: str = "a"
    kind: Literal["auto", "oak", "glass"] = "auto"

    def resolve(self, facts):
        return Cork(width=self.width, count=self.count, kind=facts) if self.kind == "auto" else self


@dataclass(frozen=True, kw_only=True)
class Cage(Part):
    """Holds corks in every way that a field can."""

    cork: Cork = Cork()
    spare: Cork | None = None
    many: tuple[Cork, ...] = ()
    pair: tuple[int, str] = (1, "b")
    rate: int | tuple[int, ...] = 1
    mixed: tuple[int, ...] | tuple[str, str] | None = None
    either: tuple[Cork | int, ...] = ()
    folder: str | None = None
    note: int | str = 0

    def resolve(self, facts):
        # Leaves come first: by now the corks know.
        assert self.cork.kind != "auto"
        return self


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name):
    recipe = find(name)
    again = from_json(json.loads(json.dumps(to_json(recipe))), Recipe)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert diff(recipe, again) == []


def values(hint):
    """Values that a field of this type takes."""
    if hint in (int, float, bool, str):
        return {
            int: st.integers(-5, 5),
            float: st.floats(allow_nan=False, allow_infinity=False),
            bool: st.booleans(),
            str: st.text(max_size=4),
        }[hint]
    if hint is type(None):
        return st.none()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    if arguments:
        return st.one_of([values(argument) for argument in arguments])
    hints = typing.get_type_hints(hint)
    return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})


@settings(derandomize=True, deadline=None)
@given(values(Cage))
def test_any_part_survives_json_and_its_leaves_and_parts_agree(cage):
    again = from_json(json.loads(json.dumps(to_json(cage))), Cage)
    assert again == cage
    assert diff(cage, again) == []
    named = {path.removesuffix("part").rstrip(".") for path, _ in leaves(cage) if path.endswith("part")}
    assert named == {path for path, _ in walk(cage)}


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_every_leaf_can_be_set_to_its_own_value(data):
    recipe = find(data.draw(st.sampled_from(sorted(RECIPES))))
    path, value = data.draw(st.sampled_from(list(leaves(recipe))))
    if not path.endswith("part"):
        assert override(recipe, f"{path}={json.dumps(value)}") == recipe


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"part": "Cargo"}, "unknown part 'Cargo' (did you mean 'Cage'?)"),
        ({}, "unknown part None"),
        ({"part": "Cage", "corc": {"part": "Cork"}}, "Cage has no field 'corc' (did you mean 'cork'?)"),
        ({"part": "Cage", "cork": {"part": "Cork", "count": True}}, "x.cork.count: got True"),
        ({"part": "Cage", "cork": {"part": "Cork", "count": 1.5}}, "allowed: a whole number"),
        ({"part": "Cage", "cork": {"part": "Cork", "wet": 1}}, "allowed: true or false"),
        ({"part": "Cage", "cork": {"part": "Cork", "width": True}}, "x.cork.width: got True"),
        ({"part": "Cage", "cork": {"part": "Cork", "width": "1"}}, "allowed: a number"),
        ({"part": "Cage", "cork": {"part": "Cork", "label": 3}}, "allowed: text"),
        ({"part": "Cage", "cork": {"part": "Cork", "kind": "cork"}}, "'auto', 'oak', 'glass'"),
        ({"part": "Cage", "cork": {"part": "Cage"}}, "x.cork: got Cage"),
        ({"part": "Cage", "cork": [{"part": "Cork"}]}, "x.cork: got a list"),
        ({"part": "Cage", "cork": None}, "x.cork: got None"),
        ({"part": "Cage", "many": {"part": "Cork"}}, "x.many: got Cork"),
        ({"part": "Cage", "many": [{"part": "Cork", "count": "x"}]}, "x.many.0.count: got 'x'"),
        ({"part": "Cage", "pair": [1]}, "x.pair: got a list of 1"),
        ({"part": "Cage", "pair": [1, 2]}, "x.pair.1: got 2, allowed: text"),
        ({"part": "Cage", "rate": "1"}, "x.rate: got '1'"),
        ({"part": "Cage", "rate": [1, True]}, "x.rate.1: got True"),
        ({"part": "Cage", "mixed": [1, "a"]}, "x.mixed: got (1, 'a')"),
        ({"part": "Cage", "spare": 3}, "x.spare: got 3"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_allowed(data, said):
    with pytest.raises(ConfigError) as caught:
        from_json(data, Cage, path="x")
    assert said in str(caught.value)


def test_a_part_with_a_missing_field_says_which():
    with pytest.raises(ConfigError, match=r"Trapezoid cannot be made: .*'warmdown'"):
        from_json({"part": "Trapezoid", "warmup": 3})


def test_a_whole_number_is_a_number():
    made = from_json({"part": "Cork", "width": 3})
    assert made == Cork(width=3.0)
    assert type(made.width) is float


def test_unions_keep_the_kind_that_was_given():
    made = from_json({"part": "Cage", "rate": [1, 2], "mixed": ["a", "b"], "either": [1, {"part": "Cork"}]})
    assert (made.rate, made.mixed, made.either) == ((1, 2), ("a", "b"), (1, Cork()))
    assert from_json({"part": "Cage", "mixed": [1]}).mixed == (1,)


def test_parts_resolve_leaves_first_wherever_they_are():
    cage = Cage(spare=Cork(), many=(Cork(), Cork(kind="glass")), either=(1, Cork()))
    made = resolve(cage, "oak")
    assert [cork.kind for cork in (made.cork, made.spare, *made.many, made.either[1])] == [
        *["oak"] * 3,
        "glass",
        "oak",
    ]
    assert resolve(made, "glass") == made


def test_a_difference_names_changed_added_and_removed_leaves():
    before, after = Cage(spare=Cork(), rate=1), Cage(many=(Cork(count=2),), rate=(1,))
    rows = {path: (old, new) for path, old, new in diff(before, after)}
    assert rows["spare"] == (MISSING, None)
    assert rows["spare.part"] == ("Cork", MISSING)
    assert rows["many.0.count"] == (MISSING, 2)
    assert rows["rate"] == (1, MISSING)
    assert rows["rate.0"] == (MISSING, 1)
    assert not any(path.startswith("cork") for path in rows)
    assert diff(Cage(note=1), Cage(note="1")) == [("note", 1, "1")]


def test_every_part_of_the_package_is_frozen_keyword_only_and_of_its_own_name():
    ours = [part for part in all_subclasses(Part) if part.__module__.startswith("sabrage.")]
    assert len(ours) > 20
    for part in ours:
        assert part.__dataclass_params__.frozen, part
        assert all(field.kw_only for field in fields(part)), part
    concrete = [part.__name__ for part in ours if part in part_classes().values()]
    assert sorted(concrete) == sorted(set(concrete))


def all_subclasses(part):
    return [part, *(below for child in part.__subclasses__() for below in all_subclasses(child))]
