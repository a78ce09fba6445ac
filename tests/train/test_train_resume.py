"""Runs that are killed, interrupted and damaged go on to the very losses of a run that was left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest

from sabrage.cli import main
from sabrage.config import override
from sabrage.model.fused_head import FusedHead
from sabrage.optim.muon import Muon
from sabrage.parts import OptimizerGroup
from sabrage.plan import Stages
from sabrage.run.checkpoint import TENSORS
from sabrage.run.folder import read_run
from sabrage.run.log import read_log

STEPS = 240


@pytest.fixture
def start(tmp_path, tiny_options):
    """start(*more options) -> the process of a run in tmp_path/run, long enough to be caught half-way."""
    processes = []

    def run(*more):
        command = [sys.executable, "-m", "sabrage", "train", "demo", "--out", "run", *tiny_options]
        command += ["--set", f"plan.steps={STEPS}", "--set", "budget.evaluate_every=40", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def undisturbed(tiny, run_recipe):
    """Training and validation losses of the same run when nothing happens to it."""
    recipe = override(override(tiny, f"plan.steps={STEPS}"), "budget.evaluate_every=40")
    return losses(run_recipe(recipe, name="undisturbed")[1])


def losses(run):
    return [
        [(record["step"], record["loss"]) for record in run.events(event)]
        for event in ("train", "validation")
    ]


def wait_for(process, folder, event, count):
    """Returns as soon as the run's log holds `count` records of a kind."""
    log = folder / "log.jsonl"
    while not log.exists() or sum(record["event"] == event for record in read_log(log)) < count:
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"the run ended early with {process.wait(0.01)}")


def resume(monkeypatch, folder):
    monkeypatch.chdir(folder.parent)
    assert main(["train", "demo", "--resume", "--out", folder.name]) == 0
    return read_run(folder)


@pytest.mark.parametrize("checkpoint_every", [7, 0])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    start, undisturbed, tmp_path, monkeypatch, one_thread, checkpoint_every
):
    folder = tmp_path / "run"
    process = start("--set", f"budget.checkpoint_every={checkpoint_every}")
    if checkpoint_every:
        wait_for(process, folder, "checkpoint", random.Random(0).randint(1, 9))
    else:
        wait_for(process, folder, "train", 20)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = read_run(folder)
    assert before.result is None
    run = resume(monkeypatch, folder)
    resumed_at = [record["step"] for record in run.events("resume")]
    assert resumed_at == [max((record["step"] for record in before.events("checkpoint")), default=0)]
    assert losses(run) == undisturbed
    assert run.result["tokens"] == STEPS * 128


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_says_how_to_go_on_and_goes_on_bit_for_bit(
    start, undisturbed, tmp_path, monkeypatch, one_thread, number, code
):
    folder = tmp_path / "run"
    process = start()
    wait_for(process, folder, "train", 25)
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait() == code
    before = read_run(folder)
    done = before.result["steps"]
    assert before.result["ending"] == "interrupted"
    assert 25 <= done < STEPS
    assert f"stopped after step {done:,}; go on with: sabrage train demo --resume --out run" in output
    run = resume(monkeypatch, folder)
    assert [record["step"] for record in run.events("resume")] == [done]
    assert losses(run) == undisturbed
    assert run.result["ending"] == "done"


def test_a_damaged_newest_checkpoint_costs_some_steps_and_nothing_else(
    tiny, run_recipe, tmp_path, monkeypatch, capsys
):
    _, whole = run_recipe(tiny, name="whole")
    _, saving = run_recipe(override(tiny, "budget.checkpoint_every=4"))
    newest = saving.path / "checkpoints" / "step-00000012" / TENSORS
    newest.write_bytes(newest.read_bytes()[:-1])
    run = resume(monkeypatch, tmp_path / "run")
    assert "checkpoint step-00000012 is damaged and passed over" in capsys.readouterr().out
    assert [record["step"] for record in run.events("resume")] == [8]
    assert losses(run) == losses(whole)


def with_dropout(recipe):
    return override(recipe, "model.wiring.dropout=0.3")


def with_gradients_that_wait(recipe):
    matrices = OptimizerGroup(pattern=r"blocks\..*weight", optimizer=Muon(lr=0.02, every=2))
    return replace(recipe, optim=(matrices, *recipe.optim))


def with_stages(recipe):
    lengths = Stages(values=(16, 64), starts=(0, 6))
    return replace(recipe, plan=replace(recipe.plan, sequence_length=lengths))


def with_growing_depth(recipe):
    return with_gradients_that_wait(
        replace(recipe, plan=replace(recipe.plan, layers=Stages(values=(1, 2), starts=(0, 7))))
    )


def with_counted_columns(recipe):
    head = FusedHead(backend="plain", columns=150, sample_tokens=40, proposal="counts")
    return replace(recipe, model=replace(recipe.model, head=head))


@pytest.mark.parametrize(
    "change",
    [with_dropout, with_gradients_that_wait, with_stages, with_growing_depth, with_counted_columns],
)
def test_whatever_the_rest_of_the_run_depends_on_is_in_the_checkpoint(tiny, run_recipe, change):
    recipe = override(override(change(tiny), "budget.checkpoint_every=5"), "budget.keep_checkpoints=3")
    _, whole = run_recipe(recipe)
    for step in (10, 5):
        for path in sorted((whole.path / "checkpoints").iterdir()):
            if path.name > f"step-{step:08d}":
                shutil.rmtree(path)
        _, run = run_recipe(recipe, resume=True)
        assert run.events("resume")[-1]["step"] == step
        assert losses(run) == losses(whole)


def test_a_run_whose_checkpoints_are_all_damaged_is_an_error_that_says_so(
    tiny, run_recipe, tmp_path, monkeypatch, capsys
):
    run_recipe(tiny)
    for path in tmp_path.glob("run/checkpoints/*/*"):
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", "--resume", "--out", "run"]) == 1
    assert "every checkpoint in run/checkpoints is damaged (step-00000012); start" in capsys.readouterr().err


def test_the_clocks_go_on_where_the_checkpoint_stopped_them(tiny, run_recipe):
    recipe = override(tiny, "budget.checkpoint_every=4")
    _, first = run_recipe(recipe)
    for path in (first.path / "checkpoints" / "step-00000012").iterdir():
        path.unlink()
    _, second = run_recipe(recipe, resume=True)
    at_eight = next(record for record in first.events("validation") if record["step"] == 8)
    for name in ("train_seconds", "nocap_seconds", "wall_seconds"):
        assert second.result[name] > at_eight[name]
    assert second.result["tokens"] == first.result["tokens"]
