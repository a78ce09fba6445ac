"""Studies whose runs are made one after another in a process that keeps what the next one needs again."""

import json
import os
import signal
import sys
from dataclasses import replace

import pytest

from sabrage.cli import parse
from sabrage.config import override, to_json
from sabrage.report.tables import source
from sabrage.study.launch import Attempt, Job, Local
from sabrage.study.plan import StudyError, StudyPlan, Variant
from sabrage.study.runner import finished
from sabrage.study.submission import run_problems
from sabrage.study.summary import summarise
from sabrage.study.workplace import INLINE, Kept

USED = "using the model and the compiled graphs"
# As sabrage.cli.inline, but for what happens to it: it tells its process, and seed 13 meets a broken device.
PROGRAM = """
import os, socket, sys
from pathlib import Path
from sabrage.cli import inline
from sabrage.train import loop

train = loop.train

def watched(recipe, **fields):
    with open("calls.txt", "a") as calls:
        calls.write(f"{os.getpid()} {recipe.budget.seed}\\n")
    if recipe.budget.seed == 13 and not Path("mended").exists():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return train(recipe, **fields)

loop.train = watched
with socket.socket(fileno=int(sys.argv[1])) as inherited:
    inline.serve(inherited)
"""


@pytest.fixture
def jobs(tiny, tmp_path, monkeypatch):
    """jobs(kind, *(seed, *assignments)) -> jobs of the tiny recipe, each in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # On the CPU, where equal runs are equal bit for bit.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fields = {key: value for key, value in to_json(tiny).items() if key not in ("part", "name", "summary")}
    sets = tuple(f"{field}={json.dumps(value)}" for field, value in fields.items())

    def make(kind, *wanted):
        return [
            Job(
                Variant(name=f"{kind} {index}", recipe="demo", sets=(*sets, *assignments)),
                seed,
                tmp_path / kind / f"{index}--seed-{seed}",
            )
            for index, (seed, *assignments) in enumerate(wanted)
        ]

    return make


@pytest.fixture
def inline(tmp_path):
    """A launcher of processes that write "PROCESS SEED" for every job that they begin to calls.txt."""
    (tmp_path / "inline.py").write_text(PROGRAM)
    return Local(inline=(sys.executable, str(tmp_path / "inline.py")))


@pytest.fixture
def calls(tmp_path):
    """(process, seed) of every job that was begun, in order."""
    return lambda: [
        tuple(map(int, line.split())) for line in (tmp_path / "calls.txt").read_text().splitlines()
    ]


@pytest.fixture
def alone(run_recipe):
    """alone(job) -> the losses of the same run by itself."""

    def losses_of(job):
        recipe = override(job.variant.make(), f"budget.seed={job.seed}")
        return losses(run_recipe(recipe, name=f"alone-{job.seed}")[1])

    return losses_of


def losses(run):
    return [(record["event"], record["step"], record["loss"]) for record in run.records if "loss" in record]


@pytest.mark.long
def test_runs_made_inline_are_those_of_processes_of_their_own(jobs, inline, calls):
    wanted = [(0,), (1, "optim.0.optimizer.lr=0.003"), (0, "model.layers=1"), (2, "model.layers=1")]
    alone, together = jobs("alone", *wanted), jobs("together", *wanted)
    assert Local().run([alone], watch=lambda: None)
    assert inline.run([together[:1], together[1:]], watch=lambda: None)
    assert {job.state() for job in (*alone, *together)} == {"done"}
    assert [losses(finished(job)) for job in together] == [losses(finished(job)) for job in alone]
    assert [USED in job.output.read_text() for job in together] == [False, True, False, True]
    assert len({process for process, _ in calls()}) == 1

    run = finished(together[1])
    before = finished(alone[1])
    assert run.inline
    assert not before.inline
    assert run.result["train_seconds"] > 0
    assert (run.result["nocap_seconds"], run.result["wall_seconds"]) == (None, None)
    # The command of the manifest makes the same run by itself.
    assert run.manifest["command"][1:] == [
        word.replace("alone", "together") for word in before.manifest["command"][1:]
    ]
    assert list(run.result.keys() - before.result.keys()) == ["inline"]
    assert any("run it without --inline" in problem for problem in run_problems(run))


@pytest.mark.long
def test_a_job_that_breaks_its_process_fails_alone(jobs, inline, calls, alone):
    made = jobs("made", (4,), (13,), (5,), (6,))
    assert inline.run([made], watch=lambda: None)
    assert [job.state() for job in made] == ["done", "failed", "done", "done"]
    failure = json.loads(made[1].failure.read_text())
    assert failure["reason"] == "exit code 1"
    assert failure["last_lines"][-1] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "Traceback (most recent call last)" in made[1].output.read_text()
    first, broken, *others = (process for process, _ in calls())
    assert broken == first
    assert len(set(others)) == 1
    assert first not in others
    assert losses(finished(made[2])) == alone(made[2])


def test_a_job_that_a_person_can_mend_fails_alone_and_the_process_goes_on(jobs, inline, calls, alone):
    wanted = [(1, "optim.0.optimizer.lr=1e30"), (2,), (3, "optim.0.pattern=blocks"), (4,)]
    made = jobs("made", *wanted)
    assert inline.run([made], watch=lambda: None)
    assert [job.state() for job in made] == ["failed", "done", "failed", "done"]
    assert "not finite" in json.loads(made[0].failure.read_text())["last_lines"][-1]
    assert "no optimizer group matches" in made[2].output.read_text()
    assert len({process for process, _ in calls()}) == 1
    assert [losses(finished(job)) for job in made[1::2]] == list(map(alone, made[1::2]))


@pytest.mark.long
def test_a_failed_job_is_made_by_the_next_call(jobs, inline, tmp_path):
    made = jobs("made", (13,), (14,))
    assert inline.run([made], watch=lambda: None)
    assert [job.state() for job in made] == ["failed", "done"]
    (tmp_path / "mended").touch()
    assert inline.run([made], watch=lambda: None)
    assert {job.state() for job in made} == {"done"}


@pytest.mark.long
def test_an_interrupted_study_saves_and_the_same_call_goes_on(jobs, inline, alone):
    long = ("plan.steps=400", "budget.evaluate_every=100")
    made = jobs("made", (1, *long), (2, *long))
    left = [signal.SIGTERM]

    def watch():
        log = made[0].folder / "log.jsonl"
        if left and log.is_file() and '"validation"' in log.read_text():
            os.kill(os.getpid(), left.pop())

    assert not inline.run([made], watch=watch)
    assert [job.state() for job in made] == ["started", "waiting"]
    assert list((made[0].folder / "checkpoints").glob("step-*"))

    assert inline.run([made], watch=lambda: None)
    assert {job.state() for job in made} == {"done"}
    assert losses(finished(made[0])) == alone(made[0])


@pytest.mark.long
def test_every_place_has_a_process_of_its_own(jobs, inline, calls):
    made = jobs("made", *((seed, "plan.steps=200") for seed in range(4)))
    assert replace(inline, parallel=2).run([[job] for job in made], watch=lambda: None)
    assert {job.state() for job in made} == {"done"}
    assert len({process for process, _ in calls()}) == 2


def test_a_job_that_a_kept_process_works_on_is_not_started_twice(jobs, inline):
    (job,) = jobs("made", (1, "plan.steps=100000"))
    place = inline.workplace({})
    first = Attempt(job, launcher=inline, place=place)
    with pytest.raises(StudyError, match="an earlier call still works on"):
        Attempt(job, launcher=inline, place=place)
    first.process.kill()
    first.process.wait()
    place.close()


def test_a_kept_process_ends_with_its_place(jobs, inline):
    (job,) = jobs("made", (1,))
    place = inline.workplace({})
    attempt = Attempt(job, launcher=inline, place=place)
    while not attempt.ended(stopping=False):
        pass
    process = place.process
    assert process.poll() is None
    place.close()
    assert process.returncode == 0


def test_a_process_that_cannot_start_says_so_in_the_output_of_the_job(jobs):
    (job,) = jobs("made", (1,))
    broken = Local(inline=(sys.executable, "-c", "raise SystemExit('no such thing')"))
    assert broken.run([[job]], watch=lambda: None)
    assert json.loads(job.failure.read_text()) == {"reason": "exit code 1", "last_lines": ["no such thing"]}


def test_a_summary_tells_no_clock_that_an_inline_run_has_not(jobs, inline):
    made = jobs("made", (0,), (1,))
    assert inline.run([made], watch=lambda: None)
    plan = StudyPlan(kind="compare", variants=tuple(job.variant for job in made), seeds=(0, 1))
    summary = summarise(plan, made, {}, name="study")
    assert summary["clocks"]["train_seconds"] > 0
    assert (summary["clocks"]["nocap_seconds"], summary["clocks"]["wall_seconds"]) == (None, None)
    assert (
        "runs shared a process (inline) or took turns on a GPU: no wall and no nocap seconds"
        in (summary["notes"])
    )
    assert "nocap" not in source(summary)


def test_the_option_asks_for_kept_processes():
    launchers = [
        parse(["study", "compare", "demo", "base", *more]).command.launcher()
        for more in ([], ["--inline"], ["--inline", "--ray", "local"])
    ]
    assert [launcher.inline for launcher in launchers] == [(), INLINE, INLINE]
    assert isinstance(launchers[1].workplace({}), Kept)
