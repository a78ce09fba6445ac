"""Plans: the baseline's schedule at every step, stages and their tokens, and all problems at once."""

from dataclasses import replace

import pytest

from sabrage.config import ConfigError, override
from sabrage.plan import Constant, Plan, Ramp, Staged, Stages, Trapezoid
from sabrage.recipes import find


def make(**changes):
    values = {"steps": 10, "lr": Constant(), "tokens_per_step": 64, "sequence_length": 16}
    return Plan(**(values | changes))


def test_the_learning_rate_is_the_baselines_at_every_step():
    recipe = find("nocap")
    (group,) = recipe.optim
    for step in range(4768):
        expected = 0.0018
        if step < 256:
            expected *= (step + 1) / 256
        elif step >= 4768 - 1024:
            expected *= (4768 - step) / 1024
        knobs = recipe.plan.at(step)
        assert group.optimizer.hyperparameters(knobs)["lr"] == pytest.approx(expected, rel=1e-12)
        assert group.optimizer.hyperparameters(knobs)["weight_decay"] == 0.1
        assert (knobs.tokens_per_step, knobs.sequence_length) == (524_288, 1024)
    assert recipe.plan.steps == 4768


def test_a_trapezoid_never_falls_below_its_floor():
    schedule = Trapezoid(warmup=0, warmdown=10, floor=0.25)
    assert [schedule.at(step, 20) for step in (0, 9, 10, 15, 19)] == [1.0, 1.0, 1.0, 0.5, 0.25]


def test_a_staged_schedule_is_another_one_times_the_factor_of_its_stage():
    inner = Trapezoid(warmup=2, warmdown=10)
    schedule = Staged(inner=inner, factors=(1.0, 1.5), starts=(0, 8))
    assert [schedule.at(step, 20) for step in (0, 7, 8, 15)] == [0.5, 1.0, 1.5, 0.75]
    longer = schedule.scaled(3)
    assert longer == Staged(inner=inner.scaled(3), factors=(1.0, 1.5), starts=(0, 24))
    assert schedule.scaled(0.01).at(0, 1) == 1.5 * inner.scaled(0.01).at(0, 1)


@pytest.mark.parametrize(
    "changes", [{"starts": (0,)}, {"starts": (1, 8)}, {"starts": (0, -1)}, {"factors": (1.0, -1.0)}]
)
def test_a_staged_schedule_that_makes_no_sense_is_told(changes):
    values = {"inner": Constant(), "factors": (1.0, 2.0), "starts": (0, 8)}
    assert Staged(**(values | changes)).problems()


def test_a_stage_holds_from_its_start_on():
    stages = Stages(values=(16, 32, 8), starts=(0, 3, 7))
    assert [stages.at(step) for step in (0, 2, 3, 6, 7, 100)] == [16, 16, 32, 32, 8, 8]


def test_stages_list_every_shape_once_a_stretch_and_their_tokens_add_up():
    plan = make(
        tokens_per_step=Stages(values=(64, 128), starts=(0, 4)),
        sequence_length=Stages(values=(16, 32, 64), starts=(0, 4, 20)),
    )
    stages = [(knobs.step, knobs.tokens_per_step, knobs.sequence_length) for knobs in plan.stages()]
    assert stages == [(0, 64, 16), (4, 128, 32)]
    shapes = {(plan.at(step).tokens_per_step, plan.at(step).sequence_length) for step in range(plan.steps)}
    assert shapes == {stage[1:] for stage in stages}
    assert (
        plan.tokens() == sum(plan.at(step).tokens_per_step for step in range(plan.steps)) == 4 * 64 + 6 * 128
    )
    assert [plan.tokens(steps) for steps in (0, 3, 4, 7, 10)] == [0, 192, 256, 640, plan.tokens()]


