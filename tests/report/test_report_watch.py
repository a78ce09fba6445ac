import io
import os

import pytest
from rich.console import Console

from sabrage.report.watch import frame, newest, remaining, sparkline, watch
from sabrage.run.folder import RunError, RunFolder, read_run, write_json
from sabrage.run.log import Log


def shown(run, *, silent=0.0):
    console = Console(file=io.StringIO(), width=100)
    console.print(frame(run, silent))
    return console.file.getvalue()


def test_a_frame_shows_progress_losses_speed_memory_and_clocks(make_run):
    text = shown(read_run(make_run("a", steps=30, done=False, second=2.0)))
    for part in ("tiny", "step 30/40", "75%", "about 20.0 s of training left", "3.7667", "3.7500",
                 "256 tokens/s", "MFU 40.0%", "3 GiB", "train 1 min 00 s", "nocap 1 min 05 s",
                 "started"):  # fmt: skip
        assert part in text


def test_a_frame_of_a_run_that_has_logged_nothing_says_what_is_not_known(make_run):
    text = shown(read_run(make_run("a", steps=0, done=False)))
    assert "step 0/40" in text
    assert "not known yet" in text


def test_a_frame_of_an_ended_run_says_how_it_ended(make_run):
    text = shown(read_run(make_run("a", result={"ending": "target"})), silent=1e4)
    assert "target" in text
    assert "nothing was logged" not in text
    assert "started" not in text


def test_a_silent_run_is_told_to_be_silent(make_run):
    run = read_run(make_run("a", steps=20, done=False))
    assert "nothing was logged for 2 min 00 s" in shown(run, silent=120)
    assert "nothing was logged" not in shown(run, silent=5)


def test_watching_ends_when_the_result_is_there(make_run):
    path = make_run("a", steps=20, done=False)
    folder, pauses = RunFolder(path), []

    def train(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            write_json(folder.result, {"ending": "done", "validation_loss": 1.2345})
        else:
            with Log(folder.log) as log:
                log.write("train", step=19 + len(pauses), loss=2.0, lr=0.1)

    console = Console(file=io.StringIO(), width=100)
    run = watch(path, console, once=False, pause=train)
    assert len(pauses) == 3
    assert run.result["ending"] == "done"
    assert "1.2345" in console.file.getvalue()


@pytest.mark.parametrize("done", [True, False])
def test_one_frame_is_shown_without_waiting(make_run, done):
    def never(seconds):
        raise AssertionError("it waited")

    console = Console(file=io.StringIO(), width=100)
    watch(make_run("a", steps=20, done=done), console, once=not done, pause=never)
    assert "step 20/40" in console.file.getvalue()


def test_clocks_that_an_inline_run_has_not_are_left_out(make_run):
    console = Console(file=io.StringIO(), width=100)
    watch(make_run("a", result={"nocap_seconds": None, "wall_seconds": None}), console, once=True)
    (clocks,) = (line for line in console.file.getvalue().splitlines() if line.split()[:1] == ["clocks"])
    assert [name in clocks for name in ("train", "nocap", "wall")] == [True, False, False]


def test_what_remains_is_told_by_the_newest_steps(make_run):
    path = make_run("a", steps=20, done=False)
    with Log(RunFolder(path).log) as log:
        for index in range(10):
            log.write("speed", step=21 + index, train_seconds=100.0 + 5 * index)
    assert remaining(read_run(path), steps=30, total=40) == pytest.approx(50.0)


def test_a_sparkline_falls_with_the_loss_and_fits_the_line():
    assert sparkline([8.0, 4.0, 2.0, 1.0]) == "█▆▃▁"
    assert len(sparkline([1.0 + 1 / (1 + step) for step in range(100_000)])) <= 48
    assert sparkline([2.0, float("nan"), 1.0]) == "█ ▁"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0]) == ""


def test_the_newest_run_is_the_one_started_last(make_run, tmp_path):
    late = make_run("runs/a", started="2026-11-24T12:00:00+00:00")
    early = make_run("runs/b", started="2026-11-23T12:00:00+00:00")
    os.utime(early)
    assert newest(tmp_path / "runs") == late
    with pytest.raises(RunError, match="give the folder of a run"):
        newest(tmp_path / "nothing")
