"""A fixed seed gives fixed losses, so that a change of code that changes results does not go unnoticed."""

import pytest
import torch

from sabrage.config import override

TORCH = "2.13"
# The first losses of the tiny recipe, fp32, one thread. Processors with other vector units differ by
# one part in ten million; whoever changes these numbers on purpose says so, and by how much, in the commit.
TRAINING = [
    5.737104415893555, 5.605354309082031, 5.425356864929199, 5.170810222625732, 5.054229736328125,
    4.849973678588867, 4.670058250427246, 4.560794353485107, 4.4695611000061035, 4.37083625793457,
    4.292913436889648, 4.345355987548828,
]  # fmt: skip
VALIDATION = {4: 5.040406097412109, 8: 4.485592407226562, 12: 4.334553680419922}


@pytest.mark.skipif(
    not torch.__version__.startswith(TORCH), reason=f"the losses were written down with torch {TORCH}"
)
def test_the_first_losses_of_the_tiny_recipe_stay_as_they_are(tiny, run_recipe):
    _, run = run_recipe(tiny)
    training = [record["loss"] for record in run.events("train")]
    assert training == pytest.approx(TRAINING, rel=1e-6)
    assert {record["step"]: record["loss"] for record in run.events("validation")} == pytest.approx(
        VALIDATION, rel=1e-6
    )


def test_two_runs_in_one_process_are_bit_identical(tiny, run_recipe):
    def losses(run):
        return [
            (record["event"], record["step"], record["loss"]) for record in run.records if "loss" in record
        ]

    _, first = run_recipe(tiny, name="first")
    torch.manual_seed(77)
    _, second = run_recipe(tiny, name="second")
    assert losses(first) == losses(second)


def test_another_seed_gives_other_losses(tiny, run_recipe):
    _, first = run_recipe(tiny, name="first")
    _, second = run_recipe(override(tiny, "budget.seed=1"), name="second")
    pairs = list(zip(first.events("train"), second.events("train"), strict=True))
    assert all(left["loss"] != right["loss"] for left, right in pairs)


def test_the_log_begins_with_how_long_each_stage_of_the_start_took(tiny, run_recipe):
    _, run = run_recipe(tiny)
    first = run.records[0]
    stages = [f"{name}_seconds" for name in ("process", "checks", "model", "manifest", "warm-up")]
    assert [name for name in first if name not in ("event", "time")] == stages
    assert first["event"] == "start"
    assert all(first[name] >= 0 for name in stages)
    assert sum(first[name] for name in stages) <= run.events("validation")[0]["wall_seconds"]
