import io
import json
import os
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from sabrage.cli import main
from sabrage.recipes import RECIPES
from sabrage.report.tables import read_results, table
from sabrage.run.folder import read_run
from sabrage.run.turn import TURN, turn_file
from sabrage.study.board import Board
from sabrage.study.launch import Attempt, Job, Local, OnRay, run_blocks
from sabrage.study.plan import StudyError, StudyPlan, parse_variant
from sabrage.study.runner import blocks_of, finished, run_study
from sabrage.study.summary import summarise

DEEP = "demo+model.layers=8"
BROKEN = "demo+model.layers=3"
LONG = "demo+budget.checkpoint_every=7"
AS_LONG = f"{LONG}+budget.log_every=3"


def compare(*recipes, **fields):
    plan = StudyPlan(kind="compare", variants=tuple(map(parse_variant, recipes)), seeds=(0, 1, 2))
    return replace(plan, **fields)


def rows(plan, jobs):
    summary = summarise(plan, jobs, {}, name="study")
    return summary, {row["variant"]: row for row in summary["rows"]}


def test_variants_take_turns_and_the_order_turns_round_with_every_seed(program, calls, tmp_path):
    run_study(compare("demo", DEEP), tmp_path / "study", Local(program=program))
    turns = [("demo", DEEP), (DEEP, "demo"), ("demo", DEEP)]
    assert calls() == [f"{name}--seed-{seed}" for seed, turn in enumerate(turns) for name in turn]


def test_a_finished_run_is_never_repeated(program, calls, tmp_path):
    for _ in range(2):
        jobs = run_study(compare("demo", DEEP), tmp_path / "study", Local(program=program))
    assert len(calls()) == len(jobs) == 6


def test_more_seeds_are_added_to_the_same_study(program, calls, tmp_path):
    for seeds in ((0, 1), (0, 1, 2)):
        run_study(compare("demo", DEEP, seeds=seeds), tmp_path / "study", Local(program=program))
    assert len(calls()) == 6


def test_a_folder_of_another_study_is_refused(program, tmp_path):
    run_study(compare("demo", DEEP, seeds=(0,)), tmp_path / "study", Local(program=program))
    with pytest.raises(StudyError, match="holds another study"):
        run_study(compare("demo", BROKEN, seeds=(0,)), tmp_path / "study", Local(program=program))


def test_a_folder_that_is_no_study_is_refused_and_left_alone(program, tmp_path):
    with pytest.raises(StudyError, match="neither empty nor a study"):
        run_study(compare("demo", DEEP), tmp_path, Local(program=program))
    assert (tmp_path / "train.py").is_file()


def test_a_failed_run_is_reported_and_the_others_go_on(program, tmp_path):
    plan = compare("demo", BROKEN, DEEP)
    jobs = run_study(plan, tmp_path / "study", Local(program=program))
    summary, by_name = rows(plan, jobs)
    assert {name: row["runs"] for name, row in by_name.items()} == {"demo": 3, BROKEN: 0, DEEP: 3}
    failure = json.loads((tmp_path / "study" / "runs" / f"{BROKEN}--seed-1.failed.json").read_text())
    assert failure == {"reason": "exit code 3", "last_lines": ["out of memory"]}
    assert list(summary["failures"]) == [f"{BROKEN}, seed {seed}" for seed in range(3)]
    assert f"{BROKEN}: no pair of finished runs" in summary["sentences"]


def test_a_failed_run_is_tried_again_by_the_next_call(program, calls, tmp_path):
    for _ in range(2):
        run_study(compare("demo", BROKEN, seeds=(0,)), tmp_path / "study", Local(program=program))
    assert calls() == ["demo--seed-0", f"{BROKEN}--seed-0", f"{BROKEN}--seed-0"]


def stop_when_saved(folder, runs=1):
    """A watch that interrupts this process once so many runs in `folder` have a checkpoint."""
    left = [signal.SIGTERM]

    def watch():
        if left and len(list(folder.rglob("step-00000001"))) == runs:
            os.kill(os.getpid(), left.pop())

    return watch


def test_an_interrupted_study_saves_and_the_same_call_goes_on(program, calls, tmp_path):
    blocks = blocks_of(tmp_path / "runs", [parse_variant("demo"), parse_variant(LONG)], (0, 1))
    launcher = Local(program=program)
    assert not launcher.run(blocks, watch=stop_when_saved(tmp_path / "runs"))
    assert [job.state() for job in blocks[0]] == ["done", "started"]
    assert calls() == ["demo--seed-0", f"{LONG}--seed-0"]

    again = [blocks[0], blocks[1][1:]]
    assert launcher.run(again, watch=lambda: None)
    assert {job.state() for block in again for job in block} == {"done"}
    assert calls()[2:] == [f"{LONG}--seed-0 resumed", "demo--seed-1"]


