"""override("a.b=c"): one leaf changes, whatever it lies in, and nonsense is refused with the remedy."""

from dataclasses import dataclass

import pytest

from sabrage.config import ConfigError, Part, leaves, override
from sabrage.parts import OptimizerGroup
from sabrage.plan import Constant, Stages, Trapezoid
from sabrage.precision.autocast import Fp32
from sabrage.recipes import find


@dataclass(frozen=True, kw_only=True)
class Shelf(Part):
    """Tuples in unions."""

    sizes: int | tuple[int, ...] | None = None
    names: tuple[int, ...] | tuple[str, str] = (1,)
    parts: tuple[Constant, ...] | None = None
    label: str = ""
    place: str | None = None


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("plan.steps=7", "plan.steps", 7),
        ("budget.target=3", "budget.target", 3.0),
        ("budget.target=None", "budget.target", None),
        ("optim.0.optimizer.lr=1e-3", "optim.0.optimizer.lr", 0.001),
        ("optim.0.optimizer.betas.1=0.9", "optim.0.optimizer.betas.1", 0.9),
        ("model.mixers.0.qk_norm=True", "model.mixers.0.qk_norm", True),
        ("model.mixers.0.qk_norm=true", "model.mixers.0.qk_norm", True),
        ("data.path=2024", "data.path", "2024"),
        ('data.path="2024"', "data.path", "2024"),
        ("data.path=a=b", "data.path", "a=b"),
        ("data.path=MultiHead", "data.path", "MultiHead"),
    ],
)
def test_one_leaf_changes_and_nothing_else(assignment, path, value):
    nocap = find("nocap")
    made = dict(leaves(override(nocap, assignment)))
    assert made[path] == value
    assert type(made[path]) is type(value)
    assert made | {path: None} == dict(leaves(nocap)) | {path: None}


def test_a_part_is_replaced_by_its_class_name_or_by_json():
    nocap = find("nocap")
    assert override(nocap, "precision=Fp32").precision == Fp32()
    assert override(nocap, 'plan.lr={"part": "Constant", "value": 2}').plan.lr == Constant(value=2.0)
    stages = '{"part": "Stages", "values": [1024, 2048], "starts": [0, 9]}'
    made = override(nocap, f"plan.sequence_length={stages}")
    assert made.plan.sequence_length == Stages(values=(1024, 2048), starts=(0, 9))
    assert override(made, "plan.sequence_length.values.1=4096").plan.sequence_length.values == (1024, 4096)
    assert override(made, "plan.sequence_length=512").plan.sequence_length == 512
    assert override(nocap, "model.mixers.0.rotary=null").model.mixers[0].rotary is None


def test_a_whole_tuple_is_replaced_by_json():
    nocap = find("nocap")
    group = '{"part": "OptimizerGroup", "pattern": ".*", "optimizer": {"part": "AdamW", "lr": 1}}'
    made = override(nocap, f"optim=[{group}, {group}]")
    assert len(made.optim) == 2
    assert isinstance(made.optim[1], OptimizerGroup)
    assert made.optim[1].optimizer.lr == 1.0


def test_an_item_of_a_tuple_that_is_one_choice_of_a_union_is_checked_by_its_own_type():
    shelf = Shelf(sizes=(1, 2), parts=(Constant(),))
    assert override(shelf, "sizes.1=5").sizes == (1, 5)
    assert override(shelf, "parts.0.value=5").parts == (Constant(value=5.0),)
    assert override(shelf, "parts.0=Constant") == shelf
    for assignment in ("sizes.1=x", "sizes.1=[3]", "sizes.1=null", "sizes.1=1.5", "parts.0=3"):
        with pytest.raises(ConfigError):
            override(shelf, assignment)


def test_an_item_of_another_tuple_type_of_the_union_does_not_slip_in():
    assert override(Shelf(names=(1, 2)), "names.1=3").names == (1, 3)
    assert override(Shelf(names=("a", "b")), "names.1=c").names == ("a", "c")
    with pytest.raises(ConfigError, match="names: got"):
        override(Shelf(names=(1, 2)), "names.1=c")


def test_text_stays_text_where_only_text_is_allowed():
    assert override(Shelf(), "label=true").label == "true"
    assert override(Shelf(), "label=").label == ""
    assert override(Shelf(place="x"), "place=null").place is None


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("plan.steps", "allowed: FIELD.FIELD=VALUE"),
        ("=3", "allowed: FIELD.FIELD=VALUE"),
        ("plan.step=3", "plan has no field 'step' (did you mean 'steps'?)"),
        ("model.mixers.1.heads=3", "model.mixers: got index '1', allowed: 0 to 0"),
        ("model.mixers.x.heads=3", "got index 'x'"),
        ("model.mixers.².heads=3", "got index '²'"),
        ("plan.steps.x=3", "plan.steps is 4768 and has no field 'x'"),
        ("plan.steps=many", "plan.steps: got 'many', allowed: a whole number"),
        ("plan.steps=true", "plan.steps: got True"),
        ("plan.steps=1.5", "plan.steps: got 1.5"),
        ("plan.lr=Fp32", "plan.lr: got Fp32"),
        ("plan.lr=Trapezoid", "Trapezoid cannot be made"),
        ("precision=fp32", "precision: got 'fp32'"),
        ("precision=Fp23", "did you mean 'Fp32'?"),
        ("model.mixers.0.backend=flush", "did you mean 'flash'?"),
        ("optim.0.optimizer.betas=[0.9]", "optim.0.optimizer.betas: got a list of 1"),
        ('plan={"part": "Plan", "stepps": 3}', "Plan has no field 'stepps' (did you mean 'steps'?)"),
    ],
)
def test_nonsense_is_refused_with_the_remedy(assignment, said):
    with pytest.raises(ConfigError) as caught:
        override(find("nocap"), assignment)
    assert said in str(caught.value)


def test_an_index_into_an_empty_tuple_says_so():
    with pytest.raises(ConfigError, match="it is empty"):
        override(Shelf(sizes=()), "sizes.0=3")


def test_overriding_the_schedule_keeps_the_rest_of_the_plan():
    plan = override(find("nocap"), "plan.lr.warmup=3").plan
    assert plan.lr == Trapezoid(warmup=3, warmdown=1024)
    assert plan.steps == 4768
