import math

import pytest

from sabrage.report.history import learning_rate, readings, speeds, standing, train_loss, validation_loss
from sabrage.run.folder import RunFolder, read_run
from sabrage.run.log import Log


@pytest.fixture
def run_of(make_run):
    """run_of((event, fields), ...) -> the run with that log."""

    def make(*records):
        path = make_run("run", steps=0, done=False)
        with Log(RunFolder(path).log) as log:
            for event, fields in records:
                log.write(event, **fields)
        return read_run(path)

    return make


def speed(step, seconds, **readings):
    facts = {"tokens": 100 * step, "tokens_per_second": 100.0, "mfu": None, "memory": None}
    return "speed", {"step": step, "train_seconds": seconds} | facts | readings


def train(step, loss=1.0):
    return "train", {"step": step, "loss": loss, "lr": 0.5}


def test_the_time_of_a_step_lies_between_the_speed_records_around_it(run_of):
    run = run_of(*map(train, range(4)), speed(2, 10.0), speed(4, 12.0))
    assert train_loss(run, "train_seconds") == [(5.0, 1.0), (10.0, 1.0), (11.0, 1.0), (12.0, 1.0)]
    assert train_loss(run, "tokens") == [(100.0, 1.0), (200.0, 1.0), (300.0, 1.0), (400.0, 1.0)]


def test_steps_after_the_last_speed_record_wait_for_it(run_of):
    assert [x for x, _ in train_loss(run_of(*map(train, range(4)), speed(2, 10.0)), "tokens")] == [100, 200]


def test_steps_that_a_resumed_run_did_again_count_once(run_of):
    run = run_of(
        speed(2, 10.0),
        train(3, 9.0),
        speed(4, 20.0),
        ("resume", {"step": 2}),
        train(2),
        train(3),
        speed(4, 14.0),
    )
    assert [record["train_seconds"] for record in speeds(run)] == [10.0, 14.0]
    assert train_loss(run, "train_seconds") == [(12.0, 1.0), (14.0, 1.0)]


def test_readings_are_what_is_known_beside_the_clocks(run_of):
    run = run_of(speed(2, 1.0), speed(4, 2.0, loss_scale=8.0))
    assert dict(readings(run)) == {"tokens_per_second": [(2, 100.0), (4, 100.0)], "loss_scale": [(4, 8.0)]}


def test_losses_that_were_not_numbers_are_nan(run_of):
    run = run_of(train(0, float("nan")), speed(1, 1.0))
    assert math.isnan(train_loss(run, "tokens")[0][1])


def test_validation_and_schedule_are_read_as_they_stand(make_run):
    run = read_run(make_run("a", steps=20))
    assert validation_loss(run, "tokens") == [(5120, 4.25), (10240, 4.0)]
    assert learning_rate(run)[:2] == [(0, 1 - 1 / 80), (1, 1 - 2 / 80)]


def test_a_run_stands_where_its_newest_records_say_until_its_result_does(make_run):
    facts = standing(read_run(make_run("on", steps=25, done=False)))
    assert (facts["steps"], facts["train_seconds"], facts["validation_loss"]) == (25, 20.0, 4.0)
    assert "ending" not in facts
    assert standing(read_run(make_run("off", result={"train_seconds": 77.0})))["train_seconds"] == 77.0