@pytest.mark.parametrize("kept", [True, False])
def test_checkpoints_of_done_runs_go_unless_they_are_wanted(program, tmp_path, kept):
    job = Job(parse_variant("demo"), 0, tmp_path / "runs" / "demo")
    assert Local(program=program, keep_checkpoints=kept).run([[job]], watch=lambda: None)
    assert (job.folder / "checkpoints").exists() == kept


def test_runs_that_end_on_the_way_are_done_and_the_summary_says_so(program, tmp_path):
    variants = tuple(parse_variant(text, ("budget.until=40",)) for text in ("demo", "demo+model.layers=6"))
    plan = StudyPlan(kind="compare", variants=variants, seeds=(0,))
    jobs = run_study(plan, tmp_path / "study", Local(program=program))
    assert {job.state() for job in jobs} == {"done"}
    notes = summarise(plan, jobs, {}, name="study")["notes"]
    assert sum("ended on the way (budget.until)" in note for note in notes) == 1


def test_a_run_that_left_no_checkpoint_starts_anew(program, tmp_path):
    job = Job(parse_variant("demo"), 0, tmp_path / "runs" / "demo")
    job.folder.mkdir(parents=True)
    (job.folder / "manifest.json").write_text("{}")
    assert job.state() == "started"
    assert Local(program=program).run([[job]], watch=lambda: None)
    assert job.state() == "done"
    assert finished(job).manifest["seed"] == 0


def test_a_run_that_another_process_works_on_is_not_started_twice(program, tmp_path):
    job = Job(parse_variant(LONG), 0, tmp_path / "runs" / "long")
    launcher = Local(program=program)
    first = Attempt(job, launcher=launcher, place=launcher.workplace({}))
    with pytest.raises(StudyError, match="an earlier call still works on"):
        Attempt(job, launcher=launcher, place=launcher.workplace({}))
    first.process.kill()
    first.process.wait()


def test_each_gpu_gets_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in Local().places()] == ["4", "6"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in Local(parallel=3).places()] == ["4", "6", "4"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Local().places() == [{}]
    assert Local(parallel=2).places() == [{}, {}]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_processes_of_one_gpu_take_turns(monkeypatch, num_gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not any(TURN in place for place in Local().places())
    turns = [place[TURN] for place in Local(parallel=2 * num_gpus).places()]
    assert turns == [str(turn_file(str(index % num_gpus))) for index in range(2 * num_gpus)]


def test_places_that_take_turns_share_a_block_and_others_do_not(program, calls, tmp_path):
    def run(turns, folder):
        # Each waits until it is stopped, so that no place gets a second job.
        long = [parse_variant(LONG), parse_variant(AS_LONG)]
        launcher, blocks = Local(program=program), blocks_of(tmp_path / folder, long, (0, 1))
        watch = stop_when_saved(tmp_path / folder, runs=2)
        assert not run_blocks(blocks, launcher=launcher, places=turns, watch=watch)
        return [[job.state() for job in block] for block in blocks]

    one, other = {TURN: "one"}, {TURN: "other"}
    assert run([one, one], "shared") == [["started", "started"], ["waiting", "waiting"]]
    assert run([one, other], "apart") == [["started", "waiting"], ["started", "waiting"]]


def test_variants_of_a_single_seed_may_each_have_a_place(program, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(Local, "places", lambda self: [{"PLACE": "0"}, {"PLACE": "1"}])
    plan, watch = compare(LONG, AS_LONG, seeds=(0,)), stop_when_saved(tmp_path, runs=2)
    monkeypatch.setattr(Board, "__call__", lambda board: watch())
    with pytest.raises(KeyboardInterrupt):
        run_study(plan, tmp_path / "study", Local(program=program))
    assert len(calls()) == 2


def test_several_places_share_the_blocks(program, calls, tmp_path):
    jobs = run_study(compare("demo", DEEP), tmp_path / "study", Local(program=program, parallel=2))
    assert {job.state() for job in jobs} == {"done"}
    assert len(calls()) == 6


def test_a_summary_compares_at_equal_tokens_and_at_equal_seconds(program, tmp_path):
    plan = compare("demo", DEEP, steps=100)
    summary, by_name = rows(plan, run_study(plan, tmp_path / "study", Local(program=program)))
    deep = by_name[DEEP]
    # The stand-in's loss is 3 + 40 / (steps (1 + layers / 40)), its step takes layers / 100 s.
    expected = 0.4 / 1.2 - 0.4 / 1.1
    assert deep["loss_difference"] == pytest.approx(expected, abs=0.003)
    assert deep["at_tokens_difference"] == pytest.approx(deep["loss_difference"])
    assert summary["equal_seconds"] == pytest.approx(4.0)
    assert deep["at_seconds_difference"] == pytest.approx(0.8 / 1.2 - 0.4 / 1.1, abs=0.003)
    assert deep["speed"] == pytest.approx(0.5)
    assert deep["seconds_to_target"] < deep["train_seconds"]
    # Seeds differ by 0.004, pairs by 0.001: pairing is what makes the difference visible.
    assert deep["loss_half"] < 0.004
    assert deep["loss_p"] < 0.01
    assert summary["sentences"][0].startswith(f"{DEEP}: better: -0.0")
    assert summary["notes"][0] == f"noise floor {summary['noise_floor']:.4f} (sd of a loss over seeds)"
    assert summary["detectable"] < summary["noise_floor"]
    assert f"3 pairs find a difference of {summary['detectable']:.4f}" in summary["notes"][1]


def test_a_speed_is_that_of_the_median_stretch(program, tmp_path):
    plan = compare("demo", DEEP, seeds=(0,))
    jobs = run_study(plan, tmp_path / "study", Local(program=program))
    log = jobs[1].folder / "log.jsonl"
    first, *rest = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | {"tokens_per_second": 1.0}), *rest]) + "\n")
    assert rows(plan, jobs)[1][DEEP]["speed"] == pytest.approx(0.5)


