"""The context sweep: cells compare, none is run twice, and what does not fit is a cell of the table."""

import json
import os
import signal
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from sabrage.cli import main
from sabrage.cli.sweep import Sweep
from sabrage.config import ConfigError
from sabrage.report.page import write_report
from sabrage.report.tables import read_results, table
from sabrage.study.context_sweep import ContextPlan, cells_of, mean_within, run_context, summarise_context
from sabrage.study.launch import Local
from sabrage.study.plan import StudyError, parse_variant

BROKEN = "demo+model.layers=5"
TOO_LARGE = "demo+model.layers=3"
LONG = "demo+budget.checkpoint_every=7"


def context(*recipes, **fields):
    plan = ContextPlan(variants=tuple(map(parse_variant, recipes)), lengths=(64, 256), steps=100)
    return replace(plan, **fields)


def swept(plan, tmp_path, program):
    jobs = run_context(plan, tmp_path / "sweep", Local(program=program))
    return summarise_context(plan, jobs, name="sweep")


def test_cells_differ_in_the_length_of_their_rows_and_in_nothing_that_would_not_compare():
    plan = context("base", "base+model.mixers.0.rotary.max_length=1024", lengths=(1024, 32768), steps=None)
    plan = replace(plan, tokens=131_072 * 40)
    recipes = {cell.name: cell.make() for cell, _, _ in cells_of(plan)}
    assert list(recipes)[:2] == ["base@1024", "base@32768"]
    for recipe, length in zip(recipes.values(), (1024, 32768) * 2, strict=True):
        assert (recipe.plan.sequence_length, recipe.budget.evaluation_length) == (length, length)
        assert (recipe.plan.tokens_per_step, recipe.plan.steps) == (131_072, 40)
        assert recipe.data.block_tokens == 32768
        assert recipe.budget.by_position
        assert recipe.runtime.micro_batch == 0
        assert recipe.model.max_lengths()["model.mixers.0.rotary.max_length"] >= length


def test_cells_that_keep_documents_apart_in_training_do_so_in_validation():
    plan = context("demo", "demo+data.order=masked", "demo+data.order=documents", lengths=(64,))
    documents = [cell.make().budget.evaluation_documents for cell, _, _ in cells_of(plan)]
    assert documents == [False, True, True]


