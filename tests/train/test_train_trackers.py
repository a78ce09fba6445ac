import importlib.util
import threading
import time

import pytest

from sabrage.config import to_json
from sabrage.train import recorder
from sabrage.train.trackers import Service, Tracker, TrackerError, make_tracker


class Fake(Service):
    """Remembers what it got; waits for `gate` and raises `error` when it has them."""

    def __init__(self, *, gate=None, error=None):
        self.got, self.closed, self.gate, self.error = [], False, gate, error

    def write(self, step, values):
        if self.gate:
            self.gate.wait(60)
        if self.error:
            raise self.error
        self.got.append((step, values))

    def close(self):
        self.closed = True


def test_records_arrive_in_order_and_the_service_is_closed():
    service = Fake()
    with Tracker(lambda: service) as tracker:
        for step in range(50):
            tracker.record(step, {"loss": 1.0})
    assert service.got == [(step, {"loss": 1.0}) for step in range(50)]
    assert service.closed


def test_a_hanging_tracker_neither_stops_nor_slows_the_run_and_is_named_once():
    gate, said = threading.Event(), []
    tracker = Tracker(lambda: Fake(gate=gate), say=said.append, capacity=10)
    start = time.perf_counter()
    for step in range(1000):
        tracker.record(step, {"loss": 1.0})
    tracker.close(timeout=0.01)
    assert time.perf_counter() - start < 5
    gate.set()
    assert len(said) == 1
    assert "does not keep up" in said[0]


def test_a_tracker_that_hangs_while_opening_does_not_hold_the_end():
    gate, said = threading.Event(), []
    tracker = Tracker(lambda: gate.wait(60) and Fake(), say=said.append)
    tracker.record(0, {"loss": 1.0})
    tracker.close(timeout=0.01)
    gate.set()
    assert len(said) == 1
    assert "did not finish within" in said[0]


def fail_to_open():
    raise ConnectionError("no route")


@pytest.mark.parametrize("opening", [fail_to_open, lambda: Fake(error=ConnectionError("no route"))])
def test_a_raising_tracker_is_named_once_and_the_run_goes_on(opening):
    said = []
    tracker = Tracker(opening, say=said.append)
    tracker.record(0, {"loss": 1.0})
    tracker.close()
    for step in range(5):
        tracker.record(step, {"loss": 1.0})
    tracker.close()
    assert len(said) == 1
    assert "ConnectionError: no route; training goes on" in said[0]


def test_trouble_is_told_by_the_thread_that_trains():
    speakers = []
    tracker = Tracker(fail_to_open, say=lambda text: speakers.append(threading.current_thread()))
    tracker.record(0, {"loss": 1.0})
    tracker.close()
    assert speakers == [threading.main_thread()]


def test_no_tracker_does_nothing(tmp_path):
    with make_tracker("none", tmp_path) as tracker:
        tracker.record(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_the_choices(tmp_path):
    with pytest.raises(TrackerError, match="got tracker 'mlflow', allowed: none, tensorboard, wandb"):
        make_tracker("mlflow", tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"pip install 'sabrage\[track\]'"):
        make_tracker(name, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = []
    with make_tracker("tensorboard", tmp_path, say=said.append) as tracker:
        for step in range(3):
            tracker.record(step, {"train/loss": 3.0 - step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert said == []
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (0, 3.0),
        (1, 2.0),
        (2, 1.0),
    ]


def test_a_run_gives_its_tracker_the_recipe_the_numbers_and_a_voice(tiny, run_recipe, monkeypatch, capsys):
    made, service = [], Fake()

    def make(name, folder, *, config, say):
        made.append((name, folder.name, config))
        say("the tracker speaks")
        return Tracker(lambda: service, say=say)

    monkeypatch.setattr(recorder, "make_tracker", make)
    run_recipe(tiny)
    assert made == [("none", "run", to_json(tiny))]
    assert "the tracker speaks" in capsys.readouterr().out
    assert [step for step, values in service.got if "validation/loss" in values] == [4, 8, 12]
    assert [step for step, values in service.got if "train/loss" in values] == [2, 4, 6, 8, 10, 12]
    assert service.closed
