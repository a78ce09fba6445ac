import json

import pytest

from sabrage.report.bars import intervals, result_bars, step_bars, wall_bars
from sabrage.run.folder import RunFolder, read_run
from sabrage.run.log import Log


@pytest.fixture
def charts(kernels):
    """The charts of the kernel timings by their unit."""
    return {bars.title.rpartition(": ")[2]: bars for bars in result_bars(json.loads(kernels.read_text()))}


def test_implementations_are_drawn_to_the_scale_of_their_row(charts):
    shares = {
        name: {one.name: one.share for one in pieces}
        for name, pieces in charts["milliseconds, each row to its own scale"].rows
    }
    assert shares == {"norm, heads 16": {"kernel": 25.0, "eager": 100.0}, "head, heads 32": {"kernel": 100.0}}


def test_one_measure_alone_is_drawn_to_the_scale_of_all_rows(charts):
    rows = charts["copy, GB/s"].rows
    assert [(piece.share, piece.text) for _, (piece,) in rows] == [(50.0, "50"), (100.0, "100")]


def test_an_implementation_keeps_its_colour_where_another_is_missing(kernels):
    result = json.loads(kernels.read_text())
    del result["rows"][0]["kernel_ms"]
    bars = next(result_bars(result))
    assert [one.colour for one in bars.rows[0][1]] == [1]


def test_a_result_without_measures_has_no_chart(study):
    assert list(result_bars(json.loads((study / "summary.json").read_text()))) == []


def test_the_wall_time_is_told_whole(make_run):
    bars = wall_bars({"a": read_run(make_run("a", second=2.0))})
    ((name, pieces),) = bars.rows
    assert name == "a: 1 min 29 s"
    assert sum(one.share for one in pieces) == pytest.approx(100)
    assert [one.text for one in pieces] == [
        "training 1 min 20 s (90%)", "compile and warm-up 2.0 s (2%)", "validation 1.0 s (1%)",
        "start, checkpoints, rest 6.0 s (7%)",
    ]  # fmt: skip


def test_a_run_that_goes_on_has_no_wall_time_yet(make_run):
    assert wall_bars({"a": read_run(make_run("a", done=False))}) is None


def test_an_inline_run_has_no_wall_time(make_run):
    path = make_run("a", result={"nocap_seconds": None, "wall_seconds": None})
    assert wall_bars({"a": read_run(path)}) is None


@pytest.mark.parametrize("where", ["log", "result"])
def test_a_breakdown_of_a_step_is_read_from_log_and_result(make_run, where):
    parts = [{"name": "products", "seconds": 0.3}, {"name": "attention", "seconds": 0.1}]
    path = make_run("a", result={"breakdown": parts} if where == "result" else {})
    if where == "log":
        with Log(RunFolder(path).log) as log:
            log.write("breakdown", parts=parts)
    ((name, pieces),) = step_bars({"a": read_run(path)}).rows
    assert name == "a: 400 ms"
    assert [one.text for one in pieces] == ["products 300 ms (75%)", "attention 100 ms (25%)"]


def test_without_a_breakdown_there_is_none(make_run):
    assert step_bars({"a": read_run(make_run("a"))}) is None


def test_intervals_lie_around_their_means_and_are_decided_when_they_leave_out_zero(study):
    zero, (deep, wide, once) = intervals(json.loads((study / "summary.json").read_text()))
    assert deep.start < deep.place < deep.start + deep.width < zero
    assert wide.start < zero < wide.place < wide.start + wide.width
    assert deep.place - deep.start == pytest.approx(deep.width / 2)
    assert [one.verdict for one in (deep, wide, once)] == ["better", "open", "open"]
    assert once.width == 0
    assert [one.text for one in (deep, once)] == ["-0.1000 ± 0.0500", "+0.1000"]