@pytest.mark.parametrize(
    ("plan", "error", "said"),
    [
        (context("demo", lengths=()), StudyError, "lengths"),
        (context("demo", tokens=5), StudyError, "give at most one"),
        (context("demo", "demo"), StudyError, "the same name"),
        (context("demo", "demo+plan.tokens_per_step=8192"), StudyError, "do not compare; give --tokens"),
        (context("demo", lengths=(8192,)), ConfigError, "plan.tokens_per_step=4096"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_it_starts(plan, error, said):
    with pytest.raises(error, match=said):
        plan.check()


def test_a_finished_cell_is_never_repeated_and_other_failures_are_tried_again(program, calls, tmp_path):
    plan = context("demo", TOO_LARGE, BROKEN, lengths=(256,))
    for _ in range(2):
        summary = swept(plan, tmp_path, program)
    broken = f"{BROKEN}@256--seed-0"
    assert calls() == ["demo@256--seed-0", f"{TOO_LARGE}@256--seed-0", broken, broken]
    assert [row["outcome"] for row in summary["rows"]] == ["done", "out of memory", "failed"]
    assert list(summary["failures"]) == [f"{BROKEN}@256, seed 0"]


def test_an_interrupted_sweep_goes_on_where_it_stopped(program, calls, tmp_path, monkeypatch):
    plan, left = context("demo", LONG, lengths=(256,)), [signal.SIGTERM]

    def stop_when_saved(board):
        if left and list(tmp_path.rglob("step-00000001")):
            os.kill(os.getpid(), left.pop())

    monkeypatch.setattr("sabrage.study.board.Board.__call__", stop_when_saved)
    with pytest.raises(KeyboardInterrupt):
        swept(plan, tmp_path, program)
    summary = swept(plan, tmp_path, program)
    again = f"{LONG}@256--seed-0"
    assert calls() == ["demo@256--seed-0", again, f"{again} resumed"]
    assert [row["outcome"] for row in summary["rows"]] == ["done", "done"]


def test_the_summary_tells_what_a_cell_costs_and_what_its_later_positions_bring(program, tmp_path):
    plan = context("demo", TOO_LARGE)
    summary = swept(plan, tmp_path, program)
    short, long, *missing = summary["rows"]
    assert (short["length"], long["length"]) == (64, 256)
    assert long["shared_loss"] == pytest.approx(long["loss"] + 0.1)
    assert long["last_loss"] == pytest.approx(long["loss"] - 0.1)
    assert long["tokens_per_second"] == pytest.approx(4096 / 0.04)
    assert [row.get("loss") for row in missing] == [None, None]
    assert summary["sentences"] == [
        "demo at 256: the last stretch of positions is better than the first 64 by 0.2000 nats"
    ]
    assert [chart["title"] for chart in summary["charts"]] == [
        "Loss by the position in the row", "Loss at equal tokens", "Speed",
    ]  # fmt: skip
    assert "| demo+model.layers=3 | 256 | out of memory | - |" in table(summary)


def test_the_mean_within_the_shared_positions_weighs_by_their_number():
    assert mean_within([(0, 64, 4.0), (64, 192, 1.0), (192, 300, 9.0)], 192) == pytest.approx(2.0)


def test_the_command_writes_a_table_a_result_file_and_charts(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sweep, "launcher", lambda self: Local(program=program))
    words = ["sweep", "context", "demo", "--over", "plan.window=null,128", "--lengths", "64", "256"]
    assert main([*words, "--steps", "50", "--out", "sweep", "--result", "results/context.json"]) == 0
    rows = read_results(tmp_path / "results")["context"]["rows"]
    lines = ["demo+plan.window=null", "demo+plan.window=128"]
    assert [(row["variant"], row["length"]) for row in rows] == [
        (line, length) for line in lines for length in (64, 256)
    ]
    for path in (tmp_path / "sweep" / "summary.svg", tmp_path / "results" / "context.svg"):
        words = " ".join(ElementTree.fromstring(path.read_text()).itertext())
        assert "Loss by the position in the row" in words
        assert "demo+plan.window=128 @ 256" in words
    assert "4 runs, 0 of them done" in capsys.readouterr().out
    (tmp_path / "alone").mkdir()
    for name in ("study.json", "summary.json"):
        (tmp_path / "sweep" / name).rename(tmp_path / "alone" / name)
    page = write_report([tmp_path / "alone"], out=tmp_path / "page.html").read_text()
    assert "<figcaption>Loss by the position in the row</figcaption>" in page
    assert '<span class="swatch c1 dots"></span> demo+plan.window=128' in page


# A real run, whose steps run out of memory in rows of 128.
SCARCE = """
import sys
import torch
from sabrage.cli import main
from sabrage.train.step import TrainStep

step = TrainStep.__call__


def scarce(self, batch, knobs):
    if knobs.sequence_length == 128:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return step(self, batch, knobs)


TrainStep.__call__ = scarce
sys.exit(main())
"""
TINY = (
    "model.dim=48", "model.layers=2", "plan.tokens_per_step=512", "data.block_tokens=512",
    "data.order=documents", "budget.evaluation_tokens=2048",
)  # fmt: skip


@pytest.mark.slow
def test_a_real_sweep_reports_the_cell_that_ran_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scarce.py").write_text(SCARCE)
    plan = ContextPlan(variants=(parse_variant("demo", TINY),), lengths=(32, 128), steps=3)
    short, long = swept(plan, tmp_path, (sys.executable, str(tmp_path / "scarce.py")))["rows"]
    assert (short["outcome"], long["outcome"]) == ("done", "out of memory")
    assert [(first, end) for first, end, _ in short["by_position"]] == [(0, 32)]
    assert short["by_position"][0][2] == pytest.approx(short["loss"], rel=1e-5)
    failure = json.loads(next((tmp_path / "sweep" / "runs").glob("*.failed.json")).read_text())
    assert "out of memory" in failure["last_lines"][-1]
