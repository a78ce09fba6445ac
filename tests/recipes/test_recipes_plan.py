"""Plans: the baseline's schedule at every step, stages and their tokens, and all problems at once."""

import pytest

from sabrage.plan import Constant, Plan, Stages, Trapezoid
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
