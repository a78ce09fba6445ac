"""Two tables that are one until a step: equal to a tied run until then, apart afterwards."""

from dataclasses import replace

import pytest
import torch

from sabrage.config import ConfigError
from sabrage.model.ends import LinearHead
from sabrage.optim.adamw import AdamW
from sabrage.optim.tied_adamw import TiedAdamW
from sabrage.parts import Batch, OptimizerGroup

UNTIL = 5


def leaving(tiny, *, until=UNTIL):
    """The tiny recipe with a head that leaves the table at a step."""
    adamw = tiny.optim[0].optimizer
    tables = OptimizerGroup(
        pattern=r"(embedding|head)\.weight", optimizer=TiedAdamW(until=until, adamw=adamw)
    )
    model = replace(tiny.model, head=LinearHead(tied=False, copied=True))
    return replace(tiny, model=model, optim=(tables, *tiny.optim))


def test_a_run_equals_the_tied_one_until_the_head_leaves_and_only_until_then(tiny, run_recipe):
    tiny = replace(tiny, budget=replace(tiny.budget, log_every=1))
    tied, left, never = (
        [record["loss"] for record in run_recipe(recipe, name=name)[1].events("train")]
        for name, recipe in (("tied", tiny), ("left", leaving(tiny)), ("never", leaving(tiny, until=100)))
    )
    assert never == tied
    # The first step with gradients apart shows in the loss after it.
    assert [a == b for a, b in zip(tied, left, strict=True)] == [n <= UNTIL for n in range(len(tied))]


def advance(recipe, session, step, numbers):
    """The weights and the state after these steps."""
    rows = torch.from_numpy(recipe.data.open().train.rows(0, 1, 32).astype("int64"))
    batch = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    for number in numbers:
        step(batch, recipe.plan.at(number))
    return {name: tensor.clone() for name, tensor in session.tensors().items() if "random" not in name}


def test_moments_are_shared_until_then_and_each_tables_own_afterwards(tiny, assemble):
    recipe = leaving(tiny)
    session, step, _ = assemble(recipe)
    for number in range(UNTIL + 1):
        found = advance(recipe, session, step, [number])
        for kind in ("learner/{}.weight", "optimizer/{}.weight/exp_avg", "optimizer/{}.weight/exp_avg_sq"):
            tables = (found[kind.format(name)] for name in ("model.embedding", "model.head"))
            assert torch.equal(*tables) == (number < UNTIL)


def test_the_tables_move_as_often_as_their_adamw():
    part = TiedAdamW(until=UNTIL, adamw=AdamW(every=3))
    assert [step for step in range(9) if part.due(step)] == [2, 5, 8]
    assert all(TiedAdamW(until=UNTIL).due(step) for step in range(9))


@pytest.mark.parametrize("stop", [UNTIL - 2, UNTIL + 2])
def test_a_run_put_back_before_or_after_the_step_goes_on_bit_for_bit(tiny, assemble, stop):
    recipe = leaving(tiny)
    session, step, _ = assemble(recipe)
    middle = advance(recipe, session, step, range(stop)) | {
        name: tensor.clone() for name, tensor in session.tensors().items() if "random" in name
    }
    end = advance(recipe, session, step, range(stop, 2 * UNTIL))
    session, step, _ = assemble(recipe)
    session.load(middle, session.values())
    again = advance(recipe, session, step, range(stop, 2 * UNTIL))
    assert all(torch.equal(again[name], tensor) for name, tensor in end.items())


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "other"]], ids=["one", "three", "unequal"])
def test_anything_but_two_equal_tables_is_refused(names):
    made = [(name, torch.nn.Parameter(torch.full((3, 2), float(name == "other")))) for name in names]
    with pytest.raises(ConfigError, match="copied=true"):
        TiedAdamW(until=3).build(made)


def test_a_negative_step_is_named():
    assert TiedAdamW(until=-1).problems()