def test_the_baseline_takes_two_and_a_half_billion_tokens():
    assert find("nocap").plan.tokens() == 4768 * 524_288


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, ["plan.steps=0 must be at least 1"]),
        ({"tokens_per_step": 0}, ["plan.tokens_per_step=0 is not a whole number of rows", "use 16"]),
        ({"tokens_per_step": 50}, ["plan.tokens_per_step=50", "use 64"]),
        ({"sequence_length": 0}, ["plan.sequence_length=0 must be at least 1"]),
        ({"steps": 0, "tokens_per_step": 50}, ["plan.steps=0", "plan.tokens_per_step=50"]),
        (
            {"sequence_length": Stages(values=(16, 48, 60), starts=(0, 3, 5))},
            ["at step 3: plan.tokens_per_step=64", "use 96", "at step 5: ", "use 120"],
        ),
        ({"steps": -1, "sequence_length": Stages(values=(16, 32))}, ["plan.steps=-1"]),
    ],
)
def test_a_plan_names_all_its_problems_with_the_remedy(changes, said):
    text = "\n".join(make(**changes).problems())
    assert [part for part in said if part not in text] == []


@pytest.mark.parametrize(
    "stages",
    [
        Stages(values=(16, 32)),
        Stages(values=()),
        Stages(values=(), starts=()),
        Stages(values=(16, 32), starts=(1, 2)),
        Stages(values=(16, 32, 48), starts=(0, 5, 5)),
        Stages(values=(16, 0), starts=(0, 5)),
    ],
)
def test_stages_that_are_no_stages_say_so_and_the_plan_survives_asking(stages):
    (problem,) = stages.problems()
    assert problem.startswith(f"stages {stages.values} from {stages.starts}")
    assert make(sequence_length=stages).problems() == []


@pytest.mark.parametrize("changes", [{"warmup": -1}, {"warmdown": -3}, {"floor": 1.5}])
def test_a_trapezoid_with_negative_ramps_or_a_floor_beyond_the_peak_is_refused(changes):
    assert Trapezoid(**({"warmup": 1, "warmdown": 1} | changes)).problems()
    assert Trapezoid(warmup=0, warmdown=0).problems() == []


def test_a_ramp_rises_stays_and_falls_back():
    momentum = Ramp(first=0.85, last=0.95, rise=4, fall=2)
    values = [momentum.at(step, 10) for step in range(10)]
    assert values == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95, 0.95, 0.9, 0.85])
    assert Ramp(first=0.85, last=0.95, rise=0).at(0, 10) == 0.95
    assert momentum.scaled(0.5) == Ramp(first=0.85, last=0.95, rise=2, fall=1)
    assert Ramp(first=0.0, last=1.0, rise=-1).problems()


def test_momentum_and_window_are_knobs_that_are_none_unless_planned():
    assert (make().at(3).momentum, make().at(3).window) == (None, None)
    plan = make(momentum=Ramp(first=0.5, last=0.9, rise=8), window=Stages(values=(8, 16), starts=(0, 4)))
    assert [plan.at(step).momentum for step in (0, 4, 8)] == pytest.approx([0.5, 0.7, 0.9])
    assert [plan.at(step).window for step in (0, 3, 4, 9)] == [8, 8, 16, 16]
    assert {knobs.steps for knobs in plan.stages()} == {10}


def test_stages_list_every_window_once_a_stretch_of_constant_shapes():
    plan = make(
        tokens_per_step=Stages(values=(64, 128), starts=(0, 4)),
        window=Stages(values=(8, 16, 24, 32), starts=(0, 2, 4, 11)),
    )
    shapes = [(knobs.step, knobs.tokens_per_step, knobs.window) for knobs in plan.stages()]
    assert shapes == [(0, 64, 8), (2, 64, 16), (4, 128, 24)]
    half = plan.scaled(5)
    assert [(knobs.step, knobs.window) for knobs in half.stages()] == [(0, 8), (1, 16), (2, 24)]


def test_active_layers_are_a_knob_in_stages_of_their_own_that_a_shorter_run_keeps():
    assert make().at(3).layers is None
    plan = make(layers=Stages(values=(2, 4), starts=(0, 4)), window=Stages(values=(8, 16), starts=(0, 6)))
    shapes = [(knobs.step, knobs.layers, knobs.window) for knobs in plan.stages()]
    assert shapes == [(0, 2, 8), (4, 4, 8), (6, 4, 16)]
    assert plan.scaled(5).layers == Stages(values=(2, 4), starts=(0, 2))


