from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from sabrage.bench import step, trial
from sabrage.config import ConfigError
from sabrage.model.counts import flops_per_token
from sabrage.optim.adamw import AdamW
from sabrage.plan import Stages
from sabrage.recipes import find
from sabrage.run.device import DeviceFacts

CPU = torch.device("cpu")
# A peak so low that a CPU has a share of it.
FACTS = DeviceFacts(kind="cpu", name="a CPU", memory=1 << 34, peaks={"fp32": 1e12})


def staged(recipe):
    """The recipe with three stages: a longer row, then a larger batch."""
    plan = replace(
        recipe.plan,
        tokens_per_step=Stages(values=(128, 256), starts=(0, 8)),
        sequence_length=Stages(values=(32, 64), starts=(0, 4)),
        window=Stages(values=(16, 32), starts=(0, 4)),
    )
    return replace(recipe, plan=plan)


def test_a_recipe_is_asked_for_as_studies_write_it():
    asked = trial.asked("demo+model.layers=2+model.mixers.0.heads=2")
    assert asked.name == "demo+model.layers=2+model.mixers.0.heads=2"
    assert (asked.model.layers, asked.model.mixers[0].heads) == (2, 2)
    assert replace(trial.asked("base"), name="base") == find("base")
    with pytest.raises(ConfigError, match="layers=0 must be at least 1"):
        trial.asked("demo+model.layers=0")


def test_one_row_tells_the_cost_of_the_first_step(tiny, one_thread):
    (row,) = step.measure(staged(tiny), FACTS, CPU)
    assert row["recipe"] == "demo"
    assert 0 < row["optimizer_ms"] < row["step_ms"]
    assert row["optimizer_share"] == row["optimizer_ms"] / row["step_ms"]
    assert row["tokens_per_second"] == pytest.approx(128 / row["step_ms"] * 1e3)
    floor = flops_per_token(tiny.model, 32, tiny.objective) * 128 / 1e12 * 1e3
    assert row["mfu"] == pytest.approx(floor / row["step_ms"])
    assert row["peak_gib"] is None
    assert "stage" not in row


def test_a_step_is_timed_in_a_turn_and_built_before(tiny, one_thread, monkeypatch):
    happened = []

    @contextmanager
    def turn():
        happened.append("turn")
        yield
        happened.append("over")

    monkeypatch.setattr(step, "turn", turn)
    for name in ("ready", "cost"):
        real = getattr(step, name)
        monkeypatch.setattr(
            step, name, lambda *words, name=name, real=real: happened.append(name) or real(*words)
        )
    assert len(list(step.measure(tiny, FACTS, CPU))) == 1
    assert happened == ["ready", "turn", "cost", "over"]


def test_with_stages_there_is_a_row_for_each_of_the_plan(tiny, one_thread):
    rows = list(step.measure(staged(tiny), FACTS, CPU, stages=True))
    shown = [tuple(row[column["key"]] for column in step.STAGE) for row in rows]
    assert shown == [(0, 0, 128, 32, 16), (1, 4, 128, 64, 32), (2, 8, 256, 64, 32)]
    assert all(row["step_ms"] > 0 for row in rows)


def test_steps_are_timed_at_the_shapes_of_their_stage(tiny, one_thread, monkeypatch):
    recipe, shapes = staged(tiny), []
    ready = trial.ready(recipe, FACTS, CPU, recipe.plan.stages())
    forward = ready.step.forward
    monkeypatch.setattr(
        ready.step,
        "forward",
        lambda tokens, *rest: (shapes.append((tuple(tokens.shape), rest[3])), forward(tokens, *rest))[1],
    )
    ready.step_ms(recipe.plan.stages()[-1])
    assert set(shapes) == {((4, 64), 32)}
    # Each of the timed steps, and one before them.
    assert len(shapes) == trial.STEPS + 1


def test_where_an_optimizer_lets_steps_pass_the_mean_tells_what_a_step_costs(tiny, one_thread, monkeypatch):
    ready = trial.ready(tiny, FACTS, CPU)
    measured = [1.0, 1.0, 5.0, 1.0]
    assert ready.typical(measured, tiny.plan.at(0)) == 1.0
    monkeypatch.setattr(AdamW, "due", lambda self, step: step % 4 == 2)
    assert ready.typical(measured, tiny.plan.at(0)) == 2.0


def test_a_recipe_that_fails_is_a_row_and_the_others_are_measured(monkeypatch, tmp_path):
    def measure(recipe, facts, device, *, stages):
        if recipe.name == "nocap":
            raise RuntimeError("out of memory\nmore")
        yield {"recipe": recipe.name, "note": ""}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "probe", lambda device: FACTS)
    monkeypatch.setattr(step, "use_compile_cache", lambda wanted: None)
    written = []
    monkeypatch.setattr(step, "write_result", lambda path, **given: written.append(list(given["rows"])))
    step.main(["nocap", "base", "--out", str(tmp_path / "steps.json")])
    assert written[-1] == [
        {"recipe": "nocap", "note": "failed: out of memory"},
        {"recipe": "base", "note": ""},
    ]