def test_a_variant_that_changes_nothing_shows_no_difference(program, tmp_path):
    plan = compare("demo", "demo+budget.log_every=10")
    summary, _ = rows(plan, run_study(plan, tmp_path / "study", Local(program=program)))
    assert "no difference seen" in summary["sentences"][0]


def test_minutes_are_measured_first_and_then_fixed(program, tmp_path):
    plan = compare("demo", DEEP, seeds=(0,), minutes=0.2)
    jobs = run_study(plan, tmp_path / "study", Local(program=program))
    assert [finished(job).result["steps"] for job in jobs] == [300, 150]
    assert {finished(job).result["train_seconds"] for job in jobs} == {12.0}


def test_a_target_is_tested_one_sided(program, tmp_path):
    plan = compare("demo", DEEP, target=3.5)
    summary, by_name = rows(plan, run_study(plan, tmp_path / "study", Local(program=program)))
    assert by_name["demo"]["p_below_target"] < 0.01
    assert "p below 3.5" in table(summary)


def test_the_board_prints_a_line_for_every_change(program, tmp_path):
    blocks = blocks_of(tmp_path / "runs", [parse_variant("demo")], (0,))
    told = Console(file=io.StringIO(), width=200)
    with Board(blocks[0], console=told) as board:
        Local(program=program).run(blocks, watch=board)
    assert "1 runs, 0 of them done\n" in told.file.getvalue()
    assert f"demo, seed 0: done, step {RECIPES['demo'].plan.steps}, loss 3." in told.file.getvalue()


def test_the_board_is_a_live_table_on_a_terminal(program, tmp_path):
    blocks = blocks_of(tmp_path / "runs", [parse_variant("demo")], (0,))
    told = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Board(blocks[0], console=told) as board:
        Local(program=program).run(blocks, watch=board)
    assert "tokens/s" in told.file.getvalue()
    assert f"step {RECIPES['demo'].plan.steps}" in told.file.getvalue()


@pytest.mark.long
def test_ray_runs_the_same_jobs_into_the_same_folders(program, calls, tmp_path):
    pytest.importorskip("ray", reason="needs the extra `ray`")
    plan = compare("demo", BROKEN, seeds=(0, 1))
    jobs = run_study(plan, tmp_path / "study", OnRay(program=program))
    assert [job.state() for job in jobs] == ["done", "done", "failed", "failed"]
    assert len(calls()) == 4


TINY = (
    "model.dim=48", "plan.tokens_per_step=512", "plan.sequence_length=64", "data.block_tokens=512",
    "budget.evaluation_tokens=2048", "budget.evaluation_length=64",
)  # fmt: skip


@pytest.mark.slow
def test_a_real_comparison_ends_with_a_result_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["study", "compare", "demo", "demo+model.layers=1", "--seeds", "2", "--steps", "6"]
    words += ["--result", "results/depth.json", "--out", "study"]
    assert main([*words, *(word for assignment in TINY for word in ("--set", assignment))]) == 0
    result = read_results(tmp_path / "results")["depth"]
    assert [row["runs"] for row in result["rows"]] == [2, 2]
    assert result["track"] == "embedded"
    assert (tmp_path / "study" / "summary.md").read_text().startswith("| variant | n | loss |")
    manifest = read_run(tmp_path / "study" / "runs" / "demo--seed-1").manifest
    assert (manifest["seed"], manifest["recipe"]["plan"]["steps"]) == (1, 6)
    assert "demo+model.layers=1: " in capsys.readouterr().out
