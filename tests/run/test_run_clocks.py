import subprocess
import sys

import pytest

from sabrage.run.clocks import Clocks, process_age


class Time:
    """A clock that the test moves."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds

    def pass_(self, seconds):
        self.seconds += seconds


@pytest.fixture
def time():
    return Time()


def run_once(clocks, time):
    time.pass_(5)  # imports, building
    clocks.start_nocap()
    for name, seconds in [("warm-up", 7), ("train", 10), ("validation", 3), ("train", 20), ("checkpoint", 2)]:
        with clocks.phase(name):
            time.pass_(seconds)
    time.pass_(1)  # between phases


def test_the_train_clock_counts_training_only(time):
    clocks = Clocks(now=time, age=2)
    run_once(clocks, time)
    assert clocks.train_seconds == 30


def test_the_benchmark_clock_includes_warm_up_and_leaves_out_validation_and_checkpoints(time):
    clocks = Clocks(now=time, age=2)
    run_once(clocks, time)
    assert clocks.nocap_seconds == 7 + 10 + 20 + 1


def test_the_wall_clock_counts_everything_since_the_process_started(time):
    clocks = Clocks(now=time, age=2)
    run_once(clocks, time)
    assert clocks.wall_seconds == 2 + 5 + 7 + 10 + 3 + 20 + 2 + 1


def test_clocks_read_right_within_a_phase(time):
    clocks = Clocks(now=time, age=0)
    clocks.start_nocap()
    clocks.start("train")
    time.pass_(4)
    assert clocks.readings() == {"train_seconds": 4, "nocap_seconds": 4, "wall_seconds": 4}
    clocks.stop()
    clocks.start("validation")
    time.pass_(9)
    assert clocks.readings() == {"train_seconds": 4, "nocap_seconds": 4, "wall_seconds": 13}


def test_what_was_left_out_before_the_benchmark_clock_started_is_not_subtracted(time):
    clocks = Clocks(now=time, age=0)
    with clocks.phase("validation"):
        time.pass_(50)
    clocks.start_nocap()
    with clocks.phase("train"):
        time.pass_(1)
    assert clocks.nocap_seconds == 1


@pytest.mark.parametrize("restore_first", [True, False])
def test_a_resumed_run_adds_the_clocks_of_the_earlier_process(time, restore_first):
    first = Clocks(now=time, age=2)
    run_once(first, time)
    before = first.readings()
    second = Clocks(now=time, age=3)
    if restore_first:
        second.restore(first.state())
    second.start_nocap()
    if not restore_first:
        second.restore(first.state())
    with second.phase("train"):
        time.pass_(6)
    assert second.train_seconds == before["train_seconds"] + 6
    assert second.nocap_seconds == before["nocap_seconds"] + 6
    assert second.wall_seconds == before["wall_seconds"] + 3 + 6


def test_inline_only_the_train_clock_is_told(time):
    clocks = Clocks(now=time, age=2, inline=True)
    run_once(clocks, time)
    assert clocks.readings() == {"train_seconds": 30, "nocap_seconds": None, "wall_seconds": None}


@pytest.mark.parametrize("inline", [(True, False), (False, True)])
def test_a_run_that_was_inline_for_a_part_has_no_other_clock_either(time, inline):
    first, second = (Clocks(now=time, age=0, inline=each) for each in inline)
    run_once(first, time)
    second.restore(first.state())
    assert second.readings() == {"train_seconds": 30, "nocap_seconds": None, "wall_seconds": None}


def test_a_phase_ends_when_its_block_raises(time):
    clocks = Clocks(now=time, age=0)

    def fail():
        with clocks.phase("train"):
            time.pass_(2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    time.pass_(5)
    assert clocks.train_seconds == 2


def test_phases_do_not_nest(time):
    clocks = Clocks(now=time, age=0)
    clocks.start("train")
    with pytest.raises(AssertionError, match="inside phase"):
        clocks.start("validation")


def test_a_negative_age_counts_as_none(time):
    assert Clocks(now=time, age=-1e9).wall_seconds == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process started")
def test_the_age_of_the_process_includes_what_came_before_the_import():
    code = (
        "import time; t = time.perf_counter()\nwhile time.perf_counter() - t < 0.5: pass\n"
        "from sabrage.run.clocks import process_age; print(process_age())"
    )
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert age >= 0.45


def test_the_age_of_the_process_never_goes_back():
    first = process_age()
    assert 0 <= first <= process_age()


def test_a_system_that_hides_the_start_gives_the_time_since_the_import(monkeypatch):
    from pathlib import Path

    def hidden(self):
        raise FileNotFoundError(self)

    told = process_age()
    monkeypatch.setattr(Path, "read_text", hidden)
    assert 0 <= process_age() <= told + 60


def test_laps_are_the_stages_of_the_start_and_add_up_to_the_wall_clock(time):
    clocks = Clocks(now=time, age=2)
    for name, seconds in (("process", 3), ("checks", 4), ("model", 0)):
        time.pass_(seconds)
        clocks.lap(name)
    assert clocks.laps == {"process": 5, "checks": 4, "model": 0}
    assert sum(clocks.laps.values()) == clocks.wall_seconds