def test_validation_takes_all_layers_where_idle_ones_add_nothing():
    recipe = find("grown").validate()
    assert [recipe.evaluation_shape(step) for step in (0, 120, 121)] == [(None, None)] * 3
    assert recipe.evaluation_shapes() == [(None, None)]


@pytest.mark.parametrize("part", ["mixers", "feedforwards"])
def test_validation_uses_the_layers_that_the_last_step_had_where_idle_ones_would_disturb(part):
    recipe = override(find("grown"), f"model.{part}.0.zero_init=false").validate()
    assert [recipe.evaluation_shape(step) for step in (0, 120, 121)] == [(None, 6), (None, 6), (None, 12)]
    assert recipe.evaluation_shapes() == [(None, 6), (None, 12)]


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["plan.layers.values=[6, 13]"], "at step 120: plan.layers is 13 and model.layers=12"),
        (["model.layers=6"], "at step 120: plan.layers is 12 and model.layers=6"),
        (["plan.steps=120"], "plan.layers is 6 at the last of plan.steps=120"),
        (["plan.layers.values=[0, 12]"], "values be at least 1"),
    ],
)
def test_layers_that_the_model_lacks_or_that_never_come_are_refused(assignments, said):
    recipe = find("grown")
    for assignment in assignments:
        recipe = override(recipe, assignment)
    with pytest.raises(ConfigError) as error:
        recipe.validate()
    assert said in str(error.value)
    assert override(find("grown").scaled(3), "plan.layers=null").validate().plan.layers is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 0}, "plan.window=0 must be at least 1"),
        ({"momentum": Constant(value=1.0)}, "at step 0: plan.momentum is 1.0"),
        ({"momentum": Ramp(first=0.9, last=1.2, rise=6)}, "at step 2: plan.momentum is 1.0"),
    ],
)
def test_a_window_or_a_momentum_that_is_none_is_refused(changes, said):
    (problem,) = make(**changes).problems()
    assert problem.startswith(said)


def test_the_batch_may_grow_in_stages_of_whole_blocks():
    stages = '{"part": "Stages", "values": [32768, 65536, 131072], "starts": [0, 1000, 2000]}'
    recipe = override(find("nocap"), f"plan.tokens_per_step={stages}").validate()
    assert recipe.data.block_tokens == 16384
    assert [knobs.tokens_per_step for knobs in recipe.plan.stages()] == [32768, 65536, 131072]


def test_a_shorter_run_scales_the_schedules_of_groups_as_well():
    own = Trapezoid(warmup=0, warmdown=100)
    recipe = find("base")
    groups = (replace(recipe.optim[0], lr=own), *recipe.optim[1:])
    half = replace(recipe, optim=groups).scaled(180)
    assert half.optim[0].lr == Trapezoid(warmup=0, warmdown=50)
    assert half.optim[1:] == recipe.optim[1:]
    assert half.plan == recipe.plan.scaled(180)


def test_validation_sees_through_the_plans_window_or_a_larger_one_that_is_declared():
    recipe = find("base")
    windows = Stages(values=(128, 512), starts=(0, 90))
    recipe = replace(recipe, plan=replace(recipe.plan, window=windows))
    assert [recipe.evaluation_window(step) for step in (0, 90, 91, 360)] == [128, 128, 512, 512]
    assert recipe.evaluation_shapes() == [(128, None), (512, None)]
    for declared, expected in ((256, [256, 512]), (1024, [1024])):
        wider = override(recipe, f"budget.evaluation_window={declared}")
        assert wider.evaluation_shapes() == [(window, None) for window in expected]
    assert override(recipe, "budget.evaluate_every=0").evaluation_shapes() == [(512, None)]
    assert find("base").evaluation_shapes() == [(None, None)]
